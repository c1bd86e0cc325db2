"""Cross entropy of every valid pixel, the loss that all architectures here are trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.registry import LOSSES


@LOSSES.register("ce")
@keras.saving.register_keras_serializable(package="kseg")
class CrossEntropy(keras.losses.Loss):
    """Cross entropy from logits, pixel by pixel, 0 where the mask is ignored.

    With z the logits of a pixel, y its class and w the class weights, its loss is
    `w[y] * (logsumexp(z) - z[y])`. Nothing is summed here: who sums divides by the valid pixels
    of the whole batch (`valid_pixels`), because a mean over all pixels gives 0.173 instead of
    0.693 where one pixel of four is valid. A class without a pixel adds nothing.

    Args:
        class_weights: one factor a class, or None for 1 everywhere; see
            `kseg.losses.class_weights`.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map.

    Source:
        J. Long, E. Shelhamer, T. Darrell, "Fully Convolutional Networks for Semantic
        Segmentation", CVPR 2015, section 4 (per-pixel multinomial logistic loss, ignored
        labels masked out), arXiv:1411.4038.

    Example:
        Two classes, both logits 0: each has the probability 1/2 and a pixel costs
        |ln 0.5| = 0.693147. Of these four pixels one is valid, so the loss of the batch is
        0.693147 / 1.

        >>> loss = CrossEntropy()(np.array([[[1, 255], [255, 255]]]), np.zeros((1, 2, 2, 2)))
        >>> loss  # (1, 2, 2)
        [[[0.693147, 0.], [0., 0.]]]
    """

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        ignore_label: int = 255,
        name: str = "ce",
        reduction: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.class_weights = None if class_weights is None else tuple(map(float, class_weights))
        self.ignore_label = ignore_label

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every pixel.

        Args:
            y_true: mask (B, H, W) of class ids; every id but `ignore_label` is below C.
            y_pred: logits (B, H, W, C) of any float type; the work is done in float32.

        Returns:
            (B, H, W) float32, 0 where ignored.

        Raises:
            ValueError: if there are not as many weights as classes.
        """
        mask = ops.cast(y_true, "int32")
        logits = ops.cast(y_pred, "float32")
        self._check_weights(logits.shape[-1])
        valid = ops.not_equal(mask, self.ignore_label)
        label = ops.where(valid, mask, 0)
        loss = ops.sparse_categorical_crossentropy(label, logits, from_logits=True)
        if self.class_weights is not None:
            loss = loss * ops.take(ops.convert_to_tensor(self.class_weights, "float32"), label)
        return ops.where(valid, loss, 0.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        weights = self.class_weights
        return {
            **super().get_config(),
            "class_weights": None if weights is None else list(weights),
            "ignore_label": self.ignore_label,
        }

    def _check_weights(self, num_classes: int) -> None:
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} factors and the logits "
                f"{num_classes} classes; one factor a class is wanted"
            )


def valid_pixels(mask: keras.KerasTensor, ignore_label: int = 255) -> keras.KerasTensor:
    """Return how many pixels of a batch have a class.

    Args:
        mask: (B, H, W) class ids.
        ignore_label: id of the pixels that have none.

    Returns:
        A float32 scalar, exact up to 2**24 pixels; 0 for an all-ignored batch, so divide by
        `max(1, valid_pixels)`.
    """
    return ops.sum(ops.cast(ops.not_equal(mask, ignore_label), "float32"))
