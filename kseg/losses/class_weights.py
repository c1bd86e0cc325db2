"""Class weights against imbalance: from the pixels of a data set, or from a file.

With n the pixels of a class, p their share among all valid pixels and f their share among the
pixels of the images that contain the class, the weights are

    inverse    1 / p                      every class counts the same in all
    median     median(f) / f              the same among the images that hold it
    effective  (1 - B) / (1 - B^n)        as inverse, but common classes stay alike
    sqrt       1 / sqrt(p)                half of that way: the usual choice for small nets
    enet       1 / ln(1.02 + p)           bounded by 50.5, however rare a class is

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
        per_image: (images, num_classes) int64, pixels of each class in each image.
    """

    per_image: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """Pixels of each class, (num_classes,) int64."""
        return self.per_image.sum(axis=0)

    @property
    def image_pixels(self) -> np.ndarray:
        """Valid pixels of the images that contain each class, (num_classes,) int64."""
        return self.per_image.sum(axis=1) @ (self.per_image > 0)

    @property
    def share(self) -> np.ndarray:
        """Share of each class among all valid pixels, (num_classes,) float64, sum 1 or 0."""
        return self.pixels / max(1, self.pixels.sum())

    @property
    def prior(self) -> np.ndarray:
        """The same for a logarithm: a class without a pixel counts as one with a single one."""
        pixels = np.maximum(1, self.pixels)
        return pixels / pixels.sum()


def count_pixels(
    masks: Iterable[np.ndarray], num_classes: int, *, ignore_label: int = 255
) -> PixelCounts:
    """Count the pixels of each class.

    Args:
        masks: one (H, W) array of class ids an image; sizes may differ.
        num_classes: how many classes there are.
        ignore_label: id of pixels that count nowhere.

    Returns:
        The counts of every mask.

    Raises:
        UserError: if a mask holds an id outside the classes.
    """
    per_image = [np.zeros((0, num_classes), np.int64)]
    for number, mask in enumerate(masks):
        counts = np.bincount(np.ravel(mask), minlength=max(num_classes, ignore_label + 1))
        counts[ignore_label] = 0
        if counts[num_classes:].any():
            found = ", ".join(map(str, np.flatnonzero(counts)))
            raise UserError(
                f"mask {number} holds the ids {found}; there are {num_classes} classes, "
                f"0 to {num_classes - 1}, and {ignore_label} for ignored pixels"
            )
        per_image.append(counts[None, :num_classes])
    return PixelCounts(np.concatenate(per_image))


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
    return np.sqrt(inverse_weights(counts))


def inverse_weights(counts: PixelCounts) -> np.ndarray:
    """Return one over each class's share; 1 for a class without a pixel.

    Args:
        counts: pixels of each class.

    Returns:
        (num_classes,) float64, not scaled.
    """
    share = counts.share
    return 1 / np.where(share > 0, share, 1.0)


def effective_weights(counts: PixelCounts, *, beta: float | None = None) -> np.ndarray:
    """Return one over the effective number of pixels, (1 - beta) / (1 - beta^n).

    A class of far fewer than 1 / (1 - beta) pixels is weighed by its inverse frequency, those of
    far more all alike.

    Args:
        counts: pixels of each class.
        beta: from 0 to below 1. Default: 1 - 1 / m, where m is the mean number of pixels of the
            classes that there are.

    Returns:
        (num_classes,) float64, not scaled; 1 for a class without a pixel.

    Source:
        Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, "Class-Balanced Loss Based on Effective
        Number of Samples", CVPR 2019, section 4, arXiv:1901.05555.

    Differs:
        The paper's 0.9 to 0.9999 count images; of pixels there are so many that all classes would
        weigh the same, hence another default.
    """
    pixels = counts.pixels
    seen = pixels > 0
    if beta is None:
        beta = 1 - 1 / max(1.0, pixels.sum() / max(1, seen.sum()))
    if beta == 0:
        return np.ones(len(pixels))
    # Of a beta near 1 the power itself would have no digits left.
    effective = -np.expm1(np.where(seen, pixels, 1) * math.log(beta)) / (1 - beta)
    return np.where(seen, 1 / effective, 1.0)


def enet_weights(counts: PixelCounts) -> np.ndarray:
    """Return bounded weights, 1 / ln(1.02 + share): from 1.42 (all pixels) to 50.5 (none).

    Args:
        counts: pixels of each class.

    Returns:
        (num_classes,) float64, not scaled.

    Source:
        A. Paszke et al., "ENet", section 5.2, arXiv:1606.02147 (c = 1.02).
    """
    return 1 / np.log(1.02 + counts.share)


WEIGHTINGS: dict[str, Callable[[PixelCounts], np.ndarray]] = {
    "inverse": inverse_weights,
    "median": median_weights,
    "effective": effective_weights,
    "sqrt": sqrt_weights,
    "enet": enet_weights,
}


def weights_for(
    choice: str, classes: Sequence[str], counts: Callable[[], PixelCounts]
) -> tuple[float, ...] | None:
    """Return the weights that `--class-weights` asks for.

    Args:
        choice: none, inverse, median, effective, effective:BETA, sqrt, enet, or the path of a .csv
            or .json file.
        classes: class names, index is the class id.
        counts: gives the pixels of the training masks; called only where they are needed.

    Returns:
        One factor a class, or None for `none`. Computed weights are scaled so that the mean
        weight of a pixel is 1; those of a file are taken as they are.

    Raises:
        UserError: if the choice is none of these, or the file does not name every class once.
    """
    if choice == "none":
        return None
    if choice in WEIGHTINGS:
        return _scaled(WEIGHTINGS[choice](counts()), counts())
    if choice.startswith("effective:"):
        beta = _beta(choice)
        return _scaled(effective_weights(counts(), beta=beta), counts())
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


def _beta(choice: str) -> float:
    text = choice.partition(":")[2]
    try:
        beta = float(text)
    except ValueError:
        beta = math.nan
    if not 0 <= beta < 1:
        raise UserError(
            f"class weighting {choice}: BETA is {text!r}; expected a number in 0..1, below 1"
        )
    return beta


def _scaled(weights: np.ndarray, counts: PixelCounts) -> tuple[float, ...]:
    mean = (counts.share * weights).sum()
    return tuple(map(float, np.where(counts.pixels > 0, weights / mean if mean else 1.0, 1.0)))
