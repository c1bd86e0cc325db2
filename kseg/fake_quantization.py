"""The layers of quantisation-aware training: each rounds as its int8 operator will.

Source: Jacob et al., CVPR 2018, section 3, arXiv:1712.05877 (`kseg.quantization` makes models of
them).
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from kseg.phase_form import phase_kernel, phase_margins
from kseg.products import MatrixProducts

RANGE_MOMENTUM = 0.99  # of the ranges, once as many batches have been seen
# One sixth, but for its last bit: of the exact one the converter makes HARD_SWISH, for which
# LiteRT has no fast int8 kernel.
SIXTH = 0.16666665
_SMALLEST = 1e-6  # range of a channel that is all zeros


@keras.saving.register_keras_serializable("kseg")
class FakeQuantize(layers.Layer):
    """Round a map to the 256 values of its range, which includes 0.

    The range follows the extremes of the maps seen in training, or is given.
    """

    def __init__(self, fixed: tuple[float, float] | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Take a fixed range, or None; `kwargs` are those of `keras.layers.Layer`."""
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.fixed = None if fixed is None else tuple(fixed)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the range, and the count of batches that it is from."""
        low, high = self.fixed or (0.0, 0.0)
        self.low, self.high, self.seen = (
            self.add_weight(name=name, shape=(), initializer=_constant(value), trainable=False)
            for name, value in (("low", low), ("high", high), ("seen", 0.0))
        )

    def call(
        self,
        x: tf.Tensor,
        training: bool | None = None,
        follow: bool = True,
        reach: float | None = None,
    ) -> tf.Tensor:
        """Return `x` rounded; widen the range by it in training, if `follow`.

        With a `reach`, `x` and the range are first multiplied so that the range is as long.
        """
        if training and follow and self.fixed is None:
            self._follow(x)
        low, high = tf.convert_to_tensor(self.low), tf.convert_to_tensor(self.high)
        if reach is not None:
            factor = tf.math.divide_no_nan(reach, high - low)
            x, low, high = x * factor, low * factor, high * factor
        return tf.quantization.fake_quant_with_min_max_vars(x, low, high)

    def _follow(self, x: tf.Tensor) -> None:
        x = tf.stop_gradient(x)
        low = tf.minimum(tf.reduce_min(x), 0.0)
        high = tf.maximum(tf.reduce_max(x), low + _SMALLEST)
        # At first the plain mean: the empty range of the beginning never counts.
        momentum = tf.minimum(RANGE_MOMENTUM, self.seen / (self.seen + 1.0))
        for average, value in ((self.low, low), (self.high, high)):
            average.assign(momentum * average + (1.0 - momentum) * value)
        self.seen.assign_add(1.0)

    def get_config(self) -> dict[str, Any]:
        """Return the layer's configuration."""
        return super().get_config() | {"fixed": self.fixed}


def _constant(value: float) -> keras.initializers.Initializer:
    return keras.initializers.Constant(value)


