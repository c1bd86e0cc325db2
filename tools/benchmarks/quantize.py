"""What int8 costs trained models, after training and with it: mIoU, labels, milliseconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kseg.artifact import REJECTED
from kseg.errors import Failure, UserError
from kseg.runs import Run
from tools.pareto import one_thread_milliseconds

MOST = {"int8": 1.0, "qat": 0.3}  # points of mIoU that may be lost
VARIANTS = ("float32", *MOST)


@dataclass(frozen=True)
class Quantize:
    """What int8 costs trained runs on their validation split.

    Changes of mIoU are in points; labels, per cent, are compared with those of Keras.
    Milliseconds are of one image on one thread, all files timed together at the end. Each run is
    exported by `kseg export --tflite --quantize int8 qat`, unless it has these files.
    """

    runs: tuple[Path, ...]
    """Run folders."""
    max_drop: float | None = None
    """Points of mIoU that the export may lose, as of `kseg export`."""


def benchmark_quantize(options: Quantize) -> int:
    """Export what is missing, print a table; 0 if every drop is within its bound, else 1."""
    found = {run: exported(run, options.max_drop) for run in options.runs}
    table = Table("run", "float32", "ms")
    for variant in MOST:
        for title in (variant, "labels", "ms"):
            table.add_column(title, justify="right")
    for run, files in found.items():
        table.add_row(run.name, *cells(run, files))
    console = Console()
    console.print(table)
    drops = {
        variant: max(-files[variant]["miou_change"] for files in found.values()) for variant in MOST
    }
    for variant, most in MOST.items():
        console.print(f"{variant}: at most {drops[variant]:.2f} points lost (aim {most:g})")
    return 0 if all(drops[variant] <= most for variant, most in MOST.items()) else 1


def exported(folder: Path, max_drop: float | None) -> dict[str, dict[str, Any]]:
    """Return what the certificate of a run says of each variant's file.

    Raises:
        UserError: if the folder is no run.
        Failure: if the export wrote no certificate.
    """
    if not Run.is_run(folder):
        raise UserError(f"{folder} is no run of `kseg train`")
    files = _certified(folder)
    if not files.keys() >= set(VARIANTS):
        words = ["export", str(folder), "--tflite", "--quantize", *MOST]
        words += [] if max_drop is None else ["--max-drop", str(max_drop)]
        subprocess.run([sys.executable, "-m", "kseg", *words])  # a rejected file is a result, too
        files = _certified(folder)
    if not files.keys() >= set(VARIANTS):
        raise Failure(f"{folder} could not be exported; see above")
    return files


def _certified(folder: Path) -> dict[str, dict[str, Any]]:
    path = Run(folder).export / "certificate.json"
    files = json.loads(path.read_text())["files"] if path.is_file() else []
    return {file["variant"]: file for file in files if file["target"] == "tflite"}


def cells(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Return the numbers of one run, its files timed now."""
    times = {name: _milliseconds(Run(folder).export / files[name]["path"]) for name in VARIANTS}
    shown = [f"{files['float32']['miou']:.4f}", times["float32"]]
    for variant in MOST:
        file = files[variant]
        shown += [f"{file['miou_change']:+.2f}", f"{file['agreement']:.2f}", times[variant]]
    return shown


def _milliseconds(path: Path) -> str:
    """Time a file, a rejected one under the name that it would have had."""
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / path.name.removesuffix(REJECTED)
        named.symlink_to(path.resolve())
        return f"{one_thread_milliseconds(named):.1f}"
