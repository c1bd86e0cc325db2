"""A run: the folder that one training writes and that evaluation and export take."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from kseg.config import TrainConfig
from kseg.errors import UserError
from kseg.files import write_text
from kseg.version import VERSION

RUNS = Path("runs")
COLUMNS = ("step", "loss", "learning_rate", "images_per_second", "miou", "pixel_accuracy")
STEP_COLUMNS = ("step", "loss", "learning_rate", "images_per_second", "waiting")
_WITNESSES = ("keras", "tensorflow", "numpy")


class Run:
    """Paths and small files of one run folder.

    Attributes:
        folder: the run folder.
        config_file, best, last, checkpoints, preview, export: what it holds.
        metrics_file: a row for each validation.
        steps_file: a row for each hundredth of the training; "waiting" is the share of the time in
            which it waited for data.
    """

    def __init__(self, folder: Path) -> None:
        """Name the parts of a run folder; nothing is read or written."""
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        self.metrics_file = self.folder / "metrics.csv"
        self.steps_file = self.folder / "steps.csv"
        self.best = self.folder / "best.keras"
        self.last = self.folder / "last.keras"
        self.checkpoints = self.folder / "checkpoints"
        self.preview = self.folder / "preview.jpg"
        self.tensorboard = self.folder / "tensorboard"
        self.export = self.folder / "export"

    @staticmethod
    def is_run(folder: Path) -> bool:
        """Tell whether `folder` holds a run."""
        return (Path(folder) / "config.json").is_file()

    def check_free(self) -> None:
        """Check that a new run may be written here.

        Raises:
            UserError: if the folder already holds a run, or is a file.
        """
        if self.is_run(self.folder):
            raise UserError(
                f"{self.folder} already holds a run; continue it with "
                f"`kseg train --resume {self.folder}`, or name another folder with --run"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; --run takes a folder")

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write config.json; raises as `check_free`."""
        self.check_free()
        versions = {name: metadata.version(name) for name in _WITNESSES}
        versions |= {"kseg": VERSION, "python": platform.python_version()}
        record = {
            "commit": _commit(),
            "config": json.loads(config.to_json()),
            "versions": versions,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_text(self.config_file, json.dumps(record, indent=1))

    def config(self) -> TrainConfig:
        """Return the configuration the run was started with.

        Raises:
            UserError: if this is no run folder or its config.json cannot be read.
        """
        if not self.is_run(self.folder):
            raise UserError(f"{self.folder} is no run folder: it has no config.json")
        try:
            return TrainConfig.from_dict(self._record()["config"])
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.config_file} is damaged: {error}") from error

    def started(self) -> str:
        """Return when the run was started, as text that sorts by time; "" if it is damaged."""
        try:
            return self._record()["started"]
        except (OSError, ValueError, KeyError):
            return ""

    def model_file(self, *, last: bool = False) -> Path:
        """Return best.keras, or last.keras.

        Raises:
            UserError: if the run has not come that far.
        """
        path = self.last if last else self.best
        if not path.is_file():
            raise UserError(
                f"{self.folder} has no {path.name} yet; finish its training with "
                f"`kseg train --resume {self.folder}`"
            )
        return path

    def _record(self) -> dict:
        return json.loads(self.config_file.read_text())


class MetricsFile:
    """A table of a run: one row every so many steps, rewritten whole and atomically."""

    def __init__(self, path: Path, *, until: int, columns: Sequence[str] = COLUMNS) -> None:
        """Open the table.

        Args:
            path: the file; it need not exist.
            columns: their names, "step" among them.
            until: rows of later steps are forgotten: a resumed training writes them again.
        """
        self._path = path
        self._columns = columns
        self.rows = [row for row in _rows(path) if int(row["step"]) <= until]

    def add(self, row: Mapping[str, float]) -> None:
        """Add a row by the names of its columns; those without a value stay empty."""
        self.rows.append({name: _text(row.get(name)) for name in self._columns})
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self._path, text.getvalue())


def new_folder(model: str) -> Path:
    """Return a folder for a new run, runs/DATE-TIME-MODEL, that does not exist yet."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"
    folder = RUNS / stem
    count = 1
    while folder.exists():
        count += 1
        folder = RUNS / f"{stem}-{count}"
    return folder


def newest() -> Run:
    """Return the run under runs/ that was started last.

    Raises:
        UserError: if there is none.
    """
    runs = [run for path in RUNS.glob("*/config.json") if (run := Run(path.parent)).started()]
    if not runs:
        raise UserError(f"no run under {RUNS.resolve()}; name one, or start one with `kseg train`")
    return max(runs, key=lambda run: (run.started(), run.config_file.stat().st_mtime_ns))


def _commit() -> str:
    """Return the commit of the clone that kseg runs from; "" where it is installed otherwise."""
    here = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # Installed below somebody's own clone, the commit would be theirs.
    clone, _, commit = done.stdout.strip().partition("\n")
    return commit if Path(clone).resolve() == here and clone else ""


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"
