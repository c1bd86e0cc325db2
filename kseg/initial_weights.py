"""The weights that a training begins with, where a run or a file gives them."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import keras

from kseg import card, models
from kseg.config import TrainConfig
from kseg.registry import MODELS
from kseg.resolve import backbone_weights, option_texts
from kseg.runs import Run
from kseg.weights import initialise_from

log = logging.getLogger(__name__)

# Options that a trained model does not depend on.
_TRAINING_ONLY = ("backbone_weights", "aux", "dropout")


def initialise(model: keras.Model, config: TrainConfig) -> None:
    """Give a model the weights that --weights names; say what does not fit."""
    if config.weights == "none" or backbone_weights(config):
        return
    path = Path(config.weights)
    source = Run(path).model_file() if Run.is_run(path) else path
    for name, (there, here) in other_options(source, config).items():
        log.warning(
            "%s was built with %s=%s, this model with %s: it computes something else with the same "
            "weights",
            source,
            name,
            there,
            here,
        )
    for layer in initialise_from(model, source):
        log.warning(
            "fresh weights for %s: %s has none of its shape (new, training-only or class count)",
            layer,
            source,
        )


def other_options(path: Path, config: TrainConfig) -> dict[str, tuple[object, object]]:
    """Return the options of the model in a file that this training's has otherwise, with both."""
    there = card.read(path)
    if there is None or there.model != config.model:
        return {}
    signature = inspect.signature(MODELS[config.model]).parameters
    defaults = {name: parameter.default for name, parameter in signature.items()}
    theirs = defaults | dict(there.options)
    ours = defaults | models.parse_options(config.model, option_texts(config))
    return {
        name: (theirs.get(name), value)
        for name, value in ours.items()
        if theirs.get(name) != value and not name.startswith(_TRAINING_ONLY)
    }
