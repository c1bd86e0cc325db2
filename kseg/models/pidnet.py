"""PIDNet: a branch for detail, one for context, one for boundaries that decides between the two."""

from __future__ import annotations

import keras
from keras import layers, ops

from kseg.blocks import activate, check_input
from kseg.losses.boundary_loss import BoundaryAwareLoss, BoundaryLoss
from kseg.models.ddrnet import (
    basic_layer,
    bn_relu_conv,
    bottleneck,
    conv_bn,
    dappm,
    segment_head,
    stem,
)
from kseg.registry import MODELS
from kseg.upsampling import resize_to


@MODELS.register(
    "pidnet",
    aux={
        "aux": (None, 0.4),
        "boundary": (BoundaryLoss(), 20.0),
        "boundary_aware": (BoundaryAwareLoss(), 1.0),
    },
)
def PIDNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    base_channels: int = 32,
    blocks: int = 2,
    deep_blocks: int = 3,
    light: bool = True,
    pyramid_channels: int = 96,
    head_channels: int = 128,
    aux: bool = True,
) -> keras.Model:
    """Build PIDNet-S.

    With base_channels=64 it is PIDNet-M; with base_channels=64, blocks=3, deep_blocks=4,
    light=False, pyramid_channels=112 and head_channels=256 PIDNet-L.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        base_channels: channels at stride 4 (C); all other widths are multiples of it.
        blocks: residual blocks of the first two stages and of each stage of the detail branch (m).
        deep_blocks: residual blocks of the context branch at strides 16 and 32 (n).
        light: take the parallel pyramid (PAPPM), Light-Bag and a narrow boundary branch instead
            of DAPPM, Bag and one as wide as the detail branch.
        pyramid_channels: channels of each scale of the pyramid pooling.
        head_channels: channels in front of a classifier.
        aux: add the training-only outputs: a head on the detail branch, of weight 0.4; the
            boundaries, of weight 20; and, of weight 1, the logits once more, judged where the
            boundary head is sure.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}, and, with `aux`, "aux"
        like the logits, "boundary" (B, H, W, 1) and "boundary_aware" (B, H, W, num_classes + 1):
        logits and boundary.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Xu, Xiong, Bhattacharyya, "PIDNet: A Real-time Semantic Segmentation Network Inspired by
        PID Controllers", CVPR 2023, section 3, arXiv:2206.02066; to the layer as in the authors'
        code, github.com/XuJiacong/PIDNet.

    Differs:
        The 3x3 convolution in four groups of PAPPM is four convolutions, one a scale: the same
        sums. The training-only heads read their maps in front of the ReLU; the authors' is made
        in place, so that theirs read what is behind it. The run's own loss takes the place of the
        cross entropy of hard pixels (OHEM); see also `BoundaryLoss` and `BoundaryAwareLoss`. The
        logits are enlarged inside the model.
    """
    check_input(input_shape, num_classes)
    size, width = input_shape[:2], 2 * base_channels
    image = keras.Input(input_shape, name="image")
    x = basic_layer(stem(image, base_channels), base_channels, blocks=blocks, name="stage1")
    x = activate(x, "relu", name="stage1")
    x = basic_layer(x, width, blocks=blocks, strides=2, name="stage2")
    p = i = d = activate(x, "relu", name="stage2")

    i = _context_stage(i, 2 * width, deep_blocks, "i3")
    p = early = _pag(basic_layer(p, width, blocks=blocks, name="p3"), i, base_channels, "pag3")
    narrow = base_channels if light else width
    d = _add_difference(basic_layer(d, narrow, blocks=1, name="d3"), i, "diff3")
    p, d = activate(p, "relu", name="p3"), activate(d, "relu", name="d3")

    i = _context_stage(i, 4 * width, deep_blocks, "i4")
    p = _pag(basic_layer(p, width, blocks=blocks, name="p4"), i, base_channels, "pag4")
    d = bottleneck(d, narrow, name="d4") if light else basic_layer(d, width, blocks=1, name="d4")
    d = edges = _add_difference(d, i, "diff4")
    p, d = activate(p, "relu", name="p4"), activate(d, "relu", name="d4")

    p, d = bottleneck(p, width, name="p5"), bottleneck(d, width, name="d5")
    i = bottleneck(i, 4 * width, strides=2, name="i5_block1")
    i = bottleneck(i, 4 * width, name="i5_block2")
    i = dappm(i, pyramid_channels, 2 * width, parallel=light)
    i = resize_to(i, p, name="dappm_resize")
    x = _light_bag(p, i, d) if light else _bag(p, i, d)
    outputs = {"logits": segment_head(x, head_channels, num_classes, size)}
    if aux:
        outputs["aux"] = segment_head(early, head_channels, num_classes, size, name="aux")
        outputs["boundary"] = segment_head(edges, base_channels, 1, size, name="boundary")
        join = layers.Concatenate(dtype="float32", name="boundary_aware")
        outputs["boundary_aware"] = join([outputs["logits"], outputs["boundary"]])
    return keras.Model(image, outputs, name="pidnet")


