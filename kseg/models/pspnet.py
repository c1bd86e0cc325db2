"""PSPNet: averages the deepest map over four grids, so that each pixel knows the whole scene."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.backbones.units import configured, even_rates
from kseg.blocks import classifier, conv_bn_relu, fcn_head, pool_to
from kseg.models.image_size import check_size
from kseg.registry import MODELS
from kseg.upsampling import resize_to


@MODELS.register("pspnet", aux={"aux": (None, 0.4)})
def PSPNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    form: Form = "keras",
    deep_stem: bool = False,
    output_stride: Literal[8, 16, 32] = 8,
    stages: Literal[3, 4, 5] = 5,
    bins: tuple[int, ...] = (1, 2, 3, 6),
    single_cell_bn: bool = True,
    align_corners: bool = False,
    head_kernel: Literal[1, 3] = 3,
    head_channels: int = 512,
    classifier_kernel: Literal[1, 3] = 1,
    dropout: float = 0.1,
    aux: bool = False,
) -> keras.Model:
    """Build PSPNet.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32, or any sizes
            from 64 on with a ResNet of form "torch". Multiples of 96 give all four grids cells of
            equal size.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        deep_stem: begin a ResNet with three 3x3 convolutions, as in the paper; there are no
            published weights for it.
        output_stride: stride at which the backbone starts to dilate.
        stages: how many stages of the backbone are kept; segmentation_models.pytorch keeps 3,
            down to stride 8.
        bins: cells a side of each grid.
        single_cell_bn: normalise the grid of one cell, over the batch alone: train with four
            images a device or more. Without, it has a bias.
        align_corners: resize grids and scores so that corner pixels meet, as in the authors' code.
        head_kernel: side of the convolution behind the pyramid; that of
            segmentation_models.pytorch is 1.
        head_channels: channels of that convolution.
        classifier_kernel: side of the classifier; that of segmentation_models.pytorch is 3.
        dropout: rate in front of the classifiers; of whole channels, as in the authors' code.
        aux: add a training-only head on the last but one stage, of weight 0.4.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is none of these, or the backbone has no deep stem.

    Source:
        Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", CVPR 2017, section 3, figure 3,
        arXiv:1612.01105; github.com/hszhao/semseg.

    Differs:
        The 7x7 stem is the default. Every unit of a dilated stage is dilated as in the authors'
        network where the backbone is a ResNet of bottlenecks; others keep the first unit of a
        stage at the rate before. By default resizing has half-pixel centres, not aligned corners.
        The auxiliary head is torchvision's, whose dropout is of single values.
    """
    check_size(input_shape, num_classes, backbone=backbone, form=form)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    build = configured(backbone, rates=even_rates(output_stride), deep_stem=deep_stem)
    features = build(image, output_stride=output_stride, weights=backbone_weights, form=form)
    x = _pyramid_pooling(features.stages[stages - 1], bins, single_cell_bn, align_corners)
    x = conv_bn_relu(x, head_channels, kernel=head_kernel, name="head")
    x = layers.SpatialDropout2D(dropout, name="head_dropout")(x)
    logits = classifier(x, num_classes, size, kernel=classifier_kernel, align_corners=align_corners)
    outputs = {"logits": logits}
    if aux:
        outputs["aux"] = fcn_head(
            features.stages[stages - 2], num_classes, size, dropout=dropout, name="aux"
        )
    return keras.Model(image, outputs, name="pspnet")


def _pyramid_pooling(
    x: keras.KerasTensor, bins: tuple[int, ...], single_cell_bn: bool, align_corners: bool
) -> keras.KerasTensor:
    pyramid = [x]
    for cells in bins:
        name, filters = f"pyramid{cells}", x.shape[-1] // len(bins)
        y = pool_to(x, cells, name=f"{name}_pool")
        if cells > 1 or single_cell_bn:
            y = conv_bn_relu(y, filters, kernel=1, name=name)
        else:
            y = layers.Conv2D(
                filters, 1, activation="relu", kernel_initializer="he_normal", name=f"{name}_conv"
            )(y)
        pyramid.append(resize_to(y, x, align_corners=align_corners, name=f"{name}_resize"))
    return layers.Concatenate(name="pyramid_concat")(pyramid)
