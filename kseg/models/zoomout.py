"""Zoom-Out: each pixel is classified by what all layers saw of it, from near to far."""

from __future__ import annotations

import itertools

import keras
from keras import layers

from kseg.backbones.vgg import VGG16
from kseg.blocks import check_input, classifier, conv_bn_relu, pool_to
from kseg.registry import MODELS
from kseg.upsampling import resize_to


@MODELS.register("zoomout")
def ZoomOut(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone_weights: str | None = None,
    fine_tune: bool = False,
    fc_channels: int = 1024,
    dropout: float = 0.5,
) -> keras.Model:
    """Build Zoom-Out for pixels: a classifier of three layers on all maps of VGG16 at stride 4.

    `kseg.superpixels` makes the paper's regions of what it says.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone_weights: None, "imagenet" or a file of VGG16's.
        fine_tune: train VGG16, too, by small steps: at Adam's 1e-3 its deep maps go constant. The
            paper trains the classifier alone, on what ImageNet taught the network; without such
            weights the maps stay random projections.
        fc_channels: channels of the classifier's two hidden layers.
        dropout: rate after each of them.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Mostajabi, Yadollahpour, Shakhnarovich, "Feedforward Semantic Segmentation with Zoom-Out
        Features", CVPR 2015, section 3, arXiv:1412.0774; at stride 4 as in the authors' fully
        convolutional release.

    Differs:
        Pixels at stride 4 stand for superpixels. The mean of conv5_3 stands for the whole image's
        fc7; there is no fc7 of the surroundings. What the first layer makes of each map is
        batch-normalised, where the paper scales features over the training set. Classes are
        weighted by the run's own loss, if at all.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    grid = (size[0] // 4, size[1] // 4)
    vgg = keras.Model(image, VGG16(image, weights=backbone_weights).stages[-1])
    vgg.trainable = fine_tune
    maps = [layer.output for layer in vgg.layers if isinstance(layer, layers.ReLU)]
    scene = pool_to(maps[-1], 1, name="scene")
    x = layers.ReLU(name="fc1_relu")(_first_layer([*maps, scene], fc_channels, grid))
    x = layers.Dropout(dropout, name="fc1_dropout")(x)
    x = layers.Conv2D(
        fc_channels, 1, activation="relu", kernel_initializer="he_normal", name="fc2"
    )(x)
    x = layers.Dropout(dropout, name="fc2_dropout")(x)
    return keras.Model(image, {"logits": classifier(x, num_classes, size)}, name="zoomout")


def _first_layer(
    sources: list[keras.KerasTensor], filters: int, grid: tuple[int, int]
) -> keras.KerasTensor:
    """Return a 1x1 convolution of all sources, resized to the grid and joined.

    It is a sum of slices, those of coarse sources convolved before they are resized: both are
    linear, so nothing changes but the work, and 4,736 channels never stand side by side. Sources
    differ by orders of magnitude, so each slice is normalised; the weak ones would go unheard.
    """
    slices = []
    for number, x in enumerate(sources, start=1):
        if x.shape[1] > grid[0]:
            x = resize_to(x, grid, name=f"zoom{number}_resize")
        slices.append(conv_bn_relu(x, filters, kernel=1, activation=None, name=f"zoom{number}"))
    levels = []
    for _, level in itertools.groupby(slices, key=_height):
        x = layers.Add(name=f"level{len(levels) + 1}")(list(level))
        levels.append(resize_to(x, grid, name=f"level{len(levels) + 1}_resize"))
    return layers.Add(name="fc1")(levels)


def _height(x: keras.KerasTensor) -> int:
    return x.shape[1]
