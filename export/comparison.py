"""What a file makes of images, counted against what its Keras model makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from kseg import resize
from kseg.data.dataset import Dataset
from kseg.inference import Predictor
from kseg.metrics.bootstrap import DRAWS, interval, resampled
from kseg.metrics.boundary import boundary_band
from kseg.metrics.iou import count_pairs

BAND = 3  # pixels on each side of a boundary
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class View:
    """One image, and what the Keras model makes of it.

    Attributes:
        name: of the image.
        pixels: uint8 (h, w, 3).
        mask: true ids uint8 (h, w), 255 where ignored.
        labels: the model's ids uint8 (H, W) at its own size.
        scored: the same uint8 (h, w) at the mask's size, of resized logits.
        scored_map: the same of the resized `labels`, as of a file that gives a class map.
        margin: probability of the best class less that of the second, float32 (H, W).
        band: which pixels of `labels` have another class within `BAND` pixels, bool (H, W).
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    scored_map: np.ndarray
    margin: np.ndarray
    band: np.ndarray


def views(
    reference: Predictor,
    dataset: Dataset,
    *,
    limit: int | None,
    scored_by: Predictor | None = None,
) -> Iterator[View]:
    """Give validation images as a Keras model sees them, spread evenly over the split.

    Args:
        reference: the Keras model.
        dataset: has a "val" split.
        limit: how many images, at most; None gives all.
        scored_by: another Keras model whose ids at the mask's size a file's IoU is compared with.
    """
    from kseg.data.pipeline import read_samples

    chosen = spread(dataset.length("val"), limit)
    samples = read_samples(dataset, "val", only=chosen)
    for number, (pixels, mask) in zip(chosen, samples, strict=True):
        seen = view(reference, pixels, mask, name=dataset.sample_name("val", number))
        yield seen if scored_by is None else _scored(seen, scored_by)


def spread(length: int, limit: int | None) -> list[int]:
    """Return the places of at most `limit` of so many images, evenly apart.

    Neighbours are often frames of one film, which say little more than one of them.
    """
    return np.unique(np.linspace(0, length - 1, min(limit or length, length)).astype(int)).tolist()


def _scored(seen: View, model: Predictor) -> View:
    """Return a view whose labels at the mask's size are another model's."""
    logits = model.forward(seen.pixels)
    size = seen.mask.shape
    return replace(
        seen,
        scored=model.labels(logits, size),
        scored_map=resize.nearest(model.labels(logits, model.size), size),
    )


def view(reference: Predictor, pixels: np.ndarray, mask: np.ndarray, *, name: str) -> View:
    """Return an image as a Keras model sees it."""
    logits = reference.forward(pixels)
    labels = reference.labels(logits, reference.size)
    return View(
        name=name,
        pixels=pixels,
        mask=mask,
        labels=labels,
        scored=reference.labels(logits, mask.shape),
        scored_map=resize.nearest(labels, mask.shape),
        margin=margins(logits),
        band=boundary_band(labels, BAND),
    )


def margins(logits: np.ndarray) -> np.ndarray:
    """Return by how much the best class leads the second in probability, (H, W) float32."""
    second, best = np.moveaxis(np.partition(logits, -2, axis=-1)[..., -2:], -1, 0)
    return (1 - np.exp(second - best)) / np.exp(logits - best[..., None]).sum(axis=-1)


@dataclass(frozen=True)
class Counts:
    """What was counted of one image; stacked along a first axis, of all of them.

    Attributes:
        equal: pixels with the model's label, of all; inside the band; outside; by margin.
        of: how many pixels there are of each kind; of the last, the sum of margins.
        moved: boundary pixels that went one pixel down less those that went up; right less left.
        edges: boundary pixels between rows; between columns.
        hits: right pixels of each class (C,), by the file.
        predicted: pixels labelled as each class (C,), by the file.
        reference_hits: right pixels of each class (C,), by the model.
        reference_predicted: pixels labelled as each class (C,), by the model.
        true: true pixels of each class (C,).
    """

    equal: np.ndarray
    of: np.ndarray
    moved: np.ndarray
    edges: np.ndarray
    hits: np.ndarray
    predicted: np.ndarray
    reference_hits: np.ndarray
    reference_predicted: np.ndarray
    true: np.ndarray


