"""Fast-SCNN: one shallow stem serves both the detail and the context of a two-branch network."""

from __future__ import annotations

import keras
from keras import layers

from kseg.blocks import (
    activate,
    batch_norm,
    check_input,
    classifier,
    conv_bn_relu,
    depthwise_bn_relu,
    fcn_head,
    pool_to,
    separable_conv,
)
from kseg.registry import MODELS
from kseg.upsampling import resize_to


@MODELS.register("fastscnn", aux={"aux_detail": (None, 0.4), "aux_context": (None, 0.4)})
def FastSCNN(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    bins: tuple[int, ...] = (1, 2, 3, 6),
    expansion: int = 6,
    dropout: float = 0.1,
    aux: bool = False,
) -> keras.Model:
    """Build Fast-SCNN.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        bins: cells a side of each pooling branch.
        expansion: widening inside the inverted residuals.
        dropout: rate before the classifier.
        aux: add training-only heads on both branches before they meet, each of weight 0.4.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Poudel, Liwicki, Cipolla, "Fast-SCNN: Fast Semantic Segmentation Network", BMVC 2019,
        table 1, arXiv:1902.04502; auxiliary heads as in mmsegmentation.

    Differs:
        The 1x1 convolutions of the fusion have biases before their BN, as in the common
        re-implementations that the parameter count 1,138,051 (19 classes) stands for.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    detail = _learning_to_downsample(image)
    context = _global_features(detail, expansion)
    context = _pyramid_pooling(context, bins)
    x = _fuse(detail, context)
    for index in (1, 2):
        x = separable_conv(x, 128, name=f"classifier{index}")
    x = layers.Dropout(dropout, name="classifier_dropout")(x)
    outputs = {"logits": classifier(x, num_classes, size)}
    if aux:
        outputs["aux_detail"] = fcn_head(detail, num_classes, size, name="aux_detail")
        outputs["aux_context"] = fcn_head(context, num_classes, size, name="aux_context")
    return keras.Model(image, outputs, name="fastscnn")


def _learning_to_downsample(image: keras.KerasTensor) -> keras.KerasTensor:
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(image)
    x = conv_bn_relu(x, 32, strides=2, name="downsample1")
    x = separable_conv(x, 48, strides=2, name="downsample2")
    return separable_conv(x, 64, strides=2, name="downsample3")


def _global_features(x: keras.KerasTensor, expansion: int) -> keras.KerasTensor:
    for stage, (filters, strides) in enumerate(((64, 2), (96, 2), (128, 1)), start=1):
        for block in range(3):
            x = _inverted_residual(
                x,
                filters,
                expansion,
                strides if block == 0 else 1,
                f"stage{stage}_block{block + 1}",
            )
    return x


def _inverted_residual(
    x: keras.KerasTensor, filters: int, expansion: int, strides: int, name: str
) -> keras.KerasTensor:
    y = conv_bn_relu(x, expansion * x.shape[-1], kernel=1, name=f"{name}_expand")
    y = depthwise_bn_relu(y, strides=strides, name=f"{name}_depthwise")
    y = conv_bn_relu(y, filters, kernel=1, activation=None, name=f"{name}_project")
    return layers.Add(name=f"{name}_add")([x, y]) if x.shape == y.shape else y


def _pyramid_pooling(x: keras.KerasTensor, bins: tuple[int, ...]) -> keras.KerasTensor:
    filters = x.shape[-1]
    pyramid = [x]
    for cells in bins:
        y = pool_to(x, cells, name=f"pyramid{cells}_pool")
        y = conv_bn_relu(y, filters // len(bins), kernel=1, name=f"pyramid{cells}")
        pyramid.append(resize_to(y, x, name=f"pyramid{cells}_resize"))
    x = layers.Concatenate(name="pyramid_concat")(pyramid)
    return conv_bn_relu(x, filters, kernel=1, name="pyramid_project")


def _fuse(detail: keras.KerasTensor, context: keras.KerasTensor) -> keras.KerasTensor:
    context = resize_to(context, detail, name="fuse_resize")
    context = depthwise_bn_relu(context, name="fuse_depthwise")
    x = layers.Add(name="fuse_add")(
        [_biased_conv(detail, "fuse_detail"), _biased_conv(context, "fuse_context")]
    )
    return activate(x, "relu", name="fuse")


def _biased_conv(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return batch_norm(layers.Conv2D(128, 1, name=f"{name}_conv")(x), name=name)
