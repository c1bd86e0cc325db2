"""Gaussian filter of values at scattered points of a space of few dimensions.

The points are spread over the corners of a regular lattice, the corners are blurred along each of
its directions, and the result is read where the points are. All three are sparse matrices, made
once, so filtering is a chain of products that can be repeated at will.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from kseg.errors import UserError

# A share of a cell and the number of its axis, in one int32: 27 bits above 3.
SHARE_BITS, AXIS_BITS = 27, 3


@dataclass(frozen=True)
class GaussianFilter:
    """Sums over all points, weighted by exp(-distance^2 / 2) and normalised on both sides.

    With k(i, j) that weight and n(i) = sum_j k(i, j), the result at a point i is
    sum_j k(i, j) / sqrt(n(i) n(j)) value(j); j = i is in the sum.

    Attributes:
        slice: (points, corners), from the corners of the simplex around each point to the point;
            transposed, it is the way there, the splat.
        blurs: (corners, corners) for each direction: 1/2, 1, 1/2 of neighbours that exist.

    Source:
        A. Adams et al., "Fast high-dimensional filtering using the permutohedral lattice",
        Eurographics 2010; the normalisation of P. Krähenbühl and V. Koltun, "Parameter learning
        and convergent inference for dense random fields", ICML 2013.

    Differs:
        The corners are found by sorting instead of hashing, and in coordinates whose axes are
        directions of the lattice. There it is the grid of whole numbers, a simplex is a cube's
        path of corners from its lowest to its highest, and its neighbours are at plus or minus
        an axis or the diagonal. Corners, shares and blur are the same.
    """

    slice: sparse.csr_array
    blurs: tuple[sparse.csr_array, ...]

    @staticmethod
    def of(features: np.ndarray) -> GaussianFilter:
        """Return the filter of some points.

        Args:
            features: (dimensions, points), at most 8 dimensions, in standard deviations.

        Raises:
            UserError: if the lattice between the points has more than 2^62 corners.
        """
        keys, shares, steps = _simplices(features.astype(np.float32, copy=False))
        corners, number = np.unique(keys, return_inverse=True)
        number = number.reshape(keys.shape).astype(np.int32)
        ends = np.arange(0, keys.size + 1, len(keys))
        back = _matrix(shares.T.ravel(), number.T.ravel(), ends, len(corners))
        return GaussianFilter(back, tuple(_blur(corners, step) for step in steps))._normalised()

    def __call__(self, values: np.ndarray, weight: float = 1.0) -> np.ndarray:
        """Return the filtered values.

        Args:
            values: (points, channels) float32.
            weight: what to multiply the result with.
        """
        corners = self.slice.T @ values
        if weight != 1:
            corners *= np.float32(weight)
        for blur in self.blurs:
            corners = blur @ corners
        return self.slice @ corners

    def _normalised(self) -> GaussianFilter:
        ones = np.ones((self.slice.shape[0], 1), np.float32)
        self.slice.data *= np.repeat(1 / np.sqrt(self(ones)), len(self.blurs))
        return self


def _simplices(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the points lie in the lattice.

    Returns:
        The number of each corner of the simplex around each point, int64 (dimensions + 1,
        points); its share in the point, float32 of the same shape; and what is added to a
        corner's number to come to its neighbour in each direction, (dimensions + 1,).
    """
    count = len(features)
    where = _directions(count) @ features
    lowest = np.floor(where)
    ranked = _ranked(where - lowest)
    lowest = (lowest - lowest.min(axis=1, keepdims=True)).astype(np.int64)
    # Highest corner one more, and one left free, that no neighbour reaches into the next row.
    radix = lowest.max(axis=1) + 3
    if math.prod(radix.tolist()) >= 2**62:
        raise UserError(
            "the points of a Gaussian filter lie too many standard deviations apart; take larger "
            "ones, or a smaller image"
        )
    strides = np.append(1, np.cumprod(radix[:-1]))
    keys = np.empty((count + 1, features.shape[1]), np.int64)
    keys[0] = strides @ lowest
    for i, axis in enumerate(ranked & (2**AXIS_BITS - 1)):
        keys[i + 1] = keys[i] + strides[axis]
    parts = (ranked >> AXIS_BITS).astype(np.float32) * np.float32(2.0**-SHARE_BITS)
    shares = -np.diff(parts, axis=0, prepend=np.float32(1), append=np.float32(0))
    return keys, shares, np.append(strides, strides.sum())


def _directions(count: int) -> np.ndarray:
    """Return the matrix from features to coordinates along the directions of the lattice."""
    # Row i of the paper's E lifts the features to the lattice's hyperplane, scaled so that the
    # blur has a standard deviation of 1.
    lift = np.triu(np.ones((count + 1, count)))
    lift[np.arange(1, count + 1), np.arange(count)] = -np.arange(1, count + 1)
    index = np.arange(1, count + 1)
    lift *= math.sqrt(2 / 3) * (count + 1) / np.sqrt(index * (index + 1))
    return ((lift[-1] - lift[:-1]) / (count + 1)).astype(np.float32)


def _ranked(parts: np.ndarray) -> np.ndarray:
    """Return the parts of each point, 0 to 1, largest first, each with its axis in the low bits."""
    codes = (parts * np.float32(2**SHARE_BITS)).astype(np.int32) << AXIS_BITS
    codes |= np.arange(len(parts), dtype=np.int32)[:, None]
    # A bubble sort of whole rows: NumPy's own sort of such short columns is ten times slower.
    for last in range(len(codes) - 1, 0, -1):
        for i in range(last):
            low, high = np.minimum(codes[i], codes[i + 1]), np.maximum(codes[i], codes[i + 1])
            codes[i], codes[i + 1] = high, low
    return codes


def _blur(corners: np.ndarray, step: np.int64) -> sparse.csr_array:
    """Return the blur along one direction.

    Args:
        corners: the sorted numbers of all corners in the lattice.
        step: from such a number to that of the neighbour.
    """
    count = len(corners)
    after = np.searchsorted(corners, corners + step).clip(max=count - 1)
    here = np.flatnonzero(corners[after] == corners + step)
    columns = np.full((count, 3), -1, np.int32)
    columns[after[here], 0] = here
    columns[:, 1] = np.arange(count)
    columns[here, 2] = after[here]
    held = columns >= 0
    weights = np.broadcast_to(np.array([0.5, 1, 0.5], np.float32), held.shape)
    ends = np.append(0, np.cumsum(held @ np.ones(3, np.int32)))
    return _matrix(weights[held], columns[held], ends, count)


def _matrix(
    data: np.ndarray, columns: np.ndarray, ends: np.ndarray, width: int
) -> sparse.csr_array:
    # SciPy's default, int64, is twice the memory to read.
    columns, ends = columns.astype(np.int32, copy=False), ends.astype(np.int32)
    return sparse.csr_array((data, columns, ends), shape=(len(ends) - 1, width))
