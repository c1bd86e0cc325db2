"""The copy of a Keras model that the engine trains: other TensorFlow kernels, the same weights.

Models stay free of TensorFlow, and Keras takes the most general kernels. On a CPU others are
faster:

- batch normalisation by one kernel; of Keras' single operations each is a pass over the whole map,
  three to six times the time and nearly half of a training step of a small net;
- in bfloat16, a 1 x 1 convolution as a product of matrices, and so the gradient of the weights of
  wider kernels that read many channels for the size of their map: up to eight times as fast as
  oneDNN's convolutions;
- in float32 on processors without AVX-512, the gradient of the weights of 3 x 3 kernels as
  products, too: 1.0 to 2.2 times as fast as oneDNN's kernel of AVX2;
- a dilated depthwise convolution without the places of its kernel that meet nothing but padding:
  with a rate of 36 on 16 x 16 pixels an eighth of the time;
- a 1 x 1 convolution with strides reads a picked map. That is for safety: where it reads 8
  channels, the gradient of its weights writes beyond its memory (TensorFlow 2.21 with oneDNN).
  Picking the first pixel of cells takes a tenth of the time of a slice with strides;
- a map times two matrices by two products of matrices, in a quarter of the time of einsum.

XLA has no gradient of a nearest resize; for it pixels are repeated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from kseg.products import MatrixProducts
from kseg.upsampling import NearestResize

# Read channels from which products of shifted maps are faster than the convolution (3 x 3, maps of
# 8 to 16 pixels a side: 1.1 times at 512, 3.6 times at 3072); with fewer the shifts cost more.
MANY_CHANNELS = 1024
# The same on maps of few pixels (3 x 3, 256 channels, 16 x 16 pixels: 1.0 to 1.7 times as fast; 512
# channels, 8 x 8 pixels: 1.6 to 2 times).
SEVERAL_CHANNELS, FEW_PIXELS = 256, 256
# The same in float32 without AVX-512 (3 x 3: 1.3 times as fast at 32, 2 times at 128; 0.8 at 16).
SOME_CHANNELS = 32


def training_copy(model: keras.Model, *, sync_bn: bool = False, jit: bool = False) -> keras.Model:
    """Return a copy of a functional model that computes the same by faster kernels.

    Args:
        model: any functional model; it is not changed.
        sync_bn: normalise by the batch of all replicas, which the fused kernel cannot.
        jit: for XLA.

    Returns:
        A model of the same layer names, with its own variables of the same paths and values.
        Layers that the kernels cannot do (batch normalisation over another axis, without scale or
        offset, not trained; convolutions in groups or channels first) are as they were.
    """
    clone = functools.partial(_synchronized if sync_bn else _fused, jit=jit)
    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


@functools.cache
def has_fast_convolutions(dtype: tf.DType) -> bool:
    """Tell whether a kernel of oneDNN or cuDNN computes convolutions of a type on this machine.

    Only those know the gradient of a dilated map. Processors without AVX-512 have none for bfloat16
    and float16. TensorFlow's own take up to 17 times as long there as float32's.
    """
    with tf.init_scope():
        one = tf.zeros((1, 1, 1, 1), dtype)
        try:
            _gradient_by_kernel(tf.shape(one), one, one, (2, 2))
        except tf.errors.OpError:  # which one depends on the device
            return False
    return True


def is_fast(precision: str) -> bool:
    """Tell whether a precision of `kseg train` costs no time on this machine beside float32."""
    narrow = precision.removeprefix("mixed_")
    return narrow == "float32" or has_fast_convolutions(tf.as_dtype(narrow))


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` over the last axis of (B, H, W, C), by one kernel."""

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Return the normalised map, of the type of `inputs`; update the statistics in training."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        output, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.cast(self.gamma, tf.float32),
            offset=tf.cast(self.beta, tf.float32),
            mean=tf.zeros((0,)),
            variance=tf.zeros((0,)),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel gives the unbiased variance n / (n - 1); Keras keeps the plain one.
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), tf.float32)
        self._move(self.moving_mean, mean)
        self._move(self.moving_variance, variance * (count - 1.0) / count)
        return output

    def _move(self, average: keras.Variable, value: tf.Tensor) -> None:
        average.assign(average * self.momentum + value * (1.0 - self.momentum))


