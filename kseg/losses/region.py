"""What losses that compare regions share: overlap by classes, and their mean in each image."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

TINY = 1e-7  # below any sum of probabilities that counts; keeps 0 / 0 away


class RegionLoss(keras.losses.Loss):
    """Base of losses with one value a class and image, averaged over the classes of the image.

    A subclass says in `of_classes` what a class costs. An image without a valid pixel costs 0.

    Args:
        present_only: average over the classes that the image's mask holds; without it over all,
            and what an absent class costs is said by the subclass.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.
    """

    def __init__(
        self,
        *,
        present_only: bool,
        background: bool,
        ignore_label: int,
        name: str,
        reduction: str | None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.present_only = present_only
        self.background = background
        self.ignore_label = ignore_label

    def of_classes(
        self, probabilities: keras.KerasTensor, truth: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return what each class costs in each image.

        Args:
            probabilities: (B, H * W, C) float32, 0 where ignored.
            truth: the same shape, 1 for the class of a pixel.

        Returns:
            (B, C) float32, finite for absent classes, too.
        """
        raise NotImplementedError

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every image.

        Args:
            y_true: mask (B, H, W) of class ids; every id but `ignore_label` is below C.
            y_pred: logits (B, H, W, C) of any float type; the work is done in float32.

        Returns:
            (B,) float32.
        """
        probabilities, truth = soft_regions(y_true, y_pred, self.ignore_label)
        counted = self._counted(ops.any(truth > 0, axis=1))
        loss = self.of_classes(probabilities, truth)
        return ops.sum(loss * counted, axis=-1) / ops.maximum(ops.sum(counted, axis=-1), 1.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {
            **super().get_config(),
            "present_only": self.present_only,
            "background": self.background,
            "ignore_label": self.ignore_label,
        }

    def _counted(self, present: keras.KerasTensor) -> keras.KerasTensor:
        """Return 1 for the classes (B, C) that are averaged over, else 0."""
        counted = present
        if not self.present_only:  # all, but none where nothing is known of the image
            counted = ops.logical_or(present, ops.any(present, axis=-1, keepdims=True))
        if not self.background:
            counted = ops.logical_and(counted, ops.arange(present.shape[-1]) > 0)
        return ops.cast(counted, "float32")


class SmoothedRegionLoss(RegionLoss):
    """Base of the region losses that add `smoothing` pixels above and below their fraction.

    Args:
        smoothing: not negative.
        present_only: as in `RegionLoss`, like all that follow.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.
    """

    def __init__(
        self,
        *,
        smoothing: float,
        present_only: bool,
        background: bool,
        ignore_label: int,
        name: str,
        reduction: str | None,
    ) -> None:
        super().__init__(
            present_only=present_only,
            background=background,
            ignore_label=ignore_label,
            name=name,
            reduction=reduction,
        )
        if smoothing < 0:
            raise ValueError(f"smoothing is {smoothing}; it must not be negative")
        self.smoothing = smoothing

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "smoothing": self.smoothing}


def soft_regions(
    mask: keras.KerasTensor, logits: keras.KerasTensor, ignore_label: int = 255
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Return the probability and the truth of every class at every pixel, 0 where ignored.

    Args:
        mask: (B, H, W) class ids.
        logits: (B, H, W, C) of any float type.
        ignore_label: id of the pixels that have no class.

    Returns:
        Two arrays (B, H * W, C) float32; the second is one-hot.
    """
    height, width, classes = logits.shape[1:]
    mask = ops.reshape(ops.cast(mask, "int32"), (-1, height * width))
    logits = ops.reshape(ops.cast(logits, "float32"), (-1, height * width, classes))
    valid = ops.not_equal(mask, ignore_label)[..., None]
    truth = ops.equal(mask[..., None], ops.arange(classes, dtype="int32"))
    truth = ops.cast(ops.logical_and(truth, valid), "float32")
    return ops.where(valid, ops.softmax(logits), 0.0), truth
