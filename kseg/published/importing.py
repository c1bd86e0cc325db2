"""A published checkpoint into a `.keras` file of kseg that computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from kseg.card import ModelCard
from kseg.data.adapters.folder import read_classes
from kseg.data.dataset import Colour, listing, voc_palette
from kseg.errors import UserError
from kseg.models import build
from kseg.published.checkpoint import read_checkpoint
from kseg.published.networks import Network, network
from kseg.train import save_model
from kseg.version import VERSION

# Tensors of each kind of misfit that are all listed, and how many are shown of more, which are
# those of another network.
_LISTED, _SHOWN = 24, 4
_NOTHING = np.zeros(())
# The weights of our layers, and what torch calls them.
_FIELDS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclass(frozen=True)
class Imported:
    """What an import has done.

    Attributes:
        card: of the file written.
        tensors: how many were taken.
        fresh: names of layers that start at random.
        notes: what else the user should know, such as tensors left out.
    """

    card: ModelCard
    tensors: int
    fresh: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self, out: Path) -> str:
        """Return as text what was written to `out`, how it differs, and what to type next."""
        card = self.card
        lines = [
            f"{out}: {card.model}, {self.tensors} tensors, {len(card.classes)} classes "
            f"({listing(card.classes)}), {card.size[0]} x {card.size[1]}"
        ]
        if self.fresh:
            lines.append(f"start at random: {', '.join(self.fresh)}")
        return "\n".join([*lines, *self.notes, "next:", *self._next(out)])

    def _next(self, out: Path) -> list[str]:
        train = f"  kseg train --data DATA --weights {out}"
        if self.fresh:
            return [train]
        return [f"  kseg evaluate {out} --data DATA", f"  kseg predict {out} IMAGE", train]


def import_weights(
    path: Path,
    name: str,
    out: Path,
    *,
    classes: str | None = None,
    size: tuple[int, int] | None = None,
    keep_backbone: bool = False,
) -> Imported:
    """Write the `.keras` file of a published network.

    Args:
        path: its weights, `.pth` or `.safetensors`.
        name: what network they are of, as `--as` names it.
        out: the file to write.
        classes: a count, names with commas between, or a classes.csv; None takes the network's.
        size: height and width of the model's input; None takes the network's.
        keep_backbone: leave the classifiers at random, so that any number of classes fits.

    Returns:
        What was done.

    Raises:
        UserError: if the name is unknown, or the file cannot be read or does not fit tensor by
            tensor; nothing is written then.
    """
    published = network(name)
    if out.suffix != ".keras":
        raise UserError(f"--out {out} must end in .keras")
    tensors = read_checkpoint(path)
    tensors, notes = _prepared(published, tensors)
    there = _classes_there(published, tensors)
    names, palette = _classes(classes, published, there)
    if there not in (None, len(names)) and not keep_backbone:
        raise UserError(
            f"{path} has {there} classes and --classes {len(names)}; leave --classes out, or add "
            "--keep-backbone: all but the classifier is imported, and that starts at random"
        )
    size = size or published.size
    options = dict(published.options) | _aux(published, tensors)
    model = build(published.model, (*size, 3), len(names), options)
    fresh = published.classifiers if keep_backbone else ()
    taken, kept = _fill(model, published, tensors, fresh, f"{path} does not fit {name}")
    card = ModelCard(
        published.model, options, names, palette, size, version=VERSION, extra={"weights": name}
    )
    save_model(out, model, card)
    return Imported(card, taken, kept, notes)


def _prepared(
    published: Network, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the tensors that should fit, and notes of what has been done to them."""
    tensors, notes = dict(tensors), []
    for prefix, reason in published.left_out.items():
        left_out = [key for key in tensors if key.startswith(prefix)]
        for key in left_out:
            del tensors[key]
        notes += [f"left out: {listing(left_out)} ({reason})"] if left_out else []
    # A classifier of one class says yes above 0: beside a background of score 0 it does the same.
    lone = [
        key for key in _classifier_keys(published) if tensors.get(key, _NOTHING).shape[:1] == (1,)
    ]
    for key in lone:
        tensors[key] = np.concatenate([np.zeros_like(tensors[key]), tensors[key]])
    notes += ["one class there: a background whose score is 0 stands before it"] if lone else []
    return tensors, tuple(notes)


def _classifier_keys(published: Network) -> list[str]:
    found = []
    for layer in published.classifiers:
        with contextlib.suppress(KeyError):
            found += [f"{published.theirs(layer)}.{part}" for part in ("weight", "bias")]
    return found