class Folded:
    """A convolution with the batch normalisation behind it in its kernel, both rounded."""

    def __init__(self, epsilon: float | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the epsilon of the normalisation; None where there is none."""
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the kernel, and the weights of the normalisation."""
        super().build(input_shape)
        if self.epsilon is None:
            return
        channels = self.compute_output_shape(input_shape)[-1]
        kinds = {"gamma": "ones", "beta": "zeros", "moving_mean": "zeros"}
        for name, initializer in (kinds | {"moving_variance": "ones"}).items():
            moving = name.startswith("moving")
            weight = self.add_weight(
                name=name, shape=(channels,), initializer=initializer, trainable=not moving
            )
            setattr(self, name, weight)

    def folded(self) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Return the kernel, rounded a channel, and the bias, of the two layers in one."""
        kernel, bias = self._whole()
        return self.channels_back(_rounded(kernel)), bias

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return the map with bias and activation."""
        kernel, bias = self.folded()
        return self.activated(self.convolved(x, kernel), bias)

    def whole_numbers(self, input_step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        """Return the kernel and the bias as the whole numbers that the file holds.

        Args:
            input_step: one step of the map that the layer takes, float64.

        Returns:
            The kernel, float32 of its own shape; the steps (C,) of its channels, float64; the
            bias (C,) in steps of the input times those, or None where there is none.
        """
        kernel, bias = self._whole()
        numbers, steps = _in_steps(kernel)
        if bias is not None:
            bias = tf.math.rint(tf.cast(bias, tf.float64) / (input_step * steps))
        return self.channels_back(numbers), steps, bias

    def channels_last(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return the kernel with the channels of the result as its last axis."""
        return kernel

    def channels_back(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return what `channels_last` was given."""
        return kernel

    def _whole(self) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Return the kernel, its channels last, and the bias, with the normalisation in them."""
        kernel = self.channels_last(tf.convert_to_tensor(self.kernel))
        bias = tf.convert_to_tensor(self.bias) if self.use_bias else None
        if self.epsilon is None:
            return kernel, bias
        gain = self.gamma * tf.math.rsqrt(self.moving_variance + self.epsilon)
        return kernel * gain, self.beta + (
            (0.0 if bias is None else bias) - self.moving_mean
        ) * gain

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Save all weights; a convolution of Keras would leave out the normalisation's."""
        layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: dict[str, Any]) -> None:
        """Load all weights."""
        layers.Layer.load_own_variables(self, store)

    def activated(self, y: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Return a map with bias and activation."""
        y = y if bias is None else tf.nn.bias_add(y, bias)
        return y if self.activation is None else self.activation(y)

    def get_config(self) -> dict[str, Any]:
        """Return the layer's configuration."""
        return super().get_config() | {"epsilon": self.epsilon}


@keras.saving.register_keras_serializable("kseg")
class QuantizedConv2D(Folded, layers.Conv2D):
    """`keras.layers.Conv2D` and `BatchNormalization` of (B, H, W, C) as one int8 operator."""

    def convolved(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, filters) before the bias."""
        return self.convolution_op(x, kernel)


@keras.saving.register_keras_serializable("kseg")
class QuantizedDepthwiseConv2D(Folded, layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` and `BatchNormalization` of (B, H, W, C) as one operator."""

    def channels_last(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return the kernel (k, k, C, multiplier) as (k, k, C * multiplier)."""
        return tf.reshape(kernel, (*kernel.shape[:2], -1))

    def channels_back(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return what `channels_last` was given."""
        return tf.reshape(kernel, self.kernel.shape)

    def convolved(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, C * multiplier) before the bias."""
        return keras.ops.depthwise_conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable("kseg")
class QuantizedConv2DTranspose(Folded, layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` and `BatchNormalization` of (B, H, W, C) as one operator."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights."""
        if len({*self.strides}) > 1 or {*self.dilation_rate} != {1} or self.output_padding:
            raise ValueError(
                f"{self.name}: int8 has a form of transposed convolutions with equal strides and "
                f"neither dilation nor output padding; got strides {self.strides}, dilation "
                f"{self.dilation_rate}, output padding {self.output_padding}"
            )
        super().build(input_shape)

    def channels_last(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return the kernel (k, k, filters, C) as (k, k, C, filters)."""
        return tf.transpose(kernel, (0, 1, 3, 2))

    def channels_back(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return what `channels_last` was given."""
        return tf.transpose(kernel, (0, 1, 3, 2))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, filters)."""
        # The converter cannot turn round a transposed kernel that carries its ranges.
        kernel, bias = self._whole()
        stride, phases = self.strides[0], self.strides[0] ** 2
        most = tf.tile(tf.stop_gradient(_most(kernel)), [phases])
        rows, columns = (
            phase_margins(length, side, stride, self.padding)
            for length, side in zip(x.shape[1:3], self.kernel_size, strict=True)
        )
        kernel = _rounded(phase_kernel(kernel, stride), most)
        y = tf.nn.conv2d(x, kernel, 1, [(0, 0), rows[:2], columns[:2], (0, 0)])
        y = self.activated(y, None if bias is None else tf.tile(bias, [phases]))
        y = y if stride == 1 else tf.nn.depth_to_space(y, stride)
        if (*y.shape[1:3],) == (rows[3], columns[3]):
            return y
        return y[:, rows[2] : rows[2] + rows[3], columns[2] : columns[2] + columns[3]]

    def convolved(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, filters) before the bias."""
        return keras.ops.conv_transpose(
            x,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable("kseg")
class QuantizedProduct(layers.Layer):
    """A map times one of the matrices of `MatrixProducts`, rounded, along one of its axes."""

    def __init__(self, products: MatrixProducts, axis: int, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the layer with the matrices, and the axis of (B, H, W, C), 1 or 2."""
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.products = products
        self.axis = axis

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make nothing: the matrices follow from the size."""
        self.products.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return the map with the axis as long as the matrix makes it."""
        return self.convolved(x, _rounded(self._kernel(x)))

    def convolved(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the map times a kernel (1, 1, old, new) along the axis."""
        # The converter turns the operands of a product of matrices round, and then has no fast
        # operator for it; a convolution stays one.
        forth, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if self.axis == 1 else ((0, 1, 3, 2),) * 2
        return tf.transpose(tf.nn.conv2d(tf.transpose(x, forth), kernel, 1, "VALID"), back)

    def whole_numbers(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the kernel for a map as the whole numbers that the file holds, and their steps.

        Returns:
            (1, 1, old, new) float32, and the steps, to be multiplied with the new map.
        """
        kernel = self._kernel(x)
        numbers, steps = _in_steps(kernel)
        return numbers, tf.reshape(steps, (-1, 1, 1) if self.axis == 1 else (-1, 1))

    def _kernel(self, x: tf.Tensor) -> tf.Tensor:
        matrix = self.products.matrices(*x.shape[1:3])[self.axis - 1]
        return tf.constant(matrix.T[None, None], tf.float32)

    def get_config(self) -> dict[str, Any]:
        """Return the layer's configuration."""
        products = keras.saving.serialize_keras_object(self.products)
        return super().get_config() | {"products": products, "axis": self.axis}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedProduct:
        """Return the layer of a configuration."""
        products = keras.saving.deserialize_keras_object(config.pop("products"))
        return cls(products, **config)


@keras.saving.register_keras_serializable("kseg")
class QuantizedHardSigmoid(layers.Layer):
    """relu6(x + 3) / 6, rounded in between; both are operators of int8."""

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Take what `keras.layers.Layer` takes."""
        super().__init__(**{**kwargs, "dtype": "float32"})

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return a map of the shape of `x`, 0..1; the last rounding is left to what follows."""
        return tf.quantization.fake_quant_with_min_max_args(tf.nn.relu6(x + 3.0), 0, 6) * SIXTH


@keras.saving.register_keras_serializable("kseg")
class QuantizedHardSwish(QuantizedHardSigmoid):
    """x relu6(x + 3) / 6, rounded in between."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return a map of the shape of `x`; the last rounding is left to what follows."""
        return x * tf.quantization.fake_quant_with_min_max_args(super().call(x), 0, 1)


def _rounded(kernel: tf.Tensor, most: tf.Tensor | None = None) -> tf.Tensor:
    """Round to -127..127 steps, the last axis by a scale of its own each, that of `most`."""
    most = tf.stop_gradient(_most(kernel)) if most is None else most
    return tf.quantization.fake_quant_with_min_max_vars_per_channel(
        kernel, -most, most, narrow_range=True
    )


def _in_steps(kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return what `_rounded` returns in whole steps; the step of each index of the last axis.

    The steps are float64, as the converter has them.
    """
    steps = tf.cast(_most(kernel), tf.float64) / 127.0
    return tf.math.rint(_rounded(kernel) / tf.cast(steps, tf.float32)), steps


def _most(kernel: tf.Tensor) -> tf.Tensor:
    """Return the largest size of a value, for each index of the last axis."""
    axes = list(range(len(kernel.shape) - 1))
    return tf.maximum(tf.reduce_max(tf.abs(kernel), axes), _SMALLEST)
