"""Optimisers, and learning-rate schedules: a linear warm-up, then poly, cosine or constant."""

from __future__ import annotations

from collections.abc import Collection

import keras
from keras import ops

from kseg.config import TrainConfig

_NOT_DECAYED = ["bias", "gamma", "beta"]


@keras.saving.register_keras_serializable("kseg")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rise linearly to the peak over `steps`, then follow another schedule from its start."""

    def __init__(
        self, after: keras.optimizers.schedules.LearningRateSchedule | float, steps: int
    ) -> None:
        """Put a warm-up of `steps` steps before `after` (a schedule or a constant rate)."""
        self.after = after
        self.steps = steps

    def __call__(self, step: keras.KerasTensor) -> keras.KerasTensor:
        """Return the learning rate of one step, counted from 0."""
        step = ops.cast(step, "float32")
        rise = ops.minimum(1.0, (step + 1.0) / max(self.steps, 1))
        rest = ops.maximum(step - self.steps, 0.0)
        rate = self.after(rest) if callable(self.after) else self.after
        return rise * rate

    def get_config(self) -> dict:
        """Return what `__init__` took."""
        after = self.after
        if callable(after):
            after = keras.saving.serialize_keras_object(after)
        return {"after": after, "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict) -> WarmUp:
        """Return the schedule that `get_config` described."""
        after = config["after"]
        if isinstance(after, dict):
            after = keras.saving.deserialize_keras_object(after)
        return cls(after, config["steps"])


def poly(peak: float, *, steps: int, warmup: int) -> WarmUp:
    """Return peak * (1 - t / T) ** 0.9 after the warm-up (DeepLab; training.md 1.1).

    Args:
        peak: learning rate after the warm-up.
        steps: length of the whole training.
        warmup: steps of the warm-up, part of `steps`.
    """
    fall = keras.optimizers.schedules.PolynomialDecay(
        peak, decay_steps=max(1, steps - warmup), end_learning_rate=0.0, power=0.9
    )
    return WarmUp(fall, warmup)


def cosine(peak: float, *, steps: int, warmup: int) -> WarmUp:
    """Return half a cosine from the peak to 0 after the warm-up; arguments as in `poly`."""
    fall = keras.optimizers.schedules.CosineDecay(peak, decay_steps=max(1, steps - warmup))
    return WarmUp(fall, warmup)


def constant(peak: float, *, steps: int, warmup: int) -> WarmUp:
    """Return the peak for ever after the warm-up; arguments as in `poly`."""
    del steps
    return WarmUp(peak, warmup)


def make_optimizer(config: TrainConfig, *, heads: Collection[str]) -> keras.optimizers.Optimizer:
    """Return the optimiser of a training.

    Args:
        config: a resolved configuration.
        heads: paths of the variables that `config.head_rate` holds for.

    Returns:
        The optimiser with its schedule; weight decay leaves out biases and BN, and under
        mixed_float16 the loss is scaled.
    """
    schedule = SCHEDULES[config.schedule]
    rate = schedule(config.learning_rate, steps=config.steps, warmup=config.warmup)
    optimizer = _OPTIMIZERS[config.optimizer](rate, config.weight_decay or None)
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=_NOT_DECAYED)
    if config.head_rate != 1.0:
        _multiply_rate(optimizer, config.head_rate, frozenset(heads))
    if config.precision == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _multiply_rate(
    optimizer: keras.optimizers.Optimizer, factor: float, paths: frozenset[str]
) -> None:
    """Let the optimiser update the variables of `paths` with `factor` times its rate."""
    update = optimizer.update_step

    def update_step(
        gradient: keras.KerasTensor, variable: keras.Variable, learning_rate: keras.KerasTensor
    ) -> None:
        # What comes in is TensorFlow's variable; Keras' own optimisers find theirs like this too.
        known = optimizer._trainable_variables[optimizer._get_variable_index(variable)]
        update(gradient, variable, learning_rate * (factor if known.path in paths else 1.0))

    # Keras has no groups of parameters; this is the one place where it hands the rate on.
    optimizer.update_step = update_step


def _sgd(rate: WarmUp, decay: float | None) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=decay)


def _adam(rate: WarmUp, decay: float | None) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(rate, weight_decay=decay)


def _adamw(rate: WarmUp, decay: float | None) -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(rate, weight_decay=decay or 0.0)


SCHEDULES = {"poly": poly, "cosine": cosine, "constant": constant}
_OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
