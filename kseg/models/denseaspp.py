"""DenseASPP: atrous convolutions, each reading the outputs of all smaller rates before it."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.blocks import activate, batch_norm, check_input, classifier, conv_bn_relu
from kseg.registry import BACKBONES, MODELS
from kseg.upsampling import resize_to

# Channels of the 1x1 and of the atrous convolutions that go with a backbone.
_WIDTHS = {"densenet161": (512, 128)}
_USUAL_WIDTHS = (128, 64)


@MODELS.register("denseaspp")
def DenseASPP(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "densenet121",
    backbone_weights: str | None = None,
    form: Form = "keras",
    output_stride: Literal[8, 16, 32] = 8,
    rates: tuple[int, ...] = (3, 6, 12, 18, 24),
    bottleneck_channels: int | None = None,
    growth: int | None = None,
    dropout: float = 0.1,
) -> keras.Model:
    """Build DenseASPP.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor; the paper's are the DenseNets, and
            mobilenetv2 for small devices.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        output_stride: stride at which the backbone starts to dilate; maps coarser than 8 are
            enlarged to it.
        rates: atrous rates at stride 8, in the order of the layers.
        bottleneck_channels: channels in front of each atrous convolution; None takes the
            authors', 512 with densenet161 and 128 otherwise.
        growth: channels that each layer adds; None takes 128 with densenet161, 64 otherwise.
        dropout: rate of whole channels, behind each layer and in front of the classifier.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Yang, Yu, Zhang, Li, Yang, "DenseASPP for Semantic Segmentation in Street Scenes",
        CVPR 2018, section 3; layers, widths and dropout as in
        github.com/DeepMotionAIResearch/DenseASPP.

    Differs:
        Batch normalisation keeps 0.9 of its averages, not 0.9997, which never settles in a short
        run. The 1x1 transition that halves the channels stands behind every backbone, the
        authors' only behind a DenseNet; their MobileNetV2 ends before its last convolution.
    """
    check_input(input_shape, num_classes)
    height, width = input_shape[:2]
    usual = _WIDTHS.get(backbone, _USUAL_WIDTHS)
    bottleneck_channels, growth = bottleneck_channels or usual[0], growth or usual[1]
    # The authors' dilated DenseNets do not pool where they do not stride.
    extra = {"transition_pooling": False} if backbone.startswith("densenet") else {}
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](
        image, output_stride=output_stride, weights=backbone_weights, form=form, **extra
    )
    x = features.stages[-1]
    x = conv_bn_relu(x, x.shape[-1] // 2, kernel=1, name="transition")
    x = resize_to(x, (height // 8, width // 8), name="transition_resize")
    for index, rate in enumerate(rates):
        name = f"aspp{index + 1}_rate{rate}"
        y = x if index == 0 else activate(batch_norm(x, name=f"{name}_0"), "relu", name=f"{name}_0")
        y = _atrous(y, bottleneck_channels, growth, rate, name)
        y = layers.SpatialDropout2D(dropout, name=f"{name}_dropout")(y)
        x = layers.Concatenate(name=f"{name}_concat")([y, x])
    x = layers.SpatialDropout2D(dropout, name="dropout")(x)
    logits = classifier(x, num_classes, (height, width))
    return keras.Model(image, {"logits": logits}, name="denseaspp")


def _atrous(
    x: keras.KerasTensor, bottleneck_channels: int, growth: int, rate: int, name: str
) -> keras.KerasTensor:
    x = layers.Conv2D(
        bottleneck_channels, 1, kernel_initializer="he_normal", name=f"{name}_1_conv"
    )(x)
    x = activate(batch_norm(x, name=f"{name}_1"), "relu", name=f"{name}_1")
    return layers.Conv2D(
        growth,
        3,
        padding="same",
        dilation_rate=rate,
        kernel_initializer="he_normal",
        name=f"{name}_2_conv",
    )(x)
