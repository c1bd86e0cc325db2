"""A quantisation-aware model, computed in whole numbers as LiteRT computes its int8 file.

A sum that lies half-way between two steps is rounded up by one kernel and to the even step by
another, and what a float leaves out decides where a whole number would not. One step more or less
in one map makes a hundred others in the next, so that after twenty layers one value in twenty
differs. Nothing is left out here: the maps are whole numbers, and each operator rounds as its
kernel does.

Source: the int8 kernels of XNNPACK (`qs8-gemm`, `qs8-vcvt`, `s8-ibilinear`, `qs8-vmul`), and those
of TensorFlow Lite where XNNPACK has none (`AveragePool`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kseg.fake_quantization import (
    FakeQuantize,
    Folded,
    QuantizedConv2DTranspose,
    QuantizedProduct,
)
from kseg.models.ppliteseg import ChannelStatistics
from kseg.quantization import MOVING
from kseg.unpooling_forms import Corners
from kseg.upsampling import BilinearResize

LOWEST, HIGHEST = -128.0, 127.0
# Between the mean of whole numbers that is a tie, and the next: windows have fewer pixels.
_TIE = 2.0**-12
_FRACTION = 2**11  # parts that a bilinear kernel divides a pixel into


@dataclass(frozen=True)
class Range:
    """What the whole numbers of a map stand for: `step * (number - zero)`.

    Attributes:
        exact_step: float64 scalar, as the converter has it.
        zero: float32 scalar.
    """

    exact_step: tf.Tensor
    zero: tf.Tensor

    @staticmethod
    def of(quantizer: FakeQuantize) -> Range:
        """Return the range that a file takes from a layer."""
        low, high = (_double(tf.convert_to_tensor(end)) for end in (quantizer.low, quantizer.high))
        step = tf.maximum((high - low) / 255.0, 1e-30)
        zero = tf.clip_by_value(tf.math.rint(LOWEST - low / step), LOWEST, HIGHEST)
        return Range(step, _single(zero))

    @property
    def step(self) -> tf.Tensor:
        """The step that the file holds, float32."""
        return _single(self.exact_step)


@dataclass(frozen=True)
class Pending:
    """A result that is rounded only once the range behind it is known.

    Attributes:
        rounded: from that range to whole numbers, not yet within its ends.
        ends: smallest and largest value that an activation lets through.
        at_once: whether a file that needs it in another range has it rounded to that one alone.
    """

    rounded: Callable[[Range], tf.Tensor]
    ends: tuple[float, float] = (-np.inf, np.inf)
    at_once: bool = True


@dataclass(frozen=True)
class Whole:
    """A map as whole numbers, counted from zero.

    Attributes:
        numbers: (B, H, W, C) float32 without fractions; the value is `numbers * range.step`.
        range: what they stand for.
        source: what they were rounded from, if the file may round that to another range instead.
    """

    numbers: tf.Tensor
    range: Range
    source: Pending | tf.Tensor | None = None

    @property
    def value(self) -> tf.Tensor:
        """The map as the float model has it."""
        return self.numbers * self.range.step


def is_rounded(model: keras.Model) -> bool:
    """Whether a model is quantisation-aware."""
    return any(isinstance(layer, FakeQuantize) for layer in model.layers)


def integer_forward(model: keras.Model) -> Callable[[tf.Tensor], Any]:
    """Return what a quantisation-aware model computes, in whole numbers.

    Args:
        model: what `kseg.quantization.quantization_aware` made; the result follows its weights.

    Returns:
        From images (1, H, W, 3) float32, whole numbers 0..255, to outputs of the model's structure.
        An operator without a form of its own here computes in float and is rounded then.
    """
    nodes = [
        node
        for depth in sorted(model._nodes_by_depth)[::-1]
        for node in model._nodes_by_depth[depth]
    ]
    taken = [one for node in nodes for one in node.input_tensors]
    readers = Counter(map(id, (*taken, *keras.tree.flatten(model.output))))

    def forward(image: tf.Tensor) -> Any:  # noqa: ANN401
        found: dict[int, Any] = {id(model.inputs[0]): image}

        def known(one: Any) -> Any:  # noqa: ANN401
            return found[id(one)] if isinstance(one, keras.KerasTensor) else one

        for node in nodes:
            if not isinstance(node.operation, layers.InputLayer):
                args = keras.tree.map_structure(known, node.arguments.args)
                kwargs = keras.tree.map_structure(known, node.arguments.kwargs)
                results = keras.tree.flatten(_computed(node.operation, args, kwargs))
                for tensor, result in zip(node.outputs, results, strict=True):
                    alone = readers[id(tensor)] == 1
                    found[id(tensor)] = result if alone else _settled(result)
        return keras.tree.map_structure(lambda one: _value(found[id(one)]), model.output)

    return forward


def _settled(result: Any) -> Any:  # noqa: ANN401
    """Return a map that keeps the range it has, since several layers read it."""
    return replace(result, source=None) if isinstance(result, Whole) else result


def _computed(layer: keras.Layer, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    """Return what a layer makes of its arguments, each a tensor, a `Whole` or `Pending`."""
    first = args[0] if args else None
    if isinstance(layer, FakeQuantize):
        return _rounded(layer, first)
    if _passes(layer):
        return first
    if isinstance(first, Pending) and _ends(layer) is not None:
        return replace(first, ends=_ends(layer))
    if isinstance(first, Whole):
        if isinstance(layer, MOVING):
            return Whole(layer(first.numbers), first.range)
        if isinstance(layer, Folded) and layer.activation in _ENDS:
            return _convolved(layer, first)
        if isinstance(layer, QuantizedProduct):
            return _multiplied(layer, first)
        if isinstance(layer, Corners):
            return [Whole(one, first.range) for one in layer(first.numbers)]
        if isinstance(layer, layers.AveragePooling2D):
            return _pooled(layer, first)
        if is_bilinear(layer):
            return _resized(layer, first)
        if isinstance(layer, layers.GlobalAveragePooling2D):
            return Pending(lambda after: _mean(first, after, (1, 2), keepdims=layer.keepdims))
        if isinstance(layer, ChannelStatistics):
            return _statistics(first)
    if isinstance(first, list) and all(isinstance(one, Whole) for one in first):
        if isinstance(layer, layers.Concatenate):
            return Pending(
                lambda after: layer([_requantised(one, after) for one in first]), at_once=False
            )
        if type(layer) in _OF_TWO and len(first) == 2:
            return _OF_TWO[type(layer)](*first)
    args, kwargs = keras.tree.map_structure(_value, (args, kwargs))
    return layer(*args, **kwargs)


# The smallest and the largest value that an activation lets through.
_ENDS = {
    keras.activations.linear: (-np.inf, np.inf),
    keras.activations.relu: (0.0, np.inf),
    keras.activations.relu6: (0.0, 6.0),
}


def _passes(layer: keras.Layer) -> bool:
    linear = isinstance(layer, layers.Activation) and layer.activation is keras.activations.linear
    return linear or isinstance(layer, layers.Identity)


def _ends(layer: keras.Layer) -> tuple[float, float] | None:
    """Return between what a ReLU keeps its values; None of any other layer."""
    if isinstance(layer, layers.Activation):
        return _ENDS.get(layer.activation)
    if isinstance(layer, layers.ReLU) and not layer.negative_slope and not layer.threshold:
        return 0.0, np.inf if layer.max_value is None else float(layer.max_value)
    return None


def is_bilinear(layer: keras.Layer) -> bool:
    """Whether a layer resizes bilinearly with half-pixel centres."""
    return isinstance(layer, (layers.UpSampling2D, BilinearResize)) and (
        layer.interpolation == "bilinear"
    )


def _value(one: Any) -> Any:  # noqa: ANN401
    """Return a map in float; whatever is no map as it is."""
    if isinstance(one, Pending):
        raise TypeError("a convolution of a quantisation-aware model is followed by no range")
    return one.value if isinstance(one, Whole) else one


def _rounded(quantizer: FakeQuantize, found: Any) -> Whole:  # noqa: ANN401
    """Return a map as the whole numbers of a range."""
    after = Range.of(quantizer)
    if isinstance(found, Pending):
        return Whole(_within(found, after), after, found if found.at_once else None)
    if isinstance(found, Whole):  # by what moves or averages values, in the range that they had
        return Whole(_within(found.value, after), after)
    # LiteRT prescribes the ranges of some operators, so that these cannot have another one.
    return Whole(_within(found, after), after, found if quantizer.fixed is None else None)


def _within(found: Pending | tf.Tensor, after: Range) -> tf.Tensor:
    """Return the whole numbers of a range."""
    low, high = LOWEST - after.zero, HIGHEST - after.zero
    if not isinstance(found, Pending):
        return tf.clip_by_value(tf.math.rint(found / after.step), low, high)
    bottom, top = (tf.math.rint(end / after.step) for end in found.ends)
    return tf.clip_by_value(found.rounded(after), tf.maximum(low, bottom), tf.minimum(high, top))


def _convolved(layer: Folded, x: Whole) -> Pending:
    """Return a convolution: a sum without error, and one product with a float32 scale."""
    kernel, steps, bias = layer.whole_numbers(x.range.exact_step)
    total = tf.cast(layer.convolved(x.numbers, kernel), tf.int32)
    total = total if bias is None else total + tf.cast(bias, tf.int32)
    # Pixels are moved behind a transposed one, in the range that it has.
    at_once = not isinstance(layer, QuantizedConv2DTranspose)
    return Pending(_scaled(total, x.range.step, _single(steps)), _ENDS[layer.activation], at_once)


def _multiplied(layer: QuantizedProduct, x: Whole) -> Pending:
    """Return a product with a constant matrix, which the file has as a convolution."""
    kernel, steps = layer.whole_numbers(x.numbers)
    total = tf.cast(layer.convolved(x.numbers, kernel), tf.int32)
    return Pending(_scaled(total, x.range.step, _single(steps)))


def _product_of(a: Whole, b: Whole) -> Pending:
    total = tf.cast(a.numbers, tf.int32) * tf.cast(b.numbers, tf.int32)
    return Pending(_scaled(total, a.range.step, b.range.step))


def _sum_of(a: Whole, b: Whole, *, sign: float = 1.0) -> Pending:
    """Return a sum, or with the sign -1 a difference, in scales of 21 binary places; ties go up."""

    def rounded(after: Range) -> tf.Tensor:
        scales = [_quotient(one.range.step, after.step) for one in (a, b)]
        largest = tf.maximum(*scales)
        # The exponent of the larger scale; a logarithm may be wrong at a power of two.
        exponent = tf.bitwise.right_shift(tf.bitcast(largest, tf.int32), 23) - 127
        parts = tf.pow(tf.constant(2.0, tf.float64), _double(20 - exponent))
        factors = [tf.math.rint(_double(scale) * parts) for scale in scales]
        total = _double(a.numbers) * factors[0] + sign * _double(b.numbers) * factors[1]
        return _single(tf.floor(total / parts + 0.5))

    return Pending(rounded)


# How two maps become one.
_OF_TWO = {
    layers.Add: _sum_of,
    layers.Subtract: functools.partial(_sum_of, sign=-1.0),
    layers.Multiply: _product_of,
}


def _scaled(total: tf.Tensor, a: tf.Tensor, b: tf.Tensor) -> Callable[[Range], tf.Tensor]:
    """Return what rounds sums in steps of `a * b`, float32 both; ties go to the even number."""

    def rounded(after: Range) -> tf.Tensor:
        scale = _quotient(_single(_double(a) * _double(b)), after.step)
        return tf.math.rint(_single(total) * scale)

    return rounded


def _quotient(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return a float32 quotient, rounded here: TensorFlow may change the order of plain ones."""
    return _single(_double(a) / _double(b))