def _context_stage(x: keras.KerasTensor, filters: int, blocks: int, name: str) -> keras.KerasTensor:
    x = basic_layer(x, filters, blocks=blocks, strides=2, name=name)
    return activate(x, "relu", name=name)


def _add_difference(d: keras.KerasTensor, i: keras.KerasTensor, name: str) -> keras.KerasTensor:
    x = conv_bn(i, d.shape[-1], name=name)
    return layers.Add(name=f"{name}_add")([d, resize_to(x, d, name=f"{name}_resize")])


def _pag(p: keras.KerasTensor, i: keras.KerasTensor, channels: int, name: str) -> keras.KerasTensor:
    """Pixel attention: take over the context where both branches see the same."""
    i = conv_bn(i, p.shape[-1], kernel=1, name=f"{name}_compress")
    seen = resize_to(conv_bn(i, channels, kernel=1, name=f"{name}_i"), p, name=f"{name}_i_resize")
    gate = Similarity(name=f"{name}_gate")([conv_bn(p, channels, kernel=1, name=f"{name}_p"), seen])
    return _mix(p, resize_to(i, p, name=f"{name}_resize"), gate, name)


def _light_bag(
    p: keras.KerasTensor, i: keras.KerasTensor, d: keras.KerasTensor
) -> keras.KerasTensor:
    """Boundary attention: p + (1 - gate) i and i + gate p, each through a convolution, summed."""
    gate = layers.Activation("sigmoid", name="bag_gate")(d)
    inside = layers.Subtract(name="bag_inside")([i, layers.Multiply(name="bag_gated_i")([gate, i])])
    edge = layers.Multiply(name="bag_gated_p")([gate, p])
    detail = conv_bn(layers.Add(name="bag_p_add")([p, inside]), p.shape[-1], kernel=1, name="bag_p")
    context = conv_bn(layers.Add(name="bag_i_add")([i, edge]), p.shape[-1], kernel=1, name="bag_i")
    return layers.Add(name="bag")([detail, context])


def _bag(p: keras.KerasTensor, i: keras.KerasTensor, d: keras.KerasTensor) -> keras.KerasTensor:
    """Boundary attention: detail on boundaries, context elsewhere, and a convolution."""
    gate = layers.Activation("sigmoid", name="bag_gate")(d)
    return bn_relu_conv(_mix(i, p, gate, "bag"), p.shape[-1], kernel=3, name="bag")


def _mix(
    x: keras.KerasTensor, y: keras.KerasTensor, gate: keras.KerasTensor, name: str
) -> keras.KerasTensor:
    """Return (1 - gate) x + gate y, as x + gate (y - x)."""
    y = layers.Subtract(name=f"{name}_difference")([y, x])
    y = layers.Multiply(name=f"{name}_gated")([gate, y])
    return layers.Add(name=f"{name}_add")([x, y])


@keras.saving.register_keras_serializable("kseg")
class Similarity(layers.Layer):
    """Sigmoid of the scalar product of two maps, pixel by pixel."""

    def call(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Return (B, H, W, 1) of two maps (B, H, W, C)."""
        x, y = inputs
        return ops.sigmoid(ops.sum(x * y, axis=-1, keepdims=True))
