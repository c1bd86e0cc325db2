"""What every metric answers, and what those that look at one image after another share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from rich.markup import escape
from rich.table import Table

from kseg.metrics.iou import ConfusionMatrix


class Metric(Protocol):
    """A measure that is shown images one after another and then says what it found.

    It is made by `METRICS[name](num_classes, ignore_label)`. The result depends neither on how
    images are put into batches nor on their order.

    Attributes:
        needs_probabilities: whether `update` takes probabilities in place of class ids.
    """

    needs_probabilities: bool

    def update(self, mask: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image (H, W) or a batch (B, H, W); probabilities have an axis C behind."""

    def result(self) -> dict[str, Any]:
        """Return every number by its name: floats, arrays, or lists of them."""

    def table(self, classes: Sequence[str]) -> Table:
        """Return what a person wants to see of it, at most 80 columns wide."""


def single_images(
    mask: np.ndarray, prediction: np.ndarray, *, num_classes: int, ignore_label: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give each image of a batch with its prediction, uint8 (H, W); where ignored, so are both.

    Args:
        mask: true ids (H, W) or (B, H, W), any integer type.
        prediction: predicted ids, same shape.
        num_classes: how many classes there are.
        ignore_label: id of the true pixels that count nowhere.

    Raises:
        ValueError: if the shapes differ or are no images, an id is no class, or `ignore_label`
            is one.
    """
    mask, prediction = np.asarray(mask), np.asarray(prediction)
    if ignore_label < num_classes:
        raise ValueError(f"ignore_label {ignore_label} is one of the {num_classes} classes")
    if mask.ndim not in (2, 3):
        raise ValueError(f"the mask is {mask.shape}; expected (H, W) or (B, H, W)")
    ConfusionMatrix(num_classes, ignore_label).update(mask, prediction)  # refuses wrong ids
    if mask.ndim == 2:
        mask, prediction = mask[None], prediction[None]
    for true, guess in zip(mask.astype(np.uint8), prediction.astype(np.uint8), strict=True):
        yield true, np.where(true == ignore_label, np.uint8(ignore_label), guess)


def class_table(
    name: str, classes: Sequence[str], values: np.ndarray, *, mean: float, mean_name: str
) -> Table:
    """Return a table of one number a class, NaN shown as "absent", the mean last."""
    table = Table("class", name)
    table.columns[1].justify = "right"
    for class_name, value in zip(classes, values, strict=True):
        table.add_row(escape(class_name), fraction(value, missing="absent"))
    table.add_section()
    table.add_row(mean_name, fraction(mean))
    return table


def fraction(value: float, *, missing: str = "-") -> str:
    """Return a fraction with four digits, or `missing` for NaN."""
    return missing if math.isnan(value) else f"{value:.4f}"
