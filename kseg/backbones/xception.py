"""DeepLab's aligned Xception: residual units of three separable convolutions, no pooling."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import PLAIN, TORCH, UNIT, batch_norm, conv, depthwise_conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import load_backbone_weights

_EPSILON = 1e-3


@BACKBONES.register("xception41")
def Xception41(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build aligned Xception-41 on an image: 8 middle units where Xception-65 has 16.

    Args, Returns, Raises, Source: as `Xception65`.
    """
    return _xception(image, 8, output_stride, weights, form)


@BACKBONES.register("xception65")
def Xception65(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build aligned Xception-65 on an image; maps of 128, 256, 728, 1024, 2048 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last units are dilated instead of strided.
        weights: None; keras.applications has another Xception only.
        form: "keras" pads strided layers at the far border, "torch" on both sides, as the authors.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes. All but the deepest
        are what the last, striding convolution of a unit reads, before its ReLU: at stride 4 the
        256 channels that the decoder of DeepLab v3+ takes.

    Raises:
        UserError: if an option is unknown or weights are asked for.

    Source:
        Chen, Zhu, Papandreou, Schroff, Adam, "Encoder-Decoder with Atrous Separable Convolution
        for Semantic Image Segmentation", ECCV 2018, figure 4, arXiv:1802.02611.
    """
    return _xception(image, 16, output_stride, weights, form)


def _xception(
    image: KerasTensor,
    middle_units: int,
    output_stride: int,
    weights: str | Path | None,
    form: Form,
) -> Features:
    check_options(output_stride, form)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = _conv_bn(x, 32, 3, Step(2, 1, 1), form, "entry_conv1", relu=True)
    x = _conv_bn(x, 64, 3, PLAIN, form, "entry_conv2", relu=True)
    maps = {}
    for number, filters in enumerate((128, 256, 728), start=1):
        stride = 2**number
        steps = _strided(stride, output_stride)
        maps[stride], x = _unit(x, (filters,) * 3, steps, form, f"entry_unit{number}")
    for number in range(1, middle_units + 1):
        steps = (stay(16, output_stride),) * 3
        _, x = _unit(x, (728,) * 3, steps, form, f"middle_unit{number}")
    steps = _strided(16, output_stride)
    maps[16], x = _unit(x, (728, 1024, 1024), steps, form, "exit_unit")
    for number, filters in enumerate((1536, 1536, 2048), start=1):
        step = stay(32, output_stride)
        x = _separable(x, filters, step, form, f"exit_separable{number}", relu=True)
    maps[32] = x
    load_backbone_weights(image, x, weights, published=None, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _strided(stride: int, output_stride: int) -> tuple[Step, Step, Step]:
    """Return the steps of a unit that reads a map at `stride`: its last convolution halves it."""
    here = stay(stride, output_stride)
    return here, here, enter(2 * stride, output_stride)


def _unit(
    x: KerasTensor,
    widths: tuple[int, int, int],
    steps: tuple[Step, Step, Step],
    form: Form,
    name: str,
) -> tuple[KerasTensor, KerasTensor]:
    """Return what the last of three separable convolutions reads, and the sum with the shortcut."""
    shortcut = x
    if x.shape[-1] != widths[-1] or steps[-1].downsamples:
        shortcut = _conv_bn(x, widths[-1], 1, steps[-1], form, f"{name}_shortcut", relu=False)
    for number, (filters, step) in enumerate(zip(widths, steps, strict=True), start=1):
        before = x
        x = layers.ReLU(name=f"{name}_relu{number}")(x)
        x = _separable(x, filters, step, form, f"{name}_separable{number}", relu=False)
    return before, layers.Add(name=f"{name}_add")([x, shortcut])


def _separable(
    x: KerasTensor, filters: int, step: Step, form: Form, name: str, *, relu: bool
) -> KerasTensor:
    x = depthwise_conv(x, 3, step=step, form=form, name=f"{name}_depthwise_conv")
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_depthwise_bn")
    if relu:
        x = layers.ReLU(name=f"{name}_depthwise_relu")(x)
    return _conv_bn(x, filters, 1, PLAIN, form, f"{name}_pointwise", relu=relu)


def _conv_bn(
    x: KerasTensor, filters: int, kernel: int, step: Step, form: Form, name: str, *, relu: bool
) -> KerasTensor:
    x = conv(x, filters, kernel, step=step, form=form, name=f"{name}_conv")
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x
