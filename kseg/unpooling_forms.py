"""Unpooling as int8 files hold it: choices between integers instead of products with masks.

Masks of 0 and 1 would be made in float. LiteRT compares and chooses integers as they are, and all
else here are operators of XNNPACK.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf
from keras import layers

from kseg.upsampling import PoolingIndices, Unpooling

# LiteRT compares int8 values in steps of 1/256, and takes steps below 1 alone. In a range of this
# length it tells any two of them from one another; in one shorter than 1 it would not.
REACH = 16.0


class Choices:
    """Puts choices in the place of masks while a model is cloned.

    Between `PoolingIndices` and `Unpooling` there is one tensor of masks; here there are several,
    of which the clone knows the first, so that the others are remembered.
    """

    def __init__(self, kind: type[FirstUnpooling] | type[SharedUnpooling]) -> None:
        """Take what stands for `Unpooling`."""
        self.kind = kind
        self.found: dict[int, list[keras.KerasTensor]] = {}  # by the id of the first

    def clone(self, layer: keras.Layer) -> keras.Layer | None:
        """Return what stands for a layer; None of one that has nothing to do with unpooling."""
        if isinstance(layer, PoolingIndices):
            return MaximaFound(name=layer.name)
        return self.kind(name=layer.name) if isinstance(layer, Unpooling) else None

    def call(
        self,
        layer: keras.Layer,
        inputs: list[keras.KerasTensor],
        comparable: Callable[[keras.KerasTensor], keras.KerasTensor] = lambda x: x,
    ) -> keras.KerasTensor:
        """Call what `clone` gave.

        Args:
            layer: as `clone` gave it.
            inputs: what the original layer would take.
            comparable: brings a rounded map to a range that is `REACH` long, and tells the
                converter of it, which does not always find ranges behind `Corners`.

        Returns:
            What stands for the result of the original layer.
        """
        if isinstance(layer, MaximaFound):
            x, pooled = inputs
            corners = Corners(name=f"{layer.name}_corners")(x)
            found = layer([comparable(one) for one in (*corners, pooled)])
            self.found[id(found[0])] = found
            return found[0]
        x, first = inputs
        return layer([x, *self.found[id(first)]])


@keras.saving.register_keras_serializable("kseg")
class Corners(layers.Layer):
    """The four pixels of each 2 x 2 window, row by row."""

    def call(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Return four (B, h, w, C) of a map (B, 2h, 2w, C)."""
        # Strided slices would be slow: LiteRT has no fast operator for them.
        return tf.split(tf.nn.space_to_depth(x, 2), 4, axis=-1)

    def compute_output_spec(self, x: keras.KerasTensor) -> list[keras.KerasTensor]:
        """Return the shapes of the results."""
        batch, height, width, channels = x.shape
        shape = (batch, height // 2, width // 2, channels)
        return [keras.KerasTensor(shape, x.dtype) for _ in range(4)]


@keras.saving.register_keras_serializable("kseg")
class MaximaFound(layers.Layer):
    """Which pixels of each 2 x 2 window equal its maximum, and which windows are all zeros."""

    def call(self, inputs: list[tf.Tensor]) -> list[tf.Tensor]:
        """Compare the pixels of windows with their maxima.

        Args:
            inputs: of `Corners`, and the maxima (B, h, w, C).

        Returns:
            Five bool (B, h, w, C): of each pixel whether it is the maximum, and whether the
            maximum is 0.
        """
        *corners, pooled = inputs
        return [tf.equal(one, pooled) for one in (*corners, _zero(pooled))]

    def compute_output_spec(self, inputs: list[keras.KerasTensor]) -> list[keras.KerasTensor]:
        """Return the shapes and types of the results."""
        return [keras.KerasTensor(inputs[-1].shape, dtype="bool") for _ in range(5)]


@keras.saving.register_keras_serializable("kseg")
class FirstUnpooling(layers.Layer):
    """`Unpooling` by choices: of equal maxima the first gets the value."""

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        """Return (B, 2h, 2w, C) of a map (B, h, w, C) and what `MaximaFound` gives."""
        x, *found, _ = inputs
        return tf.nn.depth_to_space(tf.concat(self.parts(x, found), -1), 2)

    def parts(self, x: tf.Tensor, found: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return what each pixel of the windows gets, row by row."""
        zero, parts = _zero(x), []
        for one in found[:-1]:
            parts.append(tf.where(one, x, zero))
            x = tf.where(one, zero, x)  # what is left for the others
        return [*parts, x]

    def compute_output_spec(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Return the shape of the result."""
        batch, height, width, channels = inputs[0].shape
        return keras.KerasTensor((batch, 2 * height, 2 * width, channels), inputs[0].dtype)


@keras.saving.register_keras_serializable("kseg")
class SharedUnpooling(FirstUnpooling):
    """`Unpooling` by choices: equal maxima share the value.

    For a model that was trained without rounding. Which of the values that are equal in 8 bits
    was the largest is not known, and the first of them would be a shift of the whole map up and
    to the left. Rows share first, then the pixels of a row. Zeros behind a ReLU are equal without
    any rounding: there the first pixel gets the value, as in training.
    """

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        """Return (B, 2h, 2w, C) of a map (B, h, w, C) and what `MaximaFound` gives."""
        x, *found, nothing = inputs
        first, *others = self.parts(x, found)
        parts = [tf.where(nothing, x, first)]
        parts += [tf.where(nothing, _zero(x), one) for one in others]
        return tf.nn.depth_to_space(tf.concat(parts, -1), 2)

    def parts(self, x: tf.Tensor, found: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return what each pixel of the windows gets, row by row."""
        # Choices in choices rather than a logical and, which takes LiteRT five times as long.
        upper, lower = (tf.logical_or(*pair) for pair in (found[:2], found[2:]))
        x = tf.where(upper, tf.where(lower, 0.5 * x, x), x)
        half, zero = 0.5 * x, _zero(x)
        return [
            tf.where(one, tf.where(other, half, x), zero)
            for left, right in (found[:2], found[2:])
            for one, other in ((left, right), (right, left))
        ]


def _zero(x: tf.Tensor) -> tf.Tensor:
    return tf.zeros([1, 1, 1, 1], x.dtype)
