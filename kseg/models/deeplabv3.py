"""DeepLab v3: atrous convolutions of several rates see the deepest map at several scales."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.blocks import aspp, check_input, classifier, conv_bn_relu, fcn_head
from kseg.registry import BACKBONES, MODELS


@MODELS.register("deeplabv3", aux={"aux": (None, 0.4)})
def DeepLabV3(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    form: Form = "keras",
    output_stride: Literal[8, 16, 32] = 16,
    rates: tuple[int, ...] = (6, 12, 18),
    aspp_channels: int = 256,
    head_conv: bool = False,
    dropout: float = 0.1,
    aux: bool = False,
) -> keras.Model:
    """Build DeepLab v3.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        output_stride: stride at which the backbone starts to dilate.
        rates: atrous rates at output stride 16; at 8 they double, as in the paper.
        aspp_channels: channels of every branch.
        head_conv: add torchvision's 3x3 convolution behind the pyramid.
        dropout: rate behind the pyramid; torchvision's is 0.5.
        aux: add torchvision's training-only head on the last but one stage, of weight 0.4.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image
        Segmentation", 2017, section 3, arXiv:1706.05587; head_conv and aux as in torchvision,
        `models/segmentation/deeplabv3.py`.

    Differs:
        The last stage has one dilation rate, not the multi-grid (1, 2, 4). The paper has no
        dropout; 0.1 is that of the authors' code.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](
        image, output_stride=output_stride, weights=backbone_weights, form=form
    )
    rates = tuple(rate * 16 // output_stride for rate in rates)
    x = aspp(features.stages[-1], aspp_channels, rates=rates)
    x = layers.Dropout(dropout, name="aspp_dropout")(x)
    if head_conv:
        x = conv_bn_relu(x, aspp_channels, name="head")
    outputs = {"logits": classifier(x, num_classes, size)}
    if aux:
        outputs["aux"] = fcn_head(features.stages[-2], num_classes, size, name="aux")
    return keras.Model(image, outputs, name="deeplabv3")
