"""DeepLab v2: atrous convolutions of several rates score the deepest map side by side."""

from __future__ import annotations

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.blocks import check_input, enlarged
from kseg.models.attention_to_scale import SUPERVISED, at_scales
from kseg.models.deeplabv1 import dilated_vgg16, fully_connected
from kseg.registry import BACKBONES, MODELS


@MODELS.register("deeplabv2", aux=SUPERVISED)
def DeepLabV2(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet101",
    backbone_weights: str | None = None,
    form: Form = "keras",
    rates: tuple[int, ...] = (6, 12, 18, 24),
    msc: bool = False,
    aux: bool = False,
) -> keras.Model:
    """Build DeepLab v2 on a residual network.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor, dilated to stride 8.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        rates: atrous rates of the branches; one as large as the map, an eighth of the image,
            leaves of its 3x3 kernel the middle alone.
        msc: run on the image, three quarters and half of it with the same weights, and take the
            maximum of the three score maps ("MSC").
        aux: add the scores of each of these scales as training-only outputs of weight 1, as the
            paper trains; brings `msc` along.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab: Semantic Image Segmentation with
        Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", PAMI 2017,
        sections 3 and 4.1.2, arXiv:1606.00915.

    Differs:
        Sizes are multiples of 32, not 8n + 1, and losses are taken at the size of the image. The
        batch normalisation learns, each scale's statistics into one mean, unless the training
        freezes it (`--frozen-bn`), as the authors do; `--head-rate 10` is theirs, too.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](image, output_stride=8, weights=backbone_weights, form=form)
    net = keras.Model(image, {"scores": _aspp(features.stages[-1], num_classes, rates)})
    maps = at_scales(net, (100, 75, 50) if msc or aux else (100,))
    scores = [map_["scores"] for map_ in maps.values()]
    x = layers.Maximum(name="merge")(scores) if len(scores) > 1 else scores[0]
    outputs = {"logits": enlarged(x, size)}
    if aux:
        outputs |= {name: enlarged(map_["scores"], size, name=name) for name, map_ in maps.items()}
    return keras.Model(image, outputs, name="deeplabv2")


@MODELS.register("deeplabv2_vgg")
def DeepLabV2VGG(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone_weights: str | None = None,
    rates: tuple[int, ...] = (6, 12, 18, 24),
    fc_channels: int = 1024,
    dropout: float = 0.5,
) -> keras.Model:
    """Build DeepLab v2 on VGG16: an fc6, fc7 and fc8 for each rate, and the sum of their scores.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone_weights: None, "imagenet" or a file of VGG16's.
        rates: atrous rates of the branches: (6, 12, 18, 24) is the paper's ASPP-L, (2, 4, 8, 12)
            its ASPP-S, (12,) its LargeFOV.
        fc_channels: channels of each fc6 and fc7.
        dropout: rate after each fc6 and fc7.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab: Semantic Image Segmentation with
        Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", PAMI 2017,
        sections 3 and 4.1.1, arXiv:1606.00915.

    Differs:
        Sizes are multiples of 32, not 8n + 1, and the loss is taken at the size of the image.
        fc6 and fc7 start at random.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    pool5 = dilated_vgg16(image, weights=backbone_weights).stages[-1]
    scores = []
    for rate in rates:
        suffix = f"_rate{rate}"
        x = fully_connected(pool5, fc_channels, rate=rate, dropout=dropout, suffix=suffix)
        scores.append(layers.Conv2D(num_classes, 1, name=f"fc8{suffix}")(x))
    scores = layers.Add(name="aspp")(scores)
    logits = enlarged(scores, input_shape[:2])
    return keras.Model(image, {"logits": logits}, name="deeplabv2_vgg")


def _aspp(x: keras.KerasTensor, num_classes: int, rates: tuple[int, ...]) -> keras.KerasTensor:
    """Return the sum of one 3x3 convolution a rate; no batch normalisation, unlike v3's."""
    scores = [
        layers.Conv2D(
            num_classes, 3, padding="same", dilation_rate=rate, name=f"aspp_rate{rate}_conv"
        )(x)
        for rate in rates
    ]
    return layers.Add(name="aspp")(scores)
