"""A predictor around another one, as a base: flips, scales, tiles and refinements are made so."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kseg import resize
from kseg.errors import UserError
from kseg.inference import Predictor, pixels_of
from kseg.probabilities import as_logits


@dataclass(frozen=True)
class WrappedPredictor(Predictor):
    """A predictor that makes its probabilities from those of another; they give its labels.

    What is made of it says how by `bands`, and what stands around the model by `refinements`.

    Attributes:
        inner: the other predictor, perhaps around one itself.
    """

    inner: Predictor

    @property
    def refinements(self) -> tuple[object, ...]:
        """What stands around the model until a class is taken, from the model outwards."""
        return self.inner.refinements

    def predict(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Label an image, as `Predictor.predict`; the most probable class at each pixel."""
        pixels = pixels_of(image)
        size = size or pixels.shape[:2]
        return resize.stacked_argmax(self.bands(pixels, size), size)

    def logits(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Return the logarithms of the probabilities, (h, w, C) float32."""
        return as_logits(self.probabilities(image, size=size))

    def at_size(self, size: tuple[int, int]) -> Predictor:
        """Return the same around a model of another size, as `Predictor.at_size`."""
        return self._around(self.inner.at_size(size))

    def scaled(self, scale: float) -> Predictor:
        """Return the same around what sees images `scale` times as large."""
        return self._around(self.inner.scaled(scale))

    def _around(self, inner: Predictor) -> Predictor:
        return dataclasses.replace(self, card=inner.card, runtime=inner.runtime, inner=inner)


def need_probabilities(predictor: Predictor, what: str) -> None:
    """Raise UserError if the file gives a class map: `what`, as "refining", cannot be done."""
    if predictor.output == "classes":
        raise UserError(
            f"{predictor.path} gives a class map, and {what} needs the probabilities behind it; "
            "export the run with --output logits"
        )
