"""From logits to probabilities, and from probabilities to labels, in NumPy."""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities that logits (..., C) stand for."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def as_logits(probabilities: np.ndarray) -> np.ndarray:
    """Return logits that stand for probabilities (..., C) float32: their logarithms."""
    # The smallest normal float32 stands for the zeros that rounding makes.
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))


def best_classes(probabilities: np.ndarray) -> np.ndarray:
    """Return the most probable class of each pixel, (H, W) uint8, of (H, W, C)."""
    return probabilities.argmax(axis=-1).astype(np.uint8)
