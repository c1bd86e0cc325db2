"""How far every pixel is from a region, exactly, up to a radius; computed inside the step."""

from __future__ import annotations

import keras
from keras import ops


def distance_map(region: keras.KerasTensor, radius: int) -> keras.KerasTensor:
    """Return the Euclidean distance of every pixel to the nearest pixel of a region.

    Exact up to the radius; what lies further off has the radius as its distance, and so has
    everything where the region is empty.

    First the distance along the column is found, by doubling steps, then the least of
    `dy^2 + dx^2` over the columns within the radius: 2 log2(radius) + 2 radius shifts of the map,
    which XLA fuses.

    Args:
        region: (B, H, W, C) bool; channels are apart from one another.
        radius: in pixels, at least 1.

    Returns:
        (B, H, W, C) float32, from 0 in the region to `radius`.

    Source:
        P. Felzenszwalb, D. Huttenlocher, "Distance Transforms of Sampled Functions", Theory of
        Computing 8, 2012, section 2 (the two passes, here over a window and not by envelopes).
    """
    far = float(radius + 1)
    along = ops.where(region, 0.0, far)
    step = 1
    while step <= radius:
        around = ops.minimum(_shifted(along, step, far), _shifted(along, -step, far))
        along = ops.minimum(along, around + step)
        step *= 2
    width = region.shape[2]
    squared = ops.square(along)
    padding = ((0, 0), (0, 0), (radius, radius), (0, 0))
    padded = ops.pad(squared, padding, constant_values=far * far)
    for offset in range(-radius, radius + 1):
        first = radius + offset
        squared = ops.minimum(squared, padded[:, :, first : first + width] + float(offset**2))
    return ops.sqrt(ops.minimum(squared, float(radius**2)))


def signed_distance_maps(
    mask: keras.KerasTensor, num_classes: int, *, radius: int, ignore_label: int = 255
) -> keras.KerasTensor:
    """Return how far outside the region of each class every pixel lies, negative inside.

    Outside it is the distance to the nearest pixel of the class, inside one less the distance to
    the nearest pixel of another class, so 0 on the last pixel inside and 1 on the first outside.
    Both are exact up to the radius and cut there. Ignored pixels belong to no class, so neither
    distance leads to one. Where an image does not hold a class, or nothing else, the class has no
    boundary and the map is 0.

    Args:
        mask: (B, H, W) int32 class ids.
        num_classes: how many classes there are.
        radius: in pixels, at least 1.
        ignore_label: id of the pixels that have no class.

    Returns:
        (B, H, W, C) float32.
    """
    valid = ops.not_equal(mask, ignore_label)
    label = ops.where(valid, mask, -1)[..., None]
    region = ops.equal(label, ops.arange(num_classes, dtype="int32"))
    to_class = distance_map(region, radius)
    # For a pixel of a class the nearest pixel of another class: no second transform is needed.
    to_others = ops.min(ops.where(region, float(radius), to_class), axis=-1, keepdims=True)
    signed = ops.where(region, 1.0 - to_others, to_class)
    present = ops.any(region, axis=(1, 2), keepdims=True)
    several = ops.sum(ops.cast(present, "int32"), axis=-1, keepdims=True) > 1
    return ops.where(ops.logical_and(present, several), signed, 0.0)


def _shifted(array: keras.KerasTensor, step: int, fill: float) -> keras.KerasTensor:
    """Return the array moved down by `step` rows, or up by `-step`."""
    height = array.shape[1]
    if abs(step) >= height:
        return ops.full_like(array, fill)
    before, after = max(step, 0), max(-step, 0)
    kept = array[:, after : height - before]
    return ops.pad(kept, ((0, 0), (before, after), (0, 0), (0, 0)), constant_values=fill)