def _single(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)


def _double(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float64)


def _pooled(layer: layers.AveragePooling2D, x: Whole) -> Whole:
    """Return means, of which ties go away from the whole number 0 (not from the value 0)."""
    means = layer(x.numbers) + x.range.zero
    means = tf.sign(means) * tf.floor(tf.abs(means) + 0.5 + _TIE)
    return Whole(means - x.range.zero, x.range)


def _mean(
    x: Whole, after: Range, axes: int | tuple[int, ...], *, keepdims: bool = True
) -> tf.Tensor:
    """Return means in another range: a sum and one product; ties go to the even number."""
    total = tf.reduce_sum(tf.cast(x.numbers, tf.int32), axes, keepdims=keepdims)
    shares = tf.size(total, tf.int64) / tf.size(x.numbers, tf.int64)
    scale = _single(_double(_quotient(x.range.step, after.step)) * _double(_single(shares)))
    return tf.math.rint(_single(total) * scale)


def _statistics(x: Whole) -> Pending:
    """Return the mean and the maximum over the channels, side by side."""
    largest = Whole(tf.reduce_max(x.numbers, -1, keepdims=True), x.range)

    def rounded(after: Range) -> tf.Tensor:
        return tf.concat([_mean(x, after, -1), _requantised(largest, after)], -1)

    return Pending(rounded, at_once=False)


