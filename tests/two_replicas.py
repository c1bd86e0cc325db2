"""Train on one device and on two, and print as JSON what came of it.

python tests/two_replicas.py                one step; the kernels of both
python tests/two_replicas.py DATA FOLDER    trainings on a folder of drawn data, whose runs go to
                                            FOLDER; how far the weights come to lie apart
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kseg import checkpoint
from kseg.config import TrainConfig
from kseg.engine import Engine
from kseg.losses.cross_entropy import CrossEntropy
from kseg.train import train

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


def trained(strategy, name):
    """Return the weights after three steps of `kseg train` with synchronised BN."""
    config = TrainConfig(
        data=f"folder:{sys.argv[1]}",
        run=Path(sys.argv[2]) / name,
        steps=3,
        batch_size=4,
        # AdamW divides each gradient by its size: near zero it would multiply what rounding leaves.
        optimizer="sgd",
        learning_rate=0.1,
        sync_bn=True,
        options=("widths=8,8,8,8", "blocks=1,1,1,1", "decoder_channels=8"),
    )
    train(config, strategy=strategy)
    tensors, _ = checkpoint.load(config.run / "checkpoints", 3)
    return {name: value for name, value in tensors.items() if name.startswith("model/")}


def step(strategy):
    """Return the kernels after one step, on one device and on two."""
    alone = engine()
    alone.step(tf.constant(IMAGE), tf.constant(MASK))
    with strategy.scope():
        together = engine(strategy)
    batches = tf.data.Dataset.from_tensor_slices((IMAGE, MASK)).batch(2)
    for image, mask in strategy.experimental_distribute_dataset(batches):
        together.step(image, mask)
    return [kernel(alone), kernel(together)]


def apart(strategy):
    one, two = trained(None, "one"), trained(strategy, "two")
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def main():
    device = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(device, two)
    strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
    print(json.dumps(apart(strategy) if sys.argv[1:] else step(strategy)))


main()
