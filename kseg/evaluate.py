"""How good a model is on a labelled split, counted at the labels' own size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kseg.data.dataset import IGNORE_LABEL, Dataset, FileDataset
from kseg.errors import UserError
from kseg.files import write_text
from kseg.machine import whole_memory
from kseg.metrics import bootstrap, per_image
from kseg.metrics.bootstrap import DRAWS, LEVEL, Interval, Intervals
from kseg.metrics.conventions import conventions
from kseg.metrics.iou import ConfusionMatrix
from kseg.metrics.metric import Metric
from kseg.metrics.per_image import ImageCounts, PerImage
from kseg.registry import METRICS

if TYPE_CHECKING:
    from kseg.inference import Predictor

BYTES_A_PIXEL = 24  # image, mask and labels, and what is between while they are made and counted
_MADE_UP = re.compile(r"(class )?\d+")
_BACKGROUNDS = ("background", "bg")
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
        per_image: the same counts of each image by itself, in the order of the data set.
        metrics: what else was asked for, by name.
        tiles_apart: share of the labels, 0..1, that tiles change against whole images, on a few
            that are spread over the split; None where that was not measured.
        read_from: the JSON file that this was read from; None where it was made now.
    """

    confusion: ConfusionMatrix
    classes: tuple[str, ...]
    dataset: str
    split: str
    images: int
    file: str = ""
    settled: tuple[float, ...] = ()
    refinements: tuple[str, ...] = ()
    per_image: PerImage = field(default_factory=lambda: PerImage(0, ()))
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    tiles_apart: float | None = None
    read_from: Path | None = None

    @property
    def source(self) -> str:
        """The file to name in a message: the JSON, if it was read, and the model behind it."""
        if self.read_from is None:
            return self.file
        return f"{self.read_from} ({self.file})" if self.file else str(self.read_from)

    @property
    def miou(self) -> float:
        """Mean IoU over the whole split, 0..1."""
        return self.confusion.miou

    @property
    def pixel_accuracy(self) -> float:
        """Share of the valid pixels that are right, 0..1."""
        return self.confusion.pixel_accuracy

    @cached_property
    def intervals(self) -> Intervals:
        """Where mIoU, pixel accuracy and the IoU of each class lie, 95 %, over images."""
        return bootstrap.intervals(self.per_image.tallies())

    @cached_property
    def conventions(self) -> dict[str, float | None]:
        """The mean IoU by every convention; background is the class of that name, if any."""
        names = [name.casefold() for name in self.classes]
        background = next((names.index(name) for name in _BACKGROUNDS if name in names), None)
        return conventions(self.per_image.tallies(), background=background)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as fractions 0..1; None for what an absent class does not have.

        `intervals` are those of 95 %, `conventions` mean IoU by every convention's name,
        `metrics` the results of those asked for. `per_image` holds the cells of each image's
        confusion matrix that are not empty, as [true class, predicted class, pixels].
        """
        result = self.confusion.result()
        iou, intervals = plain(result["iou"]), asdict(self.intervals)
        of_classes = intervals.pop("iou")
        return {
            "file": self.file,
            "dataset": self.dataset,
            "split": self.split,
            "images": self.images,
            **{name: result[name] for name in SCALARS},
            "classes": [
                {"id": i, "name": name, "iou": iou[i], "interval": plain(of_classes[i])}
                for i, name in enumerate(self.classes)
            ],
            **({"settled": list(self.settled)} if self.settled else {}),
            **({"refinements": list(self.refinements)} if self.refinements else {}),
            "intervals": {"level": LEVEL, "draws": DRAWS, **plain(intervals)},
            "conventions": plain(self.conventions),
            "metrics": {name: plain(metric.result()) for name, metric in self.metrics.items()},
            "per_image": [image.to_json() for image in self.per_image.images],
            **({"tiles_apart": self.tiles_apart} if self.tiles_apart is not None else {}),
        }

    @staticmethod
    def load_json(path: Path) -> Evaluation:
        """Read what `save_json` wrote; `metrics`, of which only results are kept, stay empty.

        Raises:
            UserError: if it is something else, or of a kseg that did not keep counts by image.
        """
        raw = _read_json(path)
        if "per_image" not in raw:
            raise UserError(
                f"{path} has no counts of single images (`per_image`); write it again with "
                "`kseg evaluate --json`"
            )
        try:
            classes = tuple(str(one["name"]) for one in raw["classes"])
            images = per_image.from_json(raw["per_image"], len(classes))
            confusion = ConfusionMatrix(len(classes), IGNORE_LABEL)
            confusion.matrix += images.total()
            return Evaluation(
                confusion=confusion,
                classes=classes,
                dataset=str(raw["dataset"]),
                split=str(raw["split"]),
                images=len(images.images),
                file=str(raw["file"]),
                settled=tuple(raw.get("settled", ())),
                refinements=tuple(raw.get("refinements", ())),
                per_image=images,
                tiles_apart=raw.get("tiles_apart"),
                read_from=Path(path),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is damaged: {error}; write it again") from error

    def save_json(self, path: Path) -> None:
        """Write `to_json` to a file, one line for each image; it is either whole or untouched."""
        record = self.to_json()
        images = [json.dumps(image, ensure_ascii=False) for image in record.pop("per_image")]
        head = json.dumps(record, indent=1, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n  ".join(images)
        write_text(Path(path), f'{head},\n "per_image": [\n  {lines}\n ]\n}}\n')

    def table(self) -> Table:
        """Return the IoU, its 95 % interval and the share of true pixels of each class, mIoU last.

        Before it stand the pixel accuracy and the mean over images of their own mIoU.
        """
        true = self.confusion.matrix.sum(axis=1)
        images = f"{self.images} image{'s' if self.images != 1 else ''}"
        title = ", ".join((f"{self.dataset} {self.split}", images, *self.refinements))
        table = Table("class", "IoU", f"{LEVEL:.0%} interval", "pixels", title=escape(title))
        for column in table.columns[1:]:
            column.justify = "right"
        rows = zip(
            self.classes, self.confusion.iou, self.intervals.iou, true / true.sum(), strict=True
        )
        for name, iou, interval, share in rows:
            shown = "absent" if math.isnan(iou) else f"{iou:.4f}"
            table.add_row(escape(name), shown, span(interval), f"{share:.2%}")
        table.add_section()
        for name, value, interval in self._means():
            table.add_row(name, f"{value:.4f}", span(interval), "")
        for number, share in enumerate(self.settled, start=1):
            table.add_row(f"settled by stage {number}", "", "", f"{share:.2%}")
        return table

    def tables(self) -> list[Table]:
        """Return a table for each further metric that was asked for."""
        return [metric.table(self.classes) for metric in self.metrics.values()]

    def _means(self) -> list[tuple[str, float, Interval]]:
        found = self.intervals
        return [
            ("pixel accuracy", self.pixel_accuracy, found.pixel_accuracy),
            ("images' own mIoU", self.conventions["miou_of_images"], found.miou_of_images),
            ("mIoU", self.miou, found.miou),
        ]


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    split: str,
    limit: int | None = None,
    metrics: Sequence[str] = (),
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare a model's class maps with the masks of a split, each at the mask's own size.

    Args:
        predictor: the loaded model file, of any format.
        dataset: labelled images.
        split: which of its splits.
        limit: only the first so many images.
        metrics: names of further metrics; those that need probabilities run the model twice.
        on_image: called after each image with how many are done and how many there are.

    Returns:
        The totals over all images, and the counts of each.

    Raises:
        UserError: if the model and the data set have different classes, if the limit is below 1,
            if there is no such metric or it needs probabilities that the file does not give, if a
            sample cannot be read or is larger than memory, or if no pixel of the split has a class.
    """
    check_classes(predictor, dataset)
    check_limit(limit)
    further = _metrics(metrics, predictor, len(dataset.classes))
    # Imported here because this brings TensorFlow in.
    from kseg.data.pipeline import read_samples

    total = min(dataset.length(split), limit or dataset.length(split))
    _check_memory(dataset, split, total)
    confusion = ConfusionMatrix(len(dataset.classes), IGNORE_LABEL)
    images: list[ImageCounts] = []
    before = len(predictor.settled)
    for done, (image, mask) in enumerate(read_samples(dataset, split, limit=total), start=1):
        labels = predictor.predict(image, size=mask.shape)
        own = ConfusionMatrix(len(dataset.classes), IGNORE_LABEL)
        own.update(mask, labels)
        confusion.matrix += own.matrix
        images.append(ImageCounts.of(dataset.sample_name(split, done - 1), mask, own.matrix))
        _update(further.values(), predictor, image, mask, labels)
        if on_image is not None:
            on_image(done, total)
    if not confusion.matrix.any():
        raise _nothing_to_compare(dataset, split, total)
    return Evaluation(
        confusion=confusion,
        classes=tuple(dataset.classes),
        dataset=dataset.name,
        split=split,
        images=total,
        file=str(predictor.path),
        settled=_mean(predictor.settled[before:]),
        refinements=tuple(map(str, predictor.refinements)),
        per_image=PerImage(len(dataset.classes), tuple(images)),
        metrics=further,
    )