def _classes_there(published: Network, tensors: Mapping[str, np.ndarray]) -> int | None:
    """Return how many classes the weights have; None where they have no classifier."""
    keys = [key for key in _classifier_keys(published) if tensors.get(key, _NOTHING).ndim]
    return len(tensors[keys[0]]) if keys else None


def _aux(published: Network, tensors: Mapping[str, np.ndarray]) -> dict[str, bool]:
    """Return the option that gives the model the auxiliary head that the weights have."""
    there = published.aux is not None and any(key.startswith(published.aux) for key in tensors)
    return {"aux": True} if there else {}


def _classes(
    wish: str | None, published: Network, there: int | None
) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Return names and colours of the classes asked for, of the network's own if none are."""
    if wish is not None and wish.endswith(".csv"):
        rows = [row for row in read_classes(Path(wish)) if row[1] != "ignore"]
        return tuple(name for _, name, _ in rows), tuple(colour for _, _, colour in rows)
    if wish is not None and not wish.isdecimal():
        names = tuple(name.strip() for name in wish.split(","))
    else:
        names = _unnamed(int(wish) if wish else there or len(published.classes) or 2, published)
    if len(set(names)) < max(2, len(names)) or not all(names):
        raise UserError(
            f"--classes {wish} must be a count from 2 on, different names with commas between, "
            "or a classes.csv of id,name,r,g,b"
        )
    return names, voc_palette(len(names))


def _unnamed(count: int, published: Network) -> tuple[str, ...]:
    if count == len(published.classes):
        return published.classes
    return tuple(f"class {id_}" for id_ in range(count))


def _fill(
    model: keras.Model,
    published: Network,
    tensors: Mapping[str, np.ndarray],
    fresh: Collection[str],
    complaint: str,
) -> tuple[int, tuple[str, ...]]:
    """Give the layers of `model` their weights; return how many, and the layers left at random."""
    wanted = {
        f"{published.theirs(layer.name)}.{_FIELDS[variable.name]}": (layer, variable)
        for layer in model.layers
        for variable in layer.weights
    }
    kept = [key for key, (layer, _) in wanted.items() if layer.name in fresh]
    names = tuple(dict.fromkeys(wanted.pop(key)[0].name for key in kept))
    given = {key: value for key, value in tensors.items() if key not in kept}
    wrong = [line for kind in _misfits(wanted, given) for line in _listed(kind)]
    if wrong:
        raise UserError(f"{complaint}:\n  " + "\n  ".join(wrong))
    for key, (layer, variable) in wanted.items():
        value = given[key]
        if layer.name in published.halves_swapped and value.ndim == 4:
            value = np.roll(value, value.shape[1] // 2, axis=1)
        variable.assign(value.transpose(_axes(layer, value.ndim)))
    return len(wanted), names


def _misfits(
    wanted: Mapping[str, tuple[keras.Layer, keras.Variable]], given: Mapping[str, np.ndarray]
) -> tuple[list[str], ...]:
    """Return what is wrong, a line a tensor: missing, other, left over, and broken ones."""
    missing = [f"{key} is missing" for key in wanted if key not in given]
    shapes = {key: _shape_there(*wanted[key]) for key in given if key in wanted}
    other = [
        f"{key} is {given[key].dtype} {given[key].shape}, not float32 {shape}"
        for key, shape in shapes.items()
        if (given[key].shape, given[key].dtype) != (shape, np.float32)
    ]
    left_over = [f"{key} is left over" for key in given if key not in wanted]
    broken = [
        f"{key} holds values that are not finite"
        for key in given
        if key in wanted and not np.isfinite(given[key]).all()
    ]
    return missing, other, left_over, broken


def _listed(lines: list[str]) -> list[str]:
    """Return the lines of a kind; of very many the first, and how many more there are."""
    if len(lines) <= _LISTED:
        return lines
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more of these"]


def _shape_there(layer: keras.Layer, variable: keras.Variable) -> tuple[int, ...]:
    axes = _axes(layer, len(variable.shape))
    return tuple(variable.shape[axes.index(axis)] for axis in range(len(axes)))


def _axes(layer: keras.Layer, rank: int) -> tuple[int, ...]:
    """Return which of torch's axes is each of ours: (out, in, h, w), one channel a depthwise."""
    if rank != 4:
        return tuple(range(rank))
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    return (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
