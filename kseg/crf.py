"""Fully connected CRF: class probabilities made to follow the colour edges of their image."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from kseg.data.dataset import IGNORE_LABEL, Dataset
from kseg.errors import UserError
from kseg.inference import Predictor, feed
from kseg.metrics.iou import ConfusionMatrix
from kseg.permutohedral import GaussianFilter
from kseg.probabilities import best_classes

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]

# Messages were at most 1.32 times the sum of the weights on any image tried, so that they stay
# below 88, of which float32 has no exponential.
MOST_WEIGHT = 30.0
LEAST_SIGMA = 0.5
# What follows from less would be subnormal, with which processors calculate very slowly.
SMALLEST = 1e-20

# A thread with fewer classes reads more of the matrices than of the probabilities.
CLASSES_PER_THREAD = 8
VECTOR = 4  # floats that every processor adds at once

# The first round of DeepLab v2.
W1 = (3.0, 4.0, 5.0, 6.0)
SIGMA_ALPHA = (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)
SIGMA_BETA = (3.0, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class DenseCRF:
    """A fully connected CRF as DeepLab v1 and v2 put it behind their nets.

    With P the net's probabilities, p the place of a pixel and I its colour, 0 to 255, a labelling
    x of the image has the energy

        sum_i -ln P_i(x_i) + sum_{i<j, x_i != x_j} (w1 a(i, j) + w2 b(i, j))
        a(i, j) = exp(-|p_i - p_j|^2 / (2 sigma_alpha^2) - |I_i - I_j|^2 / (2 sigma_beta^2))
        b(i, j) = exp(-|p_i - p_j|^2 / (2 sigma_gamma^2))

    with a and b normalised (`GaussianFilter`). Mean field starts at Q = P and makes, again and
    again, ln Q_i = ln P_i + sum_j (w1 a(i, j) + w2 b(i, j)) Q_j up to a constant.

    Attributes:
        w1: weight of pixels that are near and alike in colour, 0 to 30.
        sigma_alpha: how near, in pixels.
        sigma_beta: how alike, in levels of 255.
        w2: weight of pixels that are near, 0 to 30.
        sigma_gamma: how near, in pixels.
        iterations: of mean field; 0 changes nothing.

    Source:
        P. Krähenbühl and V. Koltun, arXiv:1210.5644; L.-C. Chen et al., arXiv:1412.7062, section
        4.2, and arXiv:1606.00915, section 3.3. w2, sigma_gamma and the number of iterations are
        those of the papers, which search the other three for each net (`search`); w1, sigma_alpha
        and sigma_beta are from the script that came with the second paper's code. Its ResNet-101
        was released with w1 4, sigma_alpha 67, sigma_beta 3, w2 3, sigma_gamma 1.

    Differs:
        A pixel hears itself too, as in the authors' program.
    """

    w1: float = 4.0
    sigma_alpha: float = 49.0
    sigma_beta: float = 5.0
    w2: float = 3.0
    sigma_gamma: float = 3.0
    iterations: int = 10

    def __post_init__(self) -> None:
        _check_range(self, ("w1", "w2"), 0, MOST_WEIGHT)
        _check_range(self, ("sigma_alpha", "sigma_beta", "sigma_gamma"), LEAST_SIGMA, math.inf)
        _check_range(self, ("iterations",), 0, math.inf)

    def refine(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Return the probabilities of each pixel's classes, now with regard to all others.

        Args:
            probabilities: (H, W, C), 1 in sum at each pixel: a net's softmax at the image's size.
            image: uint8 (H, W, 3), RGB.

        Returns:
            (H, W, C) float32; its argmax are the labels.

        Raises:
            UserError: if the two are not of these types and one size.
        """
        _check_sample(probabilities, image)
        with _pool() as pool:
            alike, near = pool.map(lambda make: make(image), (self.alike, self.near))
            return self.mean_field(probabilities, alike, near, pool)

    def alike(self, image: np.ndarray) -> GaussianFilter:
        """Return the filter by `a` of an image uint8 (H, W, 3)."""
        places = _places(image) / np.float32(self.sigma_alpha)
        colours = image.reshape(-1, 3).T / np.float32(self.sigma_beta)
        return GaussianFilter.of(np.concatenate([places, colours]))

    def near(self, image: np.ndarray) -> GaussianFilter:
        """Return the filter by `b` of an image uint8 (H, W, 3)."""
        return GaussianFilter.of(_places(image) / np.float32(self.sigma_gamma))

    def mean_field(
        self,
        probabilities: np.ndarray,
        alike: GaussianFilter,
        near: GaussianFilter,
        pool: Executor,
    ) -> np.ndarray:
        """Return what `refine` does, with filters that can be used again.

        Args:
            probabilities: (H, W, C).
            alike: the filter by `a`.
            near: the filter by `b`.
            pool: threads; each takes a part of the classes.
        """

        def updated(part: np.ndarray, log: np.ndarray, total: np.ndarray) -> np.ndarray:
            part /= total
            message = alike(part, self.w1)
            message += near(part, self.w2)
            message += log
            return np.exp(message, out=message)

        parts = _by_threads(probabilities)
        logs = [np.log(np.maximum(part, SMALLEST)) for part in parts]
        total = np.ones((len(parts[0]), 1), np.float32)
        for _ in range(self.iterations):
            parts = list(pool.map(updated, parts, logs, itertools.repeat(total)))
            # Five times as fast as sum(axis=1), which adds single rows.
            total = sum(np.einsum("nc->n", part) for part in parts)[:, None]
        result = np.concatenate(parts, axis=1)[:, : probabilities.shape[-1]] / total
        return result.reshape(probabilities.shape)


