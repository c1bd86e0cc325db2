"""SegNet: the decoder puts values where the encoder's maxima were, and learns what lies between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import keras
from keras import layers

from kseg.backbones.layers import CAFFE, normalise
from kseg.blocks import activate, batch_norm, check_input
from kseg.registry import BACKBONES, MODELS
from kseg.upsampling import max_pool_with_indices, unpool

Widths = tuple[tuple[int, ...], ...]

# Channels of each convolution of a stage, fine to coarse, as multiples of those of the first.
VGG16_ENCODER: Widths = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
_DECODER: Widths = ((1,), (2, 1), (4, 4, 2), (8, 8, 4), (8, 8, 8))
_BASIC: Widths = ((1,),) * 4
# Of kernels in front of a batch normalisation, at the start.
KERNEL_DEVIATION = 0.01


@MODELS.register("segnet")
def SegNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone_weights: str | None = None,
    base_channels: int = 64,
) -> keras.Model:
    """Build SegNet: the convolutions of VGG16, and their mirror image.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone_weights: None, "imagenet" or a file of them, of VGG16: where the convolutions of
            the encoder start.
        base_channels: channels at full resolution, 64 in VGG16; the coarsest map has eight times
            as many.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or the weights cannot be had.

    Source:
        Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder
        Architecture for Image Segmentation", PAMI 2017, section 3, arXiv:1511.00561; widths as in
        github.com/alexgkendall/SegNet-Tutorial, `Models/segnet_train.prototxt`.

    Differs:
        The mean colour is subtracted, as VGG16 was trained; the released code feeds plain images.
        Kernels in front of a batch normalisation start with a deviation of 0.01, like those of
        DeconvNet, rather than He's: Adam then learns faster. Images of 360 x 480 do not halve
        five times: take 384 x 480.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    x, indices = encode(normalise(image, CAFFE), VGG16_ENCODER, base_channels)
    x = decode(x, indices, _DECODER, base_channels)
    logits = _classify(x, num_classes, kernel=3)
    model = keras.Model(image, {"logits": logits}, name="segnet")
    start_from_vgg16(model, backbone_weights)
    return model


@MODELS.register("segnet_basic")
def SegNetBasic(
    input_shape: tuple[int, int, int], num_classes: int, *, base_channels: int = 64
) -> keras.Model:
    """Build SegNet-Basic: four 7x7 convolutions down and four up, all of one width.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        base_channels: channels of every convolution.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Badrinarayanan, Kendall, Cipolla, PAMI 2017, section 3.1, arXiv:1511.00561; layers as in
        github.com/alexgkendall/SegNet-Tutorial, `Models/segnet_basic_train.prototxt`.

    Differs:
        Intensities are scaled to -1..1 in place of a local response normalisation of the image.
        Kernels start as those of `SegNet`.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(image)
    x, indices = encode(x, _BASIC, base_channels, kernel=7)
    x = decode(x, indices, _BASIC, base_channels, kernel=7, activation=None)
    logits = _classify(x, num_classes, kernel=1)
    return keras.Model(image, {"logits": logits}, name="segnet_basic")


def encode(
    x: keras.KerasTensor, widths: Widths, base_channels: int, *, kernel: int = 3
) -> tuple[keras.KerasTensor, list[keras.KerasTensor]]:
    """Convolve and halve the map, stage by stage, remembering where each maximum was.

    Args:
        x: (B, H, W, C).
        widths: channels of each convolution of each stage, fine to coarse, over `base_channels`.
        base_channels: what a width of 1 means.
        kernel: side of the kernels.

    Returns:
        The coarsest map, and the pooling indices of each stage, fine to coarse.
    """
    indices = []
    for stage, stage_widths in enumerate(widths, start=1):
        for number, width in enumerate(stage_widths, start=1):
            name = f"block{stage}_conv{number}"
            x = conv_bias_bn_relu(x, width * base_channels, kernel, name=name)
        x, stage_indices = max_pool_with_indices(x, name=f"block{stage}_pool")
        indices.append(stage_indices)
    return x, indices


def decode(
    x: keras.KerasTensor,
    indices: Sequence[keras.KerasTensor],
    widths: Widths,
    base_channels: int,
    *,
    kernel: int = 3,
    activation: str | None = "relu",
) -> keras.KerasTensor:
    """Unpool by the indices of each stage, coarse to fine, and convolve.

    Args:
        x: the coarsest map (B, h, w, C), as wide as that of `encode`.
        indices: of `encode`, fine to coarse.
        widths: channels of each convolution of each stage, fine to coarse, over `base_channels`;
            the last of a stage must be as many as the encoder has in the next finer one.
        base_channels: what a width of 1 means.
        kernel: side of the kernels.
        activation: behind each batch normalisation, or None.

    Returns:
        (B, H, W, widths[0][-1] * base_channels).
    """
    for stage in range(len(widths), 0, -1):
        x = unpool(x, indices[stage - 1], name=f"block{stage}_unpool")
        for number, width in enumerate(widths[stage - 1], start=1):
            name = f"block{stage}_decode{number}"
            x = conv_bias_bn_relu(
                x, width * base_channels, kernel, activation=activation, name=name
            )
    return x


def conv_bias_bn_relu(
    x: keras.KerasTensor,
    filters: int,
    kernel: int,
    *,
    padding: Literal["same", "valid"] = "same",
    activation: str | None = "relu",
    name: str,
) -> keras.KerasTensor:
    """Convolve with a bias, which Caffe's networks keep in front of a batch normalisation.

    Args:
        x: (B, H, W, C).
        filters: channels of the result.
        kernel: side of the kernel.
        padding: of the convolution.
        activation: behind the batch normalisation, or None.
        name: of the convolution; `{name}_bn` and `{name}_relu` follow.

    Returns:
        The map, `filters` wide.
    """
    # What follows divides by the size of the kernel, so that only sets how fast it learns.
    small = keras.initializers.RandomNormal(stddev=KERNEL_DEVIATION)
    x = layers.Conv2D(filters, kernel, padding=padding, kernel_initializer=small, name=name)(x)
    return activate(batch_norm(x, name=name), activation, name=name)


def start_from_vgg16(model: keras.Model, weights: str | None) -> None:
    """Give the convolutions of `encode(VGG16_ENCODER)` in a model those of VGG16.

    Args:
        model: changed in place.
        weights: None (leaves it as it is), "imagenet" or a file of them.

    Raises:
        UserError: if the weights cannot be had.
        ValueError: if they are of another width.
    """
    if weights is None:
        return
    image = keras.Input((64, 64, 3))
    features = BACKBONES["vgg16"](image, weights=weights)
    for layer in keras.Model(image, features[32]).layers:
        if layer.weights:
            model.get_layer(layer.name).set_weights(layer.get_weights())


def _classify(x: keras.KerasTensor, num_classes: int, *, kernel: int) -> keras.KerasTensor:
    x = layers.Conv2D(
        num_classes, kernel, padding="same", kernel_initializer="he_normal", name="logits_conv"
    )(x)
    return layers.Activation("linear", dtype="float32", name="logits")(x)
