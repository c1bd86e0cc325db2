"""Attention to Scale: one net sees several sizes of the image, and each pixel weighs its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import keras
from keras import layers, ops

from kseg.blocks import check_input, enlarged
from kseg.models.deeplabv1 import average, dilated_vgg16, fully_connected
from kseg.registry import MODELS
from kseg.upsampling import resize_to

Merge = Literal["attention", "max", "average"]
SUPERVISED = {"scale100": (None, 1.0), "scale75": (None, 1.0), "scale50": (None, 1.0)}
_SCALES = {2: (100, 50), 3: (100, 75, 50)}


@MODELS.register("attention_to_scale", aux=SUPERVISED)
def AttentionToScale(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone_weights: str | None = None,
    merge: Merge = "attention",
    scales: Literal[2, 3] = 3,
    fc_channels: int = 1024,
    attention_channels: int = 512,
    dropout: float = 0.5,
    aux: bool = False,
) -> keras.Model:
    """Build a DeepLab-LargeFOV that sees the image at several scales and merges its scores.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone_weights: None, "imagenet" or a file of VGG16's.
        merge: "attention" sums the scores of the scales by weights of each pixel's own; "max"
            and "average" are what the paper compares it with.
        scales: 2 is the image and half of it; 3 also takes three quarters.
        fc_channels: channels of fc6 and fc7.
        attention_channels: channels in between of the layers that weigh.
        dropout: rate after fc6 and fc7 and in between of the layers that weigh.
        aux: add each scale's own scores as training-only outputs, of weight 1 ("extra
            supervision").

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Chen, Yang, Wang, Xu, Yuille, "Attention to Scale: Scale-aware Semantic Image
        Segmentation", CVPR 2016, section 3, arXiv:1511.03339.

    Differs:
        Losses are taken at the size of the image; those of the paper on labels made smaller. What
        `deeplabv1` says of LargeFOV holds here.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    net = _large_fov(image, num_classes, backbone_weights, fc_channels, dropout)
    maps = at_scales(net, _SCALES[scales])
    scores = [map_["scores"] for map_ in maps.values()]
    if merge == "attention":
        features = [map_["fc7"] for map_ in maps.values()]
        scores.append(_attention(features, attention_channels, dropout))
    layer = {"attention": WeightedSum, "max": layers.Maximum, "average": layers.Average}[merge]
    outputs = {"logits": enlarged(layer(name="merge")(scores), size)}
    if aux:
        outputs |= {name: enlarged(map_["scores"], size, name=name) for name, map_ in maps.items()}
    return keras.Model(image, outputs, name="attention_to_scale")


def at_scales(net: keras.Model, percents: Sequence[int]) -> dict[str, dict[str, keras.KerasTensor]]:
    """Run a net on its image at several sizes, with the same weights.

    Args:
        net: from one image (B, H, W, 3) to a dict of maps; flat, and without layers that know
            the image's size.
        percents: sides of the images as percents of the net's own; 100 is the net itself.

    Returns:
        For "scale100" and so on the maps by name, all as large as those of `net`.
    """
    height, width = net.input.shape[1:3]
    found = {}
    for percent in percents:
        scale = f"scale{percent}"
        size = (height * percent // 100, width * percent // 100)
        image = resize_to(net.input, size, name=f"{scale}_image")
        # `call` records the net's layers once more; calling the net would hide them in one layer.
        maps = net.output if percent == 100 else net.call(image)
        found[scale] = {
            name: resize_to(map_, net.output[name], name=f"{scale}_{name}")
            for name, map_ in maps.items()
        }
    return found


@keras.saving.register_keras_serializable("kseg")
class WeightedSum(layers.Layer):
    """The sum of maps, each times its own channel of the last input."""

    def call(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Return (B, h, w, C) of S maps (B, h, w, C) and weights (B, h, w, S)."""
        *maps, weights = inputs
        weights = ops.split(weights, len(maps), axis=-1)
        return sum(map_ * weight for map_, weight in zip(maps, weights, strict=True))


def _large_fov(
    image: keras.KerasTensor,
    num_classes: int,
    weights: str | None,
    fc_channels: int,
    dropout: float,
) -> keras.Model:
    pool5 = average(dilated_vgg16(image, weights=weights).stages[-1])
    fc7 = fully_connected(pool5, fc_channels, dropout=dropout)
    scores = layers.Conv2D(num_classes, 1, name="fc8")(fc7)
    return keras.Model(image, {"fc7": fc7, "scores": scores})


def _attention(
    features: list[keras.KerasTensor], filters: int, dropout: float
) -> keras.KerasTensor:
    """Return a weight for each pixel and scale; those of a pixel sum to 1."""
    x = layers.Concatenate(name="attention_concat")(features)
    x = layers.Conv2D(
        filters,
        3,
        padding="same",
        activation="relu",
        kernel_initializer="he_normal",
        name="attention_conv1",
    )(x)
    x = layers.Dropout(dropout, name="attention_dropout")(x)
    x = layers.Conv2D(len(features), 1, name="attention_conv2")(x)
    return layers.Softmax(dtype="float32", name="attention")(x)
