"""Cross entropy towards targets that are not quite certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.losses.cross_entropy import CrossEntropy
from kseg.losses.pixel_weights import pixel_weights
from kseg.registry import LOSSES


@LOSSES.register("label_smoothing")
@keras.saving.register_keras_serializable(package="kseg")
class LabelSmoothing(CrossEntropy):
    """Cross entropy towards a target that gives a share epsilon to all classes alike.

    With p the probabilities of a pixel, y its class, C classes and w the class weights, the pixel
    costs `w[y] * ((1 - epsilon) * -ln(p[y]) + epsilon / C * sum_c(-ln(p[c])))`, 0 where ignored;
    who sums divides by the valid pixels. The least possible loss is above 0. A class without a
    pixel adds nothing of its own.

    Args:
        epsilon: share of the target that is spread, from 0 to below 1; 0 is cross entropy.
        class_weights: one factor a class, or None for 1 everywhere.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map.

    Source:
        C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, "Rethinking the Inception
        Architecture for Computer Vision", CVPR 2016, section 7, arXiv:1512.00567.

    Example:
        Probabilities 3/4 of the true class and 1/4, epsilon 0.1:
        0.9 * 0.287682 + 0.05 * (0.287682 + 1.386294) = 0.342613.

        >>> p = np.array([[[[0.75, 0.25]]]])
        >>> LabelSmoothing()(np.array([[[0]]]), np.log(p))
        [[[0.342613]]]
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        class_weights: Sequence[float] | None = None,
        ignore_label: int = 255,
        name: str = "label_smoothing",
        reduction: str | None = None,
    ) -> None:
        super().__init__(class_weights, ignore_label, name, reduction)
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon is {epsilon}; it must lie in 0..1, below 1")
        self.epsilon = epsilon

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every pixel; arguments and result as of `CrossEntropy.call`."""
        logits = ops.cast(y_pred, "float32")
        sharp = CrossEntropy(ignore_label=self.ignore_label).call(y_true, logits)
        even = -ops.mean(ops.log_softmax(logits), axis=-1)
        weights = pixel_weights(y_true, self.class_weights, y_pred.shape[-1], self.ignore_label)
        # What stands in ignored pixels may be infinite, and infinity times 0 is not 0.
        even = ops.where(weights > 0, even, 0.0)
        return weights * ((1.0 - self.epsilon) * sharp + self.epsilon * even)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "epsilon": self.epsilon}
