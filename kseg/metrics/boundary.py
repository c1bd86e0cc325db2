"""What lies near the border between two classes."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def boundary_band(labels: np.ndarray, width: int, *, ignore_label: int | None = None) -> np.ndarray:
    """Return which pixels have another class within `width` pixels, diagonals counted as one.

    Args:
        labels: class ids (H, W), any integer type.
        width: half-width of the band in pixels, at least 1.
        ignore_label: id that is no class: it makes no border, and a border is seen across it, as
            PASCAL VOC's masks have all of theirs under ignored pixels.

    Returns:
        (H, W) bool.

    Example:
        >>> boundary_band(np.array([[0, 0, 0, 1, 1]]), 1)
        array([[False, False,  True,  True, False]])
        >>> boundary_band(np.array([[0, 0, 255, 1, 1]]), 2, ignore_label=255)
        array([[False,  True,  True,  True, False]])
    """
    window = 2 * width + 1
    highest, lowest = labels, labels
    if ignore_label is not None:
        ids = labels.astype(np.int32)
        highest = np.where(ids == ignore_label, -1, ids)
        lowest = np.where(ids == ignore_label, np.iinfo(np.int32).max, ids)
    return ndimage.maximum_filter(highest, window) > ndimage.minimum_filter(lowest, window)


def border_pixels(labels: np.ndarray, *, ignore_label: int) -> np.ndarray:
    """Return which pixels have another class above, below, left or right of them, (H, W) bool.

    Args:
        labels: class ids (H, W).
        ignore_label: id that is no class: neither it nor the edge of the image makes a border.

    Example:
        >>> border_pixels(np.array([[0, 0, 1, 255, 0]]), ignore_label=255)
        array([[False,  True,  True, False, False]])
    """
    border = np.zeros(labels.shape, bool)
    # Transposed, columns are rows, and what is written goes to the same pixels.
    for ids, found in ((labels, border), (labels.T, border.T)):
        upper, lower = ids[:-1], ids[1:]
        differ = (upper != lower) & (upper != ignore_label) & (lower != ignore_label)
        found[:-1] |= differ
        found[1:] |= differ
    return border


def diagonal(labels: np.ndarray) -> float:
    """Return the length of an image's diagonal in pixels."""
    return float(np.hypot(*labels.shape))
