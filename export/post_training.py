"""Post-training quantisation by kseg: ranges without outliers, even channels, unbiased layers.

LiteRT's converter takes the extremes of the calibration images as ranges. Where that loses too
much, these steps act on the fake-quantised copy of a model (`kseg.quantization`), from which the
converter then writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kseg.fake_quantization import FakeQuantize
from kseg.partial_results import partial_results

from .calibrate import Samples

CHOSEN = 50_000  # values of one map of one image that a percentile is taken from
# What scales its result as its input is scaled, for every factor above 0.
_HOMOGENEOUS = (
    layers.MaxPooling2D,
    layers.AveragePooling2D,
    layers.UpSampling2D,
    layers.ZeroPadding2D,
    layers.Dropout,
    layers.SpatialDropout2D,
)


def set_ranges(
    copy: keras.Model, model: keras.Model, samples: Samples, *, percentile: float
) -> None:
    """Give a fake-quantised copy the ranges of the float model's maps.

    Args:
        copy: what `quantization_aware` made of `model`; its ranges are changed.
        model: the float model.
        samples: images (1, H, W, 3).
        percentile: share of the values of an image within its range, per cent; the range is the
            mean over the images. 100 takes the extremes of all images.
    """
    quantizers = {
        layer.name.removesuffix("_quantize"): layer
        for layer in copy.layers
        if isinstance(layer, FakeQuantize) and layer.fixed is None
    }
    maps = {layer.name: layer.output for layer in model.layers if layer.name in quantizers}
    for layer in model.layers:
        maps |= partial_results(layer)
    found = [
        [_range(one, percentile) for one in values]
        for values in _values(model, maps.values(), samples)
    ]
    for name, seen in zip(maps, np.moveaxis(np.array(found), 0, 1), strict=True):
        low, high = (seen.min(0)[0], seen.max(0)[1]) if percentile == 100 else seen.mean(0)
        quantizers[name].low.assign(min(low, 0.0))
        quantizers[name].high.assign(max(high, low + 1e-6, 1e-6))
        quantizers[name].seen.assign(float(len(seen)))


def _range(values: np.ndarray, percentile: float) -> tuple[float, float]:
    if percentile == 100:
        return float(values.min()), float(values.max())
    some = values.ravel()[:: max(values.size // CHOSEN, 1)]
    low, high = np.percentile(some, [100 - percentile, percentile])
    return float(low), float(high)


def correct_biases(copy: keras.Model, model: keras.Model, samples: Samples) -> None:
    """Take from each convolution's bias the mean error that the rounding of its kernel makes.

    Args:
        copy: what `quantization_aware` made of `model`; its biases are changed.
        model: the float model.
        samples: images (1, H, W, 3).

    Source:
        M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
        arXiv:1906.04721, section 4.2, with means measured on images as in its appendix D.
    """
    pairs = [(new, _behind(model, new.name)) for new in copy.layers if _has_bias(new)]
    names = [name for new, after in pairs for name in (_before(model, new.name), after)]
    errors: list[list[np.ndarray]] = [[] for _ in pairs]
    for maps in maps_of(model, names, samples):
        for index, (new, _) in enumerate(pairs):
            rounded = np.asarray(new(maps[2 * index]))
            errors[index].append((rounded - maps[2 * index + 1]).mean(axis=(0, 1, 2)))
    for (new, _), error in zip(pairs, errors, strict=True):
        bias = new.beta if new.epsilon is not None else new.bias
        bias.assign_sub(np.mean(error, axis=0))


def equalised(model: keras.Model, samples: Samples) -> keras.Model:
    """Return an equal model whose maps have channels of more even ranges.

    Between two convolutions with nothing but ReLU between them, channel c is divided by
    sqrt(largest activation / largest weight that reads it), which the second kernel makes good.

    Args:
        model: the float model; it is not changed.
        samples: images (1, H, W, 3).

    Returns:
        A model of the same logits up to rounding.

    Source:
        M. Nagel et al., arXiv:1906.04721, section 4.1, with the ranges of the activations in
        place of the first kernel's, as in G. Xiao et al., arXiv:2211.10438, equation 4.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    pairs = list(_pairs(copy))
    if not pairs:
        return copy
    largest = [np.zeros(_channels(second)) for _, second in pairs]
    for maps in maps_of(copy, [_before(copy, second.name) for _, second in pairs], samples):
        for most, values in zip(largest, maps, strict=True):
            np.maximum(most, np.abs(values).max(axis=(0, 1, 2)), out=most)
    for (first, second), most in zip(pairs, largest, strict=True):
        _rescale(first, second, most)
    return copy


