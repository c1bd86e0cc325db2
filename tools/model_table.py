"""Counts every model anew, and writes what was counted where `kseg models` and the README have it.

python -m tools.model_table           kseg/models/table.json and the README's table
python -m tools.model_table --check   1 if either differs from what is counted now
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from pathlib import Path

import keras

from kseg.build import build, macs, trainable_parameters
from kseg.catalogue import TARGETS, catalogue
from kseg.registry import MODELS

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "kseg" / "models" / "table.json"
README = ROOT / "README.md"
SIZE, NUM_CLASSES = (512, 512, 3), 21
BEGIN, END = "<!-- model table -->", "<!-- end of model table -->"


def count(name: str) -> dict[str, int]:
    """Return parameters and multiply-accumulates of a model at its defaults."""
    model = build(name, SIZE, NUM_CLASSES)
    numbers = {"parameters": trainable_parameters(model), "macs": macs(model)}
    del model
    keras.backend.clear_session()
    gc.collect()
    return numbers


def count_all() -> str:
    """Return the text of `table.json`."""
    return json.dumps({name: count(name) for name in MODELS}, indent=1) + "\n"


def readme_table() -> str:
    """Return the README's table, from `table.json` and the docstrings."""
    lines = ["| model | parameters, M | MACs, G | source |", "| --- | --- | --- | --- |"]
    for model in catalogue(MODELS):
        parameters, macs_ = model["parameters"] / 1e6, model["macs"] / 1e9
        lines.append(f"| `{model['name']}` | {parameters:.2f} | {macs_:.1f} | {_paper(model)} |")
    return "\n".join(lines)


def _paper(model: dict) -> str:
    """Return authors, title and venue: the source up to its section, figure or arXiv number."""
    paper = re.split(r",? (?:section|sections|figure|table|arXiv)\b|;", model["source"])[0]
    paper = paper.rstrip(".")
    notes = [_note(limit, why) for limit, why in MODELS.entry(model["name"]).limits.items()]
    return paper + (f" ({'; '.join(notes)})" if notes else "")


def _note(limit: str, why: str) -> str:
    target = next((target for target, name in TARGETS.items() if name == limit), None)
    return f"no {target}: {why}" if target else why


def readme(text: str) -> str:
    """Return the README with its table replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    check = parser.parse_args(arguments).check
    counted = count_all()
    if check and counted != TABLE.read_text():
        print(f"{TABLE} is stale; run python -m tools.model_table")
        return 1
    if not check:
        TABLE.write_text(counted)
    text = README.read_text()
    if check and readme(text) != text:
        print(f"{README}: its table is stale; run python -m tools.model_table")
        return 1
    if not check:
        README.write_text(readme(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
