"""ResNet-38 as a dilated FCN: wide features, two convolutions of large atrous rate."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.backbones.wide_resnet import WideResNet38
from kseg.blocks import check_input, conv_bn_relu, enlarged
from kseg.registry import MODELS

_RATE = 12


@MODELS.register("resnet38")
def ResNet38(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    form: Form = "keras",
    output_stride: Literal[8, 16, 32] = 8,
    base_channels: int = 64,
    dropouts: tuple[float, float] = (0.3, 0.5),
) -> keras.Model:
    """Build the dilated FCN on ResNet-38, model A1.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        form: "keras" pads strided layers at the far border, "torch" on both sides, as the authors.
        output_stride: stride at which the backbone starts to dilate.
        base_channels: channels at full resolution; all widths, the head's too, are multiples.
        dropouts: rates in the two bottlenecks at the end of the backbone.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual
        Recognition", Pattern Recognition 2019, section 5, arXiv:1611.10080; `fcrna_model_a1`,
        github.com/itijyou/ademxapp.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    features = WideResNet38(
        image,
        output_stride=output_stride,
        form=form,
        base_channels=base_channels,
        dropouts=dropouts,
    )
    x = conv_bn_relu(features.stages[-1], 8 * base_channels, dilation=_RATE, name="head")
    x = layers.Conv2D(num_classes, 3, padding="same", dilation_rate=_RATE, name="logits_conv")(x)
    x = enlarged(x, input_shape[:2])
    return keras.Model(image, {"logits": x}, name="resnet38")