def _resized(layer: keras.Layer, x: Whole) -> Whole:
    """Return a map enlarged with weights of 11 bits; ties go up."""
    wanted = layer.compute_output_spec(keras.KerasTensor(x.numbers.shape)).shape
    sizes = zip(x.numbers.shape[1:3], wanted[1:3], strict=True)
    rows, columns = (tf.constant(_tents(old, new)) for old, new in sizes)
    sums = tf.einsum("gh,bhwc,kw->bgkc", rows, _double(x.numbers), columns)
    return Whole(_single(tf.floor(sums + 0.5)), x.range)


def _tents(old: int, new: int) -> np.ndarray:
    """Return the (new, old) float64 weights of each old position in each new one."""
    scale = np.float32(old) / np.float32(new)
    places = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    places = np.clip(places, 0, old - 1).astype(np.float32)
    before = np.floor(places).astype(int)
    behind = np.minimum(before + 1, old - 1)
    share = np.rint((places - before) * _FRACTION) / _FRACTION
    weights = np.zeros((new, old))
    weights[np.arange(new), before] += 1 - share
    weights[np.arange(new), behind] += share
    return weights


def _requantised(x: Whole, after: Range) -> tf.Tensor:
    """Return whole numbers of another range: rounded to it at once, else by 256ths."""
    if x.source is not None:
        return _within(x.source, after)
    factor = tf.math.rint(256.0 * x.range.step / after.step)
    numbers = tf.floor((x.numbers * factor + 128.0) / 256.0)
    return tf.clip_by_value(numbers, LOWEST - after.zero, HIGHEST - after.zero)
