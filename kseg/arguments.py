"""What a recipe, a run or a model file says, as the arguments of `kseg train`.

They stand before the typed ones, which so have the last word. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kseg.config import TrainConfig, quantize_aware_config
from kseg.errors import UserError
from kseg.options import option_text
from kseg.registry import nearest


def recipe_arguments(name: str, *, without: Collection[str] = ()) -> list[str]:
    """Return a recipe as the arguments that stand before the typed ones.

    Args:
        name: name of a recipe of kseg, or the path of a `.toml` file. Its keys are the fields of
            TrainConfig, with `-` or `_`; its table `options` holds options of the model.
        without: fields to leave out.

    Raises:
        UserError: if there is no such recipe, it is not TOML, or a key is unknown.
    """
    values = _read_recipe(name)
    options = values.pop("options", {})
    known = {field.name for field in dataclasses.fields(TrainConfig)} - {"recipe", "resume", "run"}
    arguments: list[str] = []
    for key, value in values.items():
        field = key.replace("-", "_")
        if field not in known:
            raise UserError(f"recipe {name}: no key {key!r}{nearest(field, known)}")
        if field not in without:
            arguments += _flag("--" + field.replace("_", "-"), value)
    if not isinstance(options, dict):
        raise UserError(f"recipe {name}: options is a table, [options], of the model's options")
    for key, value in options.items():
        arguments += ["-o", f"{key}={option_text(value)}"]
    return arguments


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with kseg."""
    folder = resources.files("kseg.recipes")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `train` with its recipe spelled out before them.

    The recipe is the one that --recipe names; where neither a recipe nor data nor a run to resume
    is named, it is `scenes`.
    """
    typed = {word.partition("=")[0] for word in arguments}
    without = _said_otherwise(arguments)
    for index, word in enumerate(arguments):
        if word == "--recipe" and index + 1 < len(arguments):
            return [*recipe_arguments(arguments[index + 1], without=without), *arguments]
        if word.startswith("--recipe="):
            return [*recipe_arguments(word.partition("=")[2], without=without), *arguments]
    if typed & {"--data", "--resume", "--help", "-h"}:
        return list(arguments)
    return [*recipe_arguments("scenes", without=without), *arguments]


def with_settings(arguments: Sequence[str], config: TrainConfig) -> list[str]:
    """Return the arguments of `train` behind those that say a configuration.

    What is typed later wins. The configuration's own run folder is left out.
    """
    without = {"run", "resume", "recipe", "options"} | _said_otherwise(arguments)
    settings: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in without and value != field.default:
            settings += _flag("--" + field.name.replace("_", "-"), value)
    settings += [word for option in config.options for word in ("-o", option)]
    return [*settings, *arguments]


def with_weights(words: Sequence[str]) -> list[str]:
    """Put first what the file or run behind --weights says of itself.

    Its model and options, where no model is named; with --quantize-aware all settings of a run.
    """
    pairs = [word.split("=", 1) for word in words if word.startswith("--") and "=" in word]
    named = dict(zip(words, words[1:], strict=False)) | dict(pairs)
    if "--weights" not in named:
        return list(words)
    path = Path(named["--weights"])
    from kseg.runs import Run

    if "--quantize-aware" in words and Run.is_run(path):
        return with_settings(words, quantize_aware_config(Run(path).config()))
    if "--model" in named:
        return list(words)
    file = path / "best.keras" if path.is_dir() else path
    if file.suffix != ".keras" or not file.is_file():
        return list(words)
    from kseg import card as cards

    card = cards.read(file)
    return list(words) if card is None else [*card.arguments(), *words]


def _read_recipe(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UserError(f"recipe {name}: there is no such file")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif name in recipe_names():
        text = (resources.files("kseg.recipes") / f"{name}.toml").read_text()
    else:
        known = recipe_names()
        raise UserError(f"no recipe {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name} is not TOML: {error}") from error


def _flag(flag: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _said_otherwise(arguments: Sequence[str]) -> set[str]:
    """Return fields that a recipe may not set: another way to say the same is typed."""
    typed = {word.partition("=")[0] for word in arguments}
    return {"steps", "epochs"} if typed & {"--steps", "--epochs"} else set()
