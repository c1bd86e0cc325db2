"""Boundary loss of Kervadec: probability mass is priced by its distance to the true region."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kseg.losses.distance_map import signed_distance_maps
from kseg.losses.region import soft_regions
from kseg.registry import LOSSES

FARTHEST = 256  # pixels of a radius: every one of them is a pass over the map


@LOSSES.register("boundary_distance")
@keras.saving.register_keras_serializable(package="kseg")
class BoundaryDistance(keras.losses.Loss):
    """Probability times the signed distance to the true boundary: Kervadec's boundary loss.

    With p the probabilities of a class and phi the distance to its region in pixels, negative
    inside (0 on the last pixel inside, 1 on the first outside), an image costs the mean over the
    classes of `sum(p phi) / N` over its N valid pixels. It may be negative: what lies inside is
    rewarded. It is meant as an addition whose weight rises: `dice+0.01..1*boundary_distance`.

    Distances are exact up to `radius` pixels and cut there. A class that the image does not hold,
    or that fills it, has no boundary and adds 0; an image without a valid pixel costs 0.

    Args:
        radius: pixels beyond which all places are equally far; costs time in proportion.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        H. Kervadec, J. Bouchtiba, C. Desrosiers, E. Granger, J. Dolz, I. Ben Ayed, "Boundary loss
        for highly unbalanced segmentation", MIDL 2019, section 2, arXiv:1812.07032; the distances
        are those of `one_hot2dist` of github.com/LIVIAETS/boundary-loss.

    Differs:
        The authors raise its weight by 0.01 an epoch; here `0.01..1*` in --loss raises it evenly
        from step to step. They do not cut distances.

    Example:
        A row of two pixels of class 0 and two of class 1, all probabilities 1/2. phi is -1, 0, 1, 2
        for class 0 and 2, 1, 0, -1 for class 1, so both cost (2 + 1 + 0 - 1) / 2 / 4 = 0.25.

        >>> BoundaryDistance()(np.array([[[0, 0, 1, 1]]]), np.zeros((1, 1, 4, 2)))
        [0.25]
    """

    def __init__(
        self,
        radius: int = 16,
        ignore_label: int = 255,
        name: str = "boundary_distance",
        reduction: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        if not 1 <= radius <= FARTHEST:
            raise ValueError(f"radius is {radius}; 1 to {FARTHEST} pixels are wanted")
        self.radius = radius
        self.ignore_label = ignore_label

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every image.

        Args:
            y_true: mask (B, H, W) of class ids; every id but `ignore_label` is below C.
            y_pred: logits (B, H, W, C) of any float type; the work is done in float32.

        Returns:
            (B,) float32.
        """
        probabilities, truth = soft_regions(y_true, y_pred, self.ignore_label)
        height, width, classes = y_pred.shape[1:]
        distance = signed_distance_maps(
            ops.cast(y_true, "int32"), classes, radius=self.radius, ignore_label=self.ignore_label
        )
        distance = ops.reshape(distance, (-1, height * width, classes))
        pixels = ops.maximum(ops.sum(truth, axis=(1, 2)), 1.0)
        return ops.sum(probabilities * distance, axis=(1, 2)) / (classes * pixels)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "radius": self.radius, "ignore_label": self.ignore_label}
