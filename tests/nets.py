"""Predictors of a few lines of NumPy, whose every probability a test can work out."""

import numpy as np

from kseg.card import ModelCard
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
