"""IoU of what lies near the borders of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from kseg.metrics.boundary import boundary_band, diagonal
from kseg.metrics.iou import class_ious, present_mean
from kseg.metrics.metric import class_table, single_images
from kseg.registry import METRICS


@METRICS.register("boundary_iou")
class BoundaryIoU:
    """IoU of the pixels of a class that lie near its own border, truth and prediction each.

    With d a share of the image's diagonal, at least a pixel, G the true pixels of a class and P
    the predicted ones, G_d and P_d those within d pixels (diagonals counted as one) of a pixel
    that is not of the class, or of the edge of the image:

        boundary IoU = |G_d and P_d| / |G_d or P_d|

    Both are counted over the whole set before they are divided, as in `iou`; a class without a
    pixel in either is absent, NaN, and left out of the mean. Ignored pixels count nowhere and make
    no border, but borders are seen across them.

    Args:
        num_classes: how many classes there are.
        ignore_label: id of the true pixels that count nowhere.
        width: d as a share of the image's diagonal.

    Source:
        B. Cheng, R. Girshick, P. Dollar, A. Berg, A. Kirillov, "Boundary IoU: Improving
        Object-Centric Image Segmentation Evaluation", CVPR 2021, arXiv:2103.16562, section 4
        (2 % of the diagonal); that the edge of the image is a border is in the authors' code.

    Example:
        Three rows of 0000011111, labelled 0000111111; d is 1. Of class 0, truth has near a border
        or an edge the 10 pixels of the outer rows and 2 of the middle one, the prediction 8 and
        2, and 8 and 1 are in both: 9 / 13. Of class 1 it is 11 / 15.

        >>> metric = BoundaryIoU(2)
        >>> metric.update(np.array([[0] * 5 + [1] * 5] * 3), np.array([[0] * 4 + [1] * 6] * 3))
        >>> metric.tallies.tolist()
        [[9, 11], [12, 12], [10, 14]]
    """

    needs_probabilities = False

    def __init__(self, num_classes: int, ignore_label: int = 255, *, width: float = 0.02) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.width = width
        self.tallies = np.zeros((3, num_classes), np.int64)  # in both, true, predicted

    def update(self, mask: np.ndarray, prediction: np.ndarray) -> None:
        """Count the pixels near borders of one image (H, W) or of a batch (B, H, W) of ids."""
        pairs = single_images(
            mask, prediction, num_classes=self.num_classes, ignore_label=self.ignore_label
        )
        for true, guess in pairs:
            near_true, near_guess = (self._near(ids) for ids in (true, guess))
            both = near_true & near_guess & (true == guess)
            self.tallies += [
                np.bincount(some, minlength=self.num_classes)
                for some in (true[both], true[near_true], guess[near_guess])
            ]

    def result(self) -> dict[str, float | np.ndarray]:
        """Return the mean over the classes that are not absent, and that of each class."""
        ious = class_ious(self.tallies)
        return {"boundary_iou": float(present_mean(ious)), "classes": ious}

    def table(self, classes: Sequence[str]) -> Table:
        """Return the boundary IoU of each class and the mean."""
        found = self.result()
        return class_table(
            f"boundary IoU ({self.width:.0%} of the diagonal)",
            classes,
            found["classes"],
            mean=found["boundary_iou"],
            mean_name="mean",
        )

    def _near(self, labels: np.ndarray) -> np.ndarray:
        """Return the valid pixels near a border of their class or the edge of the image."""
        width = max(1, round(self.width * diagonal(labels)))
        near = boundary_band(labels, width, ignore_label=self.ignore_label)
        near[:width], near[-width:], near[:, :width], near[:, -width:] = True, True, True, True
        return near & (labels != self.ignore_label)
