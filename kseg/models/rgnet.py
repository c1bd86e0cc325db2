"""RGNet: each position attends to a few others, and chooses itself where they are."""

from __future__ import annotations

from typing import Literal

import keras
import numpy as np
from keras import layers, ops

from kseg.backbones.features import Form
from kseg.blocks import check_input, classifier, conv_bn_relu, fcn_head, pool_to
from kseg.registry import BACKBONES, MODELS

# The samples start as the neighbourhood of 3 x 3; the coarse grid has 8 x 8 cells.
_SIDE = 3
_CELLS = 8


@MODELS.register(
    "rgnet",
    aux={"aux": (None, 0.4)},
    limits={"int8": "256 steps are too few for where to sample; sampling=grid has no such trouble"},
)
def RGNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    form: Form = "keras",
    output_stride: Literal[8, 16, 32] = 8,
    head_channels: int = 512,
    inner_channels: int = 256,
    sampling: Literal["bilinear", "grid"] = "bilinear",
    dropout: float = 0.1,
    aux: bool = False,
) -> keras.Model:
    """Build RGNet.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        output_stride: stride at which the backbone starts to dilate.
        head_channels: channels of the map that the graph refines.
        inner_channels: channels of queries, keys and values.
        sampling: "bilinear" reads nine positions that each position predicts; "grid" is an
            approximation for devices, not the paper's layer: every position attends to the same
            64 cells, averages over the map, without a gather.
        dropout: rate in front of the classifier.
        aux: add a training-only head on the last but one stage, of weight 0.4.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Yu, Liu, Gao, Shen, Sang, "Representative Graph Neural Network", ECCV 2020, section 3,
        arXiv:2008.05202.

    Differs:
        Widths and the number of samples are assumed, as the authors' code was not to be had:
        biased 1x1 convolutions to queries, keys and values, offsets by a 1x1 convolution on the
        queries, BN behind the last one, as non-local blocks have it. No channel groups. The paper
        says nothing of a dropout.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](
        image, output_stride=output_stride, weights=backbone_weights, form=form
    )
    x = conv_bn_relu(features.stages[-1], head_channels, name="head")
    x = _representative_graph(x, inner_channels, sampling)
    x = layers.Dropout(dropout, name="graph_dropout")(x)
    outputs = {"logits": classifier(x, num_classes, size)}
    if aux:
        outputs["aux"] = fcn_head(features.stages[-2], num_classes, size, name="aux")
    return keras.Model(image, outputs, name="rgnet")


def _representative_graph(
    x: keras.KerasTensor, channels: int, sampling: Literal["bilinear", "grid"]
) -> keras.KerasTensor:
    query, key, value = (
        layers.Conv2D(channels, 1, name=f"graph_{role}_conv")(x)
        for role in ("query", "key", "value")
    )
    attend = _attend_to_samples if sampling == "bilinear" else _attend_to_grid
    y = attend(query, key, value)
    y = conv_bn_relu(y, x.shape[-1], kernel=1, activation=None, name="graph_project")
    return layers.Add(name="graph_add")([x, y])


def _attend_to_samples(
    query: keras.KerasTensor, key: keras.KerasTensor, value: keras.KerasTensor
) -> keras.KerasTensor:
    # Zeros, so that the samples start as the neighbourhood.
    offsets = layers.Conv2D(2 * _SIDE**2, 1, kernel_initializer="zeros", name="graph_offset_conv")(
        query
    )
    # Positions need more than float16's eleven bits.
    attention = RepresentativeAttention(dtype="float32", name="graph_attention")
    return attention([query, key, value, offsets])


def _attend_to_grid(
    query: keras.KerasTensor, key: keras.KerasTensor, value: keras.KerasTensor
) -> keras.KerasTensor:
    shape = query.shape[1:]
    key = pool_to(key, _CELLS, name="graph_key_pool")
    value = pool_to(value, _CELLS, name="graph_value_pool")
    query, key, value = (
        layers.Reshape((-1, shape[-1]), name=f"graph_{role}_rows")(x)
        for role, x in (("query", query), ("key", key), ("value", value))
    )
    y = layers.Attention(dtype="float32", name="graph_attention")([query, value, key])
    return layers.Reshape(shape, name="graph_map")(y)


@keras.saving.register_keras_serializable("kseg")
class RepresentativeAttention(layers.Layer):
    """Attention of each position to nine, those around it moved by predicted offsets.

    Offsets are in pixels of the map: first the nine of the rows, then those of the columns, in
    the order of the neighbourhood, row by row. A sample beyond the border reads the border.
    """

    def call(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Return what each position gathers.

        Args:
            inputs: queries, keys and values (B, H, W, C), and offsets (B, H, W, 18).

        Returns:
            (B, H, W, C).
        """
        query, key, value, offsets = inputs
        height, width, channels = query.shape[1:]
        rows, columns = ops.split(offsets + _neighbourhood(height, width), 2, axis=-1)
        corners = _corners(rows, columns, height, width)
        query = ops.reshape(query, (-1, channels, 1))
        # A sample is a sum of four pixels, and all behind it is linear: no sample is ever made.
        similarity = sum(share * ops.matmul(_read(key, index), query) for index, share in corners)
        weight = ops.softmax(similarity, axis=1)
        gathered = sum(
            ops.matmul(ops.transpose(weight * share, (0, 2, 1)), _read(value, index))
            for index, share in corners
        )
        return ops.reshape(gathered, (-1, height, width, channels))


