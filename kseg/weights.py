"""Weights into our layers: from another model, from a kseg file, from keras.applications."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import keras
from keras import KerasTensor, ops

from kseg import card as cards
from kseg.errors import UserError
from kseg.published.checkpoint import refuse_checkpoint

_UNKNOWN = re.compile("Could not locate (?:class|function) '([^']+)'")
APPLICATIONS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/"


@dataclass(frozen=True)
class Published:
    """A network of keras.applications and the file of its ImageNet weights.

    Attributes:
        name: of the builder in keras.applications; its layers are named as ours.
        url: of the file without classifier.
        md5: of that file, or None where keras.applications states none.
        stem: the layer that reads BGR there and RGB here, or None.
    """

    name: str
    url: str
    md5: str | None = None
    stem: str | None = None


def read_model(path: Path) -> keras.Model:
    """Load a `.keras` file, without running any code that it brings along.

    Args:
        path: the file.

    Raises:
        UserError: if there is none, it is damaged, or it asks for unsafe deserialisation.
    """
    # Registers the layers that our files name; backbones import this module.
    import kseg.models

    if keras.backend.backend() == "tensorflow":
        import kseg.fake_quantization
        import kseg.unpooling_forms  # noqa: F401

    if not path.is_file():
        raise UserError(f"no file {path}; expected a .keras file")
    refuse_checkpoint(path)
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} cannot be opened: it is no .keras file, or one cut short. Write it again"
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises almost anything on a damaged archive
        raise UserError(f"{path} {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """Return why a `.keras` file cannot be opened, from what Keras said."""
    said = str(error)
    if "safe_mode" in said or "unsafe" in said:
        return (
            "holds Python code (a Lambda layer) that would run on loading; kseg does not load it. "
            "Build the model without Lambda layers and save it again"
        )
    unknown = _UNKNOWN.search(said)
    if unknown is not None:
        return (
            f"cannot be opened: it holds {unknown[1]}, which is neither of Keras nor of kseg. "
            "Build the model of their layers alone and save it again"
        )
    return f"cannot be opened: {_first_line(error)}. The file is damaged; write it again"


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Give the layers of `target` the weights of the layers of the same name in `source`.

    Args:
        source: where the weights come from; layers that only it has are left out.
        target: changed in place, and only if everything fits.

    Raises:
        UserError: naming the first variable that `source` lacks or holds in another shape.
    """
    for _, difference in _differences(source, target):
        raise UserError(f"the weights do not fit: {difference}")
    _copy(source, target, ())


def initialise_from(model: keras.Model, path: str | Path) -> list[str]:
    """Start `model` from the weights of a model file or run of kseg.

    Args:
        model: a model of kseg, with or without training-only outputs; changed in place.
        path: a `.keras` file, or a run folder, whose best.keras is taken.

    Returns:
        The names of layers that keep their fresh weights: those shaped by the number of classes
        where the file has another number; those of training-only outputs, which the files of a
        run do not hold; and those that the file lacks and that add nothing yet, their weights all
        being zeros, as the scores that make an FCN-16s of an FCN-32s.

    Raises:
        UserError: if the file cannot be read, or listing whatever else differs.
    """
    path = Path(path)
    source = _read_ours(path / "best.keras" if path.is_dir() else path)
    logits = model.output["logits"]
    classes = (source.output["logits"].shape[-1], logits.shape[-1])
    theirs = {layer.name: layer.weights for layer in source.layers}
    inference = {layer.name: layer.weights for layer in keras.Model(model.input, logits).layers}
    found = dict(_differences(source, model))
    wrong = [
        difference
        for name, difference in found.items()
        if name in inference
        and not _differs_by_classes(theirs.get(name, []), inference[name], classes)
        and not (name not in theirs and _all_zeros(inference[name]))
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"{path} does not fit this model{_origin(path)}; give its --model and options, or "
            "train without --weights:\n  " + "\n  ".join(wrong[:8]) + more
        )
    _copy(source, model, found)
    return list(found)


def of_backbone(layer: keras.Layer) -> bool:
    """Tell whether a layer of a freshly built model belongs to its backbone.

    Copies and loaded models have lost the mark.
    """
    return getattr(layer, "of_backbone", False)


def load_backbone_weights(
    image: KerasTensor,
    output: KerasTensor | list[KerasTensor],
    weights: str | Path | None,
    *,
    published: Published | None,
    form: str,
) -> None:
    """Mark the layers of a backbone, and fill them with ImageNet weights of keras.applications.

    Args:
        image: what the backbone was built on.
        output: its last map, or its last maps.
        weights: None (leaves it as it is), "imagenet" (downloads once, as keras.applications
            does), or the path of such a file.
        published: whose weights these are; None where keras.applications has none.
        form: of the backbone; only "keras" computes what the weights were trained for.

    Raises:
        UserError: if there are no such weights, or they cannot be had or read.
    """
    for layer in keras.Model(image, output).layers:
        layer.of_backbone = True
    if weights is None:
        return
    if published is None:
        raise UserError(
            f"weights {str(weights)!r}: keras.applications has none for this backbone; "
            "train it from scratch, or take resnet50"
        )
    if form != "keras":
        raise UserError(
            f"weights {str(weights)!r} were trained for form keras, not {form}; "
            "leave form out, or train from scratch"
        )
    path = _download(published) if weights == "imagenet" else Path(weights)
    _import(_read_published(published, path), keras.Model(image, output), published)


