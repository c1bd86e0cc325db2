"""PP-LiteSeg: a decoder that narrows towards the image, joining maps by a learned share of each."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers, ops

from kseg.backbones.features import Form
from kseg.blocks import check_input, classifier, conv_bn_relu, pool_to
from kseg.registry import BACKBONES, MODELS
from kseg.upsampling import resize_to

STRIDES = (8, 16, 32)
# The two released nets, by backbone.
_T, _B = (32, 64, 128), (64, 96, 128)


@MODELS.register(
    "ppliteseg",
    aux={"aux16": (None, 1.0), "aux32": (None, 1.0)},
    variants=("backbone=stdc2", "backbone=mobilenetv4_small"),
)
def PPLiteSeg(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "stdc1",
    backbone_weights: str | None = None,
    form: Form = "keras",
    bins: tuple[int, ...] = (1, 2, 4),
    context_channels: int = 128,
    decoder_channels: tuple[int, int, int] | None = None,
    attention: Literal["spatial", "channel"] = "spatial",
    aux: bool = True,
) -> keras.Model:
    """Build PP-LiteSeg, by default PP-LiteSeg-T; on `stdc2` it is PP-LiteSeg-B.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        bins: cells a side of each pooling branch.
        context_channels: channels of the pooling branches and of their sum.
        decoder_channels: channels of the decoder at strides 8, 16 and 32; None takes the paper's,
            64, 96, 128 on stdc2 and 32, 64, 128 on any other backbone.
        attention: whether a pixel or a channel has a share of its own when two maps are joined.
        aux: add training-only heads on the decoder's maps at strides 16 and 32, each of weight 1.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Peng, Liu, Tang, Hao, Chu, Chen, Wu, Chen, Yu, Du, Dang, Lai, Liu, Hu, Yu, Ma, "PP-LiteSeg:
        A Superior Real-Time Semantic Segmentation Model", 2022, section 3, arXiv:2204.02681;
        PaddleSeg, `paddleseg/models/pp_liteseg.py` and `configs/pp_liteseg`.

    Differs:
        The classifiers have biases, and the convolutions of the pooling, which batch
        normalisation follows, have none; PaddleSeg's have it the other way round. The share a of
        x joins as y + a (x - y), which is a x + (1 - a) y.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](image, weights=backbone_weights, form=form)
    if decoder_channels is None:
        decoder_channels = _B if backbone == "stdc2" else _T
    x = _simple_pyramid_pooling(features[32], context_channels, bins)
    decoded = {}
    for stride, filters in reversed(list(zip(STRIDES, decoder_channels, strict=True))):
        x = _attention_fusion(features[stride], x, filters, attention, f"fusion{stride}")
        decoded[stride] = x
    outputs = {"logits": _head(decoded[8], num_classes, size, "logits")}
    if aux:
        for stride in (16, 32):
            outputs[f"aux{stride}"] = _head(decoded[stride], num_classes, size, f"aux{stride}")
    return keras.Model(image, outputs, name="ppliteseg")


def _simple_pyramid_pooling(
    x: keras.KerasTensor, filters: int, bins: tuple[int, ...]
) -> keras.KerasTensor:
    branches = []
    for cells in bins:
        y = pool_to(x, cells, name=f"pyramid{cells}_pool")
        y = conv_bn_relu(y, filters, kernel=1, name=f"pyramid{cells}")
        branches.append(resize_to(y, x, name=f"pyramid{cells}_resize"))
    # Keras refuses to add a single map.
    x = layers.Add(name="pyramid_add")(branches) if len(branches) > 1 else branches[0]
    return conv_bn_relu(x, filters, name="pyramid_out")


def _attention_fusion(
    low: keras.KerasTensor, high: keras.KerasTensor, filters: int, attention: str, name: str
) -> keras.KerasTensor:
    """Return the map of the backbone and the deeper one of the decoder, each by its share."""
    low = conv_bn_relu(low, high.shape[-1], name=f"{name}_low")
    high = resize_to(high, low, name=f"{name}_resize")
    share = {"spatial": _spatial_share, "channel": _channel_share}[attention](low, high, name)
    apart = layers.Subtract(name=f"{name}_subtract")([low, high])
    apart = layers.Multiply(name=f"{name}_multiply")([apart, share])
    x = layers.Add(name=f"{name}_add")([high, apart])
    return conv_bn_relu(x, filters, name=f"{name}_out")


def _spatial_share(low: keras.KerasTensor, high: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Return (B, H, W, 1), from mean and maximum over the channels of either map."""
    maps = [
        ChannelStatistics(name=f"{name}_{part}_statistics")(x)
        for part, x in (("low", low), ("high", high))
    ]
    x = layers.Concatenate(name=f"{name}_statistics")(maps)
    x = conv_bn_relu(x, 2, name=f"{name}_attention1")
    return conv_bn_relu(x, 1, activation="sigmoid", name=f"{name}_attention2")


def _channel_share(low: keras.KerasTensor, high: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Return (B, 1, 1, C), from mean and maximum over all pixels of either map."""
    maps = []
    for part, x in (("low", low), ("high", high)):
        maps.append(pool_to(x, 1, name=f"{name}_{part}_mean"))
        maps.append(layers.GlobalMaxPooling2D(keepdims=True, name=f"{name}_{part}_maximum")(x))
    x = layers.Concatenate(name=f"{name}_statistics")(maps)
    channels = low.shape[-1]
    x = conv_bn_relu(x, channels // 2, kernel=1, activation=None, name=f"{name}_attention1")
    x = layers.LeakyReLU(negative_slope=0.01, name=f"{name}_attention1_relu")(x)
    return conv_bn_relu(x, channels, kernel=1, activation="sigmoid", name=f"{name}_attention2")


def _head(
    x: keras.KerasTensor, num_classes: int, size: tuple[int, int], name: str
) -> keras.KerasTensor:
    # In both released nets a head is as wide as its map, but 64 at most.
    x = conv_bn_relu(x, min(64, x.shape[-1]), name=f"{name}_head")
    return classifier(x, num_classes, size, name=name)


@keras.saving.register_keras_serializable("kseg")
class ChannelStatistics(layers.Layer):
    """Mean and maximum over the channels of each pixel."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return (B, H, W, 2) of a map (B, H, W, C)."""
        mean, maximum = ops.mean(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)
        return ops.concatenate([mean, maximum], axis=-1)
