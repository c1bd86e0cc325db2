"""One confusion matrix over a whole data set, and every number that derives from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from kseg.registry import METRICS

if TYPE_CHECKING:
    import keras

IDS = 256
_BLOCK = 131_072  # pixels


@METRICS.register("iou")
class ConfusionMatrix:
    """Counts of (true class, predicted class) over all valid pixels seen.

    Totals run over the whole set and are never averaged over images or batches, so the result
    depends neither on batch size nor on order. With M the matrix (rows truth, columns
    prediction), row and col its sums:

        pixel_accuracy   trace(M) / sum(M)
        mean_accuracy    mean of M[c, c] / row[c] over the classes with a true pixel
        iou[c]           M[c, c] / (row[c] + col[c] - M[c, c])
        miou             mean of iou over the classes with a true or a predicted pixel
        fwiou            sum of row[c] * iou[c] / sum(M)
        dice             mean of 2 M[c, c] / (row[c] + col[c]), over the same classes as miou

    A class neither true nor predicted anywhere has IoU NaN and is left out of the means; without
    any valid pixel all is NaN.

    Args:
        num_classes: how many classes there are, 255 at most.
        ignore_label: id of the true pixels that count nowhere.

    Source:
        M. Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective",
        IJCV 2015 (IoU over the whole set); J. Long et al., arXiv:1411.4038, section 5 (the
        accuracies and the frequency weighted IoU).

    Example:
        100 pixels, 5 of class 0, and a net that answers 1 everywhere: 95 % of the pixels are
        right, yet the IoUs are 0/5 and 95/100, so mIoU is 47.5 %.

        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(np.array([0] * 5 + [1] * 95), np.ones(100, int))
        >>> confusion.pixel_accuracy, confusion.miou
        (0.95, 0.475)
    """

    needs_probabilities = False

    def __init__(self, num_classes: int, ignore_label: int = 255) -> None:
        if not 1 <= num_classes < IDS or not 0 <= ignore_label < IDS:
            raise ValueError(
                f"1 to {IDS - 1} classes and an ignore_label of 0 to {IDS - 1} are wanted, got "
                f"{num_classes} and {ignore_label}"
            )
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.matrix = np.zeros((num_classes, num_classes), np.int64)

    def update(
        self, mask: np.ndarray | keras.KerasTensor, prediction: np.ndarray | keras.KerasTensor
    ) -> None:
        """Count the pixels of one image or batch.

        Args:
            mask: true class ids, any shape, any integer type; NumPy or backend tensor.
            prediction: predicted class ids, same shape.

        Raises:
            ValueError: if the shapes differ, or an id is neither a class nor, in the mask,
                `ignore_label`. The totals are then unchanged.
        """
        if tuple(mask.shape) != tuple(prediction.shape):
            raise ValueError(
                f"the mask is {tuple(mask.shape)} and the prediction {tuple(prediction.shape)}; "
                f"the shapes must agree"
            )
        pairs = count_pairs(_ids(mask, "mask"), _ids(prediction, "prediction"))
        self._check(pairs.sum(axis=0), "prediction", set())
        self._check(pairs.sum(axis=1), "mask", {self.ignore_label})
        pairs[self.ignore_label] = 0
        self.matrix += pairs[: self.num_classes, : self.num_classes]

    @property
    def tallies(self) -> np.ndarray:
        """Right, true and predicted pixels of each class, (3, num_classes) int64."""
        return np.stack([np.diag(self.matrix), self.matrix.sum(axis=1), self.matrix.sum(axis=0)])

    @property
    def pixel_accuracy(self) -> float:
        """Share of the valid pixels that are right."""
        return float(pixel_accuracies(self.tallies))

    @property
    def mean_accuracy(self) -> float:
        """Mean over classes of the share of their true pixels that are right."""
        right, true, _ = self.tallies
        return float(present_mean(ratio(right, true)))

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union, (num_classes,) float64, NaN for an absent class."""
        return class_ious(self.tallies)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that are not absent."""
        return float(present_mean(self.iou))

    @property
    def fwiou(self) -> float:
        """Mean IoU weighted with how many true pixels a class has."""
        true = self.matrix.sum(axis=1)
        return float(ratio(np.nansum(true * self.iou), true.sum()))

    @property
    def dice(self) -> float:
        """Mean Dice coefficient (F1 score) over the classes that are not absent."""
        right, true, predicted = self.tallies
        return float(present_mean(ratio(2 * right, true + predicted)))

    def result(self) -> dict[str, float | np.ndarray]:
        """Return every number by its name; `iou` is the array, the others are floats."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_accuracy": self.mean_accuracy,
            "fwiou": self.fwiou,
            "dice": self.dice,
            "iou": self.iou,
        }

    def table(self, classes: Sequence[str]) -> Table:
        """Return every number that is not of a single class."""
        table = Table("of the whole set", "")
        for name, value in self.result().items():
            if name != "iou":
                table.add_row(name, f"{value:.4f}")
        return table

    def _check(self, totals: np.ndarray, what: str, allowed: set[int]) -> None:
        found = [i for i in np.flatnonzero(totals) if i >= self.num_classes and i not in allowed]
        if found:
            raise ValueError(
                f"the {what} holds the ids {', '.join(map(str, found))}; there are "
                f"{self.num_classes} classes, 0 to {self.num_classes - 1}"
                + (f", and {self.ignore_label} for ignored pixels" if allowed else "")
            )


