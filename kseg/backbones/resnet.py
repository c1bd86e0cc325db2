"""Residual networks of basic blocks (18, 34) and of bottlenecks (50, 101)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import CAFFE, PLAIN, TORCH, batch_norm, conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import APPLICATIONS_URL, Published, load_backbone_weights

_EPSILON: dict[Form, float] = {"keras": 1.001e-5, "torch": 1e-5}
_FILE = APPLICATIONS_URL + "resnet/{}_weights_tf_dim_ordering_tf_kernels_notop.h5"
_RESNET50 = Published(
    "ResNet50",
    _FILE.format("resnet50"),
    md5="4d473c1dd8becc155b73f8504c6f6626",
    stem="conv1_conv",
)
_RESNET101 = Published(
    "ResNet101",
    _FILE.format("resnet101"),
    md5="88cf7a10940856eca736dc7b7e228a21",
    stem="conv1_conv",
)

_Block = Callable[[KerasTensor, int, Step, Form, str], KerasTensor]


@BACKBONES.register("resnet18")
def ResNet18(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build ResNet-18, two basic blocks a stage; maps of 64, 64, 128, 256, 512 channels.

    Args, Returns, Raises, Source: as `ResNet50`, but there are no published Keras weights.
    """
    x, features = _resnet(image, _basic, (2, 2, 2, 2), output_stride, form)
    load_backbone_weights(image, x, weights, published=None, form=form)
    return features


@BACKBONES.register("resnet34")
def ResNet34(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build ResNet-34, 3, 4, 6, 3 basic blocks; maps of 64, 64, 128, 256, 512 channels.

    Args, Returns, Raises, Source: as `ResNet50`, but there are no published Keras weights.
    """
    x, features = _resnet(image, _basic, (3, 4, 6, 3), output_stride, form)
    load_backbone_weights(image, x, weights, published=None, form=form)
    return features


@BACKBONES.register("resnet50")
def ResNet50(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build ResNet-50 on an image; maps of 64, 256, 512, 1024, 2048 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None, "imagenet", or a `resnet50_..._notop.h5` of keras.applications.
        form: "keras" strides in the first 1 x 1 of a stage, as keras.applications and Caffe;
            "torch" in its 3 x 3, as torchvision ("v1.5").

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        He et al., CVPR 2016, table 1 (arXiv 1512.03385).

    Differs:
        no bias before a batch normalisation; imported biases move into its mean.
    """
    x, features = _resnet(image, _bottleneck, (3, 4, 6, 3), output_stride, form)
    load_backbone_weights(image, x, weights, published=_RESNET50, form=form)
    return features


@BACKBONES.register("resnet101")
def ResNet101(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build ResNet-101 on an image: 23 blocks where ResNet-50 has 6 (at stride 16).

    Args, Returns, Raises, Source, Differs: as `ResNet50`.
    """
    x, features = _resnet(image, _bottleneck, (3, 4, 23, 3), output_stride, form)
    load_backbone_weights(image, x, weights, published=_RESNET101, form=form)
    return features


def _resnet(
    image: KerasTensor, block: _Block, depths: tuple[int, ...], output_stride: int, form: Form
) -> tuple[KerasTensor, Features]:
    check_options(output_stride, form)
    x = normalise(image, CAFFE if form == "keras" else TORCH)
    # The stem is padded alike on both sides in either form.
    x = conv(x, 64, 7, step=Step(2, 1, 1), form="torch", name="conv1_conv")
    x = _bn_relu(x, form, "conv1")
    maps = {2: x}
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for index, depth in enumerate(depths):
        stride = 4 * 2**index
        for number in range(1, depth + 1):
            first = number == 1 and index > 0
            step = enter(stride, output_stride) if first else stay(stride, output_stride)
            x = block(x, 64 * 2**index, step, form, f"conv{index + 2}_block{number}")
        maps[stride] = x
    return x, Features(maps, tuple(maps.values()), output_stride=output_stride)


def _basic(x: KerasTensor, filters: int, step: Step, form: Form, name: str) -> KerasTensor:
    shortcut = _shortcut(x, filters, step, form, name)
    x = conv(x, filters, 3, step=step, form=form, name=f"{name}_1_conv")
    x = _bn_relu(x, form, f"{name}_1")
    x = conv(x, filters, 3, step=_behind(step), form=form, name=f"{name}_2_conv")
    x = batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_2_bn")
    return _join(shortcut, x, name)


def _bottleneck(x: KerasTensor, filters: int, step: Step, form: Form, name: str) -> KerasTensor:
    # Where the stride is decides which layer still sees the old grid, and so the dilation.
    first, second = (step, _behind(step)) if form == "keras" else (PLAIN, step)
    shortcut = _shortcut(x, 4 * filters, step, form, name)
    x = conv(x, filters, 1, step=first, form=form, name=f"{name}_1_conv")
    x = _bn_relu(x, form, f"{name}_1")
    x = conv(x, filters, 3, step=second, form=form, name=f"{name}_2_conv")
    x = _bn_relu(x, form, f"{name}_2")
    x = conv(x, 4 * filters, 1, form=form, name=f"{name}_3_conv")
    x = batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_3_bn")
    return _join(shortcut, x, name)


def _shortcut(x: KerasTensor, filters: int, step: Step, form: Form, name: str) -> KerasTensor:
    """Return `x`, projected by a 1 x 1 convolution where its width or grid changes."""
    if x.shape[-1] == filters and not step.downsamples:
        return x
    x = conv(x, filters, 1, step=step, form=form, name=f"{name}_0_conv")
    return batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_0_bn")


def _join(shortcut: KerasTensor, x: KerasTensor, name: str) -> KerasTensor:
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_out")(x)


def _bn_relu(x: KerasTensor, form: Form, name: str) -> KerasTensor:
    x = batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x)


def _behind(step: Step) -> Step:
    return Step(1, step.rate, step.rate)
