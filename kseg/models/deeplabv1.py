"""DeepLab v1: VGG16 keeps stride 8 by dilation, and so does the wide view of its fc6."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import keras
from keras import layers

from kseg.backbones.features import Features
from kseg.backbones.vgg import VGG16
from kseg.blocks import check_input, classifier
from kseg.registry import MODELS

Head = Literal["largefov", "4x4_rate8", "4x4_rate4", "7x7_rate4"]


class _View(NamedTuple):
    """Side and atrous rate of fc6, channels of fc6 and fc7."""

    kernel: int
    rate: int
    channels: int


_VIEWS: dict[Head, _View] = {
    "largefov": _View(3, 12, 1024),
    "4x4_rate8": _View(4, 8, 4096),
    "4x4_rate4": _View(4, 4, 4096),
    "7x7_rate4": _View(7, 4, 4096),
}


@MODELS.register("deeplabv1")
def DeepLabV1(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone_weights: str | None = None,
    head: Head = "largefov",
    fc_channels: int | None = None,
    msc: bool = False,
    dropout: float = 0.5,
) -> keras.Model:
    """Build DeepLab-LargeFOV, or one of the nets that its paper compares it with.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone_weights: None, "imagenet" or a file of VGG16's.
        head: side and atrous rate of fc6; "largefov" is 3x3 at rate 12.
        fc_channels: channels of fc6 and fc7; None is the paper's: 1024 in LargeFOV, else 4096.
        msc: classify from the image and the first four pools too ("MSc").
        dropout: rate after fc6 and fc7, and after both layers of each branch of `msc`.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Chen, Papandreou, Kokkinos, Murphy, Yuille, "Semantic Image Segmentation with Deep
        Convolutional Nets and Fully Connected CRFs", ICLR 2015, sections 3 and 4.3 and, for the
        heads, the table of fields of view in section 5, arXiv:1412.7062; paddings, strides and the
        average behind pool5 as in the authors' LargeFOV and MSc-LargeFOV, `train.prototxt`.

    Differs:
        Sizes are multiples of 32, not 8n + 1. The loss is taken at the size of the image, not on
        labels at stride 8. The average behind pool5 does not count zeros beyond the border, and
        the three other heads have it and the 3x3 pools, too. `msc` trains with the rest; the
        authors train it alone on top of the finished net. fc6 and fc7 start at random.
    """
    check_input(input_shape, num_classes)
    view = _VIEWS[head]
    image = keras.Input(input_shape, name="image")
    pools = dilated_vgg16(image, weights=backbone_weights).stages
    x = average(pools[-1])
    channels = fc_channels or view.channels
    x = fully_connected(x, channels, kernel=view.kernel, rate=view.rate, dropout=dropout)
    if msc:
        x = layers.Concatenate(name="msc_concat")([x, *_multi_scale(image, pools, dropout)])
    logits = classifier(x, num_classes, input_shape[:2])
    return keras.Model(image, {"logits": logits}, name="deeplabv1")


def dilated_vgg16(image: keras.KerasTensor, *, weights: str | Path | None) -> Features:
    """Build VGG16 at stride 8 as DeepLab does: 3x3 pools, conv5 alone dilated.

    Args:
        image: (B, H, W, 3) RGB 0..255.
        weights: None, "imagenet" or a file of VGG16's.

    Returns:
        Its features; the last of `stages` is pool5, (B, H / 8, W / 8, 512).
    """
    return VGG16(image, output_stride=8, weights=weights, wide_pools=True)


def average(x: keras.KerasTensor) -> keras.KerasTensor:
    """Return the averages of 3x3 pixels that LargeFOV takes behind pool5."""
    return layers.AveragePooling2D(3, strides=1, padding="same", name="pool5a")(x)


def fully_connected(
    x: keras.KerasTensor,
    channels: int,
    *,
    kernel: int = 3,
    rate: int = 12,
    dropout: float = 0.5,
    suffix: str = "",
) -> keras.KerasTensor:
    """Convolve as VGG16's fc6 and fc7 read as convolutions, each with ReLU and dropout.

    Args:
        x: (B, h, w, C).
        channels: of both layers.
        kernel: side of fc6; fc7 is 1x1.
        rate: atrous rate of fc6.
        dropout: rate after each.
        suffix: what follows fc6 and fc7 in the names of the layers.

    Returns:
        (B, h, w, channels).
    """
    for name, side in (("fc6", kernel), ("fc7", 1)):
        x = layers.Conv2D(
            channels,
            side,
            padding="same",
            dilation_rate=rate if side > 1 else 1,
            activation="relu",
            kernel_initializer="he_normal",
            name=name + suffix,
        )(x)
        x = layers.Dropout(dropout, name=f"{name}{suffix}_dropout")(x)
    return x


def _multi_scale(
    image: keras.KerasTensor, pools: tuple[keras.KerasTensor, ...], dropout: float
) -> list[keras.KerasTensor]:
    """Return five maps of 128 channels at stride 8, from the image and the first four pools."""
    image = keras.Model(image, pools[0]).get_layer("rescale").output
    sources = {"image": (image, 8), "pool1": (pools[0], 4), "pool2": (pools[1], 2)}
    sources |= {"pool3": (pools[2], 1), "pool4": (pools[3], 1)}
    return [_branch(x, strides, dropout, f"msc_{name}") for name, (x, strides) in sources.items()]


def _branch(x: keras.KerasTensor, strides: int, dropout: float, name: str) -> keras.KerasTensor:
    # Padded on both sides, so that the windows are centred as those of the pools are.
    x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    for number, kernel in ((1, 3), (2, 1)):
        x = layers.Conv2D(
            128,
            kernel,
            strides=strides if kernel > 1 else 1,
            activation="relu",
            # The authors' spread: the branches start almost silent, on top of a finished net.
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.001),
            name=f"{name}_conv{number}",
        )(x)
        x = layers.Dropout(dropout, name=f"{name}_dropout{number}")(x)
    return x
