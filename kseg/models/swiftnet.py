"""SwiftNet: a small residual encoder and a ladder of lateral sums; dense convolutions only."""

from __future__ import annotations

import keras
from keras import layers

from kseg.blocks import activate, check_input, classifier, conv_bn_relu, pool_to
from kseg.errors import UserError
from kseg.registry import MODELS
from kseg.upsampling import resize_to


@MODELS.register("swiftnet", aux={"aux": (None, 0.4)})
def SwiftNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: tuple[int, ...] = (48, 96, 192, 256),
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    stem_channels: int = 32,
    decoder_channels: int = 64,
    detail_channels: int = 0,
    aux: bool = False,
) -> keras.Model:
    """Build a single-scale SwiftNet on its own light encoder.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        widths: channels of the four stages, at strides 4, 8, 16 and 32.
        blocks: residual blocks of each stage.
        stem_channels: channels at stride 2.
        decoder_channels: channels all through the decoder.
        detail_channels: where above 0, classify at stride 2, joined with that many channels of
            the stem; otherwise at stride 4.
        aux: add a training-only classifier on the decoder's map at stride 16, of weight 0.4.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or there are not as many widths as
            blocks, four at most.

    Source:
        Orsic, Kreso, Bevandic, Segvic, "In Defense of Pre-trained ImageNet Architectures for
        Real-time Semantic Segmentation of Road-driving Images", CVPR 2019, section 3,
        arXiv:1903.08469.

    Differs:
        The encoder is narrower than the paper's ResNet-18, trained from scratch, has two 3x3
        convolutions for a stem, and its shortcuts shrink by average pooling before a 1x1
        convolution. A global average added to the deepest map stands for the spatial pyramid.
        The decoder is 64 channels wide instead of 128, with ReLU after each sum and BN after
        each convolution instead of before. `detail_channels` and the auxiliary head are ours.
    """
    check_input(input_shape, num_classes)
    if len(widths) != len(blocks) or not 0 < len(widths) <= 4:
        raise UserError(
            f"widths {widths} and blocks {blocks} must have one number a stage, four stages at most"
        )
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(image)
    stem = conv_bn_relu(x, stem_channels, strides=2, name="stem1")
    features = _encoder(conv_bn_relu(stem, widths[0], strides=2, name="stem2"), widths, blocks)
    ladder = _decoder(features, decoder_channels)
    x = ladder[-1]
    if detail_channels:
        x = _add_detail(x, stem, detail_channels)
    outputs = {"logits": classifier(x, num_classes, size)}
    if aux:
        outputs["aux"] = classifier(ladder[0], num_classes, size, name="aux")
    return keras.Model(image, outputs, name="swiftnet")


def _encoder(
    x: keras.KerasTensor, widths: tuple[int, ...], blocks: tuple[int, ...]
) -> list[keras.KerasTensor]:
    features = []
    for stage, (filters, count) in enumerate(zip(widths, blocks, strict=True), start=1):
        for block in range(1, count + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = _basic_block(x, filters, strides, f"stage{stage}_block{block}")
        features.append(x)
    return features


def _basic_block(x: keras.KerasTensor, filters: int, strides: int, name: str) -> keras.KerasTensor:
    y = conv_bn_relu(x, filters, strides=strides, name=f"{name}_1")
    y = conv_bn_relu(y, filters, activation=None, name=f"{name}_2")
    if strides > 1:
        x = layers.AveragePooling2D(strides, name=f"{name}_shortcut_pool")(x)
    if x.shape[-1] != filters:
        x = conv_bn_relu(x, filters, kernel=1, activation=None, name=f"{name}_shortcut")
    return activate(layers.Add(name=f"{name}_add")([x, y]), "relu", name=name)


def _decoder(features: list[keras.KerasTensor], filters: int) -> list[keras.KerasTensor]:
    deepest = features[-1]
    x = conv_bn_relu(deepest, filters, kernel=1, name="bottom")
    context = pool_to(deepest, 1, name="context_pool")
    context = layers.Conv2D(filters, 1, activation="relu", name="context_conv")(context)
    x = layers.Add(name="context_add")([x, context])
    ladder = []
    for level in range(len(features) - 1, 0, -1):
        x = _upsample_block(x, features[level - 1], filters, f"up{level}")
        ladder.append(x)
    return ladder


def _upsample_block(
    x: keras.KerasTensor, lateral: keras.KerasTensor, filters: int, name: str
) -> keras.KerasTensor:
    x = resize_to(x, lateral, name=f"{name}_resize")
    lateral = conv_bn_relu(lateral, filters, kernel=1, activation=None, name=f"{name}_lateral")
    x = activate(layers.Add(name=f"{name}_add")([x, lateral]), "relu", name=f"{name}_add")
    return conv_bn_relu(x, filters, name=f"{name}_blend")


def _add_detail(x: keras.KerasTensor, stem: keras.KerasTensor, filters: int) -> keras.KerasTensor:
    x = conv_bn_relu(x, filters, kernel=1, name="detail_reduce")
    x = resize_to(x, stem, name="detail_resize")
    lateral = conv_bn_relu(stem, filters, kernel=1, name="detail_lateral")
    x = layers.Concatenate(name="detail_concat")([x, lateral])
    return conv_bn_relu(x, filters, name="detail_blend")
