"""How good a model is on a labelled split, counted at the labels' own size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kseg.data.dataset import IGNORE_LABEL, Dataset
from kseg.errors import UserError
from kseg.files import write_text
from kseg.metrics.iou import ConfusionMatrix

if TYPE_CHECKING:
    from kseg.inference import Predictor

SCALARS = ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "dice")


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        confusion: pixels of each true and predicted class, over all images.
        classes: class names, index is the class id.
        dataset: name of the data set.
        split: name of its split.
        images: how many images were evaluated.
        file: the model file.
        settled: of a layer cascade, the share of pixels that each stage settled; else empty.
        refinements: what stood around the model, as "flip" or "DenseCRF(w1=4.0, ...)".
        tiles_apart: share of the labels, 0..1, that tiles change against the whole image; None
            where that was not measured.
    """

    confusion: ConfusionMatrix
    classes: tuple[str, ...]
    dataset: str
    split: str
    images: int
    file: str = ""
    settled: tuple[float, ...] = ()
    refinements: tuple[str, ...] = ()
    tiles_apart: float | None = None

    @property
    def miou(self) -> float:
        """Mean IoU over the whole split, 0..1."""
        return self.confusion.miou

    @property
    def pixel_accuracy(self) -> float:
        """Share of the valid pixels that are right, 0..1."""
        return self.confusion.pixel_accuracy

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as fractions 0..1; the IoU of an absent class is None."""
        result = self.confusion.result()
        iou = [None if math.isnan(value) else float(value) for value in result["iou"]]
        return {
            "file": self.file,
            "dataset": self.dataset,
            "split": self.split,
            "images": self.images,
            **{name: result[name] for name in SCALARS},
            "classes": [
                {"id": i, "name": name, "iou": iou[i]} for i, name in enumerate(self.classes)
            ],
            **({"settled": list(self.settled)} if self.settled else {}),
            **({"refinements": list(self.refinements)} if self.refinements else {}),
            **({"tiles_apart": self.tiles_apart} if self.tiles_apart is not None else {}),
        }

    def save_json(self, path: Path) -> None:
        """Write `to_json` to a file, which is either whole or untouched."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")

    def table(self) -> Table:
        """Return a table of the IoU and the share of true pixels of each class, mIoU last."""
        true = self.confusion.matrix.sum(axis=1)
        images = f"{self.images} image{'s' if self.images != 1 else ''}"
        title = ", ".join((f"{self.dataset} {self.split}", images, *self.refinements))
        table = Table(title=escape(title))
        table.add_column("class")
        table.add_column("IoU", justify="right")
        table.add_column("pixels", justify="right")
        for name, iou, share in zip(
            self.classes, self.confusion.iou, true / true.sum(), strict=True
        ):
            table.add_row(
                escape(name), "absent" if math.isnan(iou) else f"{iou:.4f}", f"{share:.2%}"
            )
        table.add_section()
        table.add_row("mIoU", f"{self.miou:.4f}", "")
        for number, share in enumerate(self.settled, start=1):
            table.add_row(f"settled by stage {number}", "", f"{share:.2%}")
        return table


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    split: str,
    limit: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare a model's class maps with the masks of a split, each at the mask's own size.

    Args:
        predictor: the loaded model file, of any format.
        dataset: labelled images.
        split: which of its splits.
        limit: only the first so many images.
        on_image: called after each image with how many are done and how many there are.

    Returns:
        The totals over all images.

    Raises:
        UserError: if the model and the data set have different numbers of classes, if the limit
            is below 1, if a sample cannot be read, or if no pixel of the split has a class.
    """
    _check_classes(predictor, dataset)
    check_limit(limit)
    # Imported here because this brings TensorFlow in.
    from kseg.data.pipeline import read_samples

    total = min(dataset.length(split), limit or dataset.length(split))
    confusion = ConfusionMatrix(len(dataset.classes), IGNORE_LABEL)
    before = len(predictor.settled)
    for done, (image, mask) in enumerate(read_samples(dataset, split, limit=total), start=1):
        confusion.update(mask, predictor.predict(image, size=mask.shape))
        if on_image is not None:
            on_image(done, total)
    if not confusion.matrix.any():
        raise UserError(
            f"{dataset.name} {split}: every pixel of its {total} images is ignored, so there is "
            "nothing to compare with; check the ignore id of the data set"
        )
    return Evaluation(
        confusion=confusion,
        classes=tuple(dataset.classes),
        dataset=dataset.name,
        split=split,
        images=total,
        file=str(predictor.path),
        settled=_mean(predictor.settled[before:]),
        refinements=tuple(map(str, predictor.refinements)),
    )


def check_limit(limit: int | None) -> None:
    """Raise UserError unless `limit` is None or leaves an image."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} images; at least 1 is wanted")


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def _check_classes(predictor: Predictor, dataset: Dataset) -> None:
    if predictor.classes_known and predictor.num_classes != len(dataset.classes):
        raise UserError(
            f"the model has {predictor.num_classes} classes ({', '.join(predictor.classes)}) and "
            f"{dataset.name} has {len(dataset.classes)} ({', '.join(dataset.classes)}); evaluate "
            "on data with the classes that it was trained for"
        )
