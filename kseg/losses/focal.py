"""Focal loss: cross entropy that fades for pixels which are right already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.losses.cross_entropy import CrossEntropy
from kseg.losses.pixel_weights import pixel_weights
from kseg.registry import LOSSES

_LEAST = 1e-6  # the slope of a power below 1 is infinite at 0


@LOSSES.register("focal")
@keras.saving.register_keras_serializable(package="kseg")
class Focal(CrossEntropy):
    """Cross entropy times (1 - p)^gamma, so that easy pixels count for little.

    With p the probability of the class y of a pixel and w the class weights, the pixel costs
    `w[y] * (1 - p)^gamma * -ln(p)`, 0 where ignored; who sums divides by the valid pixels. A class
    without a pixel adds nothing.

    Args:
        gamma: how much faster right pixels fade; 0 is cross entropy.
        class_weights: one factor a class, or None for 1 everywhere; the paper's alpha.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map.

    Source:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection",
        ICCV 2017, section 3.2, arXiv:1708.02002 (gamma 2).

    Differs:
        One softmax over the classes, where the paper has a sigmoid for each; with two classes both
        are the same.

    Example:
        Probabilities of the true class 1/2 and 9/10: 0.25 * 0.693147 and 0.01 * 0.105361.

        >>> p = np.array([[[[0.5, 0.5], [0.9, 0.1]]]])
        >>> Focal()(np.array([[[0, 0]]]), np.log(p))
        [[[0.173287, 0.001054]]]
    """

    def __init__(
        self,
        gamma: float = 2.0,
        class_weights: Sequence[float] | None = None,
        ignore_label: int = 255,
        name: str = "focal",
        reduction: str | None = None,
    ) -> None:
        super().__init__(class_weights, ignore_label, name, reduction)
        if gamma < 0:
            raise ValueError(f"gamma is {gamma}; it must not be negative")
        self.gamma = gamma

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every pixel; arguments and result as of `CrossEntropy.call`."""
        loss = CrossEntropy(ignore_label=self.ignore_label).call(y_true, y_pred)
        wrong = ops.maximum(-ops.expm1(-loss), _LEAST)
        weights = pixel_weights(y_true, self.class_weights, y_pred.shape[-1], self.ignore_label)
        return weights * ops.power(wrong, self.gamma) * loss

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "gamma": self.gamma}
