"""What may stand behind a model: its probabilities are changed by looking at the image again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kseg.errors import UserError
from kseg.inference import Predictor, feed, read_image


class Refinement(Protocol):
    """From probabilities (H, W, C) and their image uint8 (H, W, 3) to probabilities (H, W, C)."""

    def refine(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Return the better probabilities."""


@dataclass(frozen=True)
class RefinedPredictor(Predictor):
    """A predictor of a file with logits whose probabilities are refined before a class is taken.

    Attributes:
        steps: the refinements, one after another.
    """

    steps: tuple[Refinement, ...]

    @property
    def refinements(self) -> tuple[Refinement, ...]:
        """What changes the probabilities before a class is taken, one after another."""
        return self.steps

    @staticmethod
    def of(predictor: Predictor, refinements: Sequence[Refinement]) -> RefinedPredictor:
        """Return the predictor with refinements behind it.

        Raises:
            UserError: if the file gives a class map.
        """
        if predictor.output == "classes":
            raise UserError(
                f"{predictor.path} gives a class map, and refining needs the probabilities behind "
                "it; export the run with --output logits"
            )
        return RefinedPredictor(
            predictor.path, predictor.card, predictor.runtime, tuple(refinements)
        )

    def predict(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Label an image, as `Predictor.predict`; refined at the size of the result."""
        return best_classes(self.probabilities(image, size=size))

    def probabilities(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Return the refined probabilities, as `Predictor.probabilities`."""
        pixels = image if isinstance(image, np.ndarray) else read_image(image)
        probabilities = softmax(self.logits(pixels, size=size))
        pixels = feed(pixels, probabilities.shape[:2])
        for refinement in self.steps:
            probabilities = refinement.refine(probabilities, pixels)
        return probabilities


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities that logits (..., C) stand for."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def best_classes(probabilities: np.ndarray) -> np.ndarray:
    """Return the most probable class of each pixel, (H, W) uint8, of (H, W, C)."""
    return probabilities.argmax(axis=-1).astype(np.uint8)
