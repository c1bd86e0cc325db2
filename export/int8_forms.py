"""Other forms of operations that LiteRT computes slowly, or not at all, in int8."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kseg.fake_quantization import SIXTH
from kseg.unpooling_forms import Choices, MaximaFound, SharedUnpooling
from kseg.upsampling import PoolingIndices

from .calibrate import Samples
from .even_maxima import even_maxima
from .post_training import readers


class ProductHardSwish(layers.Layer):
    """x relu6(x + 3) / 6 as a sum and two products, each of which XNNPACK runs in int8.

    Source: A. Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, section 5.2.
    """

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return a map of the shape of `x`."""
        return x * ops.relu6(x + 3.0) * SIXTH


def with_int8_forms(model: keras.Model, samples: Samples) -> keras.Model:
    """Return a model that computes the same from operators with fast int8 kernels.

    The image's normalisation becomes a 1 x 1 kernel. Where a model unpools, maps whose maxima it
    goes by get channels of even size first, and maxima that are equal share a value; see
    `SharedUnpooling`.

    Args:
        model: a functional model; it is not changed.
        samples: representative images (1, H, W, 3).

    Returns:
        The model itself where nothing is to be replaced.
    """
    return _with_normalising_kernel(_with_other_layers(model, samples))


def _with_other_layers(model: keras.Model, samples: Samples) -> keras.Model:
    """Return the model with other layers for unpooling and hard-swish; itself if it has neither."""
    unpools = any(isinstance(layer, PoolingIndices) for layer in model.layers)
    if not unpools and not any(_is_hard_swish(layer) for layer in model.layers):
        return model
    if unpools:
        model = even_maxima(model, samples)
    choices = Choices(SharedUnpooling)

    def clone(layer: keras.Layer) -> keras.Layer:
        return choices.clone(layer) or _clone(layer)

    def call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        chosen = isinstance(layer, (MaximaFound, SharedUnpooling))
        return choices.call(layer, *args) if chosen else layer(*args, **kwargs)

    copy = keras.models.clone_model(model, clone_function=clone, call_function=call)
    copy.set_weights(model.get_weights())
    return copy


def _with_normalising_kernel(model: keras.Model) -> keras.Model:
    """Return the model with a 1 x 1 kernel in place of the image's normalisation.

    The product and the sum of `Rescaling` are an operator each, and the product's step is as wide
    as the range of both. A kernel rounds once, to steps of the result alone.
    """
    (image,) = model.inputs
    (reader, *others) = readers(model, image._keras_history.operation)
    if others or not isinstance(reader, layers.Rescaling):
        return model
    channels = reader.output.shape[-1]
    scale, offset = (
        np.broadcast_to(np.asarray(value, "float32"), channels)
        for value in (reader.scale, reader.offset)
    )
    kernel = layers.Conv2D(channels, 1, name=reader.name)
    # The other layers are those of the model: of custom functions there need be no config.
    copy = keras.models.clone_model(
        model, clone_function=lambda layer: kernel if layer is reader else layer
    )
    kernel.set_weights([np.diag(scale)[None, None], offset])
    return copy


def _clone(layer: keras.Layer) -> keras.Layer:
    config: dict[str, Any] = layer.get_config()
    if _is_hard_swish(layer):
        return ProductHardSwish(name=layer.name, dtype=config["dtype"])
    return type(layer).from_config(config)


def _is_hard_swish(layer: keras.Layer) -> bool:
    if not isinstance(layer, layers.Activation):
        return False
    return layer.get_config()["activation"] in ("hard_silu", "hard_swish")
