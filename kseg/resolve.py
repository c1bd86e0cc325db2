"""Fill in what the user left open, and refuse what cannot be, before anything is written."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

from kseg import models
from kseg.config import TrainConfig
from kseg.data.dataset import Dataset, FileDataset
from kseg.data.doctor import most_frequent_size
from kseg.errors import UserError
from kseg.losses.expression import build_loss, parse_loss, takes_class_weights
from kseg.registry import LOSSES, MODELS
from kseg.runs import new_folder
from kseg.training_copy import is_fast

LARGEST_WINDOW = 512


def check(config: TrainConfig) -> None:
    """Check what can be checked before data is opened: ranges, names, options of the model.

    Args:
        config: as the user gave it.

    Raises:
        UserError: if a field is out of range, or a name is unknown.
    """
    _check_ranges(config)
    if config.quantize_aware:
        _check_quantize_aware(config)
    models.parse_options(config.model, option_texts(config))
    _check_loss(config)


def resolve(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Return the configuration with every open field filled in.

    Args:
        config: as the user gave it.
        dataset: the opened `config.data`.
    """
    common = most_frequent_size(dataset, "train")
    steps = config.steps or _steps(config.epochs or dataset.epochs, dataset, config.batch_size)
    eval_every = min(config.eval_every or math.ceil(steps / 4), steps)
    return replace(
        config,
        data=_absolute_spec(config.data) if isinstance(dataset, FileDataset) else config.data,
        weights=_absolute(config.weights),
        class_weights=_absolute(config.class_weights),
        size=config.size or tuple(min(_up(side), LARGEST_WINDOW) for side in common),
        eval_size=config.eval_size or tuple(_up(side) for side in common),
        steps=steps,
        warmup=math.ceil(steps / 20) if config.warmup is None else config.warmup,
        eval_every=eval_every,
        checkpoint_every=config.checkpoint_every or min(eval_every, 200),
        precision=_precision(config),
        run=config.run or new_folder(config.model),
    )


def _check_ranges(config: TrainConfig) -> None:
    low, high = config.scale
    checks = {
        "--batch-size must be at least 1": config.batch_size >= 1,
        "--learning-rate must be above 0": config.learning_rate > 0,
        "--head-rate must be above 0": config.head_rate > 0,
        "--ema must lie in 0..1, below 1": 0 <= config.ema < 1,
        "--weight-decay must not be negative": config.weight_decay >= 0,
        "--scale takes MIN MAX, 0 < MIN <= MAX": 0 < low <= high,
        "--jitter must lie in 0..3": 0 <= config.jitter <= 3,
        "--logit-adjustment must lie in 0..10": 0 <= config.logit_adjustment <= 10,
        "--repeat-rare must lie in 0..1": 0 <= config.repeat_rare <= 1,
        "--rare-crops must lie in 0..1": 0 <= config.rare_crops <= 1,
        "--seed must not be negative": config.seed >= 0,
        "--warmup must not be negative": config.warmup is None or config.warmup >= 0,
        "--epochs must be a finite number": config.epochs is None or math.isfinite(config.epochs),
        "take either --steps or --epochs": config.steps is None or config.epochs is None,
    }
    counts = ("steps", "epochs", "eval_every", "checkpoint_every")
    for name in counts:
        value = getattr(config, name)
        checks[f"--{name.replace('_', '-')} must be above 0"] = value is None or value > 0
    for message, fine in checks.items():
        if not fine:
            raise UserError(message)


def _check_loss(config: TrainConfig) -> None:
    build_loss(config.loss)
    taken = any(takes_class_weights(term.name) for term in parse_loss(config.loss))
    if not taken and config.class_weights not in ("none", TrainConfig.class_weights):
        takers = ", ".join(name for name in LOSSES if takes_class_weights(name))
        raise UserError(
            f"--class-weights {config.class_weights}: nothing in --loss {config.loss} takes class "
            f"weights ({takers} do); leave it out, or add one of these"
        )


def _check_quantize_aware(config: TrainConfig) -> None:
    if config.weights in ("none", "imagenet") or backbone_weights(config):
        raise UserError(
            "--quantize-aware goes on from a trained model; name it: --weights RUN or FILE.keras"
        )
    for name in ("jit", "frozen_bn", "sync_bn"):
        if getattr(config, name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} has no meaning with --quantize-aware, which folds batch normalisation "
                "into the kernels; leave it out"
            )
    if config.precision not in ("float32", "auto"):
        raise UserError(
            f"--quantize-aware computes in float32; leave --precision {config.precision} out"
        )


def _steps(epochs: float, dataset: Dataset, batch_size: int) -> int:
    return max(1, math.ceil(epochs * dataset.length("train") / batch_size))


def _precision(config: TrainConfig) -> str:
    if config.precision != "auto":
        return config.precision
    narrow = not config.quantize_aware and is_fast("mixed_bfloat16")
    return "mixed_bfloat16" if narrow else "float32"


def _up(side: int) -> int:
    return max(96, 32 * math.ceil(side / 32))


def _absolute_spec(spec: str) -> str:
    """Make the path of a data spec absolute, so that the run can be used from anywhere."""
    name, _, path = spec.partition(":")
    return f"{name}:{_absolute(path)}"


def _absolute(path: str) -> str:
    """Return an existing path as an absolute one; words that are no path as they are."""
    there = Path(path).expanduser()
    return str(there.resolve()) if path and there.exists() else path


def option_texts(config: TrainConfig) -> dict[str, str]:
    """Return the builder's options as text: -o and --backbone.

    Args:
        config: as the user gave it.

    Raises:
        UserError: if -o is not NAME=VALUE, or the model takes no backbone or ImageNet weights.
    """
    texts = {}
    for option in config.options:
        name, sign, value = option.partition("=")
        if not sign:
            raise UserError(f"-o {option}: expected NAME=VALUE")
        texts[name.replace("-", "_")] = value
    if "backbone_weights" in texts:
        raise UserError(
            "the weights of a backbone are named by --weights imagenet or --weights FILE"
        )
    takes = inspect.signature(MODELS[config.model]).parameters
    if config.backbone is not None:
        if "backbone" not in takes:
            raise UserError(f"{config.model} has its own layers throughout; leave --backbone out")
        texts["backbone"] = config.backbone
    if backbone_weights(config) and not has_backbone(config.model):
        raise UserError(f"there are no ImageNet weights for {config.model}; it has no backbone")
    return texts


def has_backbone(model: str) -> bool:
    """Tell whether a model has a backbone that ImageNet weights are for."""
    return "backbone_weights" in inspect.signature(MODELS[model]).parameters


def backbone_weights(config: TrainConfig) -> str | None:
    """Return what --weights names if that is for the backbone: imagenet, or a file of Keras'."""
    ours = config.weights == "imagenet" or config.weights.endswith(".h5")
    return config.weights if ours else None
