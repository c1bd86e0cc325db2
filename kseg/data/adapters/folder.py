"""Your own images: two folders for each split and a small table of the classes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from kseg.data.dataset import (
    IGNORE_LABEL,
    Colour,
    FileDataset,
    Pair,
    existing_folder,
    listing,
    pair_by_stem,
)
from kseg.errors import UserError
from kseg.registry import DATASETS

TREE = """\
  PATH/
    classes.csv                 id,name,r,g,b: one line for each class
    train/images/  a.jpg ...    .png or .jpg
    train/masks/   a.png ...    8-bit grey PNG of ids, same names and sizes as the images
    val/images/    val/masks/   the same for validation
    test/images/   test/masks/  the same for testing (optional)"""

EXAMPLE = """\
id,name,r,g,b
0,background,0,0,0
1,cat,250,120,40"""

COLUMNS = ("id", "name", "r", "g", "b")


@DATASETS.register("folder")
class Folder(FileDataset):
    """Your own images and masks in folders, `folder:PATH`.

    PATH holds train/images, train/masks, val/images, val/masks and, if you like, test/images and
    test/masks. Images are .png or .jpg files; each has an 8-bit grey .png mask of the same name
    and size whose pixels are the ids of classes.csv, which stands in PATH and looks like this:

        id,name,r,g,b
        0,background,0,0,0
        1,cat,250,120,40

    r,g,b is the colour to draw the class in. A further row named `ignore`, such as
    `255,ignore,0,0,0`, gives the id of pixels that touch neither loss nor metric. Ids need not
    be without gaps: classes are numbered from 0 in the order of their ids.
    """

    name = "folder"
    licence = "yours"

    def __init__(self, path: str | None) -> None:
        """Read classes.csv; raises UserError if it or the folder is missing or makes no sense."""
        self.folder = existing_folder(path, name=self.name, tree=TREE)
        rows = read_classes(self.folder / "classes.csv")
        self._ignored = [id_ for id_, name, _ in rows if name == "ignore"]
        kept = [row for row in rows if row[1] != "ignore"]
        self._ids = [id_ for id_, _, _ in kept]
        self.classes = tuple(name for _, name, _ in kept)
        self.palette = tuple(colour for _, _, colour in kept)
        has_test = (self.folder / "test").is_dir()
        self.splits = ("train", "val", "test") if has_test else ("train", "val")

    @property
    def remap(self) -> Mapping[int, int]:
        """The ids of classes.csv to 0, 1, 2, ...; the row `ignore` to 255."""
        classes = {raw: id_ for id_, raw in enumerate(self._ids)}
        return classes | dict.fromkeys(self._ignored, IGNORE_LABEL)

    def find_pairs(self, split: str) -> list[Pair]:
        """Pair SPLIT/images with SPLIT/masks by file name."""
        self.check_split(split)
        folder = self.folder / split
        return pair_by_stem(folder / "images", folder / "masks", tree=TREE)


def read_classes(path: Path) -> list[tuple[int, str, Colour]]:
    """Read classes.csv.

    Returns:
        (id, name, colour) of each row, sorted by id.

    Raises:
        UserError: naming the line that is wrong and showing an example.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; write one like this:\n{EXAMPLE}")
    # Spreadsheets put a byte order mark in front ("utf-8-sig").
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
    if not lines or tuple(lines[0]) != COLUMNS:
        raise UserError(f"{path} must begin with the line {','.join(COLUMNS)}, such as:\n{EXAMPLE}")
    numbered = [(number, line) for number, line in enumerate(lines[1:], start=2) if any(line)]
    rows = sorted(_row(path, number, line) for number, line in numbered)
    _check_rows(path, rows)
    return rows


def _row(path: Path, number: int, line: list[str]) -> tuple[int, str, Colour]:
    try:
        id_, name, r, g, b = line
        row = int(id_), name, (int(r), int(g), int(b))
    except ValueError:
        row = -1, "", (0, 0, 0)
    if not row[1] or not all(0 <= value <= 255 for value in (row[0], *row[2])):
        raise UserError(
            f"{path}, line {number}: {','.join(line)!r} is not id,name,r,g,b with whole numbers "
            f"from 0 to 255; an example:\n{EXAMPLE}"
        )
    return row


def _check_rows(path: Path, rows: list[tuple[int, str, Colour]]) -> None:
    for kind, values in (("id", [row[0] for row in rows]), ("name", [row[1] for row in rows])):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise UserError(f"{path} has the {kind} {listing(twice)} more than once")
    if sum(name != "ignore" for _, name, _ in rows) < 2:
        raise UserError(f"{path} must name at least two classes, such as:\n{EXAMPLE}")
