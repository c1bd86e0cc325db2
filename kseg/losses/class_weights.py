"""Class weights against imbalance: from the pixels of a data set, or from a file.

With p the share of a class among all valid pixels and f its share among the pixels of the
images that contain it, the weights are

    median   median(f) / f        rare classes count as much as common ones
    sqrt     1 / sqrt(p)          half of that way: the usual choice for small nets
    enet     1 / ln(1.02 + p)     bounded by 50.5, however rare a class is

each scaled so that the mean weight of a pixel, sum(p * w), is 1: a run then keeps its learning
rate when the weighting changes. A class without a pixel gets the weight 1, which nothing uses.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kseg.errors import UserError
from kseg.registry import nearest


@dataclass(frozen=True)
class PixelCounts:
    """How often each class occurs in a data set.

    Attributes:
        pixels: (num_classes,) int64, pixels of each class.
        image_pixels: (num_classes,) int64, valid pixels of the images that contain the class.
    """

    pixels: np.ndarray
    image_pixels: np.ndarray


def count_pixels(
    masks: Iterable[np.ndarray], num_classes: int, *, ignore_label: int = 255
) -> PixelCounts:
    """Count the pixels of each class.

    Args:
        masks: one (H, W) array of class ids an image; sizes may differ.
        num_classes: how many classes there are.
        ignore_label: id of pixels that count nowhere.

    Returns:
        The totals over all masks.

    Raises:
        UserError: if a mask holds an id outside the classes.
    """
    pixels = np.zeros(num_classes, np.int64)
    image_pixels = np.zeros(num_classes, np.int64)
    for number, mask in enumerate(masks):
        counts = np.bincount(np.ravel(mask), minlength=max(num_classes, ignore_label + 1))
        counts[ignore_label] = 0
        if counts[num_classes:].any():
            found = ", ".join(map(str, np.flatnonzero(counts)))
            raise UserError(
                f"mask {number} holds the ids {found}; there are {num_classes} classes, "
                f"0 to {num_classes - 1}, and {ignore_label} for ignored pixels"
            )
        pixels += counts[:num_classes]
        image_pixels[counts[:num_classes] > 0] += counts.sum()
    return PixelCounts(pixels, image_pixels)


def median_weights(counts: PixelCounts) -> np.ndarray:
    """Return median frequency weights, the constants as the paper's authors publish them.

    Args:
        counts: pixels of each class.

    Returns:
        (num_classes,) float64, not scaled: the class of median frequency has the weight 1.

    Source:
        D. Eigen, R. Fergus, ICCV 2015, section 6.3.2, arXiv:1411.4734; as used by
        V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet", section 3.1, arXiv:1511.00561.
    """
    seen = counts.pixels > 0
    frequency = counts.pixels[seen] / counts.image_pixels[seen]
    weights = np.ones(len(seen))
    weights[seen] = np.median(frequency) / frequency if seen.any() else 1.0
    return weights


def sqrt_weights(counts: PixelCounts) -> np.ndarray:
    """Return one over the square root of each class's share; 1 for a class without a pixel.

    Args:
        counts: pixels of each class.

    Returns:
        (num_classes,) float64, not scaled.
    """
    share = _share(counts)
    return np.where(share > 0, 1 / np.sqrt(np.where(share > 0, share, 1.0)), 1.0)


def enet_weights(counts: PixelCounts) -> np.ndarray:
    """Return bounded weights, 1 / ln(1.02 + share): from 1.42 (all pixels) to 50.5 (none).

    Args:
        counts: pixels of each class.

    Returns:
        (num_classes,) float64, not scaled.

    Source:
        A. Paszke et al., "ENet", section 5.2, arXiv:1606.02147 (c = 1.02).
    """
    return 1 / np.log(1.02 + _share(counts))


WEIGHTINGS: dict[str, Callable[[PixelCounts], np.ndarray]] = {
    "median": median_weights,
    "sqrt": sqrt_weights,
    "enet": enet_weights,
}


def weights_for(
    choice: str, classes: Sequence[str], masks: Callable[[], Iterable[np.ndarray]]
) -> tuple[float, ...] | None:
    """Return the weights that `--class-weights` asks for.

    Args:
        choice: none, median, sqrt, enet, or the path of a .csv or .json file.
        classes: class names, index is the class id.
        masks: gives the training masks; called only where they are needed.

    Returns:
        One factor a class, or None for `none`. Computed weights are scaled so that the mean
        weight of a pixel is 1; those of a file are taken as they are.

    Raises:
        UserError: if the choice is none of these, or the file does not name every class once.
    """
    if choice == "none":
        return None
    if choice in WEIGHTINGS:
        counts = count_pixels(masks(), len(classes))
        return tuple(map(float, _scaled(WEIGHTINGS[choice](counts), counts)))
    path = Path(choice)
    if path.suffix not in (".csv", ".json") and not path.exists():
        names = ["none", *WEIGHTINGS]
        raise UserError(
            f"no class weighting {choice!r}{nearest(choice, names)} (there are: "
            f"{', '.join(names)}, or the path of a .csv or .json file)"
        )
    return read_weights(path, classes)


def read_weights(path: Path, classes: Sequence[str]) -> tuple[float, ...]:
    """Return the weights that a file gives to the classes.

    Args:
        path: a .json file, {"road": 0.5, ...}, or a .csv file with one `name,weight` a line (a
            first line that says just this is skipped).
        classes: class names, index is the class id.

    Returns:
        One factor a class, in the order of the ids.

    Raises:
        UserError: if the file cannot be read, names a class that there is not, names one twice
            or not at all, or a weight is not a number of at least 0, or all are 0.
    """
    weights: dict[str, float] = {}
    for name, value in _read_rows(path):
        if name not in classes:
            known = ", ".join(classes)
            raise UserError(
                f"{path}: no class {name!r}{nearest(name, classes)} (there are: {known})"
            )
        if name in weights:
            raise UserError(f"{path}: class {name!r} has two weights; leave one")
        weights[name] = _weight(path, name, value)
    missing = [name for name in classes if name not in weights]
    if missing:
        raise UserError(f"{path}: no weight for {', '.join(missing)}; every class needs one")
    if not any(weights.values()):
        raise UserError(f"{path}: every weight is 0, so nothing could be learnt")
    return tuple(weights[name] for name in classes)


def _read_rows(path: Path) -> list[tuple[str, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read class weights ({error})") from error
    if path.suffix == ".json":
        return _json_rows(path, text)
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if rows and rows[0] == ["name", "weight"]:
        rows = rows[1:]
    for row in rows:
        if len(row) != 2:
            raise UserError(f"{path}: expected lines of `name,weight`, found {','.join(row)!r}")
    return [(name, value) for name, value in rows]


def _json_rows(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not text.lstrip().startswith("{"):
        raise UserError(f'{path}: expected one object, {{"class name": weight, ...}}')
    return pairs


def _weight(path: Path, name: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise UserError(
            f"{path}: the weight of {name!r} is {value!r}; expected a number of at least 0"
        )
    return number


def _share(counts: PixelCounts) -> np.ndarray:
    return counts.pixels / max(1, counts.pixels.sum())


def _scaled(weights: np.ndarray, counts: PixelCounts) -> np.ndarray:
    mean = (_share(counts) * weights).sum()
    return np.where(counts.pixels > 0, weights / mean if mean else 1.0, 1.0)
