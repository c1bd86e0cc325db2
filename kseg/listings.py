"""The commands that list what there is, or show one of it."""

from __future__ import annotations

import inspect
import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kseg import config as c
from kseg.errors import UserError
from kseg.registry import Registry


def models(config: c.ModelsConfig) -> int:
    """List the models, or show one builder."""
    from kseg.quiet import load_tensorflow
    from kseg.registry import MODELS

    if config.sort != "name" and (config.json or config.name):
        raise UserError("--sort orders the list; leave it out beside --json or a NAME")
    load_tensorflow()
    if config.json:
        from kseg.catalogue import catalogue

        names = [config.name] if config.name else list(MODELS)
        print(json.dumps(catalogue(names), indent=1))
        return 0
    if config.name is not None:
        _list(MODELS, config.name)
        print()
    from kseg.catalogue import listed, measured_when

    show(listed(sort=config.sort, model=config.name))
    print(
        "512 x 512, 21 classes; TFLite on one thread, by python -m tools.model_table:\n"
        f"{measured_when()}"
    )
    return 0


def backbones(config: c.BackbonesConfig) -> int:
    """List the backbones, or show one builder."""
    from kseg.quiet import load_tensorflow
    from kseg.registry import BACKBONES

    load_tensorflow()
    return _list(BACKBONES, config.name)


def losses(config: c.LossesConfig) -> int:
    """List the losses, or show one."""
    from kseg.quiet import load_tensorflow
    from kseg.registry import HEAD_LOSSES, LOSSES

    load_tensorflow()
    from kseg.losses.expression import CHANGING, GIVEN, SYNTAX, listed, listed_of_heads
    from kseg.page import page

    if config.name in HEAD_LOSSES:
        Console(emoji=False).print(page(HEAD_LOSSES[config.name], options="arguments, in Python"))
        return 0
    if config.name is not None:
        how = f"options, as in --loss {config.name}:OPTION=VALUE"
        Console(emoji=False).print(page(LOSSES[config.name], options=how, without=GIVEN))
        return 0
    show(listed())
    print(
        f"a sum: --loss '{SYNTAX}'\n"
        f"a weight that changes evenly from the first step to the last: --loss '{CHANGING}'\n"
        "* takes --class-weights\n"
    )
    show(listed_of_heads())
    return 0


def metrics(config: c.MetricsConfig) -> int:
    """List the metrics, or show one, or what each mean IoU of `kseg evaluate --json` is."""
    from kseg.registry import METRICS

    if config.name == "conventions":
        from kseg.metrics.conventions import conventions
        from kseg.page import page

        Console(emoji=False).print(page(conventions, options="arguments, in Python"))
        return 0
    code = _list(METRICS, config.name)
    if config.name is None:
        print("`kseg metrics conventions` says what each mean IoU in `evaluate --json` is")
    return code


def datasets(config: c.DatasetsConfig) -> int:
    """List the data sets, or show how one is laid out."""
    from kseg.registry import DATASETS

    return _list(DATASETS, config.name)


def networks() -> int:
    """List the networks whose published weights can be imported."""
    from kseg.published.networks import NETWORKS

    table = Table("network", "model of kseg", box=None)
    for name, found in NETWORKS.items():
        table.add_row(name, found.model)
    show(table)
    return 0


def show(table: Table) -> None:
    """Print a table; texts like `:car:` stay as they are."""
    Console(emoji=False).print(table)


def _list(registry: Registry, name: str | None) -> int:
    if name is not None:
        from kseg.page import page

        how = "options, by -o NAME=VALUE" if registry.kind == "model" else "arguments, in Python"
        Console(emoji=False).print(page(registry[name], options=how))
        return 0
    table = Table(registry.kind, "what it is", box=None)
    for known in registry:
        table.add_row(known, escape(inspect.getdoc(registry[known]).splitlines()[0]))
    show(table)
    return 0
