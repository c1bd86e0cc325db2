"""FRRN: a stream of full resolution that units of a pooled stream read from and add to."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.blocks import check_input, classifier, conv_bn_relu
from kseg.registry import MODELS
from kseg.upsampling import nearest, resize_to

_RESIDUAL_CHANNELS = 32
_RESIDUAL_UNITS = 3

# (units, stride, channels over base_channels) of each stage of the pooled stream.
_DOWN_A = ((3, 2, 2), (4, 4, 4), (2, 8, 8), (2, 16, 8))
_UP_A = ((2, 8, 4), (2, 4, 4), (2, 2, 2))
_STAGES = {"A": (_DOWN_A, _UP_A), "B": ((*_DOWN_A, (2, 32, 8)), ((2, 16, 4), *_UP_A))}


@MODELS.register("frrn")
def FRRN(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    variant: Literal["A", "B"] = "A",
    base_channels: int = 48,
) -> keras.Model:
    """Build a full-resolution residual network.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        variant: "A" pools to stride 16, "B" to stride 32.
        base_channels: channels of the pooled stream at full resolution; its deepest maps have
            eight times as many.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Pohlen, Hermans, Mathias, Leibe, "Full-Resolution Residual Networks for Semantic
        Segmentation in Street Scenes", CVPR 2017, section 3, table 1, arXiv:1611.08323; layers as
        in github.com/TobyPDE/FRRN, `dltools/architectures.py`.

    Differs:
        The pooled stream grows bilinearly with half-pixel centres, unlike Theano's. The paper
        trains and predicts at half (B) or quarter (A) of Cityscapes' resolution; here the size is
        the one that the model is built for.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(image)
    x = conv_bn_relu(x, base_channels, kernel=5, name="stem")
    x = _residual_units(x, base_channels, name="stem")
    residual = conv_bn_relu(x, _RESIDUAL_CHANNELS, kernel=1, activation=None, name="split")
    down, up = _STAGES[variant]
    for units, stride, width in down:
        x = layers.MaxPooling2D(2, name=f"down{stride}_pool")(x)
        x, residual = _stage(x, residual, units, stride, width * base_channels, f"down{stride}")
    for units, stride, width in up:
        x = _double(x, name=f"up{stride}_resize")
        x, residual = _stage(x, residual, units, stride, width * base_channels, f"up{stride}")
    x = _double(x, name="up1_resize")
    x = layers.Concatenate(name="merge")([x, residual])
    x = _residual_units(x, base_channels, name="head")
    logits = classifier(x, num_classes, input_shape[:2])
    return keras.Model(image, {"logits": logits}, name="frrn")


def _residual_units(x: keras.KerasTensor, filters: int, *, name: str) -> keras.KerasTensor:
    for unit in range(1, _RESIDUAL_UNITS + 1):
        x = _residual_unit(x, filters, f"{name}_unit{unit}")
    return x


def _residual_unit(x: keras.KerasTensor, filters: int, name: str) -> keras.KerasTensor:
    y = conv_bn_relu(x, filters, name=f"{name}_1")
    y = conv_bn_relu(y, filters, activation=None, name=f"{name}_2")
    if x.shape[-1] != filters:
        x = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_project")(x)
    return layers.Add(name=f"{name}_add")([x, y])


def _stage(
    x: keras.KerasTensor,
    residual: keras.KerasTensor,
    units: int,
    stride: int,
    filters: int,
    name: str,
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    for unit in range(1, units + 1):
        x, residual = _frru(x, residual, stride, filters, f"{name}_unit{unit}")
    return x, residual


def _frru(
    x: keras.KerasTensor, residual: keras.KerasTensor, stride: int, filters: int, name: str
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Full-resolution residual unit: both streams in, both streams out."""
    pooled = layers.MaxPooling2D(stride, name=f"{name}_pool")(residual)
    x = layers.Concatenate(name=f"{name}_concat")([x, pooled])
    x = conv_bn_relu(x, filters, name=f"{name}_1")
    x = conv_bn_relu(x, filters, name=f"{name}_2")
    y = layers.Conv2D(_RESIDUAL_CHANNELS, 1, name=f"{name}_residual")(x)
    y = nearest(y, stride, name=f"{name}_unpool")
    return x, layers.Add(name=f"{name}_add")([residual, y])


def _double(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    return resize_to(x, (2 * x.shape[1], 2 * x.shape[2]), name=name)