def count(
    seen: View, labels: np.ndarray, scored: np.ndarray, *, num_classes: int, as_map: bool = False
) -> Counts:
    """Compare one result of a file.

    Args:
        seen: the image as the model sees it.
        labels: the file's ids at the model's size. An id that is no class is never right.
        scored: the file's ids at the mask's size.
        num_classes: C.
        as_map: whether the file gives a class map, so that the model's is resized as its is.
    """
    equal = labels == seen.labels
    kinds = (np.ones_like(seen.margin), seen.band, ~seen.band, seen.margin)
    moved, edges = zip(_moved(seen.labels, labels), _moved(seen.labels.T, labels.T), strict=True)
    hits, predicted, true = _overlap(seen.mask, scored, num_classes)
    theirs = seen.scored_map if as_map else seen.scored
    reference_hits, reference_predicted, _ = _overlap(seen.mask, theirs, num_classes)
    return Counts(
        equal=np.array([np.sum(kind, where=equal, dtype=np.float64) for kind in kinds]),
        of=np.array([np.sum(kind, dtype=np.float64) for kind in kinds]),
        moved=np.array(moved),
        edges=np.array(edges),
        hits=hits,
        predicted=predicted,
        reference_hits=reference_hits,
        reference_predicted=reference_predicted,
        true=true,
    )


def stacked(counts: list[Counts]) -> Counts:
    """Return the counts of several images in one, image first."""
    names = [field.name for field in fields(Counts)]
    return Counts(**{name: np.stack([getattr(one, name) for one in counts]) for name in names})


def _overlap(mask: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Return right, labelled and true pixels of each class."""
    pairs = count_pairs(mask, labels)[:count]
    return np.diagonal(pairs), pairs.sum(axis=0)[:count], pairs.sum(axis=1)


def _moved(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Return how many boundaries between rows went down less up, and how many there are.

    Where row i has class a and row i + 1 class b, a move down leaves a in row i + 1 and a move up
    leaves b in row i. Errors without direction cancel.
    """
    edge = before[:-1] != before[1:]
    down = np.count_nonzero(edge & (after[1:] == before[:-1]))
    up = np.count_nonzero(edge & (after[:-1] == before[1:]))
    return down - up, np.count_nonzero(edge)


@dataclass(frozen=True)
class Score:
    """A number, what it was before, and how sure the change is.

    Attributes:
        value: of the file, per cent.
        reference: of the Keras model, per cent.
        change: their difference, points.
        interval: of the change, 95 % by the bootstrap over images; None from one image.
    """

    value: float
    reference: float
    change: float
    interval: Interval


def agreements(counts: Counts) -> tuple[float, float, float, float]:
    """Return the equal labels, per cent: of all, within the band, outside, weighted by margin."""
    with np.errstate(invalid="ignore"):
        shares = 100 * counts.equal.sum(axis=0) / counts.of.sum(axis=0)
    return tuple(float(share) for share in shares)


def agreement_interval(counts: Counts) -> Interval:
    """Return the 95 % interval of the agreement over images, per cent; None from one image."""
    images = len(counts.equal)
    draws = resampled(images, draws=DRAWS if images > 1 else 0)
    return interval(100 * (draws @ counts.equal[:, 0]) / (draws @ counts.of[:, 0]))


def shift(counts: Counts) -> tuple[float, float]:
    """Return how far the class map lies below and to the right of Keras's, pixels, -1..1."""
    rows, columns = counts.moved.sum(axis=0) / np.maximum(counts.edges.sum(axis=0), 1)
    return float(rows), float(columns)


def scores(counts: Counts) -> tuple[Score, list[Score]]:
    """Return the mean IoU, and the IoU of each class (NaN if it is absent everywhere)."""
    images = len(counts.true)
    (ours, theirs), drawn = _ious(counts, np.ones((1, images))), _drawn(counts)
    classes = [
        _score(value, before, changes)
        for value, before, changes in zip(ours[0], theirs[0], (drawn[0] - drawn[1]).T, strict=True)
    ]
    mean = _score(_mean(ours)[0], _mean(theirs)[0], _mean(drawn[0]) - _mean(drawn[1]))
    return mean, classes


def _drawn(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoUs in draws over images; no draws from one image, which says nothing."""
    images = len(counts.true)
    return _ious(counts, resampled(images, draws=DRAWS if images > 1 else 0))


def _score(value: float, before: float, changes: np.ndarray) -> Score:
    return Score(float(value), float(before), float(value - before), interval(changes))


def _ious(counts: Counts, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of each class in each draw, per cent (draws, C): the file's, the model's."""
    true = draws @ counts.true
    pairs = (
        (counts.hits, counts.predicted),
        (counts.reference_hits, counts.reference_predicted),
    )
    return tuple(_ratio(draws @ hits, true + draws @ found - draws @ hits) for hits, found in pairs)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return 100 * np.divide(part, whole, out=np.full(whole.shape, math.nan), where=whole > 0)


def _mean(ious: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that are there, of each draw."""
    known = ~np.isnan(ious)
    return _ratio(np.where(known, ious, 0).sum(axis=1), known.sum(axis=1)) / 100
