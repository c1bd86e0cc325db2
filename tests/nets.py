"""Predictors of a few lines of NumPy, and small nets of the zoo with weights that do something."""

import dataclasses

import keras
import numpy as np
from tiny import CARD, drawn

from kseg import models
from kseg.card import ModelCard
from kseg.data.dataset import voc_palette
from kseg.inference import Predictor
from kseg.runtimes import Runtime


def numpy_net(logits_of, size, *, num_classes=3, output="logits"):
    """Return a predictor of a file of one size; `logits_of` is from float (H, W, 3) to logits."""

    def forward(pixels):
        assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
        logits = logits_of(pixels.astype(np.float32)).astype(np.float32)
        return logits if output == "logits" else logits.argmax(-1).astype(np.uint8)

    names = tuple(f"class {number}" for number in range(num_classes))
    palette = tuple((50 * number, 90, 200) for number in range(num_classes))
    card = ModelCard("", {}, names, palette, size, output=output)
    return Predictor("net.tflite", card, Runtime(forward, size, output, num_classes, {}, {}))


def colours(image):
    """Logits that are the colour of each pixel: a net that sees one pixel."""
    return image / 40


def box(image, *, reach):
    """Logits that are sums of colours over a square, with zeros around the image."""
    side = 2 * reach + 1
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (0, 1))
    return windows.mean((-2, -1)) / 10


def keras_net(name, size, *, num_classes=3, **options):
    """Return a predictor of a net of the zoo, with random kernels and logits of size one."""
    model = models.inference_model(models.build(name, (*size, 3), num_classes, options))
    rng = np.random.default_rng(0)
    convolutions = [each for each in model.layers if isinstance(each, keras.layers.Conv2D)]
    for layer in convolutions:
        shape = layer.kernel.shape
        layer.kernel.assign(rng.normal(0, (2 / np.prod(shape[:3])) ** 0.5, shape))
    image = drawn(*size)[None].astype(np.float32)
    deviation = np.std(model(image, training=False)["logits"])
    convolutions[-1].kernel.assign(convolutions[-1].kernel / deviation)
    card = dataclasses.replace(
        CARD,
        model=name,
        options=options,
        size=size,
        classes=tuple(map(str, range(num_classes))),
        palette=voc_palette(num_classes),
    )
    return Predictor.from_keras(model, card)