def _nothing_to_compare(dataset: Dataset, split: str, total: int) -> UserError:
    found = f"{dataset.name} {split}: every pixel of its {total} images is ignored"
    if isinstance(dataset, FileDataset):
        more = f" and {total - 1} more of {dataset.name} {split}" if total > 1 else ""
        found = f"{dataset.pairs(split)[0].mask}{more}: every pixel is ignored"
    return UserError(
        f"{found}, so there is nothing to compare with; check the ignore id of the data set"
    )


def check_limit(limit: int | None) -> None:
    """Raise UserError unless `limit` is None or leaves an image."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} images; at least 1 is wanted")


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def check_classes(predictor: Predictor, dataset: Dataset) -> None:
    """Raise UserError unless a model's classes are those of a data set, as far as it tells them.

    Names are compared without case and punctuation; "class 3" and "3", given where nothing is
    known, are any class.
    """
    if not predictor.classes_known:
        return
    if predictor.num_classes != len(dataset.classes):
        raise UserError(
            f"{predictor.path} has {predictor.num_classes} classes "
            f"({', '.join(predictor.classes)}) and {dataset.name} has {len(dataset.classes)} "
            f"({', '.join(dataset.classes)}); evaluate on data with the classes that it was "
            "trained for"
        )
    for id_, (ours, theirs) in enumerate(zip(predictor.classes, dataset.classes, strict=True)):
        if _bare(ours) != _bare(theirs) and not any(map(_MADE_UP.fullmatch, (ours, theirs))):
            raise UserError(
                f"{predictor.path} has the class {ours!r} where {dataset.name} has {theirs!r} "
                f"(id {id_}); evaluate on data with the classes that it was trained for, or name "
                "them alike if they are the same"
            )


def span(interval: Interval) -> str:
    """Return an interval as text, "-" for None."""
    return "-" if interval is None else "{:.4f} to {:.4f}".format(*interval)


def _metrics(names: Sequence[str], predictor: Predictor, num_classes: int) -> dict[str, Metric]:
    found = {name: METRICS[name](num_classes, IGNORE_LABEL) for name in names}
    for name, metric in found.items():
        if metric.needs_probabilities and predictor.output == "classes":
            raise UserError(
                f"{predictor.path} gives a class map, and the metric {name} needs probabilities; "
                "export the run with --output logits"
            )
    return found


def _update(
    metrics: Iterable[Metric],
    predictor: Predictor,
    image: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray,
) -> None:
    probabilities = None
    for metric in metrics:
        if metric.needs_probabilities and probabilities is None:
            probabilities = predictor.probabilities(image, size=mask.shape)
        metric.update(mask, probabilities if metric.needs_probabilities else labels)


def _check_memory(dataset: Dataset, split: str, total: int) -> None:
    """Refuse a mask, by its header, that is too large to be decoded and counted."""
    if not isinstance(dataset, FileDataset):
        return
    from kseg.data.doctor import read_header

    memory = whole_memory()
    for pair in dataset.pairs(split)[:total]:
        header = read_header(pair.mask)
        needed = BYTES_A_PIXEL * header.height * header.width
        if needed > memory:
            raise UserError(
                f"{pair.mask} is {header.width} x {header.height} pixels, which take "
                f"{needed / 1e9:.1f} GB to evaluate, and there are {memory / 1e9:.1f} GB of "
                "memory; cut it and its image into smaller ones"
            )


def _bare(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever a metric found
    """Return a result as JSON has it: lists for arrays, None for NaN."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no JSON: {error}; name what `kseg evaluate --json` wrote"
        ) from error
    if not isinstance(raw, dict) or "miou" not in raw:
        raise UserError(f"{path} holds no evaluation; name what `kseg evaluate --json` wrote")
    return raw
