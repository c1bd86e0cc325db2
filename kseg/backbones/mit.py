"""Mix Transformer: four stages of attention over reduced maps; convolutions place the pixels.

In int8 its labels hold (98 of 100 pixels of unseen scenes), but the square roots of 30 LayerNorms
stay float32, so it is little faster than the float file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
from keras import KerasTensor, layers, ops

from kseg.backbones.features import Features, Form, check_options, check_undilated
from kseg.backbones.layers import TORCH, UNIT, normalise
from kseg.registry import BACKBONES
from kseg.weights import load_backbone_weights

# Stride of the map and side of the patch kernel, heads, and how much keys and values shrink.
_STAGES = ((4, 7, 1, 8), (8, 3, 2, 4), (16, 3, 5, 2), (32, 3, 8, 1))
_DEPTH = 2
_EXPANSION = 4
_EPSILON = 1e-6
# Of the last block; it grows evenly from 0 at the first.
_DROP_PATH = 0.1
_LIMITS = {"output_stride": "the first map has stride 4 and the others shrink; nothing is dilated"}


@BACKBONES.register("mit_b0", limits=_LIMITS)
def MiTB0(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    activation: str = "gelu",
) -> Features:
    """Build MiT-B0 on an image; maps of 32, 64, 160, 256 channels from stride 4 on.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 32; the network never dilates.
        weights: None; keras.applications has none.
        form: "keras" pads strided convolutions at the far border, "torch" on both sides, as the
            authors.
        activation: of the Mix-FFN; "relu" and "relu6" are fast in int8 where "gelu" is not.

    Returns:
        Features at strides 4, 8, 16, 32, and at stride 2, where the network has no stage, the
        image's own 3 channels, normalised and averaged.

    Raises:
        UserError: if an option is unknown, weights are asked for, or `output_stride` is not 32.

    Source:
        Xie, Wang, Yu, Anandkumar, Alvarez, Luo, "SegFormer: Simple and Efficient Design for
        Semantic Segmentation with Transformers", NeurIPS 2021, section 3.1 and table 6,
        arXiv:2105.15203; github.com/NVlabs/SegFormer.

    Differs:
        Every LayerNorm has an epsilon of 1e-6, as in mmsegmentation; the authors have 1e-5 behind
        the convolutions that embed and reduce.
    """
    return _mit(image, (32, 64, 160, 256), output_stride, weights, form, activation)


@BACKBONES.register("mit_b1", limits=_LIMITS)
def MiTB1(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    activation: str = "gelu",
) -> Features:
    """Build MiT-B1 on an image; maps of 64, 128, 320, 512 channels from stride 4 on.

    Args, Returns, Raises, Source, Differs: as `MiTB0`.
    """
    return _mit(image, (64, 128, 320, 512), output_stride, weights, form, activation)


def _mit(
    image: KerasTensor,
    widths: tuple[int, ...],
    output_stride: int,
    weights: str | Path | None,
    form: Form,
    activation: str,
) -> Features:
    check_options(output_stride, form)
    check_undilated(output_stride)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    maps = {2: layers.AveragePooling2D(2, name="half")(x)}
    for stage, (stride, kernel, heads, reduction) in enumerate(_STAGES):
        name = f"stage{stage + 1}"
        strides = stride // (_STAGES[stage - 1][0] if stage else 1)
        x = _overlap_patch_embed(x, widths[stage], kernel, strides, form, f"{name}_embed")
        for block in range(_DEPTH):
            drop_path = _DROP_PATH * (stage * _DEPTH + block) / (len(_STAGES) * _DEPTH - 1)
            block_name = f"{name}_block{block + 1}"
            x = _attend(x, heads, reduction, drop_path, block_name)
            x = _mix_ffn(x, activation, drop_path, block_name)
        x = maps[stride] = _layer_norm(x, name)
    load_backbone_weights(image, list(maps.values()), weights, published=None, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _overlap_patch_embed(
    x: KerasTensor, filters: int, kernel: int, strides: int, form: Form, name: str
) -> KerasTensor:
    if form == "torch":
        x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
    padding = "valid" if form == "torch" else "same"
    return _layer_norm(_conv(x, filters, kernel, name, strides=strides, padding=padding), name)


def _attend(x: KerasTensor, heads: int, reduction: int, drop_path: float, name: str) -> KerasTensor:
    """Return `x` plus attention to itself, or to a map whose sides are `reduction` times smaller.

    The map that is attended to so has stride 32 at every stage.
    """
    width = x.shape[-1]
    y = reduced = _layer_norm(x, f"{name}_attention")
    if reduction > 1:
        reduced = _conv(y, width, reduction, f"{name}_reduce", strides=reduction)
        reduced = _layer_norm(reduced, f"{name}_reduce")
    query = _linear(y, width, f"{name}_query")
    key, value = (_linear(reduced, width, f"{name}_{part}") for part in ("key", "value"))
    y = MapAttention(heads, name=f"{name}_attention")([query, key, value])
    y = _linear(y, width, f"{name}_project")
    return _add(x, y, drop_path, f"{name}_attention")


def _mix_ffn(x: KerasTensor, activation: str, drop_path: float, name: str) -> KerasTensor:
    """Return `x` plus a perceptron whose depthwise convolution stands for position codes."""
    name = f"{name}_ffn"
    y = _layer_norm(x, name)
    y = _linear(y, _EXPANSION * x.shape[-1], f"{name}_expand")
    y = layers.DepthwiseConv2D(
        3, padding="same", depthwise_initializer=_he_fan_out(), name=f"{name}_depthwise"
    )(y)
    y = _activate(y, activation, f"{name}_{activation}")
    y = _linear(y, x.shape[-1], f"{name}_project")
    return _add(x, y, drop_path, name)


def _activate(x: KerasTensor, activation: str, name: str) -> KerasTensor:
    if activation == "gelu":
        return GELU(name=name)(x)
    return layers.Activation(activation, name=name)(x)


def _add(x: KerasTensor, y: KerasTensor, drop_path: float, name: str) -> KerasTensor:
    """Return the sum, in which `y` is missing from some images while training."""
    y = layers.Dropout(drop_path, noise_shape=(None, 1, 1, 1), name=f"{name}_drop_path")(y)
    return layers.Add(name=f"{name}_add")([x, y])


def _linear(x: KerasTensor, units: int, name: str) -> KerasTensor:
    # A 1 x 1 convolution is the same map of pixels, and keeps them in their grid for converters.
    initializer = keras.initializers.TruncatedNormal(stddev=0.02)
    return layers.Conv2D(units, 1, kernel_initializer=initializer, name=f"{name}_conv")(x)


def _conv(
    x: KerasTensor, filters: int, kernel: int, name: str, *, strides: int, padding: str = "valid"
) -> KerasTensor:
    return layers.Conv2D(
        filters,
        kernel,
        strides=strides,
        padding=padding,
        kernel_initializer=_he_fan_out(),
        name=f"{name}_conv",
    )(x)


def _layer_norm(x: KerasTensor, name: str) -> KerasTensor:
    return layers.LayerNormalization(epsilon=_EPSILON, name=f"{name}_norm")(x)


def _he_fan_out() -> keras.initializers.Initializer:
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


@keras.saving.register_keras_serializable("kseg")
class GELU(layers.Layer):
    """x / 2 (1 + erf(x / sqrt 2)), the exact GELU.

    Keras's own holds an Erfc on TensorFlow 2.21, which tf2onnx 1.17 does not know; TFLite makes
    its GELU of either.
    """

    def call(self, x: KerasTensor) -> KerasTensor:
        """Return the activation of `x`, of its shape."""
        # The converter knows just this order of the factors: any other leaves an Erf, and fails.
        return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))


@keras.saving.register_keras_serializable("kseg")
class MapAttention(layers.Layer):
    """Attention of several heads between maps; it has no weights.

    With q_i, k_j and v_j the d channels that one head has of the pixels of three maps, pixel i
    becomes the sum over j of softmax_j(q_i k_j / sqrt(d)) v_j.
    """

    def __init__(self, heads: int, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the number of heads; `kwargs` are those of `keras.layers.Layer`."""
        super().__init__(**kwargs)
        self.heads = heads

    def call(self, inputs: list[KerasTensor]) -> KerasTensor:
        """Return (B, H, W, C) of a query (B, H, W, C), and a key and a value (B, h, w, C)."""
        query, key, value = (self._split(x) for x in inputs)
        # The query is scaled, not the product, which could leave the range of float16.
        query = query * query.shape[-1] ** -0.5
        weights = ops.softmax(ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))))
        x = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return ops.reshape(x, (-1, *inputs[0].shape[1:]))

    def _split(self, x: KerasTensor) -> KerasTensor:
        """Return a map (B, H, W, C) as (B, heads, H W, C / heads)."""
        height, width, channels = x.shape[1:]
        x = ops.reshape(x, (-1, height * width, self.heads, channels // self.heads))
        return ops.transpose(x, (0, 2, 1, 3))

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took."""
        return super().get_config() | {"heads": self.heads}
