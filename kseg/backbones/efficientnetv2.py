"""Inverted residuals whose early stages fuse the widening and the filtering into one 3 x 3."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import TORCH, batch_norm, conv, depthwise_conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import APPLICATIONS_URL, Published, load_backbone_weights


class _Row(NamedTuple):
    """One stage of the paper's table 4, with the widths of B0; `stride` is that of its output."""

    fused: bool
    expansion: int
    filters: int
    depth: int
    stride: int


_B0 = (
    _Row(True, 1, 16, 1, 2),
    _Row(True, 4, 32, 2, 4),
    _Row(True, 4, 48, 2, 8),
    _Row(False, 4, 96, 3, 16),
    _Row(False, 6, 112, 5, 16),
    _Row(False, 6, 192, 8, 32),
)
_EPSILON = 1e-3
_PUBLISHED = Published(
    "EfficientNetV2B0",
    APPLICATIONS_URL + "efficientnet_v2/efficientnetv2-b0_notop.h5",
    md5="893217f2bb855e2983157299931e43ff",
)


@BACKBONES.register("efficientnetv2_b0")
def EfficientNetV2B0(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build EfficientNetV2-B0 on an image; maps of 16, 32, 48, 112, 1280 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None, "imagenet", or an `efficientnetv2-b0_notop.h5` of keras.applications.
        form: "keras" pads strided layers at the far border, "torch" on both sides.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes; the deepest is the
        last 1 x 1 convolution.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        Tan, Le, "EfficientNetV2: Smaller Models and Faster Training", ICML 2021, table 4,
        arXiv:2104.00298; B0 as in `keras/src/applications/efficientnet_v2.py`.

    Differs:
        No block is dropped while training (keras.applications drops up to a fifth).
    """
    check_options(output_stride, form)
    x = normalise(image, TORCH)
    x = conv(x, 32, 3, step=Step(2, 1, 1), form=form, name="stem_conv")
    x = _bn_swish(x, "stem_")
    maps: dict[int, KerasTensor] = {2: x}
    for stage, row in enumerate(_B0, start=1):
        for block in range(row.depth):
            step = (stay if row.stride in maps else enter)(row.stride, output_stride)
            name = f"block{stage}{'abcdefgh'[block]}_"
            x = maps[row.stride] = _inverted_residual(x, row, step, form, name)
    x = conv(x, 1280, 1, form=form, name="top_conv")
    x = maps[32] = _bn_swish(x, "top_")
    load_backbone_weights(image, x, weights, published=_PUBLISHED, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _inverted_residual(x: KerasTensor, row: _Row, step: Step, form: Form, name: str) -> KerasTensor:
    shortcut, width = x, x.shape[-1]
    if row.expansion == 1:
        x = conv(x, row.filters, 3, step=step, form=form, name=f"{name}project_conv")
        x = _bn_swish(x, f"{name}project_")
    else:
        x = (_fused if row.fused else _depthwise)(x, row.expansion, step, form, name)
        x = conv(x, row.filters, 1, form=form, name=f"{name}project_conv")
        x = batch_norm(x, epsilon=_EPSILON, name=f"{name}project_bn")
    if width == row.filters and not step.downsamples:
        x = layers.Add(name=f"{name}add")([shortcut, x])
    return x


def _fused(x: KerasTensor, expansion: int, step: Step, form: Form, name: str) -> KerasTensor:
    filters = expansion * x.shape[-1]
    x = conv(x, filters, 3, step=step, form=form, name=f"{name}expand_conv")
    return _bn_swish(x, f"{name}expand_")


def _depthwise(x: KerasTensor, expansion: int, step: Step, form: Form, name: str) -> KerasTensor:
    width = x.shape[-1]
    x = conv(x, expansion * width, 1, form=form, name=f"{name}expand_conv")
    x = _bn_swish(x, f"{name}expand_")
    x = depthwise_conv(x, 3, step=step, form=form, name=f"{name}dwconv2")
    x = _bn_swish(x, name)
    return _squeeze_excite(x, width // 4, form, f"{name}se")


def _squeeze_excite(x: KerasTensor, narrow: int, form: Form, name: str) -> KerasTensor:
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_squeeze")(x)
    gate = conv(gate, narrow, 1, form=form, use_bias=True, name=f"{name}_reduce")
    gate = layers.Activation("swish", name=f"{name}_reduce_activation")(gate)
    gate = conv(gate, x.shape[-1], 1, form=form, use_bias=True, name=f"{name}_expand")
    gate = layers.Activation("sigmoid", name=f"{name}_gate")(gate)
    return layers.Multiply(name=f"{name}_excite")([x, gate])


def _bn_swish(x: KerasTensor, name: str) -> KerasTensor:
    """Return `x` batch-normalised and activated; `name` ends in "_"."""
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}bn")
    return layers.Activation("swish", name=f"{name}activation")(x)