class PointwiseConv2D(keras.layers.Conv2D):
    """A 1 x 1 `keras.layers.Conv2D` of (B, H, W, C): picked pixels; in bfloat16 a product."""

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, filters), strided, before the bias."""
        if self.strides != (1, 1):
            inputs = _picked(inputs, *self.strides)
        kernel = tf.convert_to_tensor(kernel)
        if inputs.dtype != tf.bfloat16:
            return tf.nn.conv2d(inputs, kernel, 1, "VALID")
        pixels = tf.reshape(inputs, (-1, inputs.shape[-1]))
        product = tf.matmul(pixels, tf.reshape(kernel, kernel.shape[2:]))
        return tf.reshape(product, (-1, *inputs.shape[1:3], self.filters))


class ProductGradientConv2D(keras.layers.Conv2D):
    """A `keras.layers.Conv2D` of (B, H, W, C) that keeps the size of its map.

    The gradient of its weights is a product of matrices for each place of the kernel.
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, filters) before the bias."""

        @tf.custom_gradient
        def convolve(x: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return self._map_gradient(x, weights, upstream), self._weights_gradient(x, upstream)

            y = tf.nn.conv2d(x, weights, 1, "SAME", dilations=self.dilation_rate)
            return y, gradient

        return convolve(inputs, tf.convert_to_tensor(kernel))

    def _map_gradient(self, x: tf.Tensor, weights: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        if has_fast_convolutions(x.dtype):
            return _gradient_by_kernel(tf.shape(x), weights, upstream, self.dilation_rate)
        # An eighth to a seventeenth of the time of TensorFlow's own kernel.
        turned = tf.transpose(weights[::-1, ::-1], (0, 1, 3, 2))
        padding = [[after, before] for before, after in self._padding()]
        return tf.nn.conv2d(upstream, turned, 1, padding, dilations=self.dilation_rate)

    def _padding(self) -> list[list[int]]:
        # As SAME pads: of an even kernel the larger half is behind.
        sizes = zip(self.kernel_size, self.dilation_rate, strict=True)
        halves = [divmod((size - 1) * dilation, 2) for size, dilation in sizes]
        return [[0, 0], *([half, half + odd] for half, odd in halves), [0, 0]]

    def _weights_gradient(self, x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        height, width, channels = x.shape[1:]
        (rows, columns), (down, right) = self.kernel_size, self.dilation_rate
        padded = tf.pad(x, self._padding())
        upstream = tf.reshape(upstream, (-1, self.filters))
        products = []
        for i in range(rows):
            for j in range(columns):
                top, left = i * down, j * right
                with tf.control_dependencies(products[-1:]):  # one shifted map in memory at a time
                    seen = padded[:, top : top + height, left : left + width]
                    seen = tf.reshape(seen, (-1, channels))
                    products.append(tf.matmul(seen, upstream, transpose_a=True))
        return tf.reshape(tf.stack(products), (rows, columns, channels, self.filters))


class SuccessiveProducts(keras.layers.Layer):
    """What a layer of `MatrixProducts` does to (B, H, W, C), as two products of matrices."""

    def __init__(self, layer: MatrixProducts) -> None:
        """Take the matrices, the name and the type of a layer that has been called."""
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.matrices = layer.matrices(*layer.input.shape[1:3])

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return `x` (B, H, W, C) as (B, new height, new width, C)."""
        rows, columns = (tf.cast(matrix, x.dtype) for matrix in self.matrices)
        height, width, channels = x.shape[1:]
        x = tf.matmul(rows, tf.reshape(x, (-1, height, width * channels)))
        x = tf.matmul(columns, tf.reshape(x, (-1, width, channels)))
        return tf.reshape(x, (-1, rows.shape[0], columns.shape[0], channels))


class ReachingDepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """A dilated `keras.layers.DepthwiseConv2D` of (B, H, W, C) that keeps the size of its map.

    The places of its kernel that see padding alone, wherever it stands, are left out.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return the map (B, H, W, C times the depth multiplier)."""
        (rows, down), (columns, right) = (
            _reach(*one)
            for one in zip(self.kernel_size, self.dilation_rate, inputs.shape[1:3], strict=True)
        )
        return keras.ops.depthwise_conv(
            inputs, self.kernel[rows, columns], padding="same", dilation_rate=(down, right)
        )


class RepeatedPixels(NearestResize):
    """A `NearestResize` of (B, H, W, C) by whole factors whose gradient XLA can compile."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return `x` with each pixel repeated, as many times as the size wanted holds its own."""
        height, width, channels = x.shape[1:]
        rows, columns = self.height // height, self.width // width
        cells = tf.reshape(x, (-1, height, 1, width, 1, channels))
        return tf.reshape(
            tf.tile(cells, (1, 1, rows, 1, columns, 1)), (-1, self.height, self.width, channels)
        )


