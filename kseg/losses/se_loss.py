"""SE-loss: which classes are in the image at all, a question that asks for the whole scene."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="kseg")
class SELoss(keras.losses.Loss):
    """Binary cross entropy between the classes of a mask and a presence logit for each class.

    With z_c the logit and y_c 1 where some pixel of the mask has the class c, an image costs the
    mean over c of `log(1 + exp(z_c)) - y_c * z_c`. A small thing counts as much as a large one.
    An image without any valid pixel costs nothing, because its classes are not known. It judges
    a training-only output and no pixels, so it is not among the losses of a run.

    Args:
        ignore_label: id of the pixels that have no class; they make none present.
        name: name of the loss in logs.
        reduction: as in Keras; None gives a value an image.

    Source:
        Zhang, Dana, Shi, Zhang, Wang, Tyagi, Agrawal, "Context Encoding for Semantic
        Segmentation", CVPR 2018, section 3.1, arXiv:1803.08904.

    Example:
        Both classes at the logit 0 have the probability 1/2, so each costs |ln 0.5|, whether it
        is there or not.

        >>> SELoss()(np.array([[[1, 255], [1, 1]]]), np.zeros((1, 1, 1, 2)))
        [0.693147]
    """

    def __init__(
        self, ignore_label: int = 255, name: str = "se", reduction: str | None = None
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.ignore_label = ignore_label

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return the loss of every image.

        Args:
            y_true: mask (B, H, W) of class ids; every id but `ignore_label` is below C.
            y_pred: presence logits (B, 1, 1, C) of any float type; the work is done in float32.

        Returns:
            (B,) float32, 0 where every pixel is ignored.
        """
        mask = ops.cast(y_true, "int32")
        logits = ops.cast(ops.squeeze(y_pred, (1, 2)), "float32")
        valid = ops.not_equal(mask, self.ignore_label)
        label = ops.where(valid, mask, -1)
        seen = ops.equal(label[..., None], ops.arange(logits.shape[-1], dtype="int32"))
        present = ops.cast(ops.any(seen, axis=(1, 2)), "float32")
        loss = ops.mean(ops.binary_crossentropy(present, logits, from_logits=True), axis=-1)
        return ops.where(ops.any(valid, axis=(1, 2)), loss, 0.0)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        return {**super().get_config(), "ignore_label": self.ignore_label}
