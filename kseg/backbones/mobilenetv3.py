"""Inverted residuals found by search, with squeeze-and-excite gates and hard-swish."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import TORCH, UNIT, batch_norm, conv, depthwise_conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import APPLICATIONS_URL, Published, load_backbone_weights

Activation = Literal["hard_swish", "relu6", "relu"]


class _Row(NamedTuple):
    """One block of the paper's tables 1 and 2; `stride` is that of its output."""

    kernel: int
    expanded: int
    filters: int
    gated: bool
    activation: str
    stride: int

    def with_swish(self, activation: Activation) -> _Row:
        """Return the row with another activation in place of hard-swish."""
        swish = self.activation == "hard_swish"
        return self._replace(activation=activation) if swish else self


_LARGE = (
    _Row(3, 16, 16, False, "relu", 2),
    _Row(3, 64, 24, False, "relu", 4),
    _Row(3, 72, 24, False, "relu", 4),
    _Row(5, 72, 40, True, "relu", 8),
    _Row(5, 120, 40, True, "relu", 8),
    _Row(5, 120, 40, True, "relu", 8),
    _Row(3, 240, 80, False, "hard_swish", 16),
    _Row(3, 200, 80, False, "hard_swish", 16),
    _Row(3, 184, 80, False, "hard_swish", 16),
    _Row(3, 184, 80, False, "hard_swish", 16),
    _Row(3, 480, 112, True, "hard_swish", 16),
    _Row(3, 672, 112, True, "hard_swish", 16),
    _Row(5, 672, 160, True, "hard_swish", 32),
    _Row(5, 960, 160, True, "hard_swish", 32),
    _Row(5, 960, 160, True, "hard_swish", 32),
)
_SMALL = (
    _Row(3, 16, 16, True, "relu", 4),
    _Row(3, 72, 24, False, "relu", 8),
    _Row(3, 88, 24, False, "relu", 8),
    _Row(5, 96, 40, True, "hard_swish", 16),
    _Row(5, 240, 40, True, "hard_swish", 16),
    _Row(5, 240, 40, True, "hard_swish", 16),
    _Row(5, 120, 48, True, "hard_swish", 16),
    _Row(5, 144, 48, True, "hard_swish", 16),
    _Row(5, 288, 96, True, "hard_swish", 32),
    _Row(5, 576, 96, True, "hard_swish", 32),
    _Row(5, 576, 96, True, "hard_swish", 32),
)
_EPSILON = 1e-3
_FILE = APPLICATIONS_URL + "mobilenet_v3/weights_mobilenet_v3_{}_224_1.0_float_no_top_v2.h5"
_PUBLISHED_LARGE = Published(
    "MobileNetV3Large", _FILE.format("large"), md5="07fb09a5933dd0c8eaafa16978110389"
)
_PUBLISHED_SMALL = Published(
    "MobileNetV3Small", _FILE.format("small"), md5="d3e8ec802a04aa4fc771ee12a9a9b836"
)


@BACKBONES.register("mobilenetv3_small")
def MobileNetV3Small(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    activation: Activation = "hard_swish",
) -> Features:
    """Build MobileNetV3-Small on an image; maps of 16, 16, 24, 48, 576 channels.

    Args, Returns, Raises, Source, Differs: as `MobileNetV3Large`.
    """
    x, features = _mobilenetv3(image, _SMALL, output_stride, form, activation)
    load_backbone_weights(image, x, weights, published=_PUBLISHED_SMALL, form=form)
    return features


@BACKBONES.register("mobilenetv3_large")
def MobileNetV3Large(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    activation: Activation = "hard_swish",
) -> Features:
    """Build MobileNetV3-Large on an image; maps of 16, 24, 40, 112, 960 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None, "imagenet", or a `weights_mobilenet_v3_large_..._no_top_v2.h5` of
            keras.applications.
        form: "keras" pads strided layers at the far border, "torch" on both sides.
        activation: what stands where the paper has hard-swish; "relu6" and "relu" are quicker in
            int8 files, where hard-swish leaves the fast kernels.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes; the deepest is the
        last 1 x 1 convolution, six times the width of the last block.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        Howard et al., ICCV 2019, tables 1 and 2 (arXiv 1905.02244).

    Differs:
        torchvision dilates the first block of a dilated stage, too, and taps the first block of
        a stride for LR-ASPP; here the last one is tapped.
    """
    x, features = _mobilenetv3(image, _LARGE, output_stride, form, activation)
    load_backbone_weights(image, x, weights, published=_PUBLISHED_LARGE, form=form)
    return features


