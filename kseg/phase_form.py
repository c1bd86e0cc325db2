"""A transposed convolution as a plain one that makes all pixels of a cell, side by side.

With a stride of s, pixel s j + r of a row is the sum over a of x[j - a] kernel[s a + r]: for each
phase r a plain convolution. Depth to space lays the phases out as pixels.

Source: W. Shi et al., "Is the deconvolution layer the same as a convolutional layer?",
arXiv:1609.07009.
"""

from __future__ import annotations

import math

import tensorflow as tf


def phase_kernel(kernel: tf.Tensor, stride: int) -> tf.Tensor:
    """Return the kernel of the plain convolution.

    Args:
        kernel: of the transposed one, (rows, columns, C, filters).
        stride: of the transposed one, the same for rows and columns.

    Returns:
        (taps, taps, C, stride² filters), by phase and then by filter.
    """
    rows, columns = (math.ceil(side / stride) for side in kernel.shape[:2])
    missing = [
        (0, taps * stride - side)
        for taps, side in zip((rows, columns), kernel.shape[:2], strict=True)
    ]
    kernel = tf.pad(kernel, [*missing, (0, 0), (0, 0)])
    kernel = tf.reshape(kernel, (rows, stride, columns, stride, *kernel.shape[2:]))
    kernel = tf.transpose(kernel, (0, 2, 4, 1, 3, 5))[::-1, ::-1]
    return tf.reshape(kernel, (rows, columns, kernel.shape[2], -1))


def phase_margins(length: int, side: int, stride: int, padding: str) -> tuple[int, int, int, int]:
    """Return what the plain convolution pads with, and what of its pixels counts.

    Args:
        length: pixels of the map along an axis.
        side: of the transposed kernel along it.
        stride: of the transposed convolution.
        padding: "same" or "valid", of the transposed convolution.

    Returns:
        Zeros before and behind the map; the first pixel that counts, and how many do.
    """
    beyond = max(side - stride, 0)
    before = beyond // 2 if padding == "same" else 0
    count = length * stride + (0 if padding == "same" else beyond)
    first_cell, first = divmod(before, stride)
    cells = math.ceil((first + count) / stride)
    taps = math.ceil(side / stride)
    return taps - 1 - first_cell, first_cell + cells - length, first, count
