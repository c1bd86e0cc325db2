"""ResNet-38 of "Wider or Deeper": few, wide, pre-activated residual blocks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import TORCH, UNIT, batch_norm, conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import load_backbone_weights

_EPSILON = 1e-5


class _Level(NamedTuple):
    """Blocks alike; widths are in units of `base_channels`."""

    blocks: int
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int


# Levels 2 to 7 of the paper; level 1 is a convolution.
_LEVELS = (
    _Level(3, (2, 2), (3, 3), 2),
    _Level(3, (4, 4), (3, 3), 4),
    _Level(6, (8, 8), (3, 3), 8),
    _Level(3, (8, 16), (3, 3), 16),
    _Level(1, (8, 16, 32), (1, 3, 1), 32),
    _Level(1, (16, 32, 64), (1, 3, 1), 32),
)


@BACKBONES.register("resnet38")
def WideResNet38(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    base_channels: int = 64,
    dropouts: tuple[float, float] = (0.3, 0.5),
) -> Features:
    """Build the features of ResNet-38, model A1; maps of 128, 256, 512, 1024, 4096 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last levels are dilated instead of strided.
        weights: None; keras.applications has none.
        form: "keras" pads strided layers at the far border, "torch" on both sides, as the authors.
        base_channels: channels at full resolution; all widths are multiples of it.
        dropouts: rates in front of the last convolutions of the two bottlenecks.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes: the end of each
        level, normalised and rectified as the next one reads it.

    Raises:
        UserError: if an option is unknown or weights are asked for.

    Source:
        Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual
        Recognition", Pattern Recognition 2019, section 4, arXiv:1611.10080; strides instead of
        pooling as in `rna_feat_a1`, github.com/itijyou/ademxapp.
    """
    check_options(output_stride, form)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = conv(x, base_channels, 3, form=form, name="level1_conv")
    maps, at = {}, 1
    for number, level in enumerate(_LEVELS, start=2):
        dropout = dropouts[number - 6] if number >= 6 else 0.0
        for block in range(1, level.blocks + 1):
            name = f"level{number}_block{block}"
            # Overwritten until a block strides: the end of a level, seen through its successor.
            maps[at] = activated = _bn_relu(x, name)
            step = (stay if level.stride == at else enter)(level.stride, output_stride)
            shortcut = x
            if block == 1:
                shortcut = _project(activated, base_channels * level.widths[-1], step, form, name)
            x = _residual(activated, level, base_channels, step, form, dropout, name)
            x = layers.Add(name=f"{name}_add")([shortcut, x])
            at = level.stride
    maps[32] = x = _bn_relu(x, "level7_end")
    del maps[1]
    load_backbone_weights(image, x, weights, published=None, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _project(x: KerasTensor, filters: int, step: Step, form: Form, name: str) -> KerasTensor:
    if step.strides == 2:
        # Not a stride of the convolution: TensorFlow 2.21 (oneDNN) computes the gradient of a
        # strided 1 x 1 kernel that reads eight channels past the end of its memory.
        x = layers.MaxPooling2D(1, strides=2, name=f"{name}_shortcut_skip")(x)
    return conv(x, filters, 1, form=form, name=f"{name}_shortcut")


def _residual(
    x: KerasTensor,
    level: _Level,
    base_channels: int,
    step: Step,
    form: Form,
    dropout: float,
    name: str,
) -> KerasTensor:
    """Return the convolutions of a block, on its activated input."""
    last = len(level.widths)
    for number, (width, kernel) in enumerate(zip(level.widths, level.kernels, strict=True), 1):
        if number > 1:
            x = _bn_relu(x, f"{name}_{number}")
            step = Step(1, step.rate, step.rate)
        if dropout and number == last:
            x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
        filters = base_channels * width
        x = conv(x, filters, kernel, step=step, form=form, name=f"{name}_{number}_conv")
    return x


def _bn_relu(x: KerasTensor, name: str) -> KerasTensor:
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x)
