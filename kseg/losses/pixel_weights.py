"""The class weight of every pixel, for losses that weigh pixels by something else as well."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import ops


def pixel_weights(
    mask: keras.KerasTensor,
    class_weights: Sequence[float] | None,
    num_classes: int,
    ignore_label: int = 255,
) -> keras.KerasTensor:
    """Return the class weight of every valid pixel.

    Args:
        mask: (B, H, W) class ids; every id but `ignore_label` is below `num_classes`.
        class_weights: one factor a class, or None for 1 everywhere.
        num_classes: how many classes the logits have.
        ignore_label: id of the pixels that have no class.

    Returns:
        (B, H, W) float32, 0 where ignored.

    Raises:
        ValueError: if there are not as many weights as classes.
    """
    mask = ops.cast(mask, "int32")
    valid = ops.not_equal(mask, ignore_label)
    if class_weights is None:
        return ops.cast(valid, "float32")
    if len(class_weights) != num_classes:
        raise ValueError(
            f"class_weights has {len(class_weights)} factors and the logits {num_classes} classes; "
            "one factor a class is wanted"
        )
    factors = ops.convert_to_tensor(class_weights, "float32")
    return ops.where(valid, ops.take(factors, ops.where(valid, mask, 0)), 0.0)
