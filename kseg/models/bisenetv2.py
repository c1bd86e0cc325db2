"""BiSeNet V2: a wide shallow branch for detail, a narrow deep one for meaning; each gates both."""

from __future__ import annotations

import keras
from keras import layers

from kseg.backbones.layers import TORCH, normalise
from kseg.blocks import (
    activate,
    batch_norm,
    check_input,
    classifier,
    conv_bn_relu,
    depthwise_bn_relu,
    pool_to,
)
from kseg.registry import MODELS
from kseg.upsampling import resize_to

BOOSTERS = ("booster4", "booster8", "booster16", "booster32")


@MODELS.register("bisenetv2", aux={name: (None, 1.0) for name in BOOSTERS})
def BiSeNetV2(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    expansion: int = 6,
    head_channels: int = 1024,
    booster_channels: int = 128,
    dropout: float = 0.1,
    aux: bool = True,
) -> keras.Model:
    """Build BiSeNet V2.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        expansion: widening inside the gather-and-expansion layers.
        head_channels: channels of the head's convolution; a third of the weights are behind it.
        booster_channels: the same of the training-only heads.
        dropout: rate in front of every classifier.
        aux: add the booster heads, training-only, on the four stages of the semantic branch, each
            of weight 1.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Yu, Gao, Wang, Yu, Shen, Sang, "BiSeNet V2: Bilateral Network with Guided Aggregation for
        Real-time Semantic Segmentation", IJCV 2021, section 4 and table 1, arXiv:2004.02147;
        mmsegmentation, `bisenetv2.py`, and github.com/CoinCheung/BiSeNet.

    Differs:
        As in both codes, ReLU follows the depthwise convolution of a gather-and-expansion layer
        and the aggregation, and batch normalisation and ReLU the context embedding. The heads'
        widths are CoinCheung's, but a booster has a single hidden convolution.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    x = normalise(image, TORCH)
    detail = _detail_branch(x)
    stages = _semantic_branch(x, expansion)
    context = _context_embedding(stages[-1])
    x = _guided_aggregation(detail, context)
    outputs = {"logits": _head(x, head_channels, num_classes, size, dropout, "logits")}
    if aux:
        for name, stage in zip(BOOSTERS, stages, strict=True):
            outputs[name] = _head(stage, booster_channels, num_classes, size, dropout, name)
    return keras.Model(image, outputs, name="bisenetv2")


def _detail_branch(x: keras.KerasTensor) -> keras.KerasTensor:
    for stage, widths in enumerate(((64, 64), (64, 64, 64), (128, 128, 128)), start=1):
        for number, filters in enumerate(widths, start=1):
            strides = 2 if number == 1 else 1
            x = conv_bn_relu(x, filters, strides=strides, name=f"detail{stage}_{number}")
    return x


def _semantic_branch(x: keras.KerasTensor, expansion: int) -> list[keras.KerasTensor]:
    """Return the maps of strides 4, 8, 16 and 32."""
    maps = [_stem(x)]
    for stage, (filters, count) in enumerate(((32, 2), (64, 2), (128, 4)), start=3):
        x = _gather_expansion_down(maps[-1], filters, expansion, f"semantic{stage}_1")
        for number in range(2, count + 1):
            x = _gather_expansion(x, expansion, f"semantic{stage}_{number}")
        maps.append(x)
    return maps


def _stem(x: keras.KerasTensor) -> keras.KerasTensor:
    x = conv_bn_relu(x, 16, strides=2, name="stem")
    left = conv_bn_relu(x, 8, kernel=1, name="stem_left1")
    left = conv_bn_relu(left, 16, strides=2, name="stem_left2")
    right = layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    x = layers.Concatenate(name="stem_concat")([left, right])
    return conv_bn_relu(x, 16, name="stem_fuse")


def _gather_expansion(x: keras.KerasTensor, expansion: int, name: str) -> keras.KerasTensor:
    y = conv_bn_relu(x, x.shape[-1], name=f"{name}_gather")
    y = _expand(y, expansion, 1, name)
    y = activate(y, "relu", name=f"{name}_expand")
    return _project_and_add(y, x, name)


def _gather_expansion_down(
    x: keras.KerasTensor, filters: int, expansion: int, name: str
) -> keras.KerasTensor:
    y = conv_bn_relu(x, x.shape[-1], name=f"{name}_gather")
    y = _expand(y, expansion, 2, name)
    y = depthwise_bn_relu(y, name=f"{name}_depthwise")
    x = depthwise_bn_relu(x, strides=2, activation=None, name=f"{name}_shortcut_depthwise")
    x = conv_bn_relu(x, filters, kernel=1, activation=None, name=f"{name}_shortcut_pointwise")
    return _project_and_add(y, x, name)


def _expand(x: keras.KerasTensor, expansion: int, strides: int, name: str) -> keras.KerasTensor:
    """Make `expansion` channels of each by a depthwise convolution, and normalise them."""
    x = layers.DepthwiseConv2D(
        3,
        strides=strides,
        padding="same",
        depth_multiplier=expansion,
        use_bias=False,
        # As in `depthwise_bn_relu`: a channel sees 3 x 3 values.
        depthwise_initializer=keras.initializers.RandomNormal(stddev=2**0.5 / 3),
        name=f"{name}_expand_conv",
    )(x)
    return batch_norm(x, name=f"{name}_expand")


def _project_and_add(
    x: keras.KerasTensor, shortcut: keras.KerasTensor, name: str
) -> keras.KerasTensor:
    x = conv_bn_relu(x, shortcut.shape[-1], kernel=1, activation=None, name=f"{name}_project")
    return activate(layers.Add(name=f"{name}_add")([x, shortcut]), "relu", name=f"{name}_add")


def _context_embedding(x: keras.KerasTensor) -> keras.KerasTensor:
    context = batch_norm(pool_to(x, 1, name="context_pool"), name="context_pool")
    context = conv_bn_relu(context, x.shape[-1], kernel=1, name="context")
    x = layers.Add(name="context_add")([x, context])
    return conv_bn_relu(x, x.shape[-1], name="context_out")


def _guided_aggregation(
    detail: keras.KerasTensor, semantic: keras.KerasTensor
) -> keras.KerasTensor:
    """Return the sum of both branches at stride 8, each gated by the other at the other's size."""
    channels = detail.shape[-1]
    fine = _separable(detail, "fine")
    fine_gate = conv_bn_relu(semantic, channels, activation=None, name="fine_gate")
    fine_gate = resize_to(fine_gate, detail, name="fine_gate_resize")
    fine = layers.Multiply(name="fine_multiply")([fine, _sigmoid(fine_gate, "fine_gate")])

    coarse = conv_bn_relu(detail, channels, strides=2, activation=None, name="coarse")
    coarse = layers.AveragePooling2D(3, strides=2, padding="same", name="coarse_pool")(coarse)
    coarse_gate = _sigmoid(_separable(semantic, "coarse_gate"), "coarse_gate")
    coarse = layers.Multiply(name="coarse_multiply")([coarse, coarse_gate])

    coarse = resize_to(coarse, fine, name="coarse_resize")
    x = layers.Add(name="aggregation_add")([fine, coarse])
    return conv_bn_relu(x, channels, name="aggregation")


def _separable(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    filters = x.shape[-1]
    x = depthwise_bn_relu(x, activation=None, name=f"{name}_depthwise")
    return layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_pointwise_conv")(x)


def _sigmoid(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return activate(x, "sigmoid", name=name)


def _head(
    x: keras.KerasTensor,
    filters: int,
    num_classes: int,
    size: tuple[int, int],
    dropout: float,
    name: str,
) -> keras.KerasTensor:
    x = conv_bn_relu(x, filters, name=f"{name}_head")
    x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return classifier(x, num_classes, size, name=name)
