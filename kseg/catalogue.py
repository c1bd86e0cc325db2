"""What `kseg models` tells of every architecture: options, paper, size, speed, where it runs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from rich.markup import escape
from rich.table import Table

from kseg.build import option_types, parse_options
from kseg.errors import UserError
from kseg.registry import BACKBONES, MODELS, Entry, nearest

# Every model can be written as these, as its contract test tries; a limit of a registration takes
# one away.
TARGETS = {"tflite-float32": "tflite", "tflite-int8": "int8", "saved_model": "", "onnx": ""}
TITLES = ("M params", "G MACs", "float ms", "int8 ms", "float MB", "int8 MB")
# Names of `kseg models --sort`, and the key of `table` that each stands for.
SORTS = {
    "name": None,
    "parameters": "parameters",
    "macs": "macs",
    "float-mb": "float32_mb",
    "int8-mb": "int8_mb",
    "float-ms": "float32_ms",
    "int8-ms": "int8_ms",
}


@dataclass(frozen=True)
class Row:
    """One line of the table of models: a model at its defaults, or with some options.

    Attributes:
        model: registry name.
        variant: the options, as `-o` takes them; "" for the defaults.
    """

    model: str
    variant: str = ""

    @property
    def name(self) -> str:
        """What stands in the table, for example "lraspp activation=relu6"."""
        return f"{self.model} {self.variant}".strip()

    @property
    def entry(self) -> Entry:
        """The registration of the model."""
        return MODELS.entry(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """The options, of the types that the builder takes."""
        return parse_options(self.model, dict(o.split("=", 1) for o in self.variant.split()))

    @property
    def backbone(self) -> str:
        """The backbone it is built on; "" for a model that has none to choose."""
        options = option_types(self.model)
        chosen = self.options.get("backbone")
        return chosen or (options["backbone"].default if "backbone" in options else "")

    @property
    def targets(self) -> list[str]:
        """What the model can be exported to."""
        return [name for name, limit in TARGETS.items() if limit not in self.entry.limits]


def rows() -> list[Row]:
    """Return a row for each model, and one for each of its variants, by name."""
    return [Row(name, variant) for name in MODELS for variant in ("", *MODELS.entry(name).variants)]


def catalogue(names: Iterable[str]) -> list[dict[str, Any]]:
    """Describe models at their default options and 21 classes.

    Args:
        names: registry names.

    Returns:
        For each its `name`; its `options` with their defaults; the `backbones` it takes;
        its `source`; trainable `parameters` without training-only heads; `macs`, the
        multiply-accumulates of an image of 512 x 512; and the `targets` it is exported to. What
        was measured stands in `table`.

    Raises:
        UserError: where there is no such model.
    """
    measured = table()
    return [_describe(Row(MODELS.entry(name).name), measured[name]) for name in names]


def table() -> dict[str, dict[str, Any]]:
    """Return the numbers of each row, as `python -m tools.model_table` wrote them.

    `parameters` and `macs` were counted, and it was tried whether the model `dilates` its
    backbone by default. Where a row was measured there are `float32_mb` and
    `int8_mb`, the size of its `.tflite` files; `float32_ms` and `int8_ms`, one image of 512 x 512
    on one thread (None where there is no int8 file); `date`, and `machine`.
    """
    text = (resources.files("kseg") / "models" / "table.json").read_text()
    return json.loads(text)


def listed(*, sort: str = "name", model: str | None = None) -> Table:
    """Return rows for a terminal.

    Args:
        sort: one of `SORTS`; rows without that number come last.
        model: registry name of the only model whose rows are wanted; None for all.

    Raises:
        UserError: if it is none of them.
    """
    if sort not in SORTS:
        raise UserError(f"--sort {sort}{nearest(sort, SORTS)} (there are: {', '.join(SORTS)})")
    measured = table()
    shown = Table("\nmodel", box=None)
    for title in TITLES:  # of two lines, which leaves the names most of 80 columns
        shown.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    wanted = [row for row in rows() if model in (None, row.model)]
    for row in sorted(wanted, key=lambda row: _rank(measured.get(row.name, {}), SORTS[sort])):
        shown.add_row(escape(row.name), *cells(measured.get(row.name, {})))
    return shown


def cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    """Return the numbers of a row that stand below `TITLES`, as text."""
    return (
        _number(numbers.get("parameters"), 1e6, 2),
        _number(numbers.get("macs"), 1e9, 1),
        _number(numbers.get("float32_ms"), 1, 0),
        _number(numbers.get("int8_ms"), 1, 0),
        _number(numbers.get("float32_mb"), 1, 1),
        _number(numbers.get("int8_mb"), 1, 1),
    )


def measured_when() -> str:
    """Return on what days the rows were measured, and by which machines, as text."""
    measured = [numbers for numbers in table().values() if "date" in numbers]
    days = sorted({numbers["date"] for numbers in measured})
    machines = sorted({numbers["machine"] for numbers in measured})
    return f"{' to '.join(dict.fromkeys(days[:1] + days[-1:]))}, {'; '.join(machines)}"


def source(entry: Entry) -> str:
    """Return the paper that the docstring of a builder names, as one line."""
    text = inspect.getdoc(entry.item) or ""
    section = re.search(r"^Source:\n((?:    .*\n?|\n(?=    ))+)", text, re.MULTILINE)
    return " ".join(section[1].split()) if section else ""


def _backbones(*, dilates: bool) -> list[str]:
    """Return the backbones, for a model that dilates them only those that can be dilated."""
    return [
        name
        for name in BACKBONES
        if not (dilates and "output_stride" in BACKBONES.entry(name).limits)
    ]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _rank(numbers: dict[str, Any], key: str | None) -> tuple[bool, float]:
    value = numbers.get(key) if key else 0
    return value is None, value or 0


def _describe(row: Row, numbers: dict[str, Any]) -> dict[str, Any]:
    options = option_types(row.model)
    return {
        "name": row.model,
        "options": {name: parameter.default for name, parameter in options.items()},
        "backbones": _backbones(dilates=numbers["dilates"]) if "backbone" in options else [],
        "source": source(row.entry),
        "parameters": numbers["parameters"],
        "macs": numbers["macs"],
        "targets": row.targets,
    }
