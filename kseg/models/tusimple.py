"""TuSimple: rates that differ from unit to unit leave no holes; channels become fine pixels."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.backbones.units import configured
from kseg.blocks import check_input, enlarged
from kseg.registry import MODELS
from kseg.upsampling import depth_to_space

_OUTPUT_STRIDE = 8
# Dilation rates of the units at strides 16 and 32 of the undilated network. The longest stage
# there is, ResNet-152's, has 36 units.
_HDC = {
    "released": {16: (2, 2, 5, 9) + 8 * (1, 2, 5, 9), 32: (5, 9, 17)},
    "simple": {16: (1, 2, 3), 32: (3, 4, 5)},
}


@MODELS.register("tusimple")
def TuSimple(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet101",
    backbone_weights: str | None = None,
    form: Form = "keras",
    deep_stem: bool = False,
    hdc: Literal["released", "simple"] = "released",
    rates: tuple[int, ...] = (6, 12, 18, 24),
    cell_width: Literal[1, 2, 4] = 2,
) -> keras.Model:
    """Build TuSimple's network: hybrid dilated convolution, then dense upsampling convolution.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor, which gives a map at stride 8. One that
            has no dilation rates for single units keeps its own under the default of `hdc`.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        deep_stem: begin a ResNet with three 3x3 convolutions, as in the paper; there are no
            published weights for it.
        hdc: rates of the units: "released" cycles through 1, 2, 5, 9 and ends in 5, 9, 17;
            "simple" through 1, 2, 3 and ends in 3, 4, 5.
        rates: atrous rates of the 3x3 convolutions that predict; their scores are summed. (1,)
            is the paper's plain DUC.
        cell_width: side in pixels of what one score stands for; 1 predicts every pixel by itself.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or the backbone has no deep stem, or
            "simple" is asked of one that has no rates for single units.

    Source:
        Wang, Chen, Yuan, Liu, Huang, Hou, Cottrell, "Understanding Convolution for Semantic
        Segmentation", WACV 2018, section 3, arXiv:1702.08502; github.com/TuSimple/TuSimple-DUC.

    Differs:
        The 7x7 stem is the default. Channels are pixel-major, as TensorFlow's depth to space,
        not class-major. "simple" repeats its group to the end of a stage, whatever is left over.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    build = configured(backbone, rates=_HDC[hdc], insist=hdc != "released", deep_stem=deep_stem)
    features = build(image, output_stride=_OUTPUT_STRIDE, weights=backbone_weights, form=form)
    x = _dense_upsampling(features.stages[-1], num_classes, rates, _OUTPUT_STRIDE // cell_width)
    x = enlarged(x, input_shape[:2])
    return keras.Model(image, {"logits": x}, name="tusimple")


def _dense_upsampling(
    x: keras.KerasTensor, num_classes: int, rates: tuple[int, ...], factor: int
) -> keras.KerasTensor:
    scores = [
        layers.Conv2D(
            factor**2 * num_classes,
            3,
            padding="same",
            dilation_rate=rate,
            name=f"duc_rate{rate}_conv",
        )(x)
        for rate in rates
    ]
    return depth_to_space(layers.Add(name="duc_sum")(scores), factor, name="duc")
