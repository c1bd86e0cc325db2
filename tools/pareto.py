"""Accuracy against latency of the edge models, all trained by one recipe: a table and a picture.

    python -m tools.pareto --data camvid:../shared/camvid

trains each row of the table of models (`kseg models`) below so many MACs, exports it as float32
and int8, and draws validation mIoU against the time of one image on one thread. It can be stopped
and begun again: finished runs and exports are kept, an unfinished run is resumed. Times are taken
of all files together, at the end, and mean something on a quiet machine only. Needs
`pip install 'kseg[plots]'`.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from kseg import checkpoint
from kseg.arguments import with_recipe
from kseg.catalogue import Row, rows, table
from kseg.config import Count, TrainConfig
from kseg.data.dataset import open_dataset
from kseg.errors import Failure, UserError
from kseg.files import write_text
from kseg.inference import load
from kseg.resolve import resolve
from kseg.runs import Run
from tools.model_table import measured_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where a name may stand, points to the right of and above its point; the first free one is taken.
NAME_OFFSETS = ((5, -9), (5, 5), (5, -18), (5, 14), (8, -3))
FILES = {"float32": "model-float32.tflite", "int8": "model-int8.tflite"}


@dataclass(frozen=True)
class Pareto:
    """Train, export and compare the edge models by one recipe."""

    data: str
    """Data set, NAME[:PATH]."""
    recipe: str = "camvid-edge"
    """Recipe that each is trained by; its model and options are replaced."""
    steps: Count = None
    """Steps of each training, in place of the recipe's."""
    most_macs: float = 20e9
    """Rows with more multiply-accumulates at 512 x 512 are left out."""
    only: tuple[str, ...] = ()
    """Names of rows, in place of all that are small enough."""
    out: Path = Path("runs/pareto")
    """Folder of the runs and of pareto.json."""
    picture: Path = Path(".github/pareto.png")
    """Where the picture goes."""


def chosen(options: Pareto) -> list[Row]:
    """Return the rows to compare.

    Raises:
        UserError: if a name of `only` is none.
    """
    known = {row.name: row for row in rows()}
    for name in options.only:
        if name not in known:
            raise UserError(f"no row {name!r} (there are: {', '.join(known)})")
    macs = {name: numbers["macs"] for name, numbers in table().items()}
    small = [name for name in known if macs[name] <= options.most_macs]
    return [known[name] for name in options.only or small]


def trained(row: Row, options: Pareto) -> Run:
    """Return the finished run of a row, after training what is missing.

    Raises:
        Failure: if the training fails.
        UserError: if the run that is there was trained by other settings.
    """
    run = Run(options.out / row.name.replace(" ", "-").replace("=", "-"))
    words = ["--recipe", options.recipe, "--data", options.data, "--model", row.model]
    words += [word for option in row.variant.split() for word in ("-o", option)]
    words += ["--steps", str(options.steps)] if options.steps else []
    if not Run.is_run(run.folder):
        _kseg("train", *words, "--run", str(run.folder))
        return run
    check_settings(run, words)
    if max(checkpoint.steps(run.checkpoints), default=0) < run.config().steps:
        _kseg("train", "--resume", str(run.folder))
    return run


def check_settings(run: Run, words: list[str]) -> None:
    """Check that a run was trained as these arguments of `kseg train` say.

    Raises:
        UserError: naming what differs.
    """
    wanted, found = tyro.cli(TrainConfig, args=with_recipe(words)), run.config()
    wanted = replace(resolve(wanted, open_dataset(wanted.data)), run=found.run)
    for field in fields(TrainConfig):
        want, got = getattr(wanted, field.name), getattr(found, field.name)
        if want != got:
            raise UserError(
                f"{run.folder} was trained with {field.name} {got}, not {want}; remove it, or name "
                "another folder by --out"
            )


def exported(run: Run) -> dict[str, dict[str, Any]]:
    """Return what the export found of each file, after exporting what is missing.

    Raises:
        Failure: if the export fails.
    """
    manifest = run.export / "manifest.json"
    if not manifest.is_file():
        # A rejected file is a result, too: its mIoU tells why.
        measured = ("--min-agreement", "0", "--seconds", "0")  # times are taken below, all together
        _kseg("export", str(run.folder), "--tflite", "--quantize", "int8", *measured)
    files = json.loads(manifest.read_text())["files"]
    return {file["variant"]: file for file in files if file["target"] == "tflite"}


def result(row: Row, run: Run) -> dict[str, Any]:
    """Return the numbers of one row, timed now."""
    files = exported(run)
    numbers: dict[str, Any] = {"name": row.name}
    for variant in FILES:
        numbers |= {
            f"{variant}_miou": files[variant]["miou"],
            f"{variant}_ms": one_thread_milliseconds(run.export / files[variant]["path"]),
            f"{variant}_mb": files[variant]["bytes"] / 1e6,
        }
    return numbers


