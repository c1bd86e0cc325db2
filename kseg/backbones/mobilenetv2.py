"""Inverted residuals: widen by 1 x 1, filter each channel by 3 x 3, narrow again linearly."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import TORCH, UNIT, batch_norm, conv, depthwise_conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import APPLICATIONS_URL, Published, load_backbone_weights

# Expansion, channels, blocks, and the stride the row is at (table 2 of the paper).
_ROWS = (
    (1, 16, 1, 2),
    (6, 24, 2, 4),
    (6, 32, 3, 8),
    (6, 64, 4, 16),
    (6, 96, 3, 16),
    (6, 160, 3, 32),
    (6, 320, 1, 32),
)
_EPSILON: dict[Form, float] = {"keras": 1e-3, "torch": 1e-5}
_PUBLISHED = Published(
    "MobileNetV2",
    APPLICATIONS_URL
    + "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
)


@BACKBONES.register("mobilenetv2")
def MobileNetV2(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build MobileNetV2 of width 1 on an image; maps of 16, 24, 32, 96, 1280 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None, "imagenet", or a `mobilenet_v2_..._no_top.h5` of keras.applications.
        form: "keras" pads strided layers at the far border, "torch" on both sides.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        Sandler et al., CVPR 2018, table 2 (arXiv 1801.04381).
    """
    check_options(output_stride, form)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = conv(x, 32, 3, step=Step(2, 1, 1), form=form, name="Conv1")
    x = _bn_relu6(x, form, bn="bn_Conv1", relu="Conv1_relu")
    maps: dict[int, KerasTensor] = {2: x}
    block = 0
    for expansion, filters, depth, stride in _ROWS:
        for _ in range(depth):
            step = (stay if stride in maps else enter)(stride, output_stride)
            x = maps[stride] = _inverted_residual(x, expansion, filters, step, form, block)
            block += 1
    x = conv(x, 1280, 1, form=form, name="Conv_1")
    x = maps[32] = _bn_relu6(x, form, bn="Conv_1_bn", relu="out_relu")
    features = Features(maps, tuple(maps.values()), output_stride=output_stride)
    load_backbone_weights(image, x, weights, published=_PUBLISHED, form=form)
    return features


def _inverted_residual(
    x: KerasTensor, expansion: int, filters: int, step: Step, form: Form, block: int
) -> KerasTensor:
    name = f"block_{block}" if block else "expanded_conv"
    shortcut, width = x, x.shape[-1]
    if expansion > 1:
        x = conv(x, expansion * width, 1, form=form, name=f"{name}_expand")
        x = _bn_relu6(x, form, bn=f"{name}_expand_BN", relu=f"{name}_expand_relu")
    x = depthwise_conv(x, 3, step=step, form=form, name=f"{name}_depthwise")
    x = _bn_relu6(x, form, bn=f"{name}_depthwise_BN", relu=f"{name}_depthwise_relu")
    x = conv(x, filters, 1, form=form, name=f"{name}_project")
    x = batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_project_BN")
    if width == filters and not step.downsamples:
        x = layers.Add(name=f"{name}_add")([shortcut, x])
    return x


def _bn_relu6(x: KerasTensor, form: Form, *, bn: str, relu: str) -> KerasTensor:
    x = batch_norm(x, epsilon=_EPSILON[form], name=bn)
    return layers.ReLU(6.0, name=relu)(x)