def _ids(values: np.ndarray | keras.KerasTensor, what: str) -> np.ndarray:
    ids = np.asarray(values)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"the {what} is {ids.dtype}; class ids are integers")
    # A uint8 id cannot leave the table; this pass over the pixels is for the others alone.
    if ids.dtype != np.uint8 and ids.size and not 0 <= ids.min() <= ids.max() < IDS:
        raise ValueError(
            f"the {what} holds ids from {ids.min()} to {ids.max()}; ids are 0 to {IDS - 1}"
        )
    return ids.astype(np.uint8, copy=False)


def count_pairs(mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return how often each id of 0..255 in `mask` meets each in `prediction`: (256, 256) int64.

    Args:
        mask: ids, any shape, uint8.
        prediction: ids, same shape.
    """
    # The code is label * 256 + prediction, not label * C + prediction: with room for every id,
    # ignored pixels need no masking pass, and a wrong id shows in a cell of its own instead of
    # being counted in another's. In NumPy, because bincount of keras.ops is slower on the CPU
    # (600 against 150 MPix/s with TensorFlow, 40 with JAX) and the maps are small to fetch; by
    # add.at, because bincount looks for the smallest and the largest code first, which takes as
    # long as to count. In blocks, because indices take 8 bytes a pixel, which so stay in the cache.
    mask, prediction = mask.ravel(), prediction.ravel()
    pairs = np.zeros(IDS * IDS, np.int64)
    size = min(len(mask), _BLOCK)
    codes, places = np.empty(size, np.uint16), np.empty(size, np.intp)
    for start in range(0, len(mask), _BLOCK):
        some = mask[start : start + _BLOCK]
        code, place = codes[: len(some)], places[: len(some)]
        np.multiply(some, IDS, out=code, dtype=np.uint16, casting="unsafe")
        np.add(code, prediction[start : start + _BLOCK], out=code)
        place[:] = code
        np.add.at(pairs, place, 1)
    return pairs.reshape(IDS, IDS)


def class_ious(tallies: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, (..., C) float64, NaN for a class neither true nor predicted.

    Args:
        tallies: right, true and predicted pixels of each class, (..., 3, C).

    Example:
        One of two true pixels of a class is found, and two others are taken for it: 1 / 4.

        >>> class_ious(np.array([[1], [2], [3]]))
        array([0.25])
    """
    right, true, predicted = np.moveaxis(tallies, -2, 0)
    return ratio(right, true + predicted - right)


def pixel_accuracies(tallies: np.ndarray) -> np.ndarray:
    """Return the share of valid pixels that are right, (...), of `tallies` as in `class_ious`."""
    right, true, _ = np.moveaxis(tallies, -2, 0).sum(axis=-1)
    return ratio(right, true)


def present_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean along the last axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, float64; NaN where the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
