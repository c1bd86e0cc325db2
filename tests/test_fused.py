"""The fused kernel against Keras' own batch normalisation, operation by operation."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kseg.fused import FusedBatchNormalization, with_fused_batch_norm


def model():
    image = keras.Input((6, 8, 3), name="image")
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="bn")(x)
    x = layers.Dropout(0.5, name="drop")(x)
    return keras.Model(image, {"logits": layers.Conv2D(2, 1, name="head")(x)})


@pytest.fixture
def pair():
    keras.utils.set_random_seed(3)
    plain = model()
    rng = np.random.default_rng(0)
    bn = plain.get_layer("bn")
    bn.set_weights([rng.uniform(0.5, 2, 4) for _ in range(4)])
    return plain, with_fused_batch_norm(plain)


def test_names_values_and_outputs_are_those_of_the_model(pair):
    plain, fused = pair
    assert isinstance(fused.get_layer("bn"), FusedBatchNormalization)
    assert [v.path for v in fused.weights] == [v.path for v in plain.weights]
    assert list(fused.output) == ["logits"]
    image = np.random.default_rng(1).normal(size=(2, 6, 8, 3)).astype("float32")
    np.testing.assert_array_equal(fused(image)["logits"], plain(image)["logits"])


def test_training_output_gradient_and_statistics_are_those_of_keras(pair):
    layers_ = [m.get_layer("bn") for m in pair]
    x = tf.constant(np.random.default_rng(2).normal(3, 2, (2, 5, 7, 4)).astype("float32"))
    found = []
    for layer in layers_:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
        found.append([y, *gradients, *layer.non_trainable_variables])
    # Sums of 70 float32 values in another order: some last digits differ.
    for ours, theirs in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_frozen_and_unusual_layers_stay_as_they_are():
    image = keras.Input((6, 8, 3))
    x = layers.BatchNormalization(name="frozen", trainable=False)(image)
    x = layers.BatchNormalization(name="no_scale", scale=False)(x)
    x = layers.BatchNormalization(name="first_axis", axis=1)(x)
    fused = with_fused_batch_norm(keras.Model(image, x))
    for name in ("frozen", "no_scale", "first_axis"):
        assert type(fused.get_layer(name)) is layers.BatchNormalization
    assert not fused.get_layer("frozen").trainable


def test_bfloat16_maps_keep_their_type_and_float32_statistics():
    layer = FusedBatchNormalization(dtype="mixed_bfloat16")
    x = tf.cast(tf.random.stateless_normal((2, 4, 4, 3), [1, 2]), tf.bfloat16)
    assert layer(x, training=True).dtype == tf.bfloat16
    assert layer.moving_mean.dtype == "float32"
