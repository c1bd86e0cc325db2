"""Resizing in NumPy, the same for every file format: what goes in and what comes out must agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def bilinear_part(
    image: np.ndarray, size: tuple[int, int], rows: slice, columns: slice
) -> np.ndarray:
    """Return `bilinear(image, size)[rows, columns]`, made from the pixels under it alone."""
    down = _part(_taps(image.shape[0], size[0]), rows)
    across = _part(_taps(image.shape[1], size[1]), columns)
    top, left = down[0][0], across[0][0]
    seen = image[top : down[1][-1] + 1, left : across[1][-1] + 1].astype(np.float32)
    return _blend(_blend(seen, _moved(down, -top), 0), _moved(across, -left), 1)


def bilinear_bands(
    parts: Iterable[np.ndarray], old: tuple[int, int], new: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Resize bilinearly what comes, and is wanted, band by band.

    Args:
        parts: (any, W, C) float32, which make (H, W, C) one below the other.
        old: H and W.
        new: height and width of the result.

    Yields:
        (32 or fewer, width, C), which make the result one below the other; the heights depend on
        `new` alone.
    """
    rows, columns = _taps(old[0], new[0]), _taps(old[1], new[1])
    coming = iter(parts)
    held, first = next(coming), 0
    for top in range(0, new[0], _ROWS):
        band = _part(rows, slice(top, top + _ROWS))
        while first + len(held) <= band[1][-1]:
            passed = min(int(band[0][0]) - first, len(held))
            held, first = np.concatenate([held[passed:], next(coming)]), first + passed
        yield _blend(_blend(held, _moved(band, -first), 0), columns, 1)


def bilinear_argmax(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize logits bilinearly and return the best class of each pixel, band by band.

    Args:
        logits: (H, W, C).
        size: height and width of the result.

    Returns:
        (height, width) uint8 class ids.
    """
    return stacked_argmax(bilinear_bands([logits], logits.shape[:2], size), size)


def stacked_argmax(bands: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the best class of each pixel of bands (any, width, C), one below the other.

    Args:
        bands: of logits or probabilities.
        size: height and width of all of them together.

    Returns:
        (height, width) uint8 class ids.
    """
    ids, top = np.empty(size, np.uint8), 0
    for band in bands:
        ids[top : top + len(band)] = band.argmax(-1)
        top += len(band)
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


def _part(taps: _Taps, some: slice) -> _Taps:
    low, high, share = taps
    return low[some], high[some], share[some]


def _moved(taps: _Taps, by: int) -> _Taps:
    low, high, share = taps
    return low + by, high + by, share


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
