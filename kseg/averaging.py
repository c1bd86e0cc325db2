"""Flips and scales: a model looks several times, and its probabilities are averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kseg.errors import UserError
from kseg.inference import Predictor
from kseg.wrapped import WrappedPredictor, need_probabilities

SMALLEST_SCALE, LARGEST_SCALE = 0.25, 4.0


@dataclass(frozen=True)
class FlippedPredictor(WrappedPredictor):
    """The mean of what a predictor sees in an image and in its mirror image.

    With p(x) the probabilities of an image x and m what swaps left and right,
    (p(x) + m p(m x)) / 2: the mean of probabilities, not of logits.
    """

    @property
    def refinements(self) -> tuple[object, ...]:
        """What stands around the model until a class is taken, from the model outwards."""
        return (*self.inner.refinements, "flip")

    @staticmethod
    def of(predictor: Predictor) -> FlippedPredictor:
        """Return the predictor with a second look at the mirror image.

        Raises:
            UserError: if the file gives a class map.
        """
        need_probabilities(predictor, "averaging")
        return FlippedPredictor(predictor.path, predictor.card, predictor.runtime, predictor)

    def bands(self, pixels: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the mean probabilities, as `Predictor.bands`."""
        mirrored = np.ascontiguousarray(pixels[:, ::-1])
        looks = (self.inner.bands(pixels, size), self.inner.bands(mirrored, size))
        for seen, turned in zip(*looks, strict=True):
            yield (seen + turned[:, ::-1]) / 2


@dataclass(frozen=True)
class ScaledPredictor(WrappedPredictor):
    """The mean of what a predictor sees in an image at several sizes.

    The probabilities of each size are resized to that of the result, then their mean is taken.
    A Keras model is rebuilt at each size, to a multiple of 32, and the image is resized to it;
    around a `TiledPredictor` the image is resized and cut, which every file can do.

    Attributes:
        scales: of the image, against what `inner` sees.
        members: a predictor for each scale.
    """

    scales: tuple[float, ...]
    members: tuple[Predictor, ...]

    @property
    def refinements(self) -> tuple[object, ...]:
        """What stands around the model until a class is taken, from the model outwards."""
        scales = " ".join(f"{scale:g}" for scale in self.scales)
        return (*self.inner.refinements, f"scale{'s' * (len(self.scales) > 1)} {scales}")

    @staticmethod
    def of(predictor: Predictor, scales: Sequence[float]) -> ScaledPredictor:
        """Return the predictor looking at several sizes.

        Args:
            predictor: plain, flipped or tiled.
            scales: 0.25 to 4, one at least.

        Raises:
            UserError: if the file gives a class map, if a scale is out of range, or if the model
                has one size and there are no tiles.
        """
        need_probabilities(predictor, "averaging")
        wrong = [s for s in scales if not SMALLEST_SCALE <= s <= LARGEST_SCALE]
        if wrong or not scales:
            what = f"{wrong[0]:g} is none" if wrong else "none is named"
            raise UserError(f"scales are {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}, and {what}")
        members = tuple(predictor.scaled(scale) for scale in scales)
        return ScaledPredictor(
            predictor.path, predictor.card, predictor.runtime, predictor, tuple(scales), members
        )

    def bands(self, pixels: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the mean probabilities, as `Predictor.bands`."""
        looks = [member.bands(pixels, size) for member in self.members]
        for seen in zip(*looks, strict=True):
            yield sum(seen[1:], seen[0]) / np.float32(len(seen))

    def _around(self, inner: Predictor) -> Predictor:
        return ScaledPredictor.of(inner, self.scales)
