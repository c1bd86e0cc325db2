"""MobileNetV3-Large as torchvision's segmentation networks dilate and tap it."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import TORCH, UNIT, conv, normalise
from kseg.backbones.mobilenetv3 import _LARGE, _PUBLISHED_LARGE, _bn_activation, _inverted_residual
from kseg.registry import BACKBONES
from kseg.weights import load_backbone_weights


@BACKBONES.register("mobilenetv3_large_torchvision")
def MobileNetV3LargeTorchvision(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build MobileNetV3-Large as torchvision segments with it; maps of 16, 24, 40, 80, 960.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32, or any in form "torch".
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided, the
            first block of a stage as much as the others.
        weights: None, "imagenet", or a `weights_mobilenet_v3_large_..._no_top_v2.h5` of
            keras.applications.
        form: "keras" pads strided layers at the far border, "torch" on both sides.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes: the first map of each
        stride but the deepest, which is the last 1 x 1 convolution.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        torchvision, `models/mobilenetv3.py` (`dilated`) and `models/segmentation/lraspp.py`;
        Howard et al., ICCV 2019, table 1 (arXiv 1905.02244).
    """
    check_options(output_stride, form)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = conv(x, 16, 3, step=Step(2, 1, 1), form=form, name="conv")
    x = _bn_activation(x, "hard_swish", "conv")
    maps: dict[int, KerasTensor] = {2: x}
    for block, row in enumerate(_LARGE):
        strides = row.stride not in maps and row.stride <= output_stride
        step = (enter if strides else stay)(row.stride, output_stride)
        x = _inverted_residual(x, row, step, form, block)
        maps.setdefault(row.stride, x)
    x = conv(x, 6 * x.shape[-1], 1, form=form, name="conv_1")
    x = maps[32] = _bn_activation(x, "hard_swish", "conv_1")
    load_backbone_weights(image, x, weights, published=_PUBLISHED_LARGE, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)
