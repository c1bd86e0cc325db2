"""The step: what is divided by what, under strategies, mixed precision and averaging."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kseg.config import TrainConfig
from kseg.engine import Engine
from kseg.errors import UserError
from kseg.losses.cross_entropy import CrossEntropy
from kseg.optimizers import constant, cosine, make_optimizer, poly


def linear_model():
    image = keras.Input((2, 2, 1), name="image")
    x = layers.Conv2D(2, 1, use_bias=False, kernel_initializer="zeros", name="classify")(image)
    return keras.Model(image, {"logits": layers.Activation("linear", name="logits")(x)})


def make(model, *, rate=1.0, **options):
    losses = {"logits": (CrossEntropy(), 1.0)}
    return Engine(model, optimizer=keras.optimizers.SGD(rate), losses=losses, **options)


def test_loss_is_the_mean_over_valid_pixels_only():
    # Two equal logits cost |ln 0.5| = 0.6931 a pixel, however many pixels are ignored.
    mask = np.full((3, 2, 2), 255, np.int32)
    mask[0, 0, 0] = 1
    loss = make(linear_model()).step(tf.ones((3, 2, 2, 1)), tf.constant(mask))
    assert float(loss) == pytest.approx(0.693147, abs=1e-6)


def test_an_all_ignored_batch_changes_nothing():
    engine = make(linear_model())
    mask = tf.fill((3, 2, 2), 255)
    assert float(engine.step(tf.ones((3, 2, 2, 1)), mask)) == 0.0
    np.testing.assert_array_equal(engine.model.get_layer("classify").kernel, 0.0)


def two_replicas(*words):
    """Run in a process of its own: TensorFlow takes its number of devices when it starts."""
    script = Path(__file__).with_name("two_replicas.py")
    command = [sys.executable, script, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_replicas_are_one_even_with_uneven_ignored_pixels():
    alone, together = two_replicas()
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert np.abs(alone).max() > 0


@pytest.mark.slow
def test_synchronised_batch_norm_makes_two_replicas_one(street, tmp_path):
    # Three steps of SGD at 0.1: float32 sums in another order, 7e-6 apart here, where each
    # replica's own statistics (--sync-bn left out) put kernels 0.04 and averages 0.7 apart.
    assert two_replicas(street, tmp_path) < 1e-4


def test_head_rate_multiplies_the_step_of_the_heads_alone():
    config = TrainConfig(
        optimizer="sgd",
        learning_rate=1.0,
        schedule="constant",
        warmup=0,
        weight_decay=0.0,
        steps=1,
        head_rate=10.0,
    )
    kernels = []
    for heads in ((), ("classify/kernel",)):
        optimizer = make_optimizer(config, heads=heads)
        losses = {"logits": (CrossEntropy(), 1.0)}
        engine = Engine(linear_model(), optimizer=optimizer, losses=losses)
        engine.step(tf.ones((1, 2, 2, 1)), tf.constant([[[0, 1], [1, 1]]]))
        kernels.append(engine.model.get_layer("classify").kernel.numpy())
    # Gradient of the mean cross entropy at equal logits: 0.5 - share of the class.
    np.testing.assert_allclose(kernels[0].ravel(), [-0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(kernels[1], 10 * kernels[0], rtol=1e-6)


def test_averages_follow_the_recursion_with_a_short_memory_at_first():
    engine = make(linear_model(), ema=0.9)
    kernel = engine.model.get_layer("classify").kernel
    average = kernel.numpy()
    mask = tf.constant([[[0, 1], [1, 1]]])
    for step in range(1, 4):
        engine.step(tf.ones((1, 2, 2, 1)), mask)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * kernel.numpy()
    np.testing.assert_allclose(engine.weights()[kernel.path], average, rtol=1e-6)


def test_a_step_of_infinite_loss_leaves_the_weights_under_loss_scaling():
    model = linear_model()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    engine = Engine(model, optimizer=optimizer, losses={"logits": (CrossEntropy(), 1.0)})
    scale = float(optimizer.dynamic_scale)
    engine.step(tf.fill((1, 2, 2, 1), np.inf), tf.constant([[[0, 1], [1, 1]]]))
    np.testing.assert_array_equal(model.get_layer("classify").kernel, 0.0)
    assert float(optimizer.dynamic_scale) == scale / 2


def test_restoring_a_state_gives_it_back():
    engine = make(linear_model(), ema=0.9)
    engine.step(tf.ones((1, 2, 2, 1)), tf.constant([[[0, 1], [1, 1]]]))
    state = engine.state()
    other = make(linear_model(), ema=0.9)
    other.restore(state, finished=1)
    assert other.finished == 1
    for name, tensor in other.state().items():
        np.testing.assert_array_equal(tensor, state[name])


def test_a_model_that_xla_cannot_compile_is_refused_in_one_sentence():
    image = keras.Input((4, 4, 3))
    small = layers.Conv2D(2, 1)(image)
    # XLA has no gradient of this resize, which stands in no model of kseg
    logits = layers.Resizing(8, 8, interpolation="nearest")(small)
    engine = Engine(
        keras.Model(image, {"logits": logits}),
        optimizer=keras.optimizers.SGD(0.1),
        losses={"logits": (CrossEntropy(), 1.0)},
        jit=True,
    )
    with pytest.raises(UserError, match="XLA cannot compile ResizeNearestNeighborGrad.*--jit"):
        engine.step(tf.zeros((1, 4, 4, 3)), tf.zeros((1, 8, 8), tf.int32))


def test_schedules_at_hand_worked_steps():
    # 10 steps, 2 of them warm-up: half the peak, the peak, then the fall over 8 steps.
    options = {"steps": 10, "warmup": 2}
    for schedule in (poly, cosine, constant):
        assert float(schedule(1.0, **options)(0)) == pytest.approx(0.5)
        assert float(schedule(1.0, **options)(2)) == pytest.approx(1.0)
    assert float(poly(1.0, **options)(6)) == pytest.approx(0.5**0.9)
    assert float(cosine(1.0, **options)(6)) == pytest.approx(0.5)
    assert float(cosine(1.0, **options)(10)) == pytest.approx(0.0, abs=1e-6)
    assert float(constant(1.0, **options)(10)) == 1.0
