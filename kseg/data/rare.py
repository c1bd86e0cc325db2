"""Rare classes seen more often: which image a sample is of, and where it is cut.

As in `kseg.data.augment`, all that is random follows from the seed and the number of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from kseg.data.augment import Draws, window_extent

# Folded into the seed, so that these draws have nothing to do with those of `augment.draw`.
_REPEATS, _CROPS = 1, 2


@dataclass(frozen=True)
class RareSampling:
    """How rare classes are favoured; the defaults change nothing.

    Attributes:
        repeats: (images,) how often an epoch has each image, at least 1 each; None for once.
        crops: share of the samples that are cut around a rare class.
        rarity: (num_classes,) how much likelier a class is chosen for that than another, if an
            image has both; needed where `crops` is above 0.
    """

    repeats: np.ndarray | None = None
    crops: float = 0.0
    rarity: np.ndarray | None = None


def repeat_factors(presence: np.ndarray, threshold: float) -> np.ndarray:
    """Return how often an epoch should have each image.

    With f the share of the images that hold a class, the class asks for max(1, sqrt(t / f)), and an
    image is repeated as the rarest of its classes asks. Images without any valid pixel stay at 1.

    Args:
        presence: (images, num_classes) bool, which classes an image holds.
        threshold: t; classes that a larger share of the images hold ask for nothing.

    Returns:
        (images,) float64, at least 1.

    Source:
        A. Gupta, P. Dollar, R. Girshick, "LVIS", CVPR 2019, section 5.1 (repeat factor sampling),
        arXiv:1908.03195.

    Example:
        Of four images one holds class 1: f is 1/4, and with t = 1 it is wanted sqrt(4) = 2 times.

        >>> repeat_factors(np.array([[1, 1], [1, 0], [1, 0], [1, 0]]) > 0, 1.0)
        [2., 1., 1., 1.]
    """
    share = presence.mean(axis=0)
    asked = np.sqrt(threshold / np.where(share > 0, share, 1.0))
    return np.where(presence, np.maximum(1.0, asked), 1.0).max(axis=1)


def rarity(pixels: np.ndarray) -> np.ndarray:
    """Return one over the pixels of each class, 0 for a class without any; scaled to a sum of 1.

    Args:
        pixels: (num_classes,) of each class, over all images.
    """
    inverse = np.where(pixels > 0, 1.0 / np.maximum(pixels, 1), 0.0)
    return inverse / max(inverse.sum(), np.finfo(float).tiny)


def repeated(number: tf.Tensor, *, repeats: np.ndarray, seed: int) -> tf.Tensor:
    """Return which file is sample `number` where images are repeated.

    An epoch has sum(repeats) samples, rounded up, in a new order each time. A file that is wanted
    2.3 times is there three times in three epochs of ten and twice in the others; none is left out.

    Args:
        number: of the sample, counted through all epochs, int64.
        repeats: (files,) as of `repeat_factors`.
        seed: of the whole training.
    """
    count = int(np.ceil(repeats.sum() - 1e-6))
    ends = tf.constant(np.cumsum(repeats) * (count / repeats.sum()), tf.float64)
    epoch, position = number // count, number % count
    key = tf.stack([tf.cast(seed, tf.int64), epoch])
    slot = tf.random.experimental.index_shuffle(position, key, count - 1)
    # One offset an epoch: a file as long as 2.3 slots holds two or three of their middles.
    folded = tf.random.fold_in(key, _REPEATS, alg="philox")
    offset = tf.random.stateless_uniform([], folded, dtype=tf.float64, alg="philox")
    place = tf.cast(slot, tf.float64) + offset
    found = tf.searchsorted(ends, place[tf.newaxis], side="right")[0]
    return tf.cast(tf.minimum(found, len(repeats) - 1), tf.int64)


def aimed(
    draws: Draws,
    mask: tf.Tensor,
    size: tuple[int, int],
    *,
    sampling: RareSampling,
    seed: int,
    number: tf.Tensor,
) -> Draws:
    """Move the window of a share of the samples to where a rare class is.

    A class of the image is drawn by rarity, one of its pixels evenly, and a window that shows this
    pixel at an even place. Scale, flip and colours stay as they were drawn.

    Args:
        draws: the decisions about the sample.
        mask: (h, w) uint8 class ids of the source.
        size: (height, width) of the sample.
        sampling: how often, and the rarity of each class.
        seed: of the whole training.
        number: of the sample, counted through all epochs, int64.

    Returns:
        The decisions with another place of the window, or as they were.
    """
    key = tf.random.fold_in(tf.stack([tf.cast(seed, tf.int64), number]), _CROPS, alg="philox")
    u = tf.random.stateless_uniform([5], key, alg="philox")
    chances = _chances(mask, sampling.rarity)
    wanted = (u[0] < sampling.crops) & (chances[-1] > 0)

    def at_a_rare_pixel() -> tuple[tf.Tensor, tf.Tensor]:
        pixel = _pixel_of(mask, chances, u[1], u[2])
        shape, covered = tf.shape(mask), window_extent(size, draws.scale)
        return tuple(
            _position(pixel[axis], shape[axis], covered[axis], u[3 + axis]) for axis in (0, 1)
        )

    y, x = tf.cond(wanted, at_a_rare_pixel, lambda: (draws.y, draws.x))
    return draws._replace(y=y, x=x)


def _chances(mask: tf.Tensor, rarity: np.ndarray) -> tf.Tensor:
    """Return the running sum of the rarities of the classes that are there."""
    ids = tf.cast(tf.reshape(mask, [-1]), tf.int32)
    there = tf.math.bincount(ids, minlength=256, maxlength=256)[: len(rarity)] > 0
    return tf.cumsum(tf.where(there, tf.constant(rarity, tf.float32), 0.0))


def _pixel_of(mask: tf.Tensor, chances: tf.Tensor, u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    """Return (row, column) of a pixel: its class drawn by u, which one of them by v."""
    class_id = tf.searchsorted(chances, (u * chances[-1])[tf.newaxis], side="right")[0]
    pixels = tf.where(tf.cast(mask, tf.int32) == tf.minimum(class_id, tf.size(chances) - 1))
    count = tf.shape(pixels)[0]
    which = tf.minimum(tf.cast(v * tf.cast(count, tf.float32), tf.int32), count - 1)
    return tf.cast(pixels[which], tf.int32)


def _position(pixel: tf.Tensor, extent: tf.Tensor, covered: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """Return where, from 0 to 1, a window must lie along an axis to show the pixel."""
    slack = extent - covered
    first, last = tf.maximum(pixel - covered + 1, 0), tf.minimum(pixel, slack)
    start = first + tf.cast(u * tf.cast(last - first + 1, tf.float32), tf.int32)
    middle = (tf.cast(tf.minimum(start, last), tf.float32) + 0.5) / tf.cast(slack + 1, tf.float32)
    # A window that is larger than the source shows all of it, wherever it lies.
    return tf.where(slack > 0, middle, u)
