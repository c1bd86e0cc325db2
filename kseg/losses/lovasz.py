"""Lovasz-softmax loss: the IoU itself, made differentiable over sorted errors."""

from __future__ import annotations

import keras
from keras import ops

from kseg.losses.region import RegionLoss
from kseg.registry import LOSSES


@LOSSES.register("lovasz")
@keras.saving.register_keras_serializable(package="kseg")
class Lovasz(RegionLoss):
    """The Lovasz extension of one less the IoU, averaged over the classes of an image.

    With m the errors |y - p| of a class at the valid pixels of an image, sorted from the largest,
    and g their truth (0 or 1) in the same order, J_k is one less the IoU of a prediction that is
    wrong at the first k pixels; a class costs `sum_k(m_k (J_k - J_(k-1)))`. It answers with one
    value an image, from 0 to 1, which for probabilities of 0 and 1 is exactly one less the IoU.
    Equal errors may stand in any order: the sum is the same. It is most often added to cross
    entropy, `ce+lovasz`; sorting makes it the costliest of these losses.

    A class that the image does not hold is left out; with `present_only` off it costs the largest
    of its probabilities. An image without a valid pixel costs 0.

    Args:
        present_only: average over the classes that the image's mask holds, not over all.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        M. Berman, A. Rannen Triki, M. B. Blaschko, "The Lovasz-Softmax loss", CVPR 2018, section 3
        and algorithm 1, arXiv:1705.08790.

    Example:
        Two pixels of class 0 and one of class 1, with probabilities of class 1 of 0.5, 0.1 and
        0.8. Class 1: errors 0.5, 0.2, 0.1 with truth 0, 1, 0. Wrong at the first, the IoU is 1/2;
        at the first two, 0. So J = 1/2, 1, 1, and 0.5 * 1/2 + 0.2 * 1/2 = 0.35. Class 0, the same
        errors with truth 1, 0, 1: J = 1/2, 2/3, 1, and 0.5 / 2 + 0.2 / 6 + 0.1 / 3 = 0.316667.

        >>> mask = np.array([[[0, 0, 1]]])
        >>> p = np.array([[[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]])
        >>> Lovasz()(mask, np.log(p))
        [0.333333]
        >>> Lovasz(background=False)(mask, np.log(p))
        [0.35]
    """

    def __init__(
        self,
        present_only: bool = True,
        background: bool = True,
        ignore_label: int = 255,
        name: str = "lovasz",
        reduction: str | None = None,
    ) -> None:
        super().__init__(
            present_only=present_only,
            background=background,
            ignore_label=ignore_label,
            name=name,
            reduction=reduction,
        )

    def of_classes(
        self, probabilities: keras.KerasTensor, truth: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return the loss of each class in each image, (B, C); see `RegionLoss`."""
        # Ignored pixels have the error 0, are sorted last, and weigh nothing.
        errors = ops.where(truth > 0, 1.0 - probabilities, probabilities)
        errors, truth = ops.swapaxes(errors, 1, 2), ops.swapaxes(truth, 1, 2)
        order = ops.argsort(ops.stop_gradient(-errors), axis=-1)
        steps = _jaccard_steps(ops.take_along_axis(truth, order, axis=-1))
        return ops.sum(ops.take_along_axis(errors, order, axis=-1) * steps, axis=-1)


def _jaccard_steps(truth: keras.KerasTensor) -> keras.KerasTensor:
    """Return by how much one less the IoU grows with each further wrong pixel, (B, C, N)."""
    total = ops.sum(truth, axis=-1, keepdims=True)
    intersection = total - ops.cumsum(truth, axis=-1)
    union = total + ops.cumsum(1.0 - truth, axis=-1)
    # The differences of J themselves would lose their digits where there are many pixels. A true
    # pixel leaves the intersection, any other enters the union.
    entered = intersection / (union * ops.maximum(union - 1.0, 1.0))
    steps = ops.where(truth > 0, 1.0 / union, entered)
    first = ops.cast(ops.equal(union, 1.0), "float32")  # of an absent class, whose J is 1 at once
    return ops.where(total > 0, steps, first)
