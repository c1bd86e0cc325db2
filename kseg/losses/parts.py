"""What a loss of a batch is made of: sums, and what each is divided by."""

from __future__ import annotations

from typing import NamedTuple

import keras
from keras import ops

from kseg.losses.cross_entropy import valid_pixels


class Part(NamedTuple):
    """One term of a loss: `weight * sum(values) / sum(divisor)`, both sums over the global batch.

    Attributes:
        weight: factor of the term in the first step of a training.
        values: (B, H, W) or (B,) float32.
        divisor: float32 scalar, this batch's share of what the sum is divided by; where the sum
            over all devices is 0 the term is 0.
        rise: what the factor gains, evenly, until the last step.
    """

    weight: float
    values: keras.KerasTensor
    divisor: keras.KerasTensor
    rise: float = 0.0

    def weight_at(self, progress: keras.KerasTensor) -> keras.KerasTensor:
        """Return the factor where 0 of the training is done, or 1, or what is between."""
        return self.weight + progress * self.rise

    def times(self, first: float, last: float) -> Part:
        """Return the term with another factor, which goes from `first` to `last`.

        Raises:
            ValueError: if both factors change: their product does not change evenly.
        """
        if self.rise and first != last:
            raise ValueError("a weight that changes stands before a loss whose weights change")
        rise = self.weight * (last - first) + self.rise * first
        return self._replace(weight=first * self.weight, rise=rise)


def parts_of(
    loss: keras.losses.Loss, y_true: keras.KerasTensor, y_pred: keras.KerasTensor
) -> list[Part]:
    """Return the terms of a loss on one batch, or one device's part of it.

    Losses that divide by something of their own, or that have several terms, have a method `parts`
    that answers this. All others are divided by the valid pixels where they give a value a pixel,
    and by the images where they give a value an image.

    Args:
        loss: any loss of this package.
        y_true: mask (B, H, W) of class ids.
        y_pred: what the loss judges.

    Returns:
        The terms, at least one.
    """
    if hasattr(loss, "parts"):
        return loss.parts(y_true, y_pred)
    values = loss.call(y_true, y_pred)
    if len(values.shape) == 3:
        return [Part(1.0, values, valid_pixels(y_true, getattr(loss, "ignore_label", 255)))]
    return [Part(1.0, values, ops.sum(ops.ones_like(values)))]


def quotient(total: keras.KerasTensor, divisor: keras.KerasTensor) -> keras.KerasTensor:
    """Return total / divisor, and 0 where the divisor is 0, as of a batch without a valid pixel."""
    return ops.where(divisor > 0, total / ops.where(divisor > 0, divisor, 1.0), 0.0)
