"""Resizing in NumPy, the same for every file format: what goes in and what comes out must agree."""

from __future__ import annotations

import numpy as np

# Rows of the result made at a time, so that what is between stays in the processor's cache.
_ROWS = 32

_Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize bilinearly with half-pixel centres and without antialiasing, as `tf.image.resize`.

    Args:
        image: (H, W, C), any type.
        size: height and width of the result.

    Returns:
        (height, width, C) float32.
    """
    image = image.astype(np.float32, copy=False)
    rows, columns = _taps(image.shape[0], size[0]), _taps(image.shape[1], size[1])
    return _blend(_blend(image, rows, 0), columns, 1)


def bilinear_argmax(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize logits bilinearly and return the best class of each pixel, band by band.

    Args:
        logits: (H, W, C).
        size: height and width of the result.

    Returns:
        (height, width) uint8 class ids.
    """
    rows, columns = _taps(logits.shape[0], size[0]), _taps(logits.shape[1], size[1])
    ids = np.empty(size, np.uint8)
    for top in range(0, size[0], _ROWS):
        band = slice(top, top + _ROWS)
        some = _blend(logits, (rows[0][band], rows[1][band], rows[2][band]), 0)
        ids[band] = _blend(some, columns, 1).argmax(-1)
    return ids


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map of ids (H, W) to `size`, each pixel taking the id at its own centre."""
    rows = _centres(mask.shape[0], size[0])
    columns = _centres(mask.shape[1], size[1])
    return mask[rows[:, None], columns[None, :]]


def _taps(old: int, new: int) -> _Taps:
    """Return for each new position the two old ones it lies between, and the second one's share."""
    # In float32, as TensorFlow does it: in double precision the shares would differ by 1e-5.
    scale = np.float32(old) / np.float32(new)
    where = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    where = where.clip(0, old - 1)
    low = where.astype(np.intp)
    return low, np.minimum(low + 1, old - 1), (where - low).astype(np.float32)


def _blend(image: np.ndarray, taps: _Taps, axis: int) -> np.ndarray:
    low, high, share = taps
    first = image.take(low, axis)
    if not share.any():
        return first
    second = image.take(high, axis)
    second -= first
    second *= share.reshape(-1, *(1,) * (image.ndim - axis - 1))
    second += first
    return second


def _centres(old: int, new: int) -> np.ndarray:
    return ((np.arange(new) + 0.5) * (old / new)).astype(np.intp).clip(0, old - 1)
