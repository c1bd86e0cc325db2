"""Milliseconds an image of exported files: int8 against float, LiteRT against onnxruntime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kseg.build import build
from kseg.export import onnx, tflite
from kseg.export.interface import Interface
from kseg.inference import load
from kseg.models import inference_model, parse_options
from tools.benchmarks.turns import interleaved

INT8_FASTER = 2.5  # times the float file
FLOAT_SLOWER = 1.1  # times onnxruntime on the tf2onnx file of the same net
AHEAD = 3  # images before the measured one, as in a film: a pause leaves caches cold


@dataclass(frozen=True)
class Export:
    """Milliseconds an image of a net's files, interleaved in one run.

    Random weights, calibrated on noise: speed does not depend on them.
    """

    model: str = "deeplabv3plus"
    """Registry name."""
    options: tuple[str, ...] = ("backbone=mobilenetv2",)
    """Options of the model, NAME=VALUE."""
    classes: int = 19
    """Count of classes."""
    size: int = 512
    """Height and width."""
    threads: int = 2
    """Threads of each runtime."""
    turns: int = 30
    """Images a file."""


def benchmark_export(options: Export) -> int:
    """Measure, print a table; 0 if both ratios reach their aim, else 1."""
    with tempfile.TemporaryDirectory() as folder:
        files = written(options, Path(folder))
        times = interleaved(files, options.turns, ahead=AHEAD)
    table = Table("file", "runtime", "ms")
    for name, runtime in RUNTIMES.items():
        table.add_row(name, runtime, f"{times[name]:.1f}")
    faster = times["float32.tflite"] / times["int8.tflite"]
    slower = times["float32.tflite"] / times["float32.onnx"]
    console = Console()
    console.print(table)
    console.print(
        f"{options.model} {' '.join(options.options)}, {options.size} x {options.size}, "
        f"{options.threads} of {os.cpu_count()} cores\n"
        f"int8 is {faster:.2f} times as fast as float (aim {INT8_FASTER:g}); float takes "
        f"{slower:.2f} times onnxruntime's time (aim {FLOAT_SLOWER:g} at most)"
    )
    return 0 if faster >= INT8_FASTER and slower <= FLOAT_SLOWER else 1


RUNTIMES = {"float32.tflite": "LiteRT", "int8.tflite": "LiteRT", "float32.onnx": "onnxruntime"}


def written(options: Export, folder: Path) -> dict[str, Callable[[], object]]:
    """Write the three files; return a function that runs each on one image."""
    values = parse_options(options.model, dict(one.split("=", 1) for one in options.options))
    shape = (options.size, options.size, 3)
    model = inference_model(build(options.model, shape, options.classes, values))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, shape, np.uint8)

    def samples() -> object:
        return iter([image[None], 255 - image[None]])

    runs = {}
    for name in RUNTIMES:
        path = folder / name
        module = onnx if path.suffix == ".onnx" else tflite
        module.write(model, path, variant=path.stem, interface=Interface(), samples=samples)
        forward = load(path, threads=options.threads).runtime.forward
        runs[name] = lambda f=forward: f(image)
    return runs
