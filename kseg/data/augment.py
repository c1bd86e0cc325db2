"""Steps that take (image, mask) and return (image, mask), and the draws that decide what they do.

A step never draws anything itself: `draw` makes all decisions about one sample from the seed and
the number of the sample, so the same sample looks the same in every process and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from kseg.data.dataset import IGNORE_LABEL

Step = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

PAD_GREY = 114.5  # the mean of ImageNet's three means: near what a backbone turns into zero
_MID_GREY = 127.5
_LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32
)


@dataclass(frozen=True)
class Augmentation:
    """How far training samples may depart from the files.

    Attributes:
        scale: smallest and largest scale; drawn log-uniformly, 1 keeps the source's own pixels.
        flip: whether half of the samples are mirrored left to right.
        brightness: largest shift, as a share of the range 0 to 255.
        contrast: largest relative change of the distance to mid-grey.
        saturation: largest relative change of the distance to the grey of the same luma.
        hue: largest rotation of the colours, in turns.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    brightness: float = 0.125
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.03

    @property
    def changes_colour(self) -> bool:
        """Whether any colour setting is above zero."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))


class Draws(NamedTuple):
    """The decisions about one sample, as scalar tensors."""

    scale: tf.Tensor
    y: tf.Tensor
    x: tf.Tensor
    flip: tf.Tensor
    brightness: tf.Tensor
    contrast: tf.Tensor
    saturation: tf.Tensor
    hue: tf.Tensor


class Window(NamedTuple):
    """Where pixels are taken from the source and put in the sample, each (top, left) or (h, w)."""

    source: tf.Tensor
    source_size: tf.Tensor
    target: tf.Tensor
    target_size: tf.Tensor


def draw(augmentation: Augmentation, *, seed: int, number: tf.Tensor) -> Draws:
    """Decide what happens to one sample.

    Args:
        augmentation: the limits.
        seed: of the whole training.
        number: of the sample, counted through all epochs, int64.

    Returns:
        A pure function of the arguments.
    """
    u = tf.random.stateless_uniform([8], [tf.cast(seed, tf.int64), number], alg="philox")
    low, high = (math.log(scale) for scale in augmentation.scale)
    signed = 2.0 * u[4:] - 1.0
    return Draws(
        scale=tf.exp(low + (high - low) * u[0]),
        y=u[1],
        x=u[2],
        flip=(u[3] < 0.5) & augmentation.flip,
        brightness=255.0 * augmentation.brightness * signed[0],
        contrast=1.0 + augmentation.contrast * signed[1],
        saturation=1.0 + augmentation.saturation * signed[2],
        hue=2.0 * math.pi * augmentation.hue * signed[3],
    )


def augment(augmentation: Augmentation, size: tuple[int, int], draws: Draws) -> Step:
    """Return the whole chain: cut, flip, jitter, place.

    Args:
        augmentation: decides whether colours are touched at all.
        size: (height, width) of the sample.
        draws: the decisions about this sample.

    Returns:
        A step from a source of any size, uint8, to float32 (H, W, 3) and uint8 (H, W).
    """

    def step(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        window = choose_window(tf.shape(mask), size, scale=draws.scale, y=draws.y, x=draws.x)
        image, mask = flip(draws.flip)(*cut(window)(image, mask))
        if augmentation.changes_colour:
            image, mask = jitter(*colour_matrix(draws))(image, mask)
        return place(window, size)(image, mask)

    return step


def choose_window(
    shape: tf.Tensor, size: tuple[int, int], *, scale: tf.Tensor, y: tf.Tensor, x: tf.Tensor
) -> Window:
    """Choose the part of the source that the sample shows, before a pixel of it is resized.

    The sample covers size / scale source pixels. Where that is more than there are, the source
    lies at a random place inside the sample and the rest is padding.

    Args:
        shape: (height, width) of the source.
        size: (height, width) of the sample.
        scale: sample pixels per source pixel.
        y: position of the window from 0 (first possible) to 1 (last).
        x: the same from left to right.
    """
    covered, size = window_extent(size, scale), tf.constant(size, tf.int32)
    slack = shape - covered
    room = tf.cast(tf.abs(slack) + 1, tf.float32)
    shift = tf.minimum(tf.cast(tf.stack([y, x]) * room, tf.int32), tf.abs(slack))
    first = shift * tf.sign(slack)  # negative: the source begins inside the sample
    start, end = tf.maximum(first, 0), tf.minimum(first + covered, shape)
    factor = tf.cast(size, tf.float32) / tf.cast(covered, tf.float32)
    before = tf.minimum(_round(tf.cast(start - first, tf.float32) * factor), size - 1)
    after = tf.minimum(_round(tf.cast(end - first, tf.float32) * factor), size)
    return Window(start, end - start, before, tf.maximum(1, after - before))


def window_extent(size: tuple[int, int], scale: tf.Tensor) -> tf.Tensor:
    """Return how many source pixels, (height, width), a sample of `size` covers at a scale."""
    return tf.maximum(1, _round(tf.constant(size, tf.float32) / scale))


def cut(window: Window) -> Step:
    """Return the step that takes the window out of the source and resizes it.

    The image becomes float32 by bilinear, the mask stays as it is by nearest; both sample at
    the centres of pixels, so a mask pixel is the one its image pixel is closest to.
    """

    def step(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        begin, extent = tf.concat([window.source, [0]], 0), tf.concat([window.source_size, [3]], 0)
        image = tf.raw_ops.ResizeBilinear(
            images=tf.slice(image, begin, extent)[tf.newaxis],
            size=window.target_size,
            half_pixel_centers=True,
        )[0]
        rows, columns = (_nearest(window, axis) for axis in (0, 1))
        # Whole rows are gathered much faster than single ids: gather rows, transpose, gather
        # rows, transpose.
        mask = tf.transpose(tf.gather(tf.transpose(tf.gather(mask, rows)), columns))
        return image, mask

    return step


def flip(on: tf.Tensor) -> Step:
    """Return the step that mirrors left to right if `on`."""

    def step(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        turned = [False, on]
        return tf.raw_ops.Reverse(tensor=image, dims=[*turned, False]), tf.raw_ops.Reverse(
            tensor=mask, dims=turned
        )

    return step


def colour_matrix(draws: Draws) -> tuple[tf.Tensor, tf.Tensor]:
    """Fuse brightness, contrast, saturation and hue into one affine map.

    Returns:
        matrix (3, 3) and offset (3,): a colour becomes colour @ matrix + offset. Contrast turns
        around mid-grey, so that no pass over the image is needed; hue turns the IQ plane.
    """
    cos, sin = tf.cos(draws.hue), tf.sin(draws.hue)
    zero, one = tf.zeros_like(cos), tf.ones_like(cos)
    turn = tf.reshape(tf.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos]), (3, 3))
    hue = np.linalg.inv(_YIQ).astype(np.float32) @ turn @ _YIQ
    grey = _LUMA @ np.ones((1, 3), np.float32)
    saturation = draws.saturation * np.eye(3, dtype=np.float32) + (1.0 - draws.saturation) * grey
    matrix = draws.contrast * tf.matmul(hue, saturation, transpose_a=True)
    offset = _MID_GREY * (1.0 - draws.contrast) + draws.brightness
    return matrix, tf.repeat(offset[tf.newaxis], 3)


def jitter(matrix: tf.Tensor, offset: tf.Tensor) -> Step:
    """Return the step that maps each colour to colour @ matrix + offset, kept within 0 to 255."""

    def step(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # A 1 x 1 convolution: half the time of the same product as a matmul of a thin matrix.
        kernel = matrix[tf.newaxis, tf.newaxis]
        image = tf.nn.bias_add(tf.nn.conv2d(image[tf.newaxis], kernel, 1, "VALID"), offset)
        return tf.clip_by_value(image[0], 0.0, 255.0), mask

    return step


def place(window: Window, size: tuple[int, int]) -> Step:
    """Return the step that pads to `size`: the image with a neutral grey, the mask with 255."""

    def step(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        after = tf.constant(size) - window.target - window.target_size
        edges = tf.stack([window.target, after], 1)
        image = tf.pad(image, tf.concat([edges, [[0, 0]]], 0), constant_values=PAD_GREY)
        mask = tf.pad(mask, edges, constant_values=IGNORE_LABEL)
        return tf.ensure_shape(image, (*size, 3)), tf.ensure_shape(mask, size)

    return step


def relabel(table: np.ndarray) -> Step:
    """Return the step that looks each mask id up in a table of 256 uint8."""
    # Two neighbours at once, in a table of all pairs: half as many look-ups.
    pairs = (table[:, np.newaxis].astype(np.uint16) << 8) | table[np.newaxis, :]
    pairs = pairs.reshape(-1)

    def step(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        odd = tf.size(mask) % 2
        ids = tf.pad(tf.reshape(mask, [-1]), [[0, odd]])
        two = tf.cast(tf.bitcast(tf.reshape(ids, [-1, 2]), tf.uint16), tf.int32)
        ids = tf.reshape(tf.bitcast(tf.gather(pairs, two), tf.uint8), [-1])
        return image, tf.reshape(ids[: tf.size(mask)], tf.shape(mask))

    return step


def _nearest(window: Window, axis: int) -> tf.Tensor:
    extent, count = window.source_size[axis], window.target_size[axis]
    centres = tf.cast(tf.range(count), tf.float32) + 0.5
    position = centres * tf.cast(extent, tf.float32) / tf.cast(count, tf.float32)
    return window.source[axis] + tf.minimum(tf.cast(position, tf.int32), extent - 1)


def _round(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.round(value), tf.int32)
