"""Train one step on one device and on two; print the kernels of both as JSON."""

import json

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kseg.engine import Engine
from kseg.losses.cross_entropy import CrossEntropy

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 2, 2, 1)).astype("float32")
# The first half of the batch has 4 valid pixels, the second 1: a mean of the replicas' means
# would weigh the halves alike and give another kernel.
MASK = np.array([[[0, 1], [1, 0]], [[1, 255], [255, 255]]], np.int32)


def engine(strategy=None):
    image = keras.Input((2, 2, 1), name="image")
    x = layers.Conv2D(2, 1, use_bias=False, kernel_initializer="zeros", name="classify")(image)
    model = keras.Model(image, {"logits": layers.Activation("linear", name="logits")(x)})
    losses = {"logits": (CrossEntropy(), 1.0)}
    optimizer = keras.optimizers.SGD(1.0)
    return Engine(model, optimizer=optimizer, losses=losses, ema=0.9, strategy=strategy)


def kernel(engine):
    return engine.model.get_layer("classify").kernel.numpy().ravel().tolist()


def main():
    device = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(device, two)
    alone = engine()
    alone.step(tf.constant(IMAGE), tf.constant(MASK))
    strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
    with strategy.scope():
        together = engine(strategy)
    batches = tf.data.Dataset.from_tensor_slices((IMAGE, MASK)).batch(2)
    for image, mask in strategy.experimental_distribute_dataset(batches):
        together.step(image, mask)
    print(json.dumps([kernel(alone), kernel(together)]))


main()
