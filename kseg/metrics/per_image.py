"""The confusion matrix of every image by itself: what intervals, tests and a report draw on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kseg.metrics.iou import class_ious, present_mean


@dataclass(frozen=True)
class ImageCounts:
    """What was counted of one image.

    Attributes:
        name: of the image, as the data set gives it.
        mask: fingerprint of its mask, by `fingerprint`.
        cells: the cells of its confusion matrix that are not empty, (K, 3) int64: true class,
            predicted class, pixels.
    """

    name: str
    mask: str
    cells: np.ndarray

    @staticmethod
    def of(name: str, mask: np.ndarray, matrix: np.ndarray) -> ImageCounts:
        """Return the counts of an image.

        Args:
            name: of the image.
            mask: its true ids.
            matrix: its confusion matrix, (C, C) integers, rows truth.
        """
        true, predicted = np.nonzero(matrix)
        cells = np.stack([true, predicted, matrix[true, predicted]], axis=1)
        return ImageCounts(name, fingerprint(mask), cells.astype(np.int64))

    def matrix(self, num_classes: int) -> np.ndarray:
        """Return the whole confusion matrix, (C, C) int64."""
        matrix = np.zeros((num_classes, num_classes), np.int64)
        matrix[self.cells[:, 0], self.cells[:, 1]] = self.cells[:, 2]
        return matrix

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {"name": self.name, "mask": self.mask, "cells": self.cells.tolist()}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> ImageCounts:
        """Return the counts that `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: if it gave something else.
        """
        cells = np.array(raw["cells"]).reshape(-1, 3)
        if cells.size and cells.dtype != np.int64:
            raise ValueError("counts of pixels that are no whole numbers")
        return ImageCounts(str(raw["name"]), str(raw["mask"]), cells.astype(np.int64))


@dataclass(frozen=True)
class PerImage:
    """The counts of the images of an evaluation, in the order of the data set.

    Empty cells are not kept: an image of 150 classes shows ten of them.

    Attributes:
        num_classes: how many classes there are.
        images: the counts of each image.
    """

    num_classes: int
    images: tuple[ImageCounts, ...]

    def matrix(self, index: int) -> np.ndarray:
        """Return the confusion matrix of one image, (C, C) int64."""
        return self.images[index].matrix(self.num_classes)

    def total(self) -> np.ndarray:
        """Return the confusion matrix of all images, (C, C) int64."""
        total = np.zeros((self.num_classes, self.num_classes), np.int64)
        for image in self.images:
            total[image.cells[:, 0], image.cells[:, 1]] += image.cells[:, 2]
        return total

    def tallies(self) -> np.ndarray:
        """Return right, true and predicted pixels of each class, (images, 3, C) int64.

        IoU, accuracy and Dice of any set of images follow from the sum over these images.
        """
        rows = [_tally(image.cells, self.num_classes) for image in self.images]
        return np.array(rows, np.int64).reshape(-1, 3, self.num_classes)

    def mious(self) -> np.ndarray:
        """Return the mIoU of each image by itself, (images,); NaN without a valid pixel."""
        return present_mean(class_ious(self.tallies()))

    def ranked(self) -> list[int]:
        """Return the places of the images that have a valid pixel, lowest mIoU first."""
        mious = self.mious()
        order = np.argsort(mious, kind="stable")
        return [int(index) for index in order if not np.isnan(mious[index])]


def fingerprint(mask: np.ndarray) -> str:
    """Return 16 hexadecimal digits that equal masks, and no others, have in common."""
    digest = hashlib.sha256(str(mask.shape).encode())
    digest.update(np.ascontiguousarray(mask))
    return digest.hexdigest()[:16]


def from_json(raw: Iterable[Mapping[str, Any]], num_classes: int) -> PerImage:
    """Return what was written by `ImageCounts.to_json` of each image.

    Raises:
        KeyError, TypeError, ValueError: if it is something else.
    """
    images = tuple(map(ImageCounts.from_json, raw))
    ids = np.concatenate([image.cells[:, :2].ravel() for image in images] or [[0]])
    if any((image.cells[:, 2] < 0).any() for image in images):
        raise ValueError("counts of pixels below 0")
    if not 0 <= ids.min() <= ids.max() < num_classes:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, but {num_classes} classes")
    return PerImage(num_classes, images)


def _tally(cells: np.ndarray, num_classes: int) -> list[np.ndarray]:
    true, predicted, pixels = cells.T
    right = pixels * (true == predicted)
    # The weights of bincount are float64, which counts exactly up to 2 ** 53 pixels.
    return [
        np.bincount(ids, counts, num_classes)
        for ids, counts in ((true, right), (true, pixels), (predicted, pixels))
    ]
