"""Megapixels per second of a confusion matrix, and of keras.metrics.MeanIoU on the same maps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from kseg.errors import Failure
from kseg.metrics import ConfusionMatrix
from kseg.quiet import load_tensorflow

LEAST = 15  # how many times Keras's rate


@dataclass(frozen=True)
class Metrics:
    """Megapixels per second of a confusion matrix, and of keras.metrics.MeanIoU.

    Maps are uint8: squares of 16 x 16 pixels in all classes, of which a tenth is labelled at
    random. Sides take turns, and the median of each counts; Keras is called eagerly, as by hand,
    and in a tf.function. Then the same with 1 % of the pixels ignored (`ignore_class`).
    """

    size: tuple[int, int] = (1024, 2048)
    """Height and width of the maps."""
    classes: int = 19
    """How many classes there are."""
    turns: int = 9
    """How often each side is measured."""


def benchmark_metrics(options: Metrics) -> int:
    """Measure, print a table; 0 if kseg has `LEAST` times Keras's best rate, else 1."""
    table = Table("maps", "kseg", "Keras, tf.function", "Keras, eager", "ratio to the faster")
    ratios = []
    for name, ignored in (("all pixels valid", None), ("1 % ignored", 255)):
        ours, graph, eager = _rates(options, ignored)
        ratios.append(ours / max(graph, eager))
        table.add_row(name, *(f"{rate:.1f}" for rate in (ours, graph, eager, ratios[-1])))
    console = Console()
    console.print(table)
    height, width = options.size
    console.print(f"MPix/s; {options.classes} classes, {height} x {width}, {options.turns} turns")
    return 0 if min(ratios) >= LEAST else 1


def maps(options: Metrics, ignored: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask and labels of it, uint8 (H, W)."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, options.classes, [side // 16 for side in options.size])
    mask = np.kron(coarse, np.ones((16, 16), int)).astype(np.uint8)
    noise = random.integers(0, options.classes, mask.shape)
    labels = np.where(random.random(mask.shape) < 0.9, mask, noise).astype(np.uint8)
    if ignored is not None:
        mask[: len(mask) // 100 + 1] = ignored
    return mask, labels


def _rates(options: Metrics, ignored: int | None) -> list[float]:
    """Return the median rate of each side, megapixels per second."""
    load_tensorflow()
    import keras
    import tensorflow as tf

    mask, labels = maps(options, ignored)
    ours = ConfusionMatrix(options.classes)
    peers = [keras.metrics.MeanIoU(options.classes, ignore_class=ignored) for _ in range(2)]
    compiled = tf.function(lambda true, guess: peers[0].update_state(true, guess))
    tensors = tf.constant(mask), tf.constant(labels)
    sides: list[Callable[[], object]] = [
        lambda: ours.update(mask, labels),
        lambda: compiled(*tensors),
        lambda: peers[1].update_state(mask, labels),
    ]
    times = np.array([[_seconds(side) for side in sides] for _ in range(options.turns + 1)])
    for peer in peers:
        if abs(float(peer.result()) - ours.miou) > 1e-5:
            raise Failure(f"Keras has a mIoU of {float(peer.result())}, kseg {ours.miou}")
    return (mask.size / 1e6 / np.median(times[1:], axis=0)).tolist()  # the first turn traces


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
