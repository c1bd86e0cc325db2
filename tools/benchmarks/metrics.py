"""Megapixels per second of a confusion matrix, and of keras.metrics.MeanIoU on the same maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from kseg.errors import Failure
from kseg.metrics import ConfusionMatrix
from kseg.quiet import load_tensorflow
from tools.benchmarks.turns import interleaved

LEAST = 15  # how many times Keras's rate


@dataclass(frozen=True)
class Metrics:
    """Megapixels per second of a confusion matrix, and of keras.metrics.MeanIoU.

    Maps are uint8: squares of 16 x 16 pixels in all classes, of which a tenth is labelled at
    random. Sides take turns of a few images, and the median of each counts; Keras is called
    eagerly, as by hand, and in a tf.function. Then the same with 1 % of the pixels ignored
    (`ignore_class`).
    """

    size: tuple[int, int] = (1024, 2048)
    """Height and width of the maps."""
    classes: int = 19
    """How many classes there are."""
    images: int = 8
    """How many images a turn has, each with maps of its own."""
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


def maps(options: Metrics, ignored: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask and labels of it, uint8 (H, W)."""
    random = np.random.default_rng(seed)
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

    pairs = [maps(options, ignored, seed) for seed in range(options.images)]
    tensors = [(tf.constant(mask), tf.constant(labels)) for mask, labels in pairs]
    ours = ConfusionMatrix(options.classes)
    peers = [keras.metrics.MeanIoU(options.classes, ignore_class=ignored) for _ in range(2)]
    compiled = tf.function(lambda true, guess: peers[0].update_state(true, guess))
    times = interleaved(
        {
            "ours": lambda: [ours.update(*pair) for pair in pairs],
            "compiled": lambda: [compiled(*pair) for pair in tensors],
            "eager": lambda: [peers[1].update_state(*pair) for pair in pairs],
        },
        options.turns,
    )
    for peer in peers:
        if abs(float(peer.result()) - ours.miou) > 1e-5:
            raise Failure(f"Keras has a mIoU of {float(peer.result())}, kseg {ours.miou}")
    pixels = sum(mask.size for mask, _ in pairs)
    return [pixels / 1e3 / milliseconds for milliseconds in times.values()]
