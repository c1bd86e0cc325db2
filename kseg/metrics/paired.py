"""Whether one of two models is better, measured on the same images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kseg.metrics.bootstrap import DRAWS, Interval, drawn_sums, interval
from kseg.metrics.iou import class_ious, present_mean

SIGNIFICANCE = 0.05
SWAPS = 9999
_TIE = 1e-12  # differences that rounding alone sets apart
_NUMBERS = 2**22  # of a block of swaps, 32 MiB

Verdict = Literal["better", "worse", "not shown"]


@dataclass(frozen=True)
class Difference:
    """By how much the second model's mean IoU exceeds the first's, and how sure that is.

    Attributes:
        miou: mIoU of the second less that of the first, fractions of 1.
        interval: of `miou`, 95 % by the paired bootstrap; None from one image.
        p: how often the two, swapped on images by chance, differ at least as much.
        p_bootstrap: twice the share of bootstrap draws on the other side of zero, at most 1.
        classes: IoU of each class, second less first, (C,); NaN where either has none.
        class_intervals: of `classes`, each by itself.
    """

    miou: float
    interval: Interval
    p: float
    p_bootstrap: float
    classes: np.ndarray
    class_intervals: tuple[Interval, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the second is better: the interval leaves out zero and p is at most 5 %.

        Two tests must agree, since a bootstrap of few images is too sure of itself: of three
        images all better, the interval leaves out zero, yet p is 25 %.
        """
        if self.interval is None or self.p > SIGNIFICANCE:
            return "not shown"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "not shown"


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    draws: int = DRAWS,
    swaps: int = SWAPS,
    seed: int = 0,
) -> Difference:
    """Compare two models on the same images.

    The bootstrap draws images with replacement, the same for both models, so that what makes an
    image hard for both does not count. The permutation test asks what would be seen if the two
    were equally good: then it is chance which of them gave which answer, image by image.

    Args:
        first: right, true and predicted pixels of each class in each image, (N, 3, C).
        second: the same of the second model, of the same images in the same order.
        draws: how many bootstrap samples.
        swaps: how many ways of swapping are tried at most.
        seed: equal seeds give equal results.

    Raises:
        ValueError: if the true pixels of the two differ.

    Source:
        B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 15;
        P. Good, "Permutation Tests", 1994 (matched pairs).
    """
    if first.shape != second.shape or (first[:, 1] != second[:, 1]).any():
        raise ValueError("the two were not counted on the same images")
    images = len(first)
    ious = class_ious(np.stack([first, second]).sum(axis=1))
    miou = float(_differences(*ious))
    drawn = _drawn_ious(first, second, draws=draws if images > 1 else 0, seed=seed)
    moved, classes = _differences(*drawn), (drawn[1] - drawn[0]).T
    return Difference(
        miou=miou,
        interval=interval(moved, images=images),
        p=permutation_p(first, second, swaps=swaps, seed=seed),
        p_bootstrap=_other_side(moved),
        classes=ious[1] - ious[0],
        class_intervals=tuple(interval(one, images=images) for one in classes),
    )


def permutation_p(
    first: np.ndarray, second: np.ndarray, *, swaps: int = SWAPS, seed: int = 0
) -> float:
    """Return how often two equally good models would differ in mIoU as much as these, or more.

    On each image the two are swapped or not. All ways are tried where they are fewer than
    `swaps`, else so many by chance, the way it was counted as one more.

    Args:
        first: as in `paired_difference`.
        second: as in `paired_difference`.
        swaps: how many ways to try.
        seed: equal seeds give equal results.

    Example:
        Three images, the second model better on each: of the 8 ways, the one seen and its mirror
        differ most, so p = 2 / 8.

        >>> tallies = np.array([[[8], [9], [9]]] * 3)
        >>> permutation_p(tallies, tallies + [[1], [0], [0]])
        0.25
    """
    change = (second - first).reshape(len(first), -1).astype(np.float64)
    before, after = first.sum(axis=0), second.sum(axis=0)
    seen = abs(_differences(*class_ious(np.stack([before, after]))))
    count, extreme = 0, 0
    for chosen in _swapped(len(first), swaps=swaps, seed=seed):
        moved = (chosen @ change).reshape(-1, *before.shape)
        found = np.abs(_differences(class_ious(before + moved), class_ious(after - moved)))
        count, extreme = count + len(found), extreme + np.count_nonzero(found >= seen - _TIE)
    return float(extreme / count)


def _swapped(images: int, *, swaps: int, seed: int) -> Iterator[np.ndarray]:
    """Give blocks of rows that say on which images to swap; the way it was is among them."""
    if 2**images <= swaps:
        yield (np.arange(2**images)[:, None] >> np.arange(images) & 1).astype(np.float64)
        return
    yield np.zeros((1, images))
    generator, rows = np.random.default_rng(seed), max(1, _NUMBERS // images)
    for start in range(0, swaps, rows):
        yield generator.integers(0, 2, (min(rows, swaps - start), images)).astype(np.float64)


def _drawn_ious(
    first: np.ndarray, second: np.ndarray, *, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of each class in each draw, (draws, C), of both on the same draws."""
    images, _, classes = first.shape
    counts = np.concatenate([first, second], axis=1).reshape(images, -1)
    sums = drawn_sums(counts, draws=draws, seed=seed).reshape(draws, 6, classes)
    return class_ious(sums[:, :3]), class_ious(sums[:, 3:])


def _differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return present_mean(second) - present_mean(first)


def _other_side(moved: np.ndarray) -> float:
    """Return a two-sided p of differences in draws; 1 without a draw."""
    if not len(moved):
        return 1.0
    sides = np.count_nonzero(moved <= 0), np.count_nonzero(moved >= 0)
    return min(1.0, 2 * (min(sides) + 1) / (len(moved) + 1))
