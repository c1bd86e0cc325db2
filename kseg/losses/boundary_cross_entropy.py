"""Cross entropy that counts more near the places where two classes meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.losses.cross_entropy import CrossEntropy
from kseg.losses.distance_map import distance_map
from kseg.registry import LOSSES

_REACH = 3.0  # in sigma; beyond it less than a ninetieth of `weight` is left


@LOSSES.register("boundary_ce")
@keras.saving.register_keras_serializable(package="kseg")
class BoundaryCrossEntropy(CrossEntropy):
    """Cross entropy times 1 + weight * exp(-d^2 / (2 sigma^2)), d being the distance to a boundary.

    On a pixel with a pixel of another class beside, above or below it d is 0. It is exact up to
    3 sigma (rounded up to a pixel), beyond which a pixel counts 1, as it does in an image of one
    class. What lies behind an ignored pixel is not known, so no boundary is there.
    Ignored pixels cost 0; who sums divides by the valid pixels. A class without a pixel adds
    nothing.

    Args:
        weight: by how much a boundary counts more, U-Net's w0.
        sigma: how far that reaches, pixels.
        class_weights: one factor a class, or None for 1 everywhere.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map.

    Source:
        O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, section 3, equation 2,
        arXiv:1505.04597 (w0 10, sigma 5).

    Differs:
        U-Net adds up the distances to the two nearest cells, to keep touching cells apart. Classes
        have no instances; the distance is that to the nearest boundary.

    Example:
        A row whose class changes after the second of four pixels, both logits 0, sigma 1: d is
        1, 0, 0, 1, so the pixels count 1 + 10 exp(-1/2) = 7.065307 and 11, times 0.693147.

        >>> loss = BoundaryCrossEntropy(sigma=1.0)
        >>> loss(np.array([[[0, 0, 1, 1]]]), np.zeros((1, 1, 4, 2)))
        [[[4.897297, 7.624619, 7.624619, 4.897297]]]
    """

    def __init__(
        self,
        weight: float = 10.0,
        sigma: float = 5.0,
        class_weights: Sequence[float] | None = None,
        ignore_label: int = 255,
        name: str = "boundary_ce",
        reduction: str | None = None,
    ) -> None:
        super().__init__(class_weights, ignore_label, name, reduction)
        if weight < 0:
            raise ValueError(f"weight is {weight}; it must not be negative")
        if sigma <= 0:
            raise ValueError(f"sigma is {sigma}; it must be above 0 pixels")
        self.weight = weight
        self.sigma = sigma

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every pixel; arguments and result as of `CrossEntropy.call`."""
        mask = ops.cast(y_true, "int32")
        radius = math.ceil(_REACH * self.sigma)
        edges = _edges(ops.where(ops.equal(mask, self.ignore_label), -1, mask))
        distance = distance_map(edges[..., None], radius + 1)[..., 0]
        near = ops.exp(-ops.square(distance) / (2.0 * self.sigma**2))
        factor = 1.0 + self.weight * ops.where(distance > radius, 0.0, near)
        return factor * super().call(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "weight": self.weight, "sigma": self.sigma}


def _edges(label: keras.KerasTensor) -> keras.KerasTensor:
    """Return which pixels have another class beside, above or below, (B, H, W) bool; -1 is none."""
    right = _differ(label[:, :, 1:], label[:, :, :-1])
    below = _differ(label[:, 1:], label[:, :-1])
    found = [ops.pad(right, ((0, 0), (0, 0), side)) for side in ((1, 0), (0, 1))]
    found += [ops.pad(below, ((0, 0), side, (0, 0))) for side in ((1, 0), (0, 1))]
    return sum(found) > 0


def _differ(one: keras.KerasTensor, other: keras.KerasTensor) -> keras.KerasTensor:
    known = ops.logical_and(one >= 0, other >= 0)
    return ops.cast(ops.logical_and(known, ops.not_equal(one, other)), "int32")
