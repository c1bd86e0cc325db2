"""Tversky losses: overlap with a price of its own for false positives and for false negatives."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kseg.losses.region import TINY, SmoothedRegionLoss
from kseg.registry import LOSSES


@LOSSES.register("tversky")
@keras.saving.register_keras_serializable(package="kseg")
class Tversky(SmoothedRegionLoss):
    """One less the Tversky index of each class, which prices false negatives by themselves.

    With p the probabilities of a class, y its truth (0 or 1), s the smoothing, and TP = sum(p y),
    FP = sum(p (1 - y)), FN = sum((1 - p) y) over the valid pixels of an image, a class costs
    `1 - (TP + s) / (TP + alpha FP + beta FN + s)`. The mean over the classes is the value of the
    image, from 0 to 1. With alpha = beta = 0.5 it is the linear Dice loss, with 1 and 1 Jaccard's;
    beta above alpha favours recall.

    A class that the image does not hold is left out. With `present_only` off it counts: without
    smoothing as the constant 1, of gradient 0; with it, the less of the class is predicted the
    less it costs. An image without a valid pixel costs 0.

    Args:
        alpha: price of false positives.
        beta: price of false negatives.
        smoothing: added above and below, in pixels.
        present_only: average over the classes that the image's mask holds, not over all.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        S. S. M. Salehi, D. Erdogmus, A. Gholipour, "Tversky loss function for image segmentation
        using 3D fully convolutional deep networks", MLMI 2017, section 2.2, arXiv:1706.05721.

    Example:
        Of four pixels two are of class 1, which has the probabilities 0.9, 0.6, 0.2 and 0.1:
        TP = 1.5, FP = 0.3, FN = 0.5 and 1 - 1.5 / (1.5 + 0.3 * 0.3 + 0.7 * 0.5) = 0.226804.

        >>> mask = np.array([[[1, 1, 0, 0]]])
        >>> p = np.array([[[[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1]]]])
        >>> Tversky(background=False)(mask, np.log(p))
        [0.226804]
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        smoothing: float = 0.0,
        present_only: bool = True,
        background: bool = True,
        ignore_label: int = 255,
        name: str = "tversky",
        reduction: str | None = None,
    ) -> None:
        super().__init__(
            smoothing=smoothing,
            present_only=present_only,
            background=background,
            ignore_label=ignore_label,
            name=name,
            reduction=reduction,
        )
        if min(alpha, beta) < 0 or alpha + beta == 0:
            raise ValueError(f"alpha is {alpha} and beta {beta}; none may be below 0, nor both 0")
        self.alpha = alpha
        self.beta = beta

    def of_classes(
        self, probabilities: keras.KerasTensor, truth: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return the loss of each class in each image, (B, C); see `RegionLoss`."""
        right = ops.sum(probabilities * truth, axis=1)
        false_positive = ops.sum(probabilities, axis=1) - right
        false_negative = ops.sum(truth, axis=1) - right
        wrong = self.alpha * false_positive + self.beta * false_negative
        return 1.0 - (right + self.smoothing) / ops.maximum(right + wrong + self.smoothing, TINY)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta}
