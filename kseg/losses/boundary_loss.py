"""Losses of a boundary head: where classes meet, and what the classifier makes of these places."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from kseg.losses.cross_entropy import CrossEntropy


@keras.saving.register_keras_serializable(package="kseg")
class BoundaryLoss(keras.losses.Loss):
    """Binary cross entropy between the edges of a mask and a boundary logit for each pixel.

    With z the logit and y 1 on a boundary, a pixel costs `w * (log(1 + exp(z)) - y * z)`, where w
    is the share of the other kind among the valid pixels of its image: boundaries are few, and so
    weigh as much in all as the rest. An image of one class, without any boundary, costs nothing.
    It judges a training-only output, so it is not among the losses of a run.

    A boundary are the `width / 2` pixels on either side of a place where two classes meet. What
    lies behind an ignored pixel is not known, so none begins there.

    Args:
        width: pixels across a boundary, an even number.
        ignore_label: id of the pixels that have no class; they cost nothing.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map.

    Source:
        Xu, Xiong, Bhattacharyya, "PIDNet: A Real-time Semantic Segmentation Network Inspired by
        PID Controllers", CVPR 2023, section 3, arXiv:2206.02066, and `utils/criterion.py` of
        github.com/XuJiacong/PIDNet; the balance is that of Xie, Tu, "Holistically-Nested Edge
        Detection", ICCV 2015, arXiv:1504.06375.

    Differs:
        The authors find edges with a Canny filter in the mask's file, before it is scaled and
        cropped, and dilate them by a 4x4 window, which gives the same two pixels on each side;
        they leave out six pixels along the image's border, count the rims of ignored regions as
        boundaries and balance over a batch, not an image.

    Example:
        Where the class changes in the middle, 4 of 8 pixels are boundary, so both kinds weigh
        1/2, and at the logit 0 each pixel costs |ln 0.5| / 2.

        >>> BoundaryLoss()(np.array([[[0, 0, 0, 0, 1, 1, 1, 1]]]), np.zeros((1, 1, 8, 1)))
        [[[0.346574, 0.346574, 0.346574, 0.346574, 0.346574, 0.346574, 0.346574, 0.346574]]]
    """

    def __init__(
        self,
        width: int = 4,
        ignore_label: int = 255,
        name: str = "boundary",
        reduction: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.width = width
        self.ignore_label = ignore_label

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every pixel.

        Args:
            y_true: mask (B, H, W) of class ids.
            y_pred: boundary logits (B, H, W, 1) of any float type; the work is done in float32.

        Returns:
            (B, H, W) float32, 0 where ignored.
        """
        mask = ops.cast(y_true, "int32")
        logits = ops.cast(ops.squeeze(y_pred, -1), "float32")
        valid = ops.cast(ops.not_equal(mask, self.ignore_label), "float32")
        boundary = boundaries(mask, width=self.width, ignore_label=self.ignore_label)
        pixels = ops.maximum(ops.sum(valid, axis=(1, 2), keepdims=True), 1.0)
        share = ops.sum(boundary * valid, axis=(1, 2), keepdims=True) / pixels
        weight = boundary * (1.0 - share) + (1.0 - boundary) * share
        loss = ops.softplus(logits) - boundary * logits
        return ops.where(valid > 0, weight * loss, 0.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {
            **super().get_config(),
            "width": self.width,
            "ignore_label": self.ignore_label,
        }


@keras.saving.register_keras_serializable(package="kseg")
class BoundaryAwareLoss(keras.losses.Loss):
    """Cross entropy of the pixels alone that a boundary head is sure of.

    An image costs the mean cross entropy of its valid pixels whose boundary logit stands for a
    probability above the threshold, and nothing where there are none. The boundary head learns
    nothing from it.

    Args:
        threshold: probability above which a pixel is taken for boundary, between 0 and 1.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        Xu, Xiong, Bhattacharyya, "PIDNet: A Real-time Semantic Segmentation Network Inspired by
        PID Controllers", CVPR 2023, section 3, arXiv:2206.02066, and `utils/utils.py` of
        github.com/XuJiacong/PIDNet (threshold).

    Differs:
        The authors average over the hard pixels (OHEM) of a batch, here all of an image count.

    Example:
        Both logits 0, so each pixel costs |ln 0.5|. The first is boundary with a probability of
        exp(3) / (1 + exp(3)) = 0.95, the second of one half; only the first counts.

        >>> BoundaryAwareLoss()(np.array([[[0, 1]]]), np.array([[[[0, 0, 3], [0, 0, 0]]]]))
        [0.693147]
    """

    def __init__(
        self,
        threshold: float = 0.8,
        ignore_label: int = 255,
        name: str = "boundary_aware",
        reduction: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.threshold = threshold
        self.ignore_label = ignore_label

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every image.

        Args:
            y_true: mask (B, H, W) of class ids; every id but `ignore_label` is below C.
            y_pred: (B, H, W, C + 1) of any float type: the logits, and behind them the boundary
                logit; the work is done in float32.

        Returns:
            (B,) float32.
        """
        mask = ops.cast(y_true, "int32")
        loss = CrossEntropy(ignore_label=self.ignore_label).call(mask, y_pred[..., :-1])
        edge = ops.cast(y_pred[..., -1], "float32")
        sure = edge > math.log(self.threshold / (1.0 - self.threshold))
        chosen = ops.logical_and(sure, ops.not_equal(mask, self.ignore_label))
        total = ops.sum(ops.where(chosen, loss, 0.0), axis=(1, 2))
        return total / ops.maximum(ops.sum(ops.cast(chosen, "float32"), axis=(1, 2)), 1.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {
            **super().get_config(),
            "threshold": self.threshold,
            "ignore_label": self.ignore_label,
        }


def boundaries(
    mask: keras.KerasTensor, *, width: int = 4, ignore_label: int = 255
) -> keras.KerasTensor:
    """Return where two classes are near.

    Args:
        mask: (B, H, W) class ids.
        width: pixels across a boundary, an even number: half of them on either side.
        ignore_label: id of the pixels that have no class.

    Returns:
        (B, H, W) float32 of 0 and 1.
    """
    valid = ops.not_equal(mask, ignore_label)
    # The later pixel of a pair is marked: the window of an even side, which reaches one pixel
    # further ahead than back, then covers as many before the change as behind it.
    right = _differs(mask[:, :, 1:], mask[:, :, :-1], valid[:, :, 1:], valid[:, :, :-1])
    below = _differs(mask[:, 1:], mask[:, :-1], valid[:, 1:], valid[:, :-1])
    edge = ops.maximum(
        ops.pad(right, ((0, 0), (0, 0), (1, 0))), ops.pad(below, ((0, 0), (1, 0), (0, 0)))
    )
    edge = ops.max_pool(edge[..., None], width, 1, padding="same", data_format="channels_last")
    return edge[..., 0]


def _differs(
    one: keras.KerasTensor,
    other: keras.KerasTensor,
    one_valid: keras.KerasTensor,
    other_valid: keras.KerasTensor,
) -> keras.KerasTensor:
    known = ops.logical_and(one_valid, other_valid)
    return ops.cast(ops.logical_and(known, ops.not_equal(one, other)), "float32")
