"""Jaccard loss: one less the soft intersection over union of each class."""

from __future__ import annotations

import keras
from keras import ops

from kseg.losses.region import TINY, SmoothedRegionLoss
from kseg.registry import LOSSES


@LOSSES.register("jaccard")
@keras.saving.register_keras_serializable(package="kseg")
class Jaccard(SmoothedRegionLoss):
    """One less the soft IoU of each class, averaged over the classes of an image.

    With p the probabilities of a class, y its truth (0 or 1), s the smoothing and I = sum(p y),
    sums over the valid pixels of an image, a class costs `1 - (I + s) / (sum(y) + sum(p) - I + s)`.
    It answers with one value an image, from 0 to 1.

    A class that the image does not hold is left out. With `present_only` off it counts: without
    smoothing as the constant 1, of gradient 0; with it, the less of the class is predicted the
    less it costs. An image without a valid pixel costs 0.

    Args:
        smoothing: added above and below, in pixels.
        present_only: average over the classes that the image's mask holds, not over all.
        background: whether class 0 counts.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        M. A. Rahman, Y. Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image
        Segmentation", ISVC 2016, section 3.

    Example:
        Of four pixels two are of class 1, which has the probabilities 0.9, 0.6, 0.2 and 0.1:
        1 - 1.5 / (2 + 1.8 - 1.5) = 0.347826.

        >>> mask = np.array([[[1, 1, 0, 0]]])
        >>> p = np.array([[[[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1]]]])
        >>> Jaccard(background=False)(mask, np.log(p))
        [0.347826]
    """

    def __init__(
        self,
        smoothing: float = 0.0,
        present_only: bool = True,
        background: bool = True,
        ignore_label: int = 255,
        name: str = "jaccard",
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

    def of_classes(
        self, probabilities: keras.KerasTensor, truth: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return the loss of each class in each image, (B, C); see `RegionLoss`."""
        overlap = ops.sum(probabilities * truth, axis=1)
        union = ops.sum(truth, axis=1) + ops.sum(probabilities, axis=1) - overlap
        return 1.0 - (overlap + self.smoothing) / ops.maximum(union + self.smoothing, TINY)
