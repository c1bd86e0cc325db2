"""TensorFlow's fused batch normalisation under a Keras model while it is trained.

Keras computes batch normalisation from single operations, each a pass over the whole map; on a
CPU that is three to six times the time of the fused kernel and nearly half of a training step of
a small net. Models stay free of TensorFlow: the engine trains a copy with other layers of the same
names and weights.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf


def with_fused_batch_norm(model: keras.Model) -> keras.Model:
    """Return a copy of a functional model whose batch normalisations train by the fused kernel.

    Args:
        model: any functional model; it is not changed.

    Returns:
        A model of the same layer names, with its own variables of the same paths and values.
        Layers that the kernel cannot do (another axis, no scale or offset, synchronised over
        replicas, not trained) are as they were.
    """
    return _copy(model, _fused)


def with_synchronized_batch_norm(model: keras.Model) -> keras.Model:
    """Return a copy of a functional model that normalises by the batch of all replicas.

    Args:
        model: any functional model; it is not changed.

    Returns:
        A model of the same layer names, with its own variables of the same paths and values.
    """
    return _copy(model, _synchronized)


def _copy(model: keras.Model, clone: Callable[[keras.Layer], keras.Layer]) -> keras.Model:
    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` over the last axis of (B, H, W, C), by one kernel."""

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Return the normalised map, of the type of `inputs`; update the statistics in training."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        output, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.cast(self.gamma, tf.float32),
            offset=tf.cast(self.beta, tf.float32),
            mean=tf.zeros((0,)),
            variance=tf.zeros((0,)),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel gives the unbiased variance n / (n - 1); Keras keeps the plain one.
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), tf.float32)
        self._move(self.moving_mean, mean)
        self._move(self.moving_variance, variance * (count - 1.0) / count)
        return output

    def _move(self, average: keras.Variable, value: tf.Tensor) -> None:
        average.assign(average * self.momentum + value * (1.0 - self.momentum))


def _fused(layer: keras.Layer) -> keras.Layer:
    config = layer.get_config()
    plain = type(layer) is keras.layers.BatchNormalization
    if plain and layer.trainable and _fits(layer):
        return FusedBatchNormalization.from_config(config)
    return type(layer).from_config(config)


def _synchronized(layer: keras.Layer) -> keras.Layer:
    config = layer.get_config()
    if type(layer) is keras.layers.BatchNormalization:
        config |= {"synchronized": True}
    return type(layer).from_config(config)


def _fits(layer: keras.layers.BatchNormalization) -> bool:
    rank = len(layer.input.shape)
    last = layer.axis in (-1, rank - 1)
    return rank == 4 and last and layer.center and layer.scale and not layer.synchronized