def _neighbourhood(height: int, width: int) -> np.ndarray:
    """Return (H, W, 18): rows, then columns, of the 3 x 3 positions around each."""
    steps = np.arange(_SIDE) - _SIDE // 2
    down, right = np.meshgrid(steps, steps, indexing="ij")
    rows = np.arange(height)[:, None, None] + np.zeros((width, 1)) + down.ravel()
    columns = np.arange(width)[:, None] + np.zeros((height, 1, 1)) + right.ravel()
    return np.concatenate([rows, columns], axis=-1).astype("float32")


def _corners(
    rows: keras.KerasTensor, columns: keras.KerasTensor, height: int, width: int
) -> list[tuple[keras.KerasTensor, keras.KerasTensor]]:
    """Return the pixels that bilinear samples are made of.

    Args:
        rows: (B, H, W, S), in pixels; beyond the border counts as on it.
        columns: likewise.
        height: of the map.
        width: of the map.

    Returns:
        Of each of the four, the number (B * H * W, S) in the maps read row by row, and its share
        (B * H * W, S, 1) in the sample.
    """
    samples = rows.shape[-1]
    top, down = _corner(rows, height)
    left, right = _corner(columns, width)
    image = ops.arange(ops.shape(rows)[0], dtype="int32")[:, None, None, None]
    index = ops.reshape((image * height + top) * width + left, (-1, samples))
    down, right = (ops.reshape(part, (-1, samples, 1)) for part in (down, right))
    return [
        (index, (1.0 - down) * (1.0 - right)),
        (index + 1, (1.0 - down) * right),
        (index + width, down * (1.0 - right)),
        (index + width + 1, down * right),
    ]


def _read(x: keras.KerasTensor, index: keras.KerasTensor) -> keras.KerasTensor:
    """Return the pixels (N, S, C) of maps (B, H, W, C) whose numbers are `index` (N, S)."""
    return ops.take(ops.reshape(x, (-1, x.shape[-1])), index, axis=0)


def _corner(position: keras.KerasTensor, side: int) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Return the near pixel of each position, and the share of the far one."""
    position = ops.clip(position, 0.0, side - 1.0)
    # The far pixel is on the map, too: the last position of all is its own far pixel.
    near = ops.minimum(ops.cast(position, "int32"), side - 2)
    return near, position - ops.cast(near, position.dtype)
