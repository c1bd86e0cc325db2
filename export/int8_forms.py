"""Other forms of operations that LiteRT computes slowly in int8."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from kseg.fake_quantization import SIXTH


class ProductHardSwish(layers.Layer):
    """x relu6(x + 3) / 6 as a sum and two products, each of which XNNPACK runs in int8.

    Source: A. Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, section 5.2.
    """

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return a map of the shape of `x`."""
        return x * ops.relu6(x + 3.0) * SIXTH


def with_int8_forms(model: keras.Model) -> keras.Model:
    """Return a model that computes the same from operators with fast int8 kernels.

    Args:
        model: a functional model; it is not changed.

    Returns:
        The model itself where nothing is to be replaced, else a copy with the same weights.
    """
    if not any(_is_hard_swish(layer) for layer in model.layers):
        return model
    copy = keras.models.clone_model(model, clone_function=_clone)
    copy.set_weights(model.get_weights())
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
