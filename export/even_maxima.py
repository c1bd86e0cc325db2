"""Even channels for maps whose maxima an unpooling goes by: in 8 bits, fewer of them are equal."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
from keras import layers

from kseg.unpooling_forms import REACH
from kseg.upsampling import PoolingIndices, Unpooling

from .calibrate import Samples
from .post_training import maps_of, readers, rescale, source_of_channels


def even_maxima(model: keras.Model, samples: Samples) -> keras.Model:
    """Return an equal model where channels of maps before `PoolingIndices` reach `REACH`.

    All channels of a map have one step in an int8 file. A channel that is small beside another
    is left with few of the 256 values, and its maxima are equal where they were not. Dividing a
    channel moves no maximum; the kernels that read the maxima make it good.

    Args:
        model: a functional model; it is not changed.
        samples: images (1, H, W, 3).

    Returns:
        A model of the same logits up to rounding; `model` itself if it never unpools.
    """
    indices = [layer.name for layer in model.layers if isinstance(layer, PoolingIndices)]
    if not indices:
        return model
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    found = [_around(copy, copy.get_layer(name)) for name in indices]
    found = [one for one in found if one is not None]
    largest = [np.zeros(pooled.output.shape[-1]) for _, pooled, _ in found]
    for maps in maps_of(copy, [pooled.name for _, pooled, _ in found], samples):
        for most, values in zip(largest, maps, strict=True):
            np.maximum(most, values.max(axis=(0, 1, 2)), out=most)
    for (source, _, kernels), most in zip(found, largest, strict=True):
        rescale(source, kernels, np.where(most > 0, most, REACH) / REACH)
    return copy


def _around(
    model: keras.Model, indices: PoolingIndices
) -> tuple[keras.Layer, keras.Layer, list[keras.Layer]] | None:
    """Return what makes the channels of a map, its pooling, and the convolutions that read it.

    None where something else reads the map or the maxima, which a scale would change.
    """
    mapped, pooled = (tensor._keras_history.operation for tensor in indices.input)
    if any(reader not in (indices, pooled) for reader in readers(model, mapped)):
        return None
    source, kernels = source_of_channels(model, mapped), list(_reading(model, pooled))
    if source is None or not all(type(one) is layers.Conv2D and one.groups == 1 for one in kernels):
        return None
    return source, pooled, kernels


def _reading(model: keras.Model, layer: keras.Layer) -> Iterator[keras.Layer]:
    """Give what computes with the values of a layer, also once they are unpooled."""
    for reader in readers(model, layer):
        if isinstance(reader, Unpooling):
            yield from _reading(model, reader)
        elif not isinstance(reader, PoolingIndices):
            yield reader
