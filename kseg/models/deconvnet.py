"""DeconvNet: VGG16 down to one vector, and its mirror image up again through unpooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import layers

from kseg.backbones.layers import CAFFE, normalise
from kseg.blocks import activate, batch_norm, check_input, classifier
from kseg.errors import UserError
from kseg.models.segnet import (
    KERNEL_DEVIATION,
    VGG16_ENCODER,
    Widths,
    conv_bias_bn_relu,
    decode,
    encode,
    start_from_vgg16,
)
from kseg.registry import MODELS

_DECODER: Widths = ((1, 1), (2, 1), (4, 4, 2), (8, 8, 4), (8, 8, 8))
_BASE_CHANNELS = 64
_FC6_KERNEL = 7

Box = tuple[int, int, int, int]


@MODELS.register(
    "deconvnet",
    limits={
        "rounding": "where two pixels of a window are equal up to rounding, a converted file may "
        "unpool at the other one"
    },
)
def DeconvNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone_weights: str | None = None,
    fc_channels: int = 4096,
) -> keras.Model:
    """Build DeconvNet for whole images; `fuse_proposals` applies it to parts of one.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32. The paper's
            is 224 x 224.
        num_classes: number of classes, background among them.
        backbone_weights: None, "imagenet" or a file of them, of VGG16: where the convolutions of
            the encoder start.
        fc_channels: channels of fc6 and fc7; most of the weights are theirs.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or the weights cannot be had.

    Source:
        Noh, Hong, Han, "Learning Deconvolution Network for Semantic Segmentation", ICCV 2015,
        section 3, arXiv:1505.04366; widths as in github.com/HyeonwooNoh/DeconvNet,
        `model/DeconvNet/DeconvNet_inference_deploy.prototxt`.

    Differs:
        The 3x3 deconvolutions have stride 1, so they are built as convolutions: the same
        functions, the kernel turned around. At 224 x 224 fc6 gathers the 7x7 map into one vector,
        which its deconvolution spreads again, as in the paper; at other sizes both pad by "same",
        so that each position gathers and spreads the 7x7 around it, with the same weights. fc6
        and fc7 start at random, as the convolutional ImageNet files do not hold them.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    x, indices = encode(normalise(image, CAFFE), VGG16_ENCODER, _BASE_CHANNELS)
    x = _fully_connected(x, fc_channels)
    x = decode(x, indices, _DECODER, _BASE_CHANNELS)
    logits = classifier(x, num_classes, input_shape[:2])
    model = keras.Model(image, {"logits": logits}, name="deconvnet")
    start_from_vgg16(model, backbone_weights)
    return model


def fuse_proposals(
    scores: Callable[[np.ndarray], np.ndarray], image: np.ndarray, boxes: Iterable[Box]
) -> np.ndarray:
    """Score the parts of an image that may hold an object, and keep the best score of each pixel.

    Args:
        scores: gives the scores (h, w, C) of a part uint8 (h, w, 3), such as the `logits` of a
            `kseg.inference.Predictor`.
        image: uint8 (H, W, 3), RGB.
        boxes: (left, top, right, bottom) of each part in pixels, right and bottom exclusive. The
            paper takes the 50 best of EdgeBox, widened to take in what lies around an object.
            What of a box lies outside of the image is black.

    Returns:
        (H, W, C) float32: the largest score that a box gives a pixel, or 0 where that is negative
        or no box lies; its softmax over the classes are the paper's probabilities.

    Raises:
        UserError: if there are no boxes, or one has no pixel in common with the image.

    Source:
        Noh, Hong, Han, ICCV 2015, "Aggregating Instance-wise Segmentation Maps", equation 1,
        arXiv:1505.04366; github.com/HyeonwooNoh/DeconvNet,
        `inference/generate_EDeconvNet_CRF_results.m`.

    Example:
        >>> predictor = kseg.load("runs/deconvnet")
        >>> fuse_proposals(predictor.logits, image, [(0, 0, 240, 200), (100, 40, 360, 300)])
    """
    fused = None
    for box in boxes:
        part, place = _cut(image, box)
        given = scores(part)
        if fused is None:
            fused = np.zeros((*image.shape[:2], given.shape[-1]), np.float32)
        left, top = box[:2]
        inside = given[_shifted(place[0], -top), _shifted(place[1], -left)]
        fused[place] = np.maximum(fused[place], inside)
    if fused is None:
        raise UserError("there are no boxes; give at least one (left, top, right, bottom)")
    return fused


def _cut(image: np.ndarray, box: Box) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Return what lies in a box, black outside of the image, and where in the image it lies."""
    height, width = image.shape[:2]
    left, top, right, bottom = box
    place = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    if any(side.start >= side.stop for side in place):
        raise UserError(f"box {box} has no pixel of an image {width} wide and {height} high")
    rows, columns = place
    margins = (
        (rows.start - top, bottom - rows.stop),
        (columns.start - left, right - columns.stop),
        (0, 0),
    )
    return np.pad(image[place], margins), place


def _shifted(pixels: slice, offset: int) -> slice:
    return slice(pixels.start + offset, pixels.stop + offset)


def _fully_connected(x: keras.KerasTensor, channels: int) -> keras.KerasTensor:
    filters = x.shape[-1]
    paper = x.shape[1:3] == (_FC6_KERNEL, _FC6_KERNEL)
    padding = "valid" if paper else "same"
    x = conv_bias_bn_relu(x, channels, _FC6_KERNEL, padding=padding, name="fc6")
    x = conv_bias_bn_relu(x, channels, 1, name="fc7")
    small = keras.initializers.RandomNormal(stddev=KERNEL_DEVIATION)
    x = layers.Conv2DTranspose(
        filters, _FC6_KERNEL, padding=padding, kernel_initializer=small, name="fc6_deconv"
    )(x)
    return activate(batch_norm(x, name="fc6_deconv"), "relu", name="fc6_deconv")