@dataclass(frozen=True)
class Predictions:
    """The samples that `search` takes, from a predictor and a labelled split.

    Attributes:
        predictor: gives probabilities; asked anew each time the samples are gone through.
        dataset: labelled images.
        split: which of its splits.
        limit: only the first so many images; 100, as in the papers.
    """

    predictor: Predictor
    dataset: Dataset
    split: str = "val"
    limit: int | None = 100

    @property
    def length(self) -> int:
        """How many samples there are."""
        there = self.dataset.length(self.split)
        return min(there, self.limit or there)

    def __iter__(self) -> Iterator[Sample]:
        # Imported here because this brings TensorFlow in.
        from kseg.data.pipeline import read_samples

        for image, mask in read_samples(self.dataset, self.split, limit=self.limit):
            probabilities = self.predictor.probabilities(image, size=mask.shape)
            yield probabilities, feed(image, mask.shape), mask


@dataclass(frozen=True)
class Search:
    """What a search for the parameters of a CRF found.

    Attributes:
        without: mIoU of the probabilities as they came.
        trials: mIoU of each CRF that was tried, in order.
    """

    without: float
    trials: dict[DenseCRF, float]

    @property
    def best(self) -> DenseCRF:
        """The CRF with the highest mIoU; the first of equals."""
        return max(self.trials, key=self.trials.__getitem__)

    def table(self) -> Table:
        """Return a table of all trials, best first, below the mIoU without a CRF."""
        table = Table(title="dense CRF")
        for title in ("w1", "sigma_alpha", "sigma_beta", "mIoU"):
            table.add_column(title, justify="right")
        table.add_row("none", "", "", f"{self.without:.4f}", end_section=True)
        for crf, miou in sorted(self.trials.items(), key=lambda trial: -trial[1]):
            settings = (f"{value:g}" for value in (crf.w1, crf.sigma_alpha, crf.sigma_beta))
            table.add_row(*settings, f"{miou:.4f}")
        return table


def search(
    samples: Iterable[Sample],
    *,
    crf: DenseCRF | None = None,
    w1: Sequence[float] = W1,
    sigma_alpha: Sequence[float] = SIGMA_ALPHA,
    sigma_beta: Sequence[float] = SIGMA_BETA,
    on_sample: Callable[[int, int], None] | None = None,
) -> Search:
    """Find w1, sigma_alpha and sigma_beta on labelled images, coarse to fine.

    The first round tries every combination; the second those of the best values and of the
    points halfway to their neighbours. By default that is 128 and at most 27 times the work of
    `DenseCRF.refine`, less the making of filters that trials share.

    Args:
        samples: probabilities float32 (H, W, C), image uint8 (H, W, 3) and mask (H, W) of class
            ids, 255 where ignored. A list, or `Predictions`: they are gone through twice.
        crf: gives the other parameters; those of the papers by default.
        w1: values of the first round.
        sigma_alpha: values of the first round.
        sigma_beta: values of the first round.
        on_sample: called after each sample with the round, 1 or 2, and how many of it are done.

    Returns:
        All trials; `best` is the one to take.

    Raises:
        UserError: if there is nothing to compare with, or the samples are an iterator.

    Source:
        L.-C. Chen et al., arXiv:1606.00915, section 4.
    """
    if isinstance(samples, Iterator):
        raise UserError("samples are gone through twice; give a list of them or `Predictions`")
    crf = crf or DenseCRF()
    grids = [sorted(values) for values in (w1, sigma_alpha, sigma_beta)]
    coarse = _try_all(samples, _combinations(crf, grids), 1, on_sample)
    best = (coarse.best.w1, coarse.best.sigma_alpha, coarse.best.sigma_beta)
    grids = [_around(value, grid) for value, grid in zip(best, grids, strict=True)]
    fine = _try_all(samples, _combinations(crf, grids), 2, on_sample)
    return Search(coarse.without, coarse.trials | fine.trials)


