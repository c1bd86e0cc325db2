"""GiB of memory that a training takes at its peak."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from kseg.data.dataset import open_dataset
from kseg.errors import Failure
from kseg.registry import MODELS

TARGET = 6.0  # GiB


@dataclass(frozen=True)
class Memory:
    """GiB of memory that `kseg train` takes at its peak, the process as a whole.

    A few steps on drawn images and the validation of two at the same size, each model in a
    process of its own at its default options.
    """

    models: tuple[str, ...] = ("encnet", "zoomout", "denseaspp", "rgnet")
    """Registry names."""
    size: int = 512
    """Height and width of training windows and of the validation."""
    batch_size: int = 2
    """Images a step."""
    steps: int = 3
    """Steps."""


def benchmark_memory(options: Memory) -> int:
    """Measure, print a table; 0 if all stay under the target, else 1."""
    table = Table("model", "peak GiB")
    peaks = []
    for model in options.models:
        MODELS.entry(model)
        peaks.append(peak_of_training(model, options))
        table.add_row(model, f"{peaks[-1]:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{options.size} x {options.size}, batch {options.batch_size}, float32, "
        f"{os.cpu_count()} cores; target {TARGET:g}"
    )
    return 0 if max(peaks) <= TARGET else 1


def peak_of_training(model: str, options: Memory) -> float:
    """Return the peak of the resident memory of one training, in GiB.

    Raises:
        Failure: with what the training said, if it failed.
    """
    side = str(options.size)
    with tempfile.TemporaryDirectory() as folder:
        data = f"folder:{_drawn(Path(folder) / 'data')}"
        words = [sys.executable, "-m", "kseg", "train", "--data", data, "--model", model]
        words += ["--size", side, side, "--eval-size", side, side]
        words += ["--batch-size", str(options.batch_size), "--steps", str(options.steps)]
        log = Path(folder) / "log"
        with log.open("w") as out:
            child = subprocess.Popen(
                [*words, "--run", str(Path(folder) / "run")], stdout=out, stderr=out
            )
            # Popen.wait would take the usage of this one child away.
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise Failure(f"kseg train --model {model}: {log.read_text().strip()}")
    return usage.ru_maxrss / 2**20


def _drawn(folder: Path) -> Path:
    """Write two scenes for training and two for validation, and return the folder."""
    scenes = open_dataset("scenes")
    rows = [f"{i},{name},0,0,{i}" for i, name in enumerate(scenes.classes)]
    for split in ("train", "val"):
        for kind, place in (("images", 0), ("masks", 1)):
            (folder / split / kind).mkdir(parents=True)
            for index in range(2):
                array = scenes.sample(split, index)[place]
                Image.fromarray(array).save(folder / split / kind / f"{index}.png")
    (folder / "classes.csv").write_text("\n".join(["id,name,r,g,b", *rows]) + "\n")
    return folder
