"""What `kseg models` tells of every architecture: options, paper, size, where it runs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

from kseg.build import option_types
from kseg.registry import BACKBONES, MODELS, Entry

# Every model can be written as these; a limit of a registration takes one away.
TARGETS = {"tflite-float32": "tflite", "tflite-int8": "int8", "saved_model": "", "onnx": "onnx"}


def catalogue(names: Iterable[str]) -> list[dict[str, Any]]:
    """Describe models at their default options and 21 classes.

    Args:
        names: registry names.

    Returns:
        For each its `name`; its `options` with their defaults; the `backbones` it takes;
        its `source`; trainable `parameters` without training-only heads; `macs`, the
        multiply-accumulates of an image of 512 x 512; and the `targets` it is exported to.

    Raises:
        UserError: where there is no such model.
    """
    measured = table()
    return [_describe(MODELS.entry(name), measured[name]) for name in names]


def table() -> dict[str, dict[str, int]]:
    """Return `parameters` and `macs` of each model, as `python -m tools.model_table` wrote them."""
    text = (resources.files("kseg") / "models" / "table.json").read_text()
    return json.loads(text)


def source(entry: Entry) -> str:
    """Return the paper that the docstring of a builder names, as one line."""
    text = inspect.getdoc(entry.item) or ""
    section = re.search(r"^Source:\n((?:    .*\n?|\n(?=    ))+)", text, re.MULTILINE)
    return " ".join(section[1].split()) if section else ""


def _describe(entry: Entry, measured: dict[str, int]) -> dict[str, Any]:
    options = option_types(entry.name)
    return {
        "name": entry.name,
        "options": {name: parameter.default for name, parameter in options.items()},
        "backbones": list(BACKBONES) if "backbone" in options else [],
        "source": source(entry),
        **measured,
        "targets": [name for name, limit in TARGETS.items() if limit not in entry.limits],
    }
