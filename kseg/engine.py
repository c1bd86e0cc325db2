"""The compiled training step, with any `tf.distribute` strategy around it.

`keras.Model.fit` is not used: it can neither resume exactly nor run on several workers, and it
averages losses per replica where a segmentation loss has to be averaged over the valid pixels of
the global batch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from kseg.errors import UserError
from kseg.losses.parts import parts_of, quotient
from kseg.training_copy import training_copy

_UNSUPPORTED = re.compile(r" on XLA_\w+_JIT: (\w+)")


class Engine:
    """A model in training: one call of `step` a batch.

    Attributes:
        model: the training model, a copy of the one given; its outputs are a dict with `logits`
            first.
        optimizer: the Keras optimiser; under mixed_float16 its loss is scaled.
        finished: number of finished steps.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        optimizer: keras.optimizers.Optimizer,
        losses: Mapping[str, tuple[keras.losses.Loss, float]],
        steps: int | None = None,
        ema: float = 0.0,
        jit: bool = False,
        sync_bn: bool = False,
        strategy: tf.distribute.Strategy | None = None,
    ) -> None:
        """Make the state of a training; build it inside the strategy's scope.

        Args:
            model: outputs {"logits": (B, H, W, C), ...}, all float32.
            optimizer: any Keras optimiser.
            losses: for each output that counts, its loss and weight. A loss answers with a value
                a pixel (B, H, W), 0 where ignored, or a value an image (B,), or it says itself what
                it is divided by; see `kseg.losses.parts`.
            steps: length of the training, along which weights of losses may change; without it
                they stay what they are in the first step.
            ema: decay of the averaged weights; 0 for none.
            jit: compile with XLA.
            sync_bn: normalise by the batch of all replicas; without it each has its own statistics,
                and those of the first are kept.
            strategy: where the replicas live; the default strategy if None.
        """
        self.model = training_copy(model, sync_bn=sync_bn, jit=jit)
        self.optimizer = optimizer
        self.finished = 0
        self._losses = dict(losses)
        self._steps = steps
        self._ema = ema
        self._strategy = strategy or tf.distribute.get_strategy()
        optimizer.build(self.model.trainable_variables)
        self._averaged = list(self.model.weights) if ema else []
        self._shadows = [tf.Variable(v.value, name=f"ema_{v.name}") for v in self._averaged]
        self._step = tf.function(self._global_step, jit_compile=jit)

    def step(self, image: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Train on one global batch.

        Args:
            image: (B, H, W, 3) float32 0..255, or the strategy's distributed form of it.
            mask: (B, H, W) int32 class ids, 255 where ignored.

        Returns:
            The loss of the global batch before the update, float32 scalar.

        Raises:
            UserError: if XLA has no form of an operation of the model.
        """
        try:
            loss = self._step(image, mask, tf.constant(self._progress(), tf.float32))
        except tf.errors.OpError as error:
            raise _beyond_xla(error) or error from error
        self.finished += 1
        return loss

    def learning_rate(self) -> float:
        """Return the rate that the next step will use."""
        return float(self.optimizer.learning_rate)

    def weights(self) -> dict[str, np.ndarray]:
        """Return what evaluation uses, by variable path: averaged weights where EMA is on."""
        values = {v.path: v.numpy() for v in self.model.weights}
        shadows = zip(self._averaged, self._shadows, strict=True)
        return values | {v.path: shadow.numpy() for v, shadow in shadows}

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that the next step depends on, by name."""
        return {name: np.asarray(v) for name, v in self._named_state().items()}

    def restore(self, tensors: Mapping[str, np.ndarray], *, finished: int) -> None:
        """Set what `state` returned; names and shapes must be those of `shapes`."""
        for name, variable in self._named_state().items():
            variable.assign(tensors[name])
        self.finished = finished

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of `state`."""
        return {name: tuple(v.shape) for name, v in self._named_state().items()}

    def _progress(self) -> float:
        """Return 0 at the first step and 1 at the last; resumed or not, the same at each step."""
        return self.finished / max(1, self._steps - 1) if self._steps else 0.0

    def _named_state(self) -> dict[str, tf.Variable | keras.Variable]:
        named = {f"model/{v.path}": v for v in self.model.weights}
        # By place: the paths of random seeds and optimisers count the instances of a process.
        seeds = [v for v in self.model.variables if not _is_weight(v)]
        named |= {f"seed/{i:04d}": v for i, v in enumerate(seeds)}
        named |= {f"optimizer/{i:04d}/{v.name}": v for i, v in enumerate(self.optimizer.variables)}
        pairs = zip(self._averaged, self._shadows, strict=True)
        return named | {f"ema/{v.path}": shadow for v, shadow in pairs}

    def _global_step(self, image: tf.Tensor, mask: tf.Tensor, progress: tf.Tensor) -> tf.Tensor:
        replica_losses = self._strategy.run(self._replica_step, args=(image, mask, progress))
        loss = self._strategy.reduce(tf.distribute.ReduceOp.SUM, replica_losses, axis=None)
        self._average_weights()
        return loss

    def _replica_step(self, image: tf.Tensor, mask: tf.Tensor, progress: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            outputs = self.model(image, training=True)
            loss = self._loss(outputs, mask, progress)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.model.trainable_variables)
        # apply_gradients sums over the replicas; each loss is already a share of the global one.
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        return loss

    def _loss(
        self, outputs: Mapping[str, tf.Tensor], mask: tf.Tensor, progress: tf.Tensor
    ) -> tf.Tensor:
        total = tf.constant(0.0)
        for name, (loss, weight) in self._losses.items():
            # A chain of cheap operations at full resolution: XLA makes one pass of it, in less
            # than half of the time on CPUs too.
            parts = tf.function(functools.partial(parts_of, loss), jit_compile=True)
            for part in parts(mask, outputs[name]):
                divisor = _global_sum(part.divisor)
                value = quotient(tf.reduce_sum(part.values), divisor)
                total += weight * part.weight_at(progress) * value
        return total

    def _average_weights(self) -> None:
        if not self._averaged:
            return
        done = tf.cast(self.optimizer.iterations, tf.float32)
        # A short memory at the start, or the random initial weights would stay in the average.
        decay = tf.minimum(self._ema, (1.0 + done) / (10.0 + done))
        for variable, shadow in zip(self._averaged, self._shadows, strict=True):
            shadow.assign(decay * shadow + (1.0 - decay) * variable.value)


def _global_sum(value: tf.Tensor) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def _beyond_xla(error: tf.errors.OpError) -> UserError | None:
    found = _UNSUPPORTED.search(error.message)
    if found is None:
        return None
    return UserError(f"XLA cannot compile {found[1]}, which this model needs; leave --jit out")


def _is_weight(variable: keras.Variable) -> bool:
    """Tell weights and BN statistics from random seeds."""
    return "float" in variable.dtype
