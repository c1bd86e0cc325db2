"""A sum of losses, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.losses.parts import Part, parts_of, quotient


@keras.saving.register_keras_serializable(package="kseg")
class SumOfLosses(keras.losses.Loss):
    """Several losses of the same output, each times a weight; `--loss ce+0.5*dice` makes one.

    Every term keeps its own divisor: a term with a value a pixel is a mean over the valid pixels of
    the global batch, one with a value an image a mean over its images. So no term changes when
    another is added.

    A weight may change along the training, which the engine does: only it knows the step.

    Args:
        losses: the terms.
        weights: a factor for each, or what it is in the first step and in the last one; in between
            it changes evenly.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.
    """

    def __init__(
        self,
        losses: Sequence[keras.losses.Loss],
        weights: Sequence[float | Sequence[float]],
        name: str = "sum",
        reduction: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.losses = tuple(losses)
        self.weights = tuple(map(_weight, weights))
        if len(self.losses) != len(self.weights):
            raise ValueError(f"{len(self.losses)} losses and {len(self.weights)} weights")

    def parts(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> list[Part]:
        """Return the terms of all losses; see `kseg.losses.parts`."""
        return [
            part.times(*ends(weight))
            for loss, weight in zip(self.losses, self.weights, strict=True)
            for part in parts_of(loss, y_true, y_pred)
        ]

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of the batch at the first step, the sum over all terms.

        Args:
            y_true: mask (B, H, W) of class ids.
            y_pred: logits (B, H, W, C) of any float type.

        Returns:
            A float32 scalar.
        """
        parts = self.parts(y_true, y_pred)
        return sum(part.weight * quotient(ops.sum(part.values), part.divisor) for part in parts)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        losses = [keras.saving.serialize_keras_object(loss) for loss in self.losses]
        return {**super().get_config(), "losses": losses, "weights": list(self.weights)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SumOfLosses:
        """Return the loss that `get_config` describes."""
        losses = [keras.saving.deserialize_keras_object(loss) for loss in config["losses"]]
        return cls(**{**config, "losses": losses})


def ends(weight: float | Sequence[float]) -> tuple[float, float]:
    """Return what a weight is in the first step of a training and in the last."""
    first, last = weight if isinstance(weight, Sequence) else (weight, weight)
    return first, last


def _weight(weight: float | Sequence[float]) -> float | tuple[float, float]:
    first, last = map(float, ends(weight))
    return first if first == last else (first, last)
