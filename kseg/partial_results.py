"""What a layer that is several operators of an int8 file computes on its way, rounded.

The converter takes an operator for int8 only where a rounded map goes in and out. So all but the
last of the operators become layers of their own, each with its rounding.
"""

from __future__ import annotations

import keras
from keras import layers, ops

from kseg.fake_quantization import FakeQuantize, QuantizedConv2D
from kseg.models.pidnet import Similarity


def last_operator(layer: keras.Layer) -> keras.Layer | None:
    """Return the layer that stands for the last operator of a layer of a plain model.

    None where that is a layer of the same kind.
    """
    if isinstance(layer, Similarity):
        return layers.Activation("sigmoid", name=layer.name)
    return None


def partial_results(layer: keras.Layer) -> dict[str, keras.KerasTensor]:
    """Return what a layer of a plain model computes ahead of its last operator.

    Returns:
        Maps of the plain model, by name; `{name}_quantize` rounds each in a copy.
    """
    if isinstance(layer, Similarity):
        product = ops.multiply(*layer.input)
        total = ops.sum(product, axis=-1, keepdims=True)
        return {f"{layer.name}_product": product, f"{layer.name}_sum": total}
    if _adds_many(layer):
        first, *others = layer.input
        found = {}
        for number, other in enumerate(others[:-1], start=2):
            first = ops.add(first, other)
            found[f"{layer.name}_first{number}"] = first
        return found
    return {}


def ahead_of_last(
    layer: keras.Layer, inputs: list[keras.KerasTensor]
) -> keras.KerasTensor | list[keras.KerasTensor]:
    """Compute in a copy what a layer of the plain model does ahead of its last operator.

    Args:
        layer: of the plain model.
        inputs: what stands for its inputs in the copy.

    Returns:
        What the last operator takes; `inputs` where there is only one operator.
    """
    if isinstance(layer, Similarity):
        product, total = partial_results(layer)
        y = _rounded(layers.Multiply(name=f"{product}_multiply")(inputs), product)
        # Exact in int8; LiteRT's own operator of sums has no fast kernel there.
        ones = QuantizedConv2D(
            filters=1,
            kernel_size=1,
            use_bias=False,
            kernel_initializer="ones",
            trainable=False,
            name=f"{total}_conv",
        )
        return _rounded(ones(y), total)
    if _adds_many(layer):
        first, *others = inputs
        for name, other in zip(partial_results(layer), others[:-1], strict=True):
            first = _rounded(layers.Add(name=f"{name}_add")([first, other]), name)
        return [first, others[-1]]
    return inputs


def _adds_many(layer: keras.Layer) -> bool:
    return type(layer) is layers.Add and len(layer.input) > 2


def _rounded(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return FakeQuantize(name=f"{name}_quantize")(x)
