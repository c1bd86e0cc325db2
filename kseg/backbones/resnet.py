"""Residual networks of basic blocks (18, 34) and of bottlenecks (50, 101, 152)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import CAFFE, PLAIN, TORCH, batch_norm, conv, normalise
from kseg.backbones.units import even_rates
from kseg.errors import UserError
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
_RESNET152 = Published(
    "ResNet152",
    _FILE.format("resnet152"),
    md5="ee4c566cf9a93f14d82f913c2dc6dd0c",
    stem="conv1_conv",
)

Rates = Mapping[int, tuple[int, ...]]
_Stem = Callable[[KerasTensor, Form], KerasTensor]
_Block = Callable[[KerasTensor, int, Step, Form, str], KerasTensor]


@BACKBONES.register("resnet18")
def ResNet18(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    even_dilation: bool = False,
) -> Features:
    """Build ResNet-18, two basic blocks a stage; maps of 64, 64, 128, 256, 512 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None; there are no published Keras weights.
        form: "keras" pads strided convolutions on the far side, "torch" on both.
        even_dilation: dilate the first unit of a dilated stage as much as the others.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes.

    Raises:
        UserError: if an option is unknown, or weights are asked for.

    Source:
        He et al., CVPR 2016, table 1 (arXiv 1512.03385).
    """
    rates = even_rates(output_stride) if even_dilation else {}
    x, features = _resnet(image, _basic, (2, 2, 2, 2), output_stride, form, _stem, rates)
    load_backbone_weights(image, x, weights, published=None, form=form)
    return features


@BACKBONES.register("resnet34")
def ResNet34(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    even_dilation: bool = False,
) -> Features:
    """Build ResNet-34, 3, 4, 6, 3 basic blocks; maps of 64, 64, 128, 256, 512 channels.

    Args, Returns, Raises, Source: as `ResNet18`.
    """
    rates = even_rates(output_stride) if even_dilation else {}
    x, features = _resnet(image, _basic, (3, 4, 6, 3), output_stride, form, _stem, rates)
    load_backbone_weights(image, x, weights, published=None, form=form)
    return features


@BACKBONES.register("resnet50")
def ResNet50(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    deep_stem: bool = False,
    rates: Rates | None = None,
) -> Features:
    """Build ResNet-50 on an image; maps of 64, 256, 512, 1024, 2048 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided.
        weights: None, "imagenet", or a `resnet50_..._notop.h5` of keras.applications.
        form: "keras" strides in the first 1 x 1 of a stage, as keras.applications and Caffe;
            "torch" in its 3 x 3, as torchvision ("v1.5").
        deep_stem: three 3 x 3 convolutions of 64, 64, 128 channels instead of the 7 x 7; no
            published weights fit it.
        rates: dilation rates of the units of a stage, by its stride in the undilated network;
            repeated in turn where there are more units than rates. They replace those that
            `output_stride` brings.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes.

    Raises:
        UserError: if an option is unknown, the weights cannot be had, or `rates` dilates a unit
            that strides.

    Source:
        He et al., CVPR 2016, table 1 (arXiv 1512.03385); deep stem: Zhao et al., CVPR 2017, as in
        github.com/hszhao/PSPNet.

    Differs:
        no bias before a batch normalisation; imported biases move into its mean.
    """
    return _deep(image, (3, 4, 6, 3), output_stride, weights, form, deep_stem, rates, _RESNET50)


@BACKBONES.register("resnet101")
def ResNet101(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    deep_stem: bool = False,
    rates: Rates | None = None,
) -> Features:
    """Build ResNet-101 on an image: 23 units where ResNet-50 has 6 (at stride 16).

    Args, Returns, Raises, Source, Differs: as `ResNet50`.
    """
    return _deep(image, (3, 4, 23, 3), output_stride, weights, form, deep_stem, rates, _RESNET101)


@BACKBONES.register("resnet152")
def ResNet152(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    deep_stem: bool = False,
    rates: Rates | None = None,
) -> Features:
    """Build ResNet-152 on an image: 8 units at stride 8 and 36 at stride 16.

    Args, Returns, Raises, Source, Differs: as `ResNet50`.
    """
    return _deep(image, (3, 8, 36, 3), output_stride, weights, form, deep_stem, rates, _RESNET152)


def _deep(
    image: KerasTensor,
    depths: tuple[int, ...],
    output_stride: int,
    weights: str | Path | None,
    form: Form,
    deep_stem: bool,
    rates: Rates | None,
    published: Published,
) -> Features:
    """Build a network of bottlenecks, and fill it."""
    stem = _deep_stem if deep_stem else _stem
    x, features = _resnet(image, _bottleneck, depths, output_stride, form, stem, rates or {})
    # Nobody has published Keras weights behind a deep stem.
    published = None if deep_stem else published
    load_backbone_weights(image, x, weights, published=published, form=form)
    return features


def _resnet(
    image: KerasTensor,
    block: _Block,
    depths: tuple[int, ...],
    output_stride: int,
    form: Form,
    stem: _Stem,
    rates: Rates,
) -> tuple[KerasTensor, Features]:
    check_options(output_stride, form)
    x = stem(normalise(image, CAFFE if form == "keras" else TORCH), form)
    maps = {2: x}
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for index, depth in enumerate(depths):
        stride = 4 * 2**index
        for number, step in enumerate(_steps(depth, stride, output_stride, rates), start=1):
            x = block(x, 64 * 2**index, step, form, f"conv{index + 2}_block{number}")
        maps[stride] = x
    return x, Features(maps, tuple(maps.values()), output_stride=output_stride)


def _steps(depth: int, stride: int, output_stride: int, rates: Rates) -> list[Step]:
    """Return how each unit of the stage at `stride` moves."""
    first = stay(stride, output_stride) if stride == 4 else enter(stride, output_stride)
    steps = [first] + [stay(stride, output_stride)] * (depth - 1)
    if stride not in rates:
        return steps
    own = list(itertools.islice(itertools.cycle(rates[stride]), depth))
    if first.strides == 2 and own[0] > 1:
        raise UserError(
            f"the first unit at stride {stride} strides, so its dilation rate is 1, not {own[0]}; "
            f"take an output stride below {stride}"
        )
    return [Step(step.strides, rate, rate) for step, rate in zip(steps, own, strict=True)]


def _stem(x: KerasTensor, form: Form) -> KerasTensor:
    # The stem is padded alike on both sides in either form.
    x = conv(x, 64, 7, step=Step(2, 1, 1), form="torch", name="conv1_conv")
    return _bn_relu(x, form, "conv1")


def _deep_stem(x: KerasTensor, form: Form) -> KerasTensor:
    for number, (filters, strides) in enumerate(((64, 2), (64, 1), (128, 1)), start=1):
        name = f"conv1_{number}"
        step = Step(strides, 1, 1)
        x = _bn_relu(conv(x, filters, 3, step=step, form="torch", name=f"{name}_conv"), form, name)
    return x


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
