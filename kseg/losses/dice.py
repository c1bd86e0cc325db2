"""Dice loss: one less the overlap of the predicted and the true region of each class."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kseg.losses.region import TINY, SmoothedRegionLoss
from kseg.registry import LOSSES


@LOSSES.register("dice")
@keras.saving.register_keras_serializable(package="kseg")
class Dice(SmoothedRegionLoss):
    """One less the Dice coefficient of each class, averaged over the classes of an image.

    With p the probabilities of a class, y its truth (0 or 1) and s the smoothing, sums over the
    valid pixels of an image, a class costs `1 - (2 sum(p y) + s) / (sum(y^2) + sum(p^2) + s)`, or
    with `squared` off `1 - (2 sum(p y) + s) / (sum(y) + sum(p) + s)`. It answers with one value an
    image, from 0 to 1. Each class counts alike, however few pixels it has, so there are no class
    weights.

    A class that the image does not hold is left out. With `present_only` off it counts: without
    smoothing as the constant 1, of gradient 0; with it, the less of the class is predicted the
    less it costs. An image without a valid pixel costs 0.

    Args:
        squared: square the terms of the denominator.
        smoothing: added above and below, in pixels.
        present_only: average over the classes that the image's mask holds, not over all.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016, section 3, arXiv:1606.04797
        (squared). The linear form is that of `DiceLoss` of segmentation-models-pytorch.

    Differs:
        V-Net has two classes and sums over the foreground alone: that is `background` off.

    Example:
        Of four pixels two are of class 1, which has the probabilities 0.9, 0.6, 0.2 and 0.1:
        1 - 2 * 1.5 / (2 + 1.22) = 0.068323, and 1 - 2 * 1.5 / (2 + 1.8) = 0.210526 without
        squares.

        >>> mask = np.array([[[1, 1, 0, 0]]])
        >>> p = np.array([[[[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1]]]])
        >>> Dice(background=False)(mask, np.log(p))
        [0.068323]
        >>> Dice(squared=False, background=False)(mask, np.log(p))
        [0.210526]
    """

    def __init__(
        self,
        squared: bool = True,
        smoothing: float = 0.0,
        present_only: bool = True,
        background: bool = True,
        ignore_label: int = 255,
        name: str = "dice",
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
        self.squared = squared

    def of_classes(
        self, probabilities: keras.KerasTensor, truth: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return the loss of each class in each image, (B, C); see `RegionLoss`."""
        overlap = ops.sum(probabilities * truth, axis=1)
        predicted = ops.square(probabilities) if self.squared else probabilities
        sizes = ops.sum(truth, axis=1) + ops.sum(predicted, axis=1)
        above, below = 2.0 * overlap + self.smoothing, sizes + self.smoothing
        return 1.0 - above / ops.maximum(below, TINY)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "squared": self.squared}
