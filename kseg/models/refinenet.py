"""RefineNet: from deep to shallow, each block joins a finer map and pools it in a chain."""

from __future__ import annotations

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.blocks import check_input, enlarged
from kseg.registry import BACKBONES, MODELS
from kseg.upsampling import resize_to

_POOLINGS = 4


@MODELS.register("refinenet")
def RefineNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet101",
    backbone_weights: str | None = None,
    form: Form = "keras",
    light: bool = False,
    base_channels: int = 256,
    dropout: float = 0.5,
) -> keras.Model:
    """Build RefineNet, or its light-weight form.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        light: 1x1 convolutions throughout the decoder, and no residual units.
        base_channels: channels of the decoder; its deepest block has twice as many.
        dropout: rate on the two deepest maps and in front of the classifier.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Lin, Milan, Shen, Reid, "RefineNet: Multi-Path Refinement Networks for High-Resolution
        Semantic Segmentation", CVPR 2017, section 3, figure 3, arXiv:1611.06612; the light form:
        Nekrasov, Shen, Reid, "Light-Weight RefineNet for Real-Time Semantic Segmentation", BMVC
        2018, section 3, arXiv:1810.03272.

    Differs:
        Four pooling steps a block, three residual units behind them and the dropout are those of
        the released networks; the paper's text has two and one, the authors' light form no
        dropout. Residuals begin small. Resizing has half-pixel centres, not aligned corners.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](image, weights=backbone_weights, form=form)
    kernel, units_before, units_behind = (1, 0, 0) if light else (3, 2, 3)
    coarser = None
    for stride in (32, 16, 8, 4):
        x = features[stride]
        if stride >= 16:
            x = layers.Dropout(dropout, name=f"reduce{stride}_dropout")(x)
        width = 2 * base_channels if stride == 32 else base_channels
        x = _conv(x, width, kernel, name=f"reduce{stride}_conv")
        x = _residual_units(x, units_before, name=f"adapt{stride}")
        if coarser is not None:
            x = _fuse(x, coarser, base_channels, kernel, name=f"fuse{stride}")
        x = layers.ReLU(name=f"pool{stride}_relu")(x)
        x = _chained_residual_pooling(x, kernel, name=f"pool{stride}")
        coarser = _residual_units(x, units_behind, name=f"output{stride}")
    x = layers.Dropout(dropout, name="logits_dropout")(coarser)
    x = _conv(x, num_classes, 3, use_bias=True, name="logits_conv")
    x = enlarged(x, input_shape[:2])
    return keras.Model(image, {"logits": x}, name="refinenet")


def _residual_units(x: keras.KerasTensor, count: int, *, name: str) -> keras.KerasTensor:
    filters = x.shape[-1]
    for unit in (f"{name}_unit{number}" for number in range(1, count + 1)):
        y = layers.ReLU(name=f"{unit}_relu1")(x)
        y = _conv(y, filters, 3, scale=2.0, use_bias=True, name=f"{unit}_conv1")
        y = layers.ReLU(name=f"{unit}_relu2")(y)
        y = _conv(y, filters, 3, scale=0.1, name=f"{unit}_conv2")
        x = layers.Add(name=unit)([x, y])
    return x


def _fuse(
    fine: keras.KerasTensor, coarse: keras.KerasTensor, filters: int, kernel: int, *, name: str
) -> keras.KerasTensor:
    coarse = _conv(coarse, filters, kernel, name=f"{name}_coarse_conv")
    coarse = resize_to(coarse, fine, name=f"{name}_resize")
    fine = _conv(fine, filters, kernel, name=f"{name}_fine_conv")
    return layers.Add(name=name)([fine, coarse])


def _chained_residual_pooling(x: keras.KerasTensor, kernel: int, *, name: str) -> keras.KerasTensor:
    maps = [x]
    for number in range(1, _POOLINGS + 1):
        x = layers.MaxPooling2D(5, strides=1, padding="same", name=f"{name}_max{number}")(x)
        x = _conv(x, x.shape[-1], kernel, scale=0.1, name=f"{name}_conv{number}")
        maps.append(x)
    return layers.Add(name=name)(maps)


def _conv(
    x: keras.KerasTensor,
    filters: int,
    kernel: int,
    *,
    scale: float = 1.0,
    use_bias: bool = False,
    name: str,
) -> keras.KerasTensor:
    # Nothing is normalised, and 36 residuals add up: a scale of 0.1 keeps their sum near one.
    return layers.Conv2D(
        filters,
        kernel,
        padding="same",
        use_bias=use_bias,
        kernel_initializer=keras.initializers.VarianceScaling(scale),
        name=name,
    )(x)
