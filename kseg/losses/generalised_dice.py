"""Generalised Dice loss: one overlap over all classes, small ones weighed up."""

from __future__ import annotations

import keras
from keras import ops

from kseg.losses.region import RegionLoss, soft_regions
from kseg.registry import LOSSES


@LOSSES.register("generalised_dice")
@keras.saving.register_keras_serializable(package="kseg")
class GeneralisedDice(RegionLoss):
    """One less a single Dice coefficient over all classes, small ones weighed up.

    With p_c the probabilities of a class, y_c its truth (0 or 1) and w_c = 1 / sum(y_c)^2, sums
    over the valid pixels of an image, an image costs
    `1 - 2 sum_c(w_c sum(p_c y_c)) / sum_c(w_c (sum(y_c) + sum(p_c)))`, from 0 to 1.

    A class that the image does not hold has no finite weight and is left out. An image without a
    valid pixel costs 0.

    Args:
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        C. Sudre, W. Li, T. Vercauteren, S. Ourselin, M. J. Cardoso, "Generalised Dice Overlap as a
        Deep Learning Loss Function for Highly Unbalanced Segmentations", DLMIA 2017, section 2.1,
        arXiv:1707.03237.

    Example:
        Of four pixels one is of class 1, so w is 1 / 9 and 1. Every probability is 1/2: the
        overlaps are 1.5 and 0.5, the sizes 3 + 2 and 1 + 2, and the loss is
        1 - 2 * (1.5 / 9 + 0.5) / (5 / 9 + 3) = 0.625.

        >>> GeneralisedDice()(np.array([[[0, 0], [0, 1]]]), np.zeros((1, 2, 2, 2)))
        [0.625]
    """

    def __init__(
        self,
        background: bool = True,
        ignore_label: int = 255,
        name: str = "generalised_dice",
        reduction: str | None = None,
    ) -> None:
        super().__init__(
            present_only=True,
            background=background,
            ignore_label=ignore_label,
            name=name,
            reduction=reduction,
        )

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every image; arguments and result as of `RegionLoss.call`."""
        probabilities, truth = soft_regions(y_true, y_pred, self.ignore_label)
        areas = ops.sum(truth, axis=1)
        counted = self._counted(areas > 0)
        weights = counted / ops.square(ops.maximum(areas, 1.0))
        overlap = ops.sum(weights * ops.sum(probabilities * truth, axis=1), axis=-1)
        sizes = ops.sum(weights * (areas + ops.sum(probabilities, axis=1)), axis=-1)
        known = ops.any(counted > 0, axis=-1)
        # Weights fall with the area squared: the sum is small wherever all areas are large.
        return ops.where(known, 1.0 - 2.0 * overlap / ops.where(known, sizes, 1.0), 0.0)

    def get_config(self) -> dict[str, object]:
        """Return what `__init__` took, ready for JSON."""
        config = super().get_config()
        del config["present_only"]
        return config
