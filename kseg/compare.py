"""Whether one model is better than another on the same images, and how surely."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from kseg.errors import UserError
from kseg.evaluate import Evaluation, plain, span
from kseg.files import write_text
from kseg.metrics.bootstrap import LEVEL
from kseg.metrics.paired import Difference, paired_difference


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same images, and what sets them apart.

    Attributes:
        first: of the model that is compared with, A.
        second: of the model in question, B.
        difference: B less A.
    """

    first: Evaluation
    second: Evaluation
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as fractions 0..1; None for what an absent class does not have."""
        found, rows = self.difference, self._rows()
        return {
            **{name: _side(one) for name, one in (("a", self.first), ("b", self.second))},
            "dataset": self.second.dataset,
            "split": self.second.split,
            "images": self.second.images,
            "verdict": found.verdict,
            "difference": found.miou,
            "level": LEVEL,
            "interval": plain(found.interval),
            "p": found.p,
            "p_bootstrap": found.p_bootstrap,
            "classes": [
                plain({"id": id_, "name": name, "a": a, "b": b, "difference": d, "interval": i})
                for id_, (name, a, b, d, i) in enumerate(rows)
            ],
        }

    def save_json(self, path: Path) -> None:
        """Write `to_json` to a file, which is either whole or untouched."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")

    def table(self) -> Table:
        """Return the IoU of each class by A and B and their difference, mIoU last."""
        title = f"{self.second.dataset} {self.second.split}, {self.second.images} images"
        table = Table("class", "A", "B", "B - A", f"{LEVEL:.0%} interval", title=escape(title))
        for column in table.columns[1:]:
            column.justify = "right"
        for name, *numbers, interval in self._rows():
            if not all(map(math.isnan, numbers)):
                table.add_row(escape(name), *_cells(*numbers), _signed_span(interval))
        table.add_section()
        mious, found = (self.first.miou, self.second.miou), self.difference
        table.add_row("mIoU", *_cells(*mious, found.miou), _signed_span(found.interval))
        return table

    def sides(self) -> str:
        """Return what A and B are, each on a line: the file, and what stood behind the model."""
        named = (("A", self.first), ("B", self.second))
        return "\n".join(
            f"{name}: {', '.join((one.source, *one.refinements))}" for name, one in named
        )

    def sentence(self) -> str:
        """Return the verdict on B with what it rests on."""
        found = self.difference
        said = {
            "better": "B is better than A",
            "worse": "B is worse than A",
            "not shown": "not shown that either is better",
        }[found.verdict]
        between = f", {LEVEL:.0%} interval {_signed_span(found.interval)}" * bool(found.interval)
        return (
            f"{said}: mIoU of B less that of A is {found.miou:+.4f}{between}; p = {found.p:.2g}: "
            f"if A and B were equally good, {_percent(found.p)} of such tests would set them "
            "apart as much"
        )

    def _rows(self) -> list[tuple[str, float, float, float, tuple[float, float] | None]]:
        """Return name, IoU by A and B, difference and its interval of each class."""
        found = self.difference
        columns = (self.first.confusion.iou, self.second.confusion.iou, found.classes)
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        return [
            (name, *row, interval)
            for name, row, interval in zip(
                self.second.classes, numbers, found.class_intervals, strict=True
            )
        ]


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two models by what was counted of the same images.

    Args:
        first: of the model that is compared with, A.
        second: of the model in question, B.

    Returns:
        The difference B less A with its 95 % interval, a p value and a verdict.

    Raises:
        UserError: if they were evaluated on different classes, images or masks.
    """
    if first.classes != second.classes:
        raise UserError(
            f"{first.source} was evaluated on the classes {', '.join(first.classes)} and "
            f"{second.source} on {', '.join(second.classes)}; compare them on the same data"
        )
    _check_images(first, second)
    tallies = (one.per_image.tallies() for one in (first, second))
    try:
        return Comparison(first, second, paired_difference(*tallies))
    except ValueError as error:
        raise UserError(
            f"{first.source} and {second.source} have equal masks, yet count their pixels "
            "differently: one of them is damaged; write both again"
        ) from error


def _side(one: Evaluation) -> dict[str, Any]:
    return {"file": one.file, "refinements": list(one.refinements), "miou": one.miou}


def _check_images(first: Evaluation, second: Evaluation) -> None:
    ours, theirs = first.per_image.images, second.per_image.images
    if len(ours) != len(theirs):
        raise UserError(
            f"{first.source} was evaluated on {len(ours)} images and {second.source} on "
            f"{len(theirs)}; compare them on the same images"
        )
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        # The folder may be another on another machine; the name and the mask may not.
        if Path(one.name).name != Path(other.name).name:
            what = f"image {number} is {one.name} and {other.name}"
        elif one.mask != other.mask:
            what = f"the masks of {other.name} differ"
        else:
            continue
        raise UserError(
            f"{first.source} and {second.source} were evaluated on different images: {what}; "
            "evaluate both on the same data"
        )


def _cells(first: float, second: float, difference: float) -> list[str]:
    known = ["-" if math.isnan(value) else f"{value:.4f}" for value in (first, second)]
    return [*known, "-" if math.isnan(difference) else f"{difference:+.4f}"]


def _signed_span(interval: tuple[float, float] | None) -> str:
    return span(interval) if interval is None else "{:+.4f} to {:+.4f}".format(*interval)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.2%}"