def _picked(x: tf.Tensor, rows: int, columns: int) -> tf.Tensor:
    """Return every so-many-th row and column of (B, H, W, C), the first among them."""
    height, width, channels = x.shape[1:]
    if not (height and width) or height % rows or width % columns:
        return x[:, ::rows, ::columns]
    cells = tf.reshape(x, (-1, rows, width // columns, columns * channels))
    firsts = tf.slice(cells, (0, 0, 0, 0), (-1, 1, -1, channels))
    return tf.reshape(firsts, (-1, height // rows, width // columns, channels))


def _reach(size: int, dilation: int, extent: int) -> tuple[slice, int]:
    """Return the places of an odd kernel's axis that reach into a map, and their dilation."""
    middle = size // 2
    reach = min(middle, (extent - 1) // dilation)
    return slice(middle - reach, middle + reach + 1), dilation if reach else 1


def _gradient_by_kernel(
    sizes: tf.Tensor, weights: tf.Tensor, upstream: tf.Tensor, dilation_rate: tuple[int, int]
) -> tf.Tensor:
    return tf.raw_ops.Conv2DBackpropInput(
        input_sizes=sizes,
        filter=weights,
        out_backprop=upstream,
        strides=[1, 1, 1, 1],
        padding="SAME",
        dilations=[1, *dilation_rate, 1],
    )


def _fused(layer: keras.Layer, *, jit: bool) -> keras.Layer:
    plain = type(layer) is keras.layers.BatchNormalization
    if plain and layer.trainable and _fits(layer):
        return FusedBatchNormalization.from_config(layer.get_config())
    return _other(layer, jit=jit)


def _synchronized(layer: keras.Layer, *, jit: bool) -> keras.Layer:
    if type(layer) is keras.layers.BatchNormalization:
        return type(layer).from_config(layer.get_config() | {"synchronized": True})
    return _other(layer, jit=jit)


def _other(layer: keras.Layer, *, jit: bool) -> keras.Layer:
    kind = type(layer)
    if isinstance(layer, MatrixProducts):
        return SuccessiveProducts(layer)
    if jit and kind is NearestResize and _by_whole_factors(layer):
        kind = RepeatedPixels
    if kind is keras.layers.Conv2D and layer.groups == 1 and layer.data_format == "channels_last":
        kind = _convolution_kind(layer, jit=jit)
    if kind is keras.layers.DepthwiseConv2D and _overreaches(layer):
        kind = ReachingDepthwiseConv2D
    return kind.from_config(layer.get_config())


def _convolution_kind(layer: keras.layers.Conv2D, *, jit: bool) -> type[keras.layers.Conv2D]:
    narrow = layer.compute_dtype == "bfloat16"
    if layer.kernel_size == (1, 1):
        return PointwiseConv2D if narrow or layer.strides != (1, 1) else keras.layers.Conv2D
    faster = _slow_gradient_in_bfloat16(layer) or (not jit and _slow_gradient_in_float32(layer))
    return ProductGradientConv2D if _keeps_size(layer) and faster else keras.layers.Conv2D


def _keeps_size(layer: keras.layers.Conv2D | keras.layers.DepthwiseConv2D) -> bool:
    """Tell whether a layer gives maps of the size of those it reads, and that size is known."""
    known = None not in layer.input.shape[1:]
    return known and layer.padding == "same" and layer.strides == (1, 1)


def _slow_gradient_in_bfloat16(layer: keras.layers.Conv2D) -> bool:
    *size, channels = layer.input.shape[1:]
    small = None not in size and math.prod(size) <= FEW_PIXELS
    many = channels >= MANY_CHANNELS or (small and channels >= SEVERAL_CHANNELS)
    return layer.compute_dtype == "bfloat16" and many


def _slow_gradient_in_float32(layer: keras.layers.Conv2D) -> bool:
    return (
        layer.compute_dtype == "float32"
        and layer.kernel_size == (3, 3)
        and layer.dilation_rate == (1, 1)
        and layer.input.shape[-1] >= SOME_CHANNELS
        and has_fast_convolutions(tf.float32)
        and not has_fast_convolutions(tf.bfloat16)  # oneDNN without AVX-512
    )


def _overreaches(layer: keras.layers.DepthwiseConv2D) -> bool:
    """Tell whether places of a dilated kernel meet nothing but padding, and no more is to do."""
    plain = not layer.use_bias and layer.activation is keras.activations.linear
    odd = all(size % 2 for size in layer.kernel_size)
    if not (plain and odd and _keeps_size(layer) and layer.data_format == "channels_last"):
        return False
    axes = zip(layer.kernel_size, layer.dilation_rate, layer.input.shape[1:3], strict=True)
    return any(size // 2 * dilation >= extent for size, dilation, extent in axes)


def _by_whole_factors(layer: NearestResize) -> bool:
    _, height, width, _ = layer.input.shape
    return layer.height % height == 0 and layer.width % width == 0


def _fits(layer: keras.layers.BatchNormalization) -> bool:
    rank = len(layer.input.shape)
    last = layer.axis in (-1, rank - 1)
    return rank == 4 and last and layer.center and layer.scale and not layer.synchronized