def _pairs(model: keras.Model) -> Iterator[tuple[keras.Layer, keras.Layer]]:
    """Give what makes a map's channels (a convolution or its normalisation), and what reads it."""
    for second in model.layers:
        if type(second) not in (layers.Conv2D, layers.DepthwiseConv2D):
            continue
        if getattr(second, "groups", 1) != 1:
            continue
        before = _sole_source(model, second)
        before = None if before is None else source_of_channels(model, before)
        if before is not None:
            yield before, second


def source_of_channels(model: keras.Model, layer: keras.Layer) -> keras.Layer | None:
    """Return what a map's channels can be scaled in: `layer`, or what only it reads.

    Between the two nothing but ReLU and what else scales its result as its input is scaled.
    """
    found: keras.Layer | None = layer
    while found is not None and _is_homogeneous(found):
        found = _sole_source(model, found)
    return found if found is not None and _sets_channels(found) else None


def _rescale(first: keras.Layer, second: keras.Layer, largest: np.ndarray) -> None:
    kernel = second.kernel.numpy()
    reads = np.abs(kernel).max(axis=(0, 1, 3))
    usable = (largest > 0) & (reads > 0)
    rescale(first, [second], np.sqrt(np.where(usable, largest, 1) / np.where(usable, reads, 1)))


def rescale(first: keras.Layer, seconds: Sequence[keras.Layer], scale: np.ndarray) -> None:
    """Divide the channels that a layer makes by `scale`, and multiply the kernels that read them.

    Args:
        first: a normalisation or convolution; changed in place.
        seconds: the convolutions that read its channels; changed in place.
        scale: one value a channel, above 0.
    """
    for name in ("gamma", "beta") if _is_norm(first) else ("kernel", "bias"):
        variable = getattr(first, name, None)
        if variable is None:
            continue
        by = (
            scale[:, None]
            if isinstance(first, layers.DepthwiseConv2D) and name == "kernel"
            else scale
        )
        variable.assign(variable.numpy() / by)
    for second in seconds:
        second.kernel.assign(second.kernel.numpy() * scale[:, None])


def _sole_source(model: keras.Model, layer: keras.Layer) -> keras.Layer | None:
    """Return the layer before, where there is one and nothing else reads it."""
    if isinstance(layer.input, list):
        return None
    before = layer.input._keras_history.operation
    return before if len(readers(model, before)) == 1 else None


def readers(model: keras.Model, layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers of a model that take the result of one."""
    nodes = {id(node) for depth in model._nodes_by_depth.values() for node in depth}
    return [node.operation for node in layer._outbound_nodes if id(node) in nodes]


def _is_homogeneous(layer: keras.Layer) -> bool:
    if isinstance(layer, layers.ReLU):
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    if isinstance(layer, layers.Activation):
        return layer.get_config()["activation"] in ("relu", "linear")
    return isinstance(layer, _HOMOGENEOUS)


def _is_norm(layer: keras.Layer) -> bool:
    return type(layer) is layers.BatchNormalization and layer.scale and layer.center


def _sets_channels(layer: keras.Layer) -> bool:
    if _is_norm(layer):
        return True
    plain = type(layer) in (layers.Conv2D, layers.DepthwiseConv2D)
    return plain and layer.get_config()["activation"] in ("linear", "relu")


def _channels(layer: keras.Layer) -> int:
    return layer.input.shape[-1]


def _has_bias(layer: keras.Layer) -> bool:
    """Whether a layer of a fake-quantised copy is a convolution that ends without activation."""
    if not hasattr(layer, "epsilon") or not hasattr(layer, "folded"):
        return False
    return layer.activation is keras.activations.linear and (
        layer.epsilon is not None or layer.use_bias
    )


def _before(model: keras.Model, name: str) -> str:
    """Return the layer whose result a layer reads."""
    return model.get_layer(name).input._keras_history.operation.name


def _behind(model: keras.Model, name: str) -> str:
    """Return the normalisation behind a convolution, else the convolution itself."""
    behind = readers(model, model.get_layer(name))
    norm = len(behind) == 1 and type(behind[0]) is layers.BatchNormalization
    return behind[0].name if norm else name


def maps_of(
    model: keras.Model, names: Sequence[str], samples: Samples
) -> Iterator[list[np.ndarray]]:
    """Give the results of some layers, one list an image."""
    return _values(model, [model.get_layer(name).output for name in names], samples)


def _values(
    model: keras.Model, tensors: Iterable[keras.KerasTensor], samples: Samples
) -> Iterator[list[np.ndarray]]:
    """Give the values of some tensors of a model, one list an image."""
    probe = keras.Model(model.input, list(tensors))

    @tf.function
    def graph(image: tf.Tensor) -> list[tf.Tensor]:
        return probe(image, training=False)

    for image in samples():
        yield [one.numpy() for one in graph(tf.constant(image, tf.float32))]
