"""Counts and measures every model, and writes it where `kseg models` and the README have it.

python -m tools.model_table              count all; measure rows never measured at these counts
python -m tools.model_table --measure    measure all rows anew, or those named behind it
python -m tools.model_table --count      count all; measure nothing
python -m tools.model_table --check      1 if a count or the README's table is stale

A measurement writes the two `.tflite` files of an image of 512 x 512 from random weights, in a
process of its own, and times them on one thread. Each is kept as soon as it is made, so the
command can be stopped and begun again. It means something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kseg.build import build, macs, trainable_parameters
from kseg.catalogue import TARGETS, TITLES, Row, cells, rows, source, table
from kseg.errors import Failure, UserError
from kseg.files import write_text
from kseg.inference import load
from kseg.machine import machine
from kseg.models import inference_model

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "kseg" / "models" / "table.json"
README = ROOT / "README.md"
SIZE, NUM_CLASSES = (512, 512, 3), 21
BEGIN, END = "<!-- model table -->", "<!-- end of model table -->"
COUNTED = ("parameters", "macs", "dilates")
UNDILATED = "hrnet_w18_small"  # a backbone that refuses to be dilated
CALIBRATION_IMAGES = 2  # times hardly depend on the ranges


def count(row: Row) -> dict[str, Any]:
    """Return parameters and multiply-accumulates of a row, and whether it dilates its backbone."""
    model = build(row.model, SIZE, NUM_CLASSES, row.options)
    numbers = {"parameters": trainable_parameters(model), "macs": macs(model)}
    numbers["dilates"] = bool(row.backbone) and _dilates(row)
    del model
    keras.backend.clear_session()
    gc.collect()
    return numbers


def _dilates(row: Row) -> bool:
    # Without its activation, which that backbone may not let one choose either.
    options = {name: value for name, value in row.options.items() if name != "activation"}
    try:
        build(row.model, (64, 96, 3), NUM_CLASSES, options | {"backbone": UNDILATED})
    except UserError:
        return True
    return False


def measure(row: Row) -> dict[str, Any]:
    """Return size and time of the `.tflite` files of a row; None for a file it cannot have."""
    # TensorFlow's converter, which only a measurement needs.
    from kseg.export import tflite
    from kseg.export.interface import Interface
    from kseg.export.verify import milliseconds

    model = inference_model(build(row.model, SIZE, NUM_CLASSES, row.options))
    _normalise(model, next(_noise()))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("float32", "int8"):
            path = Path(folder) / tflite.file_name(variant)
            found |= {f"{variant}_mb": None, f"{variant}_ms": None}
            if f"tflite-{variant}" in row.targets:
                tflite.write(model, path, variant=variant, interface=Interface(), samples=_noise)
                found[f"{variant}_mb"] = round(path.stat().st_size / 1e6, 2)
                time = milliseconds(load(path, threads=1), next(_noise())[0])
                found[f"{variant}_ms"] = round(time, 1)
    return found | {"date": datetime.date.today().isoformat(), "machine": measured_on()}


def _normalise(model: keras.Model, images: np.ndarray) -> None:
    """Give batch normalisations the statistics of these images, as a training does.

    With those of random weights the maps fade from layer to layer, and in int8 the scales of two
    neighbours may be too far apart for a fast kernel, which no trained model has met.
    """
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in norms:
        layer.momentum = 0.0
    model(images.astype("float32"), training=True)


def measured_on() -> str:
    """Return processor and versions, as one line."""
    from importlib.metadata import version

    facts = machine()
    runtime = f"TensorFlow {version('tensorflow')}, LiteRT {version('ai-edge-litert')}"
    return f"{facts['processor']}, {facts['cores']} cores, {runtime}"


def counted() -> dict[str, dict[str, Any]]:
    """Return all rows with their counts of now, and what was measured at the same counts."""
    return {row.name: _merged(table().get(row.name, {}), count(row)) for row in rows()}


def measured_apart(row: Row) -> dict[str, Any]:
    """Return `measure` of a row from a process of its own, which gives its memory back.

    Raises:
        Failure: with the last line of what it said, if it failed.
    """
    words = [sys.executable, "-m", "tools.model_table", "--row", row.model, row.variant]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise Failure(f"{row.name}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def readme_table() -> str:
    """Return the README's table, from `table.json` and the docstrings."""
    titles = ("model", "backbone", *TITLES, "targets", "paper")
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    numbers = table()
    for row in rows():
        paper = "" if row.variant else _paper(row)
        known = (row.backbone or "-", *cells(numbers[row.name]), _targets(row))
        texts = (f"`{row.name}`", *known, paper)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def _merged(old: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    same = all(old.get(key) == counts[key] for key in COUNTED)
    return old if same else counts


def _noise() -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for _ in range(CALIBRATION_IMAGES):
        yield random.integers(0, 256, (1, *SIZE), dtype=np.uint8)


def _paper(row: Row) -> str:
    """Return authors, title and venue: the source up to its section, figure or arXiv number."""
    text = source(row.entry)
    paper = re.split(r",? (?:section|sections|figure|table|arXiv)\b|;", text)[0].rstrip(".")
    notes = [_note(limit, why) for limit, why in row.entry.limits.items()]
    return paper + (f" ({'; '.join(notes)})" if notes else "")


def _targets(row: Row) -> str:
    """Return "all", or all but what a limit of the registration takes away."""
    missing = [target for target in TARGETS if target not in row.targets]
    return f"all but {', '.join(missing)}" if missing else "all"


def _note(limit: str, why: str) -> str:
    target = next((target for target, name in TARGETS.items() if name == limit), None)
    return f"no {target}: {why}" if target else why


def readme(text: str) -> str:
    """Return the README with its table replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


def _save(numbers: dict[str, dict[str, Any]]) -> None:
    write_text(TABLE, json.dumps(numbers, indent=1) + "\n")


def check() -> int:
    """Return 1, and say which, if a count or the README's table is stale."""
    if counted() != table():
        print(f"{TABLE} is stale; run python -m tools.model_table")
        return 1
    text = README.read_text()
    if readme(text) != text:
        print(f"{README}: its table is stale; run python -m tools.model_table")
        return 1
    return 0


def write(due: list[str] | None) -> int:
    """Count all rows, measure some, and write both files; 1 if a measurement failed.

    Args:
        due: names of the rows to measure; None for those that were not measured yet.
    """
    numbers, failed = counted(), 0
    _save(numbers)
    for row in rows():
        wanted = "date" not in numbers[row.name] if due is None else row.name in due
        if wanted:
            try:
                numbers[row.name] |= measured_apart(row)
            except Failure as failure:
                print(failure, file=sys.stderr)
                failed = 1
            _save(numbers)
            print(row.name, *cells(numbers[row.name]), flush=True)
    write_text(README, readme(README.read_text()))
    return failed


def main(arguments: list[str]) -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    what.add_argument("--count", action="store_true", help="measure nothing")
    what.add_argument("--measure", nargs="*", metavar="ROW", help="measure these anew, or all")
    what.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.row:
        print(json.dumps(measure(Row(*chosen.row))))
        return 0
    if chosen.check:
        return check()
    names = [row.name for row in rows()]
    if chosen.measure is not None:
        return write(chosen.measure or names)
    return write([] if chosen.count else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
