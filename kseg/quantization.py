"""Quantisation-aware training: a model that rounds as its int8 file will, while it is trained.

Every kernel is rounded to 8 bits a channel and every map to 8 bits; gradients pass as if nothing
had been rounded. Batch normalisation is part of the kernel before it, with the statistics of the
finished training. A converter finds all ranges in the graph and needs no images.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, sections 3 and 3.2, arXiv:1712.05877; kernels by
channel: Krishnamoorthi, arXiv:1806.08342, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from kseg.fake_quantization import (
    FakeQuantize,
    QuantizedConv2D,
    QuantizedConv2DTranspose,
    QuantizedDepthwiseConv2D,
    QuantizedHardSigmoid,
    QuantizedHardSwish,
    QuantizedProduct,
)
from kseg.partial_results import ahead_of_last, last_operator
from kseg.products import MatrixProducts
from kseg.unpooling_forms import REACH, Choices, FirstUnpooling, MaximaFound
from kseg.upsampling import BilinearResize

_QUANTIZED = {
    layers.Conv2D: QuantizedConv2D,
    layers.DepthwiseConv2D: QuantizedDepthwiseConv2D,
    layers.Conv2DTranspose: QuantizedConv2DTranspose,
}
# What moves values without making new ones: their ranges are those of their input.
MOVING = (
    layers.MaxPooling2D,
    layers.Reshape,
    layers.Permute,
    layers.Flatten,
    layers.ZeroPadding2D,
    layers.Cropping2D,
    layers.Dropout,
    layers.SpatialDropout2D,
)
# What averages within the range of its input, and has to be rounded again in that same range.
_AVERAGING = (layers.AveragePooling2D, layers.UpSampling2D, BilinearResize)
# Ranges that LiteRT prescribes.
_FIXED = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "hard_sigmoid": (0.0, 1.0)}
WIDER = 1.02  # the range of rescaled images, as a multiple of what they fill
# Activations that are several operators, with a rounding between each two.
_SEVERAL = {
    "hard_sigmoid": QuantizedHardSigmoid,
    "hard_silu": QuantizedHardSwish,
    "hard_swish": QuantizedHardSwish,
}


def quantization_aware(model: keras.Model, *, in_float: Collection[str] = ()) -> keras.Model:
    """Return a copy of a functional model that rounds as an int8 file does.

    Args:
        model: takes images 0..255; it is not changed. Its batch normalisations keep their
            statistics.
        in_float: names of convolutions that compute in float, with the normalisation behind them;
            their results are rounded again.

    Returns:
        A model of the same inputs and outputs in float32, with its own variables. The ranges of
        its maps are empty: train it, or call it with `training=True`, on some batches first.
    """
    plan = _Plan(model, in_float)
    copy = keras.models.clone_model(model, clone_function=plan.clone, call_function=plan.call)
    plan.fill(copy)
    return copy


def convolutions(model: keras.Model) -> list[str]:
    """Return the names of the layers that `quantization_aware` can keep in float."""
    return [layer.name for layer in model.layers if type(layer) in _QUANTIZED]


def without_quantization(source: keras.Model, model: keras.Model) -> None:
    """Give a plain model the weights of its quantisation-aware copy.

    Args:
        source: what `quantization_aware` made of a model like `model`, trained or not.
        model: changed in place.
    """
    plan = _Plan(model)
    holders = {norm.name: name for name, norm in plan.folds.items()}
    for layer in model.layers:
        there = source.get_layer(holders.get(layer.name, layer.name))
        values = {variable.name: variable.numpy() for variable in there.weights}
        layer.set_weights([values[variable.name] for variable in layer.weights])


class _Plan:
    """What becomes of each layer of a model."""

    def __init__(self, model: keras.Model, in_float: Collection[str] = ()) -> None:
        self.model = model
        self.in_float = set(in_float)
        self.folds: dict[str, keras.Layer] = {}  # convolution to the normalisation in it
        self.emptied: set[str] = set()  # normalisations that are in a convolution now
        self.fused: set[str] = set()  # layers whose result is rounded only behind the next one
        self.ranges: dict[int, FakeQuantize] = {}  # of tensors, by id
        self.kept: list[Any] = []  # tensors above, so that no id is used twice
        self.choices = Choices(FirstUnpooling)
        nodes = {id(node) for depth in model._nodes_by_depth.values() for node in depth}
        for layer in model.layers:
            behind = [n.operation for n in layer._outbound_nodes if id(n) in nodes]
            follower = behind[0] if len(behind) == 1 else None
            if type(layer) in _QUANTIZED and type(follower) is layers.BatchNormalization:
                if layer.name in self.in_float:
                    self.in_float.add(follower.name)
                    self.fused.add(layer.name)
                    continue
                self.folds[layer.name] = follower
                self.emptied.add(follower.name)
            if _computes(layer) and _is_relu(follower):
                self.fused.add(layer.name)

    def clone(self, layer: keras.Layer) -> keras.Layer:
        """Return the layer that stands for `layer`."""
        config = layer.get_config()
        if layer.name in self.in_float:
            return type(layer).from_config({**config, "dtype": "float32"})
        if layer.name in self.emptied:
            return layers.Identity(name=layer.name)
        # As int8, the product and sum of these would be float; a 1 x 1 kernel is one operator.
        if isinstance(layer, layers.Rescaling):
            return QuantizedDepthwiseConv2D(kernel_size=1, name=layer.name, trainable=False)
        if _is_lone_norm(layer):
            return QuantizedDepthwiseConv2D(
                epsilon=layer.epsilon, kernel_size=1, use_bias=False, name=layer.name
            )
        if isinstance(layer, MatrixProducts):
            products = type(layer).from_config({**config, "dtype": "float32"})
            return QuantizedProduct(products, 2, name=layer.name)
        if type(layer) in _QUANTIZED:
            norm = self.folds.get(layer.name)
            config["epsilon"] = None if norm is None else norm.epsilon
            return _QUANTIZED[type(layer)].from_config(config)
        if _activation(layer) in _SEVERAL:
            return _SEVERAL[_activation(layer)](name=layer.name)
        other = self.choices.clone(layer) or last_operator(layer)
        if other is not None:
            return other
        if isinstance(config.get("dtype"), str | Mapping):
            config["dtype"] = "float32"
        if type(layer) is layers.BatchNormalization:
            config["trainable"] = False  # keeps its statistics
        return type(layer).from_config(config)

    def call(self, layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call the new layer on tensors of the copy, and round its result."""
        args = keras.tree.map_structure(self._fed, args)
        if isinstance(layer, (MaximaFound, FirstUnpooling)):
            return self._chosen(layer, args[0])
        before = self.ranges.get(id(args[0]))  # none of a list of several
        if layer.name in self.in_float and type(layer) in _QUANTIZED:
            # With a rounded input and result the converter would round any kernel between them.
            # It has no int8 form of a change of sign, which the kernel makes good.
            args = (keras.ops.negative(args[0]),)
        if isinstance(layer, QuantizedProduct):
            args = (self._rows_product(layer, args[0], before),)
        args = (ahead_of_last(self.model.get_layer(layer.name), args[0]), *args[1:])
        kwargs.pop("mask", None)  # of a batch normalisation; nothing here has masks
        y = layer(*args, **kwargs)
        if isinstance(layer, MOVING) or _is_linear(layer):
            return self._remember(y, before)
        if layer.name in self.folds or layer.name in self.fused:
            return y  # rounded behind the layer that follows
        if isinstance(layer, (*_AVERAGING, QuantizedProduct)) and before is not None:
            return self._remember(before(y, follow=False), before)
        quantizer = FakeQuantize(self._fixed(layer), name=f"{layer.name}_quantize")
        return self._remember(quantizer(y), quantizer)

    def fill(self, copy: keras.Model) -> None:
        """Give the copy the weights of the model."""
        for layer in self.model.layers:
            new = copy.get_layer(layer.name)
            norm = self.folds.get(layer.name)
            if layer.name in self.in_float:
                new.set_weights(layer.get_weights())
                if type(layer) in _QUANTIZED:
                    new.kernel.assign(-new.kernel)
            elif _is_lone_norm(layer) and layer.name not in self.emptied:
                ones = np.ones([v.shape for v in new.weights if v.name == "kernel"][0])
                new.set_weights([ones, *layer.get_weights()])
                new.kernel.trainable = False
            elif isinstance(layer, layers.Rescaling):
                channels = layer.output.shape[-1]
                scale, offset = (
                    np.broadcast_to(np.asarray(value, "float32"), channels)
                    for value in (layer.scale, layer.offset)
                )
                new.set_weights([scale.reshape(1, 1, channels, 1), offset])
            elif layer.weights and layer.name not in self.emptied:
                new.set_weights(layer.get_weights() + (norm.get_weights() if norm else []))
                new.trainable = layer.trainable and new.trainable

    def _rows_product(
        self, layer: QuantizedProduct, x: keras.KerasTensor, before: FakeQuantize | None
    ) -> keras.KerasTensor:
        """Return `x` times the first of two matrices; means stay within the range of `x`."""
        y = QuantizedProduct(layer.products, 1, name=_rows_name(layer))(x)
        if before is None:
            return FakeQuantize(name=f"{_rows_name(layer)}_quantize")(y)
        return before(y, follow=False)

    def _chosen(self, layer: keras.Layer, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Call a layer of `Choices`; what it chooses among is rounded, in the range of the map."""
        before = self.ranges[id(inputs[0])]

        def comparable(x: keras.KerasTensor) -> keras.KerasTensor:
            return before(before(x, follow=False), follow=False, reach=REACH)

        y = self.choices.call(layer, inputs, comparable)
        if isinstance(layer, MaximaFound):
            return y
        return self._remember(before(y, follow=False), before)

    def _fed(self, tensor: Any) -> Any:  # noqa: ANN401
        """Return what stands for an argument: the image is rounded to its own bytes."""
        history = getattr(tensor, "_keras_history", None)
        if history is None or not isinstance(history.operation, layers.InputLayer):
            return tensor
        if "image" not in self.__dict__:
            quantizer = FakeQuantize((0.0, 255.0), name="image_quantize")
            self.image = self._remember(quantizer(tensor), quantizer)
        return self.image

    def _fixed(self, layer: keras.Layer) -> tuple[float, float] | None:
        """Return the range of a layer's result where it is known; None if it is to be seen."""
        if isinstance(layer, QuantizedHardSwish):
            return None
        original = self.model.get_layer(layer.name)
        if isinstance(original, layers.Rescaling):
            return _rescaled_range(original)
        name = "hard_sigmoid" if isinstance(layer, QuantizedHardSigmoid) else _activation(layer)
        return _FIXED.get(name)

    def _remember(self, tensor: Any, quantizer: FakeQuantize | None) -> Any:  # noqa: ANN401
        if quantizer is not None:
            self.ranges[id(tensor)] = quantizer
            self.kept.append(tensor)
        return tensor


def _is_lone_norm(layer: keras.Layer) -> bool:
    """Whether a layer normalises the channels of (B, H, W, C); one in a convolution does, too."""
    return type(layer) is layers.BatchNormalization and len(layer.output.shape) == 4


def _rows_name(layer: keras.Layer) -> str:
    return f"{layer.name}_rows"


def _computes(layer: keras.Layer) -> bool:
    kinds = (*_QUANTIZED, layers.BatchNormalization, layers.Add)
    return isinstance(layer, kinds)


def _is_relu(layer: keras.Layer | None) -> bool:
    if isinstance(layer, layers.Activation):
        return layer.get_config()["activation"] in ("relu", "relu6")
    return isinstance(layer, layers.ReLU) and layer.max_value in (None, 6.0)


def _is_linear(layer: keras.Layer) -> bool:
    return _activation(layer) == "linear"


def _activation(layer: keras.Layer) -> str | None:
    """Return what an activation layer computes; None of another layer."""
    return layer.get_config()["activation"] if isinstance(layer, layers.Activation) else None


def _rescaled_range(layer: layers.Rescaling) -> tuple[float, float]:
    """Return the range of an image 0..255 after rescaling, made wider.

    In its own range, -1..1 would put every byte half-way between two steps, and how such ties are
    rounded differs from kernel to kernel.
    """
    scale, offset = np.asarray(layer.scale, "float64"), np.asarray(layer.offset, "float64")
    ends = np.stack([offset + 0 * scale, 255 * scale + offset])
    return WIDER * min(float(ends.min()), 0.0), WIDER * max(float(ends.max()), 0.0)