def _differences(source: keras.Model, target: keras.Model) -> Iterator[tuple[str, str]]:
    """Yield the name of each layer of `target` that does not fit, and its first misfit."""
    theirs = {layer.name: layer.weights for layer in source.layers}
    for layer in target.layers:
        there = [(variable.name, variable.shape) for variable in theirs.get(layer.name, [])]
        for index, variable in enumerate(layer.weights):
            name, shape = there[index] if index < len(there) else ("", ())
            if (name, shape) != (variable.name, variable.shape):
                found = f"{name} {shape}" if name else "missing"
                text = f"{layer.name}/{variable.name} {variable.shape} is {found} there"
                yield layer.name, text
                break


def _copy(source: keras.Model, target: keras.Model, kept: Collection[str]) -> None:
    theirs = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        if layer.weights and layer.name not in kept:
            layer.set_weights(theirs[layer.name].get_weights())


def _differs_by_classes(
    old: Sequence[keras.Variable], new: Sequence[keras.Variable], classes: tuple[int, int]
) -> bool:
    """Whether shapes differ only where the new number of classes stands for the old one."""
    return len(old) == len(new) and all(
        len(before.shape) == len(after.shape)
        and all(pair[0] == pair[1] or pair == classes for pair in _pairs(before, after))
        for before, after in zip(old, new, strict=True)
    )


def _all_zeros(weights: Sequence[keras.Variable]) -> bool:
    return not any(ops.convert_to_numpy(variable).any() for variable in weights)


def _pairs(before: keras.Variable, after: keras.Variable) -> Iterator[tuple[int, int]]:
    return zip(before.shape, after.shape, strict=True)


def _origin(path: Path) -> str:
    """Return " (it is X)" with model and options where the file tells them."""
    card = cards.read(path / "best.keras" if path.is_dir() else path)
    if card is None:
        return ""
    options = "".join(f" {name}={value}" for name, value in card.options.items())
    return f" (it is {card.model}{options})"


def _read_ours(path: Path) -> keras.Model:
    model = read_model(path)
    output = getattr(model, "output", None)
    if not isinstance(output, dict) or "logits" not in output:
        raise UserError(f"{path}: not a model of kseg (it has no output named logits)")
    return model


def _download(published: Published) -> Path:
    file = Path(urlsplit(published.url).path).name
    try:
        return Path(
            keras.utils.get_file(
                file, published.url, cache_subdir="models", file_hash=published.md5
            )
        )
    # get_file raises bare Exception for every network error.
    except Exception as error:
        raise UserError(
            f"could not download {published.url} ({_first_line(error)}); fetch that file "
            f"elsewhere and give its path in place of imagenet"
        ) from error


def _read_published(published: Published, path: Path) -> keras.Model:
    """Return the network of keras.applications, filled from its own file by its own reader.

    The old files name layers otherwise than today's networks and are read in order; nobody but
    the original network knows that order.
    """
    if not path.is_file():
        raise UserError(f"no weights file {path}; expected a copy of {published.url}")
    build = getattr(keras.applications, published.name)
    try:
        return build(weights=str(path), include_top=False, input_shape=(64, 64, 3))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path} does not hold the weights of keras.applications.{published.name} without "
            f"classifier ({_first_line(error)}); expected a copy of {published.url}"
        ) from error


def _import(source: keras.Model, target: keras.Model, published: Published) -> None:
    """Copy by name; a bias we lack goes into the mean of the normalisation behind it."""
    theirs = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        if not layer.weights:
            continue
        values = {v.name: ops.convert_to_numpy(v) for v in theirs[layer.name].weights}
        if layer.name == published.stem:
            values["kernel"] = values["kernel"][:, :, ::-1]
        biased = theirs.get(layer.name.removesuffix("bn") + "conv")
        if "moving_mean" in values and biased is not None and biased.use_bias:
            values["moving_mean"] = values["moving_mean"] - ops.convert_to_numpy(biased.bias)
        layer.set_weights([values[variable.name] for variable in layer.weights])


def _first_line(error: Exception) -> str:
    # Keras says what is wrong with a layer behind what holds it.
    said = str(error).rpartition("Exception encountered: ")[2].strip()
    return said.splitlines()[0].rstrip(".") if said else type(error).__name__