def one_thread_milliseconds(path: Path) -> float:
    """Return the median time of one image of a file on one thread, timed now."""
    from kseg.export.verify import milliseconds  # TensorFlow's converter comes with it

    file = load(path, threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (*file.size, 3), dtype=np.uint8)
    return milliseconds(file, pixels)


def front(results: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """Return the results that none is both faster and better than, fastest first."""
    best, kept = -1.0, []
    for one in sorted(results, key=lambda one: (one[f"{variant}_ms"], -one[f"{variant}_miou"])):
        if one[f"{variant}_miou"] > best:
            best = one[f"{variant}_miou"]
            kept.append(one)
    return kept


def as_table(results: list[dict[str, Any]]) -> Table:
    """Return the results for a terminal, best in int8 first."""
    shown = Table("model", box=None)
    for title in ("int8 mIoU", "float mIoU", "int8 ms", "float ms", "int8 MB"):
        shown.add_column(title, justify="right")
    for one in sorted(results, key=lambda one: -one["int8_miou"]):
        shown.add_row(
            one["name"],
            f"{one['int8_miou']:.3f}",
            f"{one['float32_miou']:.3f}",
            f"{one['int8_ms']:.1f}",
            f"{one['float32_ms']:.1f}",
            f"{one['int8_mb']:.2f}",
        )
    return shown


def draw(results: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw mIoU against latency, int8 filled and float hollow, each with its front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=120)
    for variant, colour, filled in (("int8", "tab:blue", True), ("float32", "tab:orange", False)):
        x, y = ([one[f"{variant}_{kind}"] for one in results] for kind in ("ms", "miou"))
        face = colour if filled else "none"
        axes.scatter(x, y, s=40, facecolors=face, edgecolors=colour, label=variant, zorder=3)
        line = front(results, variant)
        axes.plot(
            [one[f"{variant}_ms"] for one in line],
            [one[f"{variant}_miou"] for one in line],
            color=colour,
            linewidth=1,
        )
    for one in results:
        x, y = ([one[f"{variant}_{kind}"] for variant in FILES] for kind in ("ms", "miou"))
        axes.plot(x, y, color="0.85", linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(one["int8_ms"] for one in results))  # room for the last name
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set(xlabel="ms an image, one thread", ylabel="validation mIoU", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    _name(axes, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _title(options: Pareto, day: str) -> str:
    steps = f"{options.steps} steps each" if options.steps else "its own number of steps"
    return f"recipe {options.recipe}, {steps}, one run; {day}\n{measured_on()}"


def _name(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Write the name of each model near its int8 point, where no name and no point stands."""
    from matplotlib.transforms import Bbox

    where = [axes.transData.transform((one["int8_ms"], one["int8_miou"])) for one in results]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in where]
    for one in sorted(results, key=lambda one: one["int8_ms"]):
        for offset in NAME_OFFSETS:
            text = axes.annotate(
                one["name"].replace("backbone=", "").replace("activation=", ""),
                (one["int8_ms"], one["int8_miou"]),
                xytext=offset,
                textcoords="offset points",
                fontsize=8,
            )
            box = text.get_window_extent()
            if offset == NAME_OFFSETS[-1] or not any(map(box.overlaps, taken)):
                taken.append(box)
                break
            text.remove()


def require_matplotlib() -> None:
    """Find out before hours of training whether the picture can be drawn.

    Raises:
        UserError: if matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs pip install 'kseg[plots]'")


def main() -> int:
    """Train, export, print the table, draw the picture; 1 if a model failed."""
    options, runs, failed = tyro.cli(Pareto, prog="tools.pareto"), {}, 0
    require_matplotlib()
    options.out.mkdir(parents=True, exist_ok=True)
    for row in chosen(options):
        try:
            run = trained(row, options)
            exported(run)
            runs[row] = run
        except Failure as failure:
            print(failure, file=sys.stderr)
            failed = 1
    if runs:
        results = [result(row, run) for row, run in runs.items()]
        write_text(options.out / "pareto.json", json.dumps(results, indent=1) + "\n")
        Console().print(as_table(results))
        day = datetime.date.today().isoformat()
        draw(results, options.picture, title=_title(options, day))
    return failed


def _kseg(*words: str) -> None:
    print("kseg", *words, flush=True)
    # TensorFlow's import has set a level of 1 here, which kseg would take for the user's wish.
    silent = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen([sys.executable, "-m", "kseg", *words], env=silent) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C has reached it as well, and it saves what it has trained
            raise
    if code:
        raise Failure(f"kseg {' '.join(words)} failed; see above")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
