"""OCRNet: a coarse map pools one vector a class, and every pixel attends to these vectors."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers, ops

from kseg.backbones.features import Features, Form
from kseg.blocks import activate, batch_norm, check_input, classifier, conv_bn_relu
from kseg.registry import BACKBONES, MODELS
from kseg.upsampling import resize_to


@MODELS.register("ocrnet", aux={"regions": (None, 0.4)})
def OCRNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "hrnet_w48",
    backbone_weights: str | None = None,
    form: Form = "keras",
    output_stride: Literal[4, 8, 16] = 4,
    region_channels: int | None = None,
    pixel_channels: int = 512,
    key_channels: int = 256,
    dropout: float = 0.05,
    aux: bool = True,
) -> keras.Model:
    """Build OCRNet.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        output_stride: 4 joins the maps of strides 4 to 32 on the finest, as for HRNet; 8 (the
            paper's ResNet-101) or 16 takes the last two stages of a backbone dilated from there.
        region_channels: channels of the region head's convolution; None takes those of its map
            at stride 4, 512 otherwise (mmsegmentation's is 256).
        pixel_channels: channels of pixels and of class vectors.
        key_channels: channels in which pixels and classes are compared.
        dropout: rate in front of the classifier.
        aux: train the region head also by itself, of weight 0.4, as the paper does; it is part
            of the model either way.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or the backbone does not dilate.

    Source:
        Yuan, Chen, Wang, "Object-Contextual Representations for Semantic Segmentation",
        ECCV 2020, section 3, arXiv:1909.11065; github.com/HRNet/HRNet-Semantic-Segmentation,
        branch HRNet-OCR, at stride 4, and mmsegmentation otherwise, which has no biases before
        batch normalisation.

    Differs:
        The softmax over space is taken row by row, then over the rows (`SpatialGather`).
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    options = {"weights": backbone_weights, "form": form}
    if output_stride == 4:
        x = _join(BACKBONES[backbone](image, **options))
        scores = _biased(x, region_channels or x.shape[-1], 1, "regions_head")
        pixels = _biased(x, pixel_channels, 3, "pixels")
    else:
        stages = BACKBONES[backbone](image, output_stride=output_stride, **options).stages
        scores = conv_bn_relu(stages[-2], region_channels or 512, name="regions_head")
        pixels = conv_bn_relu(stages[-1], pixel_channels, name="pixels")
    scores = layers.Conv2D(num_classes, 1, name="regions_conv")(scores)
    vectors = SpatialGather(dtype="float32", name="gather")([pixels, scores])
    context = _attend(pixels, vectors, key_channels)
    x = layers.Concatenate(name="fuse_concat")([context, pixels])
    x = conv_bn_relu(x, pixel_channels, kernel=1, name="fuse")
    x = layers.Dropout(dropout, name="fuse_dropout")(x)
    outputs = {"logits": classifier(x, num_classes, input_shape[:2])}
    if aux:
        scores = resize_to(scores, input_shape[:2], name="regions_resize")
        outputs["regions"] = layers.Activation("linear", dtype="float32", name="regions")(scores)
    return keras.Model(image, outputs, name="ocrnet")


def _join(features: Features) -> keras.KerasTensor:
    """Return the maps of strides 4 to 32 side by side, at stride 4."""
    maps = [features[4]]
    maps += [resize_to(features[s], maps[0], name=f"join{s}_resize") for s in (8, 16, 32)]
    return layers.Concatenate(name="join")(maps)


def _biased(x: keras.KerasTensor, filters: int, kernel: int, name: str) -> keras.KerasTensor:
    """Convolve with a bias in spite of the batch normalisation behind it, as the authors."""
    x = layers.Conv2D(
        filters, kernel, padding="same", kernel_initializer="he_normal", name=f"{name}_conv"
    )(x)
    return activate(batch_norm(x, name=name), "relu", name=name)


def _attend(pixels: keras.KerasTensor, vectors: keras.KerasTensor, keys: int) -> keras.KerasTensor:
    """Return for each pixel the mean of the class vectors (B, C, 1, K), weighted by likeness."""
    query = _twice(pixels, keys, "query")
    height, width = query.shape[1:3]
    query = layers.Rescaling(keys**-0.5, name="query_scale")(query)
    query = layers.Reshape((height * width, keys), name="query_rows")(query)
    key = layers.Reshape((-1, keys), name="key_rows")(_twice(vectors, keys, "key"))
    value = conv_bn_relu(vectors, keys, kernel=1, name="value")
    value = layers.Reshape((-1, keys), name="value_rows")(value)
    context = layers.Attention(name="class_attention")([query, value, key])
    context = layers.Reshape((height, width, keys), name="context_map")(context)
    return conv_bn_relu(context, pixels.shape[-1], kernel=1, name="context")


def _twice(x: keras.KerasTensor, filters: int, name: str) -> keras.KerasTensor:
    x = conv_bn_relu(x, filters, kernel=1, name=f"{name}1")
    return conv_bn_relu(x, filters, kernel=1, name=f"{name}2")


@keras.saving.register_keras_serializable("kseg")
class SpatialGather(layers.Layer):
    """Average all pixels once a class, weighted by the softmax over space of its scores.

    First over each row, then over the rows, weighted by the softmax of their total scores: the
    same average, but of few terms at a time. A softmax of an int8 file knows steps of 1/256
    only; over a whole map, where the terms are about 1 / (H W), nearly all of it would be zero.
    Rows are safe up to about 256 positions.
    """

    def call(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Return (B, C, 1, K) of pixels (B, H, W, K) and scores (B, H, W, C)."""
        pixels, scores = inputs
        scores = ops.swapaxes(scores, 2, 3)
        means = ops.matmul(ops.softmax(scores, axis=-1), pixels)
        highest = ops.max(scores, axis=-1, keepdims=True)
        totals = highest + ops.log(ops.sum(ops.exp(scores - highest), axis=-1, keepdims=True))
        rows = ops.softmax(ops.transpose(totals, (0, 2, 3, 1)), axis=-1)
        return ops.matmul(rows, ops.swapaxes(means, 1, 2))
