"""How well the borders of the classes are met."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.table import Table
from scipy.spatial import cKDTree

from kseg.metrics.boundary import border_pixels, diagonal
from kseg.metrics.metric import class_table, single_images
from kseg.registry import METRICS


@METRICS.register("boundary_f1")
class BoundaryF1:
    """F1 score of borders: how many predicted ones lie near true ones, and the other way round.

    For each image and class, a border pixel is one of the class with a pixel of another class
    above, below, left or right of it. With theta a share of the image's diagonal:

        precision   share of the predicted border pixels with a true one within theta
        recall      share of the true border pixels with a predicted one within theta
        F1          2 precision recall / (precision + recall), 0 if both are 0

    The score of an image is the mean over the classes with a true or a predicted border in it,
    that of the set the mean over the images that have a score. A class with a border on one side
    only has F1 0. Neither the edge of an image nor an ignored pixel makes a border, so masks whose
    borders are all ignored, as PASCAL VOC's, have no score; `trimap` sees those.

    Args:
        num_classes: how many classes there are.
        ignore_label: id of the true pixels that count nowhere.
        theta: how far off a border may be, a share of the image's diagonal.

    Source:
        G. Csurka, D. Larlus, F. Perronnin, "What is a good evaluation measure for semantic
        segmentation?", BMVC 2013, section 2.2 (theta 0.75 % of the diagonal).

    Example:
        A border lies five rows too low in an image of 30 x 40, whose diagonal is 50 pixels:
        too far at 6 % of it, which are 3 pixels, near enough at 12 %.

        >>> rows = np.arange(30)[:, None].repeat(40, axis=1)
        >>> for theta in (0.06, 0.12):
        ...     metric = BoundaryF1(2, theta=theta)
        ...     metric.update((rows > 10) * 1, (rows > 15) * 1)
        ...     print(metric.result()["boundary_f1"])
        0.0
        1.0
    """

    needs_probabilities = False

    def __init__(self, num_classes: int, ignore_label: int = 255, *, theta: float = 0.0075) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.theta = theta
        self.scores: list[np.ndarray] = []  # of each image, (C,), NaN without a border

    def update(self, mask: np.ndarray, prediction: np.ndarray) -> None:
        """Measure the borders of one image (H, W) or of a batch (B, H, W) of class ids."""
        pairs = single_images(
            mask, prediction, num_classes=self.num_classes, ignore_label=self.ignore_label
        )
        self.scores += [self._scores(true, guess) for true, guess in pairs]

    def result(self) -> dict[str, float | np.ndarray]:
        """Return the mean over images, and that of each class over the images it has borders in."""
        of_images = np.array([_mean(scores) for scores in self.scores])
        return {
            "boundary_f1": _mean(of_images),
            "classes": np.array([_mean(column) for column in self._columns()]),
        }

    def table(self, classes: Sequence[str]) -> Table:
        """Return the score of each class and the mean over images."""
        found = self.result()
        return class_table(
            f"boundary F1 ({self.theta:.2%} of the diagonal)",
            classes,
            found["classes"],
            mean=found["boundary_f1"],
            mean_name="mean of images",
        )

    def _columns(self) -> np.ndarray:
        return np.reshape(self.scores, (-1, self.num_classes)).T

    def _scores(self, mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        theta = self.theta * diagonal(mask)
        borders = zip(self._borders(mask), self._borders(prediction), strict=True)
        return np.array([_f1(true, guess, theta) for true, guess in borders])

    def _borders(self, labels: np.ndarray) -> list[np.ndarray]:
        """Return row and column of the border pixels of each class, (K, 2)."""
        border = border_pixels(labels, ignore_label=self.ignore_label)
        places, ids = np.argwhere(border), labels[border]
        return [places[ids == id_] for id_ in range(self.num_classes)]


def _f1(true: np.ndarray, guess: np.ndarray, theta: float) -> float:
    if not len(true) and not len(guess):
        return math.nan
    precision, recall = _share_near(guess, true, theta), _share_near(true, guess, theta)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_near(points: np.ndarray, others: np.ndarray, theta: float) -> float:
    """Return the share of the points that have one of the others within `theta`."""
    if not len(points) or not len(others):
        return 0.0
    # The search leaves out what lies at its bound itself.
    distances, _ = cKDTree(others).query(points, distance_upper_bound=theta * (1 + 1e-9))
    return float(np.mean(np.isfinite(distances)))


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not NaN, the same in whatever order it comes."""
    known = values[~np.isnan(values)]
    return math.fsum(known) / len(known) if len(known) else math.nan
