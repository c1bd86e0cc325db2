"""Densely connected networks: each layer adds a few channels to all that came before it."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import TORCH, average_pool, batch_norm, conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import APPLICATIONS_URL, Published, load_backbone_weights

_EPSILON: dict[Form, float] = {"keras": 1.001e-5, "torch": 1e-5}
_FILE = APPLICATIONS_URL + "densenet/{}_weights_tf_dim_ordering_tf_kernels_notop.h5"
_DENSENET121 = Published(
    "DenseNet121", _FILE.format("densenet121"), md5="30ee3e1110167f948a6b9946edeeb738"
)
_DENSENET169 = Published(
    "DenseNet169", _FILE.format("densenet169"), md5="b8c4d4c20dd625c148057b9ff1c1176b"
)
_DENSENET201 = Published(
    "DenseNet201", _FILE.format("densenet201"), md5="c13680b51ded0fb44dff2d8f86ac8bb1"
)


@BACKBONES.register("densenet121")
def DenseNet121(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    transition_pooling: bool = True,
) -> Features:
    """Build DenseNet-121 on an image; maps of 64, 256, 512, 1024, 1024 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last blocks are dilated.
        weights: None, "imagenet", or a `densenet121_..._notop.h5` of keras.applications.
        form: the two differ in nothing but the epsilon of batch normalisation.
        transition_pooling: let a transition that loses its stride still average the four pixels
            that it did, so that ImageNet weights compute what they were trained for; False
            drops the average, as DenseASPP.

    Returns:
        Features at strides 2, 4, 8, 16, 32, as far as `output_stride` goes: the end of each
        block, normalised and rectified as the following transition reads it.

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks",
        CVPR 2017, table 1, arXiv:1608.06993.
    """
    x, features = _densenet(
        image, (6, 12, 24, 16), output_stride, form, transition_pooling=transition_pooling
    )
    load_backbone_weights(image, x, weights, published=_DENSENET121, form=form)
    return features


@BACKBONES.register("densenet161")
def DenseNet161(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    transition_pooling: bool = True,
) -> Features:
    """Build DenseNet-161 on an image, 48 channels a layer; maps of 96, 384, 768, 2112, 2208.

    Args, Returns, Raises, Source: as `DenseNet121`, but there are no published Keras weights.
    """
    x, features = _densenet(
        image, (6, 12, 36, 24), output_stride, form, 48, transition_pooling=transition_pooling
    )
    load_backbone_weights(image, x, weights, published=None, form=form)
    return features


@BACKBONES.register("densenet169")
def DenseNet169(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    transition_pooling: bool = True,
) -> Features:
    """Build DenseNet-169 on an image; maps of 64, 256, 512, 1280, 1664 channels.

    Args, Returns, Raises, Source: as `DenseNet121`.
    """
    x, features = _densenet(
        image, (6, 12, 32, 32), output_stride, form, transition_pooling=transition_pooling
    )
    load_backbone_weights(image, x, weights, published=_DENSENET169, form=form)
    return features


@BACKBONES.register("densenet201")
def DenseNet201(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    transition_pooling: bool = True,
) -> Features:
    """Build DenseNet-201 on an image; maps of 64, 256, 512, 1792, 1920 channels.

    Args, Returns, Raises, Source: as `DenseNet121`.
    """
    x, features = _densenet(
        image, (6, 12, 48, 32), output_stride, form, transition_pooling=transition_pooling
    )
    load_backbone_weights(image, x, weights, published=_DENSENET201, form=form)
    return features


def _densenet(
    image: KerasTensor,
    depths: tuple[int, ...],
    output_stride: int,
    form: Form,
    growth: int = 32,
    *,
    transition_pooling: bool,
) -> tuple[KerasTensor, Features]:
    check_options(output_stride, form)
    x = normalise(image, TORCH)
    # The stem is padded alike on both sides in either form.
    x = conv(x, 2 * growth, 7, step=Step(2, 1, 1), form="torch", name="conv1_conv")
    x = _bn_relu(x, form, "conv1")
    maps = {2: x}
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    for index, depth in enumerate(depths):
        stride, name = 4 * 2**index, f"conv{index + 2}"
        for number in range(1, depth + 1):
            step = stay(stride, output_stride)
            x = _dense_layer(x, growth, step, form, f"{name}_block{number}")
        if stride < 32:
            name = f"pool{index + 2}"
            maps[stride] = x = _bn_relu(x, form, name)
            x = conv(x, x.shape[-1] // 2, 1, form=form, name=f"{name}_conv")
            step = enter(2 * stride, output_stride)
            if transition_pooling or step.strides == 2:
                x = average_pool(x, step=step, name=f"{name}_pool")
    x = batch_norm(x, epsilon=_EPSILON[form], name="bn")
    maps[32] = x = layers.ReLU(name="relu")(x)
    return x, Features(maps, tuple(maps.values()), output_stride=output_stride)


def _dense_layer(x: KerasTensor, growth: int, step: Step, form: Form, name: str) -> KerasTensor:
    y = _bn_relu(x, form, f"{name}_0")
    y = conv(y, 4 * growth, 1, form=form, name=f"{name}_1_conv")
    y = _bn_relu(y, form, f"{name}_1")
    y = conv(y, growth, 3, step=step, form=form, name=f"{name}_2_conv")
    return layers.Concatenate(name=f"{name}_concat")([x, y])


def _bn_relu(x: KerasTensor, form: Form, name: str) -> KerasTensor:
    x = batch_norm(x, epsilon=_EPSILON[form], name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x)