@BACKBONES.register("mobilenetv3_large_torchvision")
def MobileNetV3LargeTorchvision(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    activation: Activation = "hard_swish",
) -> Features:
    """Build MobileNetV3-Large as torchvision segments with it; maps of 16, 24, 40, 80, 960.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32, or any in form "torch".
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided, the
            first block of a stage as much as the others.
        weights: None, "imagenet", or a `weights_mobilenet_v3_large_..._no_top_v2.h5` of
            keras.applications.
        form: "keras" pads strided layers at the far border, "torch" on both sides.
        activation: as in `MobileNetV3Large`.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes: the first map of each
        stride but the deepest, which is the last 1 x 1 convolution.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        torchvision, `models/mobilenetv3.py` (`dilated`) and `models/segmentation/lraspp.py`;
        Howard et al., ICCV 2019, table 1 (arXiv 1905.02244).
    """
    x, features = _mobilenetv3(image, _LARGE, output_stride, form, activation, as_torchvision=True)
    load_backbone_weights(image, x, weights, published=_PUBLISHED_LARGE, form=form)
    return features


def _mobilenetv3(
    image: KerasTensor,
    rows: tuple[_Row, ...],
    output_stride: int,
    form: Form,
    activation: Activation,
    *,
    as_torchvision: bool = False,
) -> tuple[KerasTensor, Features]:
    check_options(output_stride, form)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = conv(x, 16, 3, step=Step(2, 1, 1), form=form, name="conv")
    x = _bn_activation(x, activation, "conv")
    first, last = {2: x}, {2: x}
    for block, row in enumerate(rows):
        enters = row.stride not in last
        if as_torchvision:  # a block that would stride dilates at once instead
            enters &= row.stride <= output_stride
        step = (enter if enters else stay)(row.stride, output_stride)
        x = _inverted_residual(x, row.with_swish(activation), step, form, block)
        first.setdefault(row.stride, x)
        last[row.stride] = x
    maps = first if as_torchvision else last
    x = conv(x, 6 * x.shape[-1], 1, form=form, name="conv_1")
    x = maps[32] = _bn_activation(x, activation, "conv_1")
    return x, Features(maps, tuple(maps.values()), output_stride=output_stride)


def _inverted_residual(
    x: KerasTensor, row: _Row, step: Step, form: Form, block: int
) -> KerasTensor:
    name = f"expanded_conv_{block}" if block else "expanded_conv"
    shortcut, width = x, x.shape[-1]
    if row.expanded != width:
        x = conv(x, row.expanded, 1, form=form, name=f"{name}_expand")
        x = _bn_activation(x, row.activation, f"{name}_expand")
    x = depthwise_conv(x, row.kernel, step=step, form=form, name=f"{name}_depthwise")
    x = _bn_activation(x, row.activation, f"{name}_depthwise")
    if row.gated:
        x = _squeeze_excite(x, form, f"{name}_squeeze_excite")
    x = conv(x, row.filters, 1, form=form, name=f"{name}_project")
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_project_bn")
    if width == row.filters and not step.downsamples:
        x = layers.Add(name=f"{name}_add")([shortcut, x])
    return x


def _squeeze_excite(x: KerasTensor, form: Form, name: str) -> KerasTensor:
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_avg_pool")(x)
    narrow = _multiple_of_8(x.shape[-1] / 4)
    gate = conv(gate, narrow, 1, form=form, use_bias=True, name=f"{name}_conv")
    gate = layers.ReLU(name=f"{name}_relu")(gate)
    gate = conv(gate, x.shape[-1], 1, form=form, use_bias=True, name=f"{name}_conv_1")
    gate = layers.Activation("hard_sigmoid", name=f"{name}_gate")(gate)
    return layers.Multiply(name=f"{name}_mul")([x, gate])


def _bn_activation(x: KerasTensor, activation: str, name: str) -> KerasTensor:
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_bn")
    return layers.Activation(activation, name=f"{name}_{activation}")(x)


def _multiple_of_8(width: float) -> int:
    """Return the multiple of 8 nearest to `width`, never more than a tenth below it."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8
