"""Focal Tversky loss: the Tversky loss bent so that badly found classes count for more."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kseg.losses.tversky import Tversky
from kseg.registry import LOSSES

_LEAST = 1e-6  # below it the power is replaced by a line, whose slope is finite


@LOSSES.register("focal_tversky")
@keras.saving.register_keras_serializable(package="kseg")
class FocalTversky(Tversky):
    """The Tversky loss of each class to the power 1 / gamma, averaged over the classes of an image.

    With L_c what `Tversky` says a class costs, an image costs the mean over c of `L_c^(1/gamma)`,
    from 0 to 1. Losses near 0 are raised, so that the last misses of a small class still count.
    Absent classes and ignored images are treated as there.

    Args:
        gamma: above 1; 1 is the Tversky loss.
        alpha: price of false positives.
        beta: price of false negatives.
        smoothing: added above and below, in pixels.
        present_only: average over the classes that the image's mask holds, not over all.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        N. Abraham, N. M. Khan, "A Novel Focal Tversky Loss Function with Improved Attention U-Net
        for Lesion Segmentation", ISBI 2019, section 2.2, arXiv:1810.07842 (gamma 4/3, 0.7 for false
        negatives).

    Differs:
        The paper sums over the classes; the mean keeps the loss below 1. A loss below 1e-6 is
        scaled by a straight line, since the power has an infinite slope at 0.

    Example:
        The Tversky loss of class 1 is 0.226804 there, and 0.226804^(3/4) = 0.328653.

        >>> mask = np.array([[[1, 1, 0, 0]]])
        >>> p = np.array([[[[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1]]]])
        >>> FocalTversky(background=False)(mask, np.log(p))
        [0.328653]
    """

    def __init__(
        self,
        gamma: float = 4 / 3,
        alpha: float = 0.3,
        beta: float = 0.7,
        smoothing: float = 0.0,
        present_only: bool = True,
        background: bool = True,
        ignore_label: int = 255,
        name: str = "focal_tversky",
        reduction: str | None = None,
    ) -> None:
        super().__init__(
            alpha, beta, smoothing, present_only, background, ignore_label, name, reduction
        )
        if gamma < 1:
            raise ValueError(f"gamma is {gamma}; it must be at least 1")
        self.gamma = gamma

    def of_classes(
        self, probabilities: keras.KerasTensor, truth: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return the loss of each class in each image, (B, C); see `RegionLoss`."""
        loss = super().of_classes(probabilities, truth)
        bound = ops.maximum(loss, _LEAST)
        return ops.power(bound, 1.0 / self.gamma) * (loss / bound)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "gamma": self.gamma}
