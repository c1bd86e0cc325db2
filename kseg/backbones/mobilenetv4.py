"""Universal inverted bottlenecks: a depthwise convolution before the widening, behind it, or both.

ReLU throughout and no gates: nothing in it is slow or coarse in int8.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import PLAIN, TORCH, UNIT, batch_norm, conv, depthwise_conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import load_backbone_weights


class _Row(NamedTuple):
    """One bottleneck: sides of its depthwise kernels, 0 for none; stride of its output."""

    start: int
    middle: int
    expanded: int
    filters: int
    stride: int


_SMALL = (
    _Row(5, 5, 192, 96, 16),
    _Row(0, 3, 192, 96, 16),
    _Row(0, 3, 192, 96, 16),
    _Row(0, 3, 192, 96, 16),
    _Row(0, 3, 192, 96, 16),
    _Row(3, 0, 384, 96, 16),
    _Row(3, 3, 576, 128, 32),
    _Row(5, 5, 512, 128, 32),
    _Row(0, 5, 512, 128, 32),
    _Row(0, 5, 384, 128, 32),
    _Row(0, 3, 512, 128, 32),
    _Row(0, 3, 512, 128, 32),
)
_EPSILON: dict[Form, float] = {"keras": 1e-3, "torch": 1e-5}


@BACKBONES.register("mobilenetv4_small")
def MobileNetV4Small(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build MobileNetV4-Conv-Small on an image; maps of 32, 32, 64, 96, 960 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None; keras.applications has none.
        form: "keras" pads strided layers at the far border, "torch" on both sides, as timm.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes; the deepest is the
        1 x 1 convolution behind the last bottleneck.

    Raises:
        UserError: if an option is unknown, or weights are asked for.

    Source:
        Qin et al., "MobileNetV4: Universal Models for the Mobile Ecosystem", ECCV 2024, section 3
        and its appendix's table of Conv-Small, arXiv:2404.10518; `mobilenetv4_conv_small` of timm.
    """
    check_options(output_stride, form)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = _conv(x, 32, 3, Step(2, 1, 1), form, "stem")
    maps: dict[int, KerasTensor] = {2: x}
    for stride, filters, narrow in ((4, 32, 32), (8, 96, 64)):
        name = f"stride{stride}"
        x = _conv(x, filters, 3, enter(stride, output_stride), form, f"{name}_fused")
        x = maps[stride] = _conv(x, narrow, 1, PLAIN, form, f"{name}_project")
    for block, row in enumerate(_SMALL, start=1):
        step = (stay if row.stride in maps else enter)(row.stride, output_stride)
        x = maps[row.stride] = _universal_bottleneck(x, row, step, form, f"block{block}")
    x = maps[32] = _conv(x, 960, 1, PLAIN, form, "top")
    load_backbone_weights(image, x, weights, published=None, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _universal_bottleneck(
    x: KerasTensor, row: _Row, step: Step, form: Form, name: str
) -> KerasTensor:
    """Return the block's map; the last of its depthwise convolutions strides."""
    shortcut = x
    if row.start:
        before = Step(1, step.entry, step.entry) if row.middle else step
        x = _depthwise(x, row.start, before, form, f"{name}_start", relu=False)
    x = _conv(x, row.expanded, 1, PLAIN, form, f"{name}_expand")
    if row.middle:
        x = _depthwise(x, row.middle, step, form, f"{name}_middle")
    x = _conv(x, row.filters, 1, PLAIN, form, f"{name}_project", relu=False)
    if shortcut.shape[-1] == row.filters and not step.downsamples:
        x = layers.Add(name=f"{name}_add")([shortcut, x])
    return x


def _conv(
    x: KerasTensor,
    filters: int,
    kernel: int,
    step: Step,
    form: Form,
    name: str,
    *,
    relu: bool = True,
) -> KerasTensor:
    x = conv(x, filters, kernel, step=step, form=form, name=f"{name}_conv")
    return _bn_relu(x, form, name, relu=relu)


def _depthwise(
    x: KerasTensor, kernel: int, step: Step, form: Form, name: str, *, relu: bool = True
) -> KerasTensor:
    x = depthwise_conv(x, kernel, step=step, form=form, name=f"{name}_depthwise")
    return _bn_relu(x, form, name, relu=relu)


def _bn_relu(x: KerasTensor, form: Form, name: str, *, relu: bool) -> KerasTensor:
    x = batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x
