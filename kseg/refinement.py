"""What may stand behind a model: its probabilities are changed by looking at the image again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kseg import resize
from kseg.errors import UserError
from kseg.inference import Predictor, feed
from kseg.wrapped import WrappedPredictor, need_probabilities

# Probabilities of one image: 1 GiB, of which a CRF makes several copies.
MOST_VALUES = 2**28


class Refinement(Protocol):
    """From probabilities (H, W, C) and their image uint8 (H, W, 3) to probabilities (H, W, C)."""

    def refine(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Return the better probabilities."""


@dataclass(frozen=True)
class RefinedPredictor(WrappedPredictor):
    """A predictor whose probabilities are refined before a class is taken, at the result's size.

    Attributes:
        steps: the refinements, one after another.
    """

    steps: tuple[Refinement, ...]

    @property
    def refinements(self) -> tuple[object, ...]:
        """What stands around the model until a class is taken, from the model outwards."""
        return (*self.inner.refinements, *self.steps)

    @staticmethod
    def of(predictor: Predictor, refinements: Sequence[Refinement]) -> RefinedPredictor:
        """Return the predictor with refinements behind it.

        Raises:
            UserError: if the file gives a class map.
        """
        need_probabilities(predictor, "refining")
        return RefinedPredictor(
            predictor.path, predictor.card, predictor.runtime, predictor, tuple(refinements)
        )

    def bands(self, pixels: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the refined probabilities, as `Predictor.bands`; those of all pixels are held.

        Raises:
            UserError: if they would be more than `MOST_VALUES`.
        """
        self._check_memory(size)
        probabilities = self.inner.probabilities(pixels, size=size)
        pixels = feed(pixels, size)
        for refinement in self.steps:
            probabilities = refinement.refine(probabilities, pixels)
        yield from resize.bilinear_bands([probabilities], size, size)

    def _check_memory(self, size: tuple[int, int]) -> None:
        if math.prod(size) * self.num_classes > MOST_VALUES:
            most = MOST_VALUES / self.num_classes / 1e6
            raise UserError(
                f"{size[0]} x {size[1]} pixels are too many to be refined at once, at most "
                f"{most:.1f} million are with {self.num_classes} classes; cut the image into "
                "parts, or leave --crf and --superpixels out"
            )
