"""Whether small objects are found as large ones are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.markup import escape
from rich.table import Table
from scipy import ndimage

from kseg.metrics.iou import ratio
from kseg.metrics.metric import fraction, single_images
from kseg.registry import METRICS

NAMES = ("small", "medium", "large")
EDGES = (32**2, 96**2)


@METRICS.register("sizes")
class Sizes:
    """Recall of the objects of the truth by how large they are.

    An object is a connected component of the true pixels of one class (8 neighbours), small below
    32 x 32 pixels, large from 96 x 96 on. It is found if at least half of its pixels have the
    right class. Beside the share of objects found, of which each counts as one, stands the share
    of right pixels, in which large ones count more. Where there is no object it is NaN.

    An object that an ignored line cuts in two is two. Nothing is said about objects that are
    predicted where there are none: that is IoU's business.

    Args:
        num_classes: how many classes there are.
        ignore_label: id of the true pixels that count nowhere.
        edges: areas in pixels from which an object is medium and large.

    Source:
        T.-Y. Lin et al., "Microsoft COCO", arXiv:1405.0312, and cocodataset.org, detection
        evaluation (the sizes); M. Cordts et al., arXiv:1604.01685 (why: IoU is biased
        toward large instances).

    Example:
        Two objects of class 1: of the one 2 of 4 pixels are right, of the other none of 1.

        >>> metric = Sizes(2, edges=(4, 100))
        >>> metric.update(np.array([[1, 1, 1, 1, 0, 1]]), np.array([[1, 1, 0, 0, 0, 0]]))
        >>> metric.objects[1].tolist(), metric.found[1].tolist()
        ([1, 1, 0], [0, 1, 0])
    """

    needs_probabilities = False

    def __init__(
        self, num_classes: int, ignore_label: int = 255, *, edges: tuple[int, int] = EDGES
    ) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.edges = edges
        # Each of each class and size, (C, 3).
        self.objects, self.found, self.pixels, self.right = np.zeros(
            (4, num_classes, len(NAMES)), np.int64
        )

    def update(self, mask: np.ndarray, prediction: np.ndarray) -> None:
        """Look for the objects of one image (H, W) or of a batch (B, H, W) of class ids."""
        pairs = single_images(
            mask, prediction, num_classes=self.num_classes, ignore_label=self.ignore_label
        )
        for true, guess in pairs:
            for id_, pixels, right in self._objects(true, guess):
                size = np.digitize(pixels, self.edges)
                found = 2 * right >= pixels
                counts = (np.ones_like(pixels), found, pixels, right)
                totals = (self.objects, self.found, self.pixels, self.right)
                for total, count in zip(totals, counts, strict=True):
                    np.add.at(total[id_], size, count)

    def result(self) -> dict[str, list | np.ndarray]:
        """Return objects, share found and share of right pixels of each size; classes apart."""
        return {
            "sizes": list(NAMES),
            "edges": list(self.edges),
            "objects": self.objects.sum(axis=0),
            "recall": ratio(self.found.sum(axis=0), self.objects.sum(axis=0)),
            "pixel_recall": ratio(self.right.sum(axis=0), self.pixels.sum(axis=0)),
            "classes": {
                "objects": self.objects,
                "recall": ratio(self.found, self.objects),
            },
        }

    def table(self, classes: Sequence[str]) -> Table:
        """Return the share of objects found of each class and size, and how many there are."""
        found = self.result()
        small, large = self.edges
        names = (f"small, < {small} px", "medium", f"large, >= {large} px")
        table = Table("class", *names, title="share of the objects that are half right, and more")
        for column in table.columns[1:]:
            column.justify = "right"
        rows = zip(classes, found["classes"]["recall"], self.objects, strict=True)
        for name, recalls, objects in rows:
            table.add_row(escape(name), *_cells(recalls, objects))
        table.add_section()
        table.add_row("all", *_cells(found["recall"], found["objects"]))
        table.add_row("right pixels", *(fraction(value) for value in found["pixel_recall"]))
        return table

    def _objects(
        self, mask: np.ndarray, prediction: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Give each class there is, with the pixels of its objects and the right ones of them."""
        right = mask == prediction
        for id_ in np.unique(mask[mask != self.ignore_label]):
            numbers, count = ndimage.label(mask == id_, structure=np.ones((3, 3)))
            pixels = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
            hits = np.bincount(numbers[right], minlength=count + 1)[1:]
            yield int(id_), pixels, hits


def _cells(recalls: np.ndarray, objects: np.ndarray) -> list[str]:
    return [
        f"{recall:.2f} of {count}" if count else "-"
        for recall, count in zip(recalls, objects, strict=True)
    ]