def _combinations(crf: DenseCRF, grids: Sequence[Sequence[float]]) -> list[DenseCRF]:
    """Return a CRF for each combination of values, those with equal sigmas in a row."""
    w1, sigma_alpha, sigma_beta = grids
    return [
        dataclasses.replace(crf, w1=weight, sigma_alpha=alpha, sigma_beta=beta)
        for alpha, beta, weight in itertools.product(sigma_alpha, sigma_beta, w1)
    ]


def _around(value: float, grid: list[float]) -> list[float]:
    """Return a value of a sorted grid, between the points halfway to its neighbours."""
    at = grid.index(value)
    return [(value + near) / 2 for near in (*grid[at - 1 : at], value, *grid[at + 1 : at + 2])]


def _try_all(
    samples: Iterable[Sample],
    crfs: list[DenseCRF],
    number: int,
    on_sample: Callable[[int, int], None] | None,
) -> Search:
    counts: dict[DenseCRF | None, ConfusionMatrix] = {}
    for done, (probabilities, image, mask) in enumerate(samples, start=1):
        _check_sample(probabilities, image)
        for crf, labels in _tried(probabilities, image, crfs):
            counts.setdefault(crf, ConfusionMatrix(probabilities.shape[-1], IGNORE_LABEL))
            counts[crf].update(mask, labels)
        if on_sample is not None:
            on_sample(number, done)
    without = counts.pop(None, None)
    if without is None or not without.matrix.any():
        raise UserError("there is no labelled pixel to compare the CRFs by")
    return Search(without.miou, {crf: confusion.miou for crf, confusion in counts.items()})


def _tried(
    probabilities: np.ndarray, image: np.ndarray, crfs: list[DenseCRF]
) -> Iterator[tuple[DenseCRF | None, np.ndarray]]:
    """Yield the labels as they came, under None, and as each CRF makes them."""
    yield None, best_classes(probabilities)
    near = crfs[0].near(image)
    with _pool() as pool:
        for _, group in itertools.groupby(crfs, lambda crf: (crf.sigma_alpha, crf.sigma_beta)):
            same = list(group)
            alike = same[0].alike(image)
            for crf in same:
                yield crf, best_classes(crf.mean_field(probabilities, alike, near, pool))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _by_threads(probabilities: np.ndarray) -> list[np.ndarray]:
    """Return the columns (H * W, some) that each thread takes; the last has classes of nought."""
    classes = probabilities.shape[-1]
    threads = min(os.cpu_count() or 1, math.ceil(classes / CLASSES_PER_THREAD))
    width = VECTOR * math.ceil(classes / threads / VECTOR)
    columns = probabilities.reshape(-1, classes)
    parts = []
    for start in range(0, classes, width):
        some = columns[:, start : start + width]
        parts.append(np.zeros((len(columns), width), np.float32))
        parts[-1][:, : some.shape[1]] = some
    return parts


def _places(image: np.ndarray) -> np.ndarray:
    """Return x and y of each pixel, float32 (2, H * W)."""
    rows, columns = np.indices(image.shape[:2], np.float32)
    return np.stack([columns.ravel(), rows.ravel()])


def _check_range(crf: DenseCRF, names: Sequence[str], low: float, high: float) -> None:
    for name in names:
        value = getattr(crf, name)
        if not low <= value <= high:
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise UserError(f"the CRF's {name} is {value}; at least {low}{upper} is wanted")


def _check_sample(probabilities: np.ndarray, image: np.ndarray) -> None:
    fits = probabilities.ndim == 3 and image.shape == (*probabilities.shape[:2], 3)
    if not fits or image.dtype != np.uint8 or probabilities.dtype.kind != "f":
        raise UserError(
            f"expected probabilities (h, w, classes) and an image of uint8 (h, w, 3), got "
            f"{probabilities.dtype} {probabilities.shape} and {image.dtype} {image.shape}"
        )
