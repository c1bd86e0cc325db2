"""Online hard example mining: cross entropy of the pixels that are not right yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.losses.cross_entropy import CrossEntropy
from kseg.losses.parts import Part
from kseg.losses.pixel_weights import pixel_weights
from kseg.registry import LOSSES


@LOSSES.register("ohem")
@keras.saving.register_keras_serializable(package="kseg")
class OHEM(CrossEntropy):
    """Cross entropy of the hard pixels alone, those below a probability or the hardest share.

    A pixel is kept where the probability of its class is below `threshold`, or where it is among
    the hardest `share` of the valid pixels of its image (rounded, at least one; pixels equal to the
    last of these are all kept). The loss is the sum of `w[y] * -ln(p[y])` over the kept pixels of
    the global batch, divided by how many they are. With `threshold=0` the hardest share alone is
    kept: bootstrapping, or top-k. Class weights do not change what is kept. An ignored pixel is
    never kept; a class without a pixel adds nothing.

    Args:
        threshold: probability of the true class below which a pixel is hard, from 0 to 1.
        share: least share of the valid pixels of an image that is kept, from 0 to 1.
        class_weights: one factor a class, or None for 1 everywhere.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map, 0 where not kept.

    Source:
        Z. Wu, C. Shen, A. van den Hengel, "High-performance Semantic Segmentation Using Very Deep
        Fully Convolutional Networks", section 3.3, arXiv:1604.04339 (threshold); T. Pohlen et al.,
        "Full-Resolution Residual Networks", CVPR 2017, section 4.2, arXiv:1611.08323 (top-k).

    Differs:
        The least number kept is a share, and of each image, not a number of pixels of the batch:
        it then means the same at every size and on any number of devices.

    Example:
        Probabilities of the true class 0.5, 0.6, 0.9 and 0.95. Below 0.7 are two: the loss is
        (0.693147 + 0.510826) / 2. The hardest share of 3/4 keeps the third as well, of 0.105361.

        >>> p = np.array([[[[0.5, 0.5], [0.6, 0.4], [0.9, 0.1], [0.95, 0.05]]]])
        >>> OHEM()(np.zeros((1, 1, 4)), np.log(p))
        [[[0.693147, 0.510826, 0., 0.]]]
        >>> OHEM(threshold=0.0, share=0.75)(np.zeros((1, 1, 4)), np.log(p))
        [[[0.693147, 0.510826, 0.105361, 0.]]]
    """

    def __init__(
        self,
        threshold: float = 0.7,
        share: float = 0.1,
        class_weights: Sequence[float] | None = None,
        ignore_label: int = 255,
        name: str = "ohem",
        reduction: str | None = None,
    ) -> None:
        super().__init__(class_weights, ignore_label, name, reduction)
        for option, value in (("threshold", threshold), ("share", share)):
            if not 0 <= value <= 1:
                raise ValueError(f"{option} is {value}; it must lie in 0..1")
        if threshold == share == 0:
            raise ValueError("threshold and share are both 0, so that no pixel would be kept")
        self.threshold = threshold
        self.share = share

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every pixel, 0 where not kept; arguments as of `CrossEntropy.call`."""
        return self.parts(y_true, y_pred)[0].values

    def parts(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> list[Part]:
        """Return the one term of this loss; see `kseg.losses.parts`."""
        loss = CrossEntropy(ignore_label=self.ignore_label).call(y_true, y_pred)
        kept = self._kept(ops.cast(y_true, "int32"), ops.stop_gradient(loss))
        weights = pixel_weights(y_true, self.class_weights, y_pred.shape[-1], self.ignore_label)
        return [Part(1.0, kept * weights * loss, ops.sum(kept))]

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "threshold": self.threshold, "share": self.share}

    def _kept(self, mask: keras.KerasTensor, loss: keras.KerasTensor) -> keras.KerasTensor:
        """Return 1 where a pixel is kept, (B, H, W) float32."""
        valid = ops.not_equal(mask, self.ignore_label)
        limit = -math.log(self.threshold) if self.threshold else math.inf
        hard = loss > limit
        if self.share:
            hard = ops.logical_or(hard, loss >= self._limit_of_share(valid, loss))
        return ops.cast(ops.logical_and(hard, valid), "float32")

    def _limit_of_share(
        self, valid: keras.KerasTensor, loss: keras.KerasTensor
    ) -> keras.KerasTensor:
        """Return the least loss among the hardest share of each image, (B, 1, 1)."""
        pixels = math.prod(loss.shape[1:])
        count = ops.round(self.share * ops.sum(ops.cast(valid, "float32"), axis=(1, 2)))
        last = ops.cast(ops.maximum(count, 1.0), "int32") - 1
        ranked = ops.reshape(ops.where(valid, loss, -1.0), (-1, pixels))
        # No image has more valid pixels than pixels, so that a fixed number is enough.
        hardest = ops.top_k(ranked, min(pixels, int(self.share * pixels) + 1))[0]
        return ops.take_along_axis(hardest, last[:, None], axis=1)[..., None]
