"""What networks of torch do otherwise than ours: any image size, corners that meet, a 3x3 score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kseg.backbones.features import Form
from kseg.blocks import check_input, conv_bn_relu, pool_to
from kseg.upsampling import resize_to

# Compared with torch at sizes that 32 does not divide (tests/test_torch_weights.py). Others may
# pool or join their maps in ways that an odd size upsets.
_ANY_SIZE = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "mobilenetv3_large_torchvision",
)
_SMALLEST = 64


def check_size(
    input_shape: tuple[int, int, int], num_classes: int, *, backbone: str, form: Form
) -> None:
    """Check as `check_input`, but take any size from 64 on where the backbone does, as in torch.

    Args:
        input_shape: (height, width, channels) of the image.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        form: its convention; padded as torch does, sides that 2 does not divide are rounded up.

    Raises:
        UserError: as `check_input`.
    """
    if form == "torch" and backbone in _ANY_SIZE and min(input_shape[:2]) >= _SMALLEST:
        input_shape = (_SMALLEST, _SMALLEST, input_shape[-1])
    check_input(input_shape, num_classes)


def resize(
    x: keras.KerasTensor,
    target: keras.KerasTensor | tuple[int, int],
    *,
    align_corners: bool,
    name: str,
) -> keras.KerasTensor:
    """Resize as `resize_to`, or so that the corner pixels of both maps meet.

    Args:
        x: (B, h, w, C).
        target: (height, width), or a map (B, H, W, any) whose size is wanted.
        align_corners: let the corners meet.
        name: of the layer.

    Returns:
        (B, H, W, C) float32; `x` itself where it has that size.
    """
    size = target if isinstance(target, tuple) else target.shape[1:3]
    if not align_corners or x.shape[1:3] in (size, (1, 1)):
        return resize_to(x, target, name=name)
    return CornerResize(*size, dtype="float32", name=name)(x)


@keras.saving.register_keras_serializable("kseg")
class CornerResize(layers.Layer):
    """Resize bilinearly so that corner pixels keep their values: torch's `align_corners=True`.

    Two products with constant matrices stand for it, as `keras.ops` has no such resize.

    Example:
        [0, 30] enlarged to 4 is [0, 10, 20, 30]; with half-pixel centres [0, 7.5, 22.5, 30].
    """

    def __init__(self, height: int, width: int, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the size wanted; `kwargs` are those of `keras.layers.Layer`."""
        super().__init__(**kwargs)
        self.height = height
        self.width = width

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return `x` (B, h, w, C) as (B, height, width, C)."""
        rows = ops.cast(_tents(x.shape[1], self.height), x.dtype)
        columns = ops.cast(_tents(x.shape[2], self.width), x.dtype)
        return ops.einsum("yh,bhwc,xw->byxc", rows, x, columns)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took."""
        return super().get_config() | {"height": self.height, "width": self.width}


def _tents(old: int, new: int) -> np.ndarray:
    """Return the (new, old) matrix of weights of each old position in each new one."""
    where = np.linspace(0, old - 1, new)[:, None]
    return np.clip(1 - np.abs(where - np.arange(old)), 0, 1).astype("float32")


def scores(
    x: keras.KerasTensor,
    num_classes: int,
    size: tuple[int, int],
    *,
    kernel: int = 1,
    align_corners: bool = False,
) -> keras.KerasTensor:
    """Classify each pixel, then resize to the image: the output "logits" of a model.

    Args:
        x: (B, h, w, C).
        num_classes: number of classes.
        size: height and width of the image.
        kernel: side of the classifier.
        align_corners: let the corners meet when resizing.

    Returns:
        (B, height, width, num_classes) float32.
    """
    x = layers.Conv2D(num_classes, kernel, padding="same", name="logits_conv")(x)
    x = resize(x, size, align_corners=align_corners, name="logits_resize")
    return layers.Activation("linear", dtype="float32", name="logits")(x)


def plain_separable_conv(
    x: keras.KerasTensor, filters: int, *, name: str, dilation: int = 1
) -> keras.KerasTensor:
    """3x3 depthwise then 1x1 convolution with nothing between, batch normalisation, ReLU.

    Args:
        x: (B, H, W, C).
        filters: channels of the result.
        name: its layers are `{name}_depthwise_conv` and `{name}_pointwise_conv` ...
        dilation: atrous rate of the depthwise convolution.

    Returns:
        (B, H, W, filters).
    """
    x = layers.DepthwiseConv2D(
        3,
        padding="same",
        dilation_rate=dilation,
        use_bias=False,
        name=f"{name}_depthwise_conv",
    )(x)
    return conv_bn_relu(x, filters, kernel=1, name=f"{name}_pointwise")


def aspp_of(
    conv: Callable[..., keras.KerasTensor],
    x: keras.KerasTensor,
    filters: int,
    *,
    rates: Sequence[int],
) -> keras.KerasTensor:
    """`kseg.blocks.aspp` with atrous branches of one's own.

    Args:
        conv: makes a branch: called as `conv_bn_relu` is, with `dilation`.
        x: (B, H, W, C).
        filters: channels of every branch and of the result.
        rates: atrous rate of each branch.

    Returns:
        (B, H, W, filters).
    """
    branches = [conv_bn_relu(x, filters, kernel=1, name="aspp_1x1")]
    branches += [conv(x, filters, dilation=rate, name=f"aspp_rate{rate}") for rate in rates]
    image_level = pool_to(x, 1, name="aspp_pool")
    image_level = conv_bn_relu(image_level, filters, kernel=1, name="aspp_image")
    branches.append(resize_to(image_level, x, name="aspp_image_resize"))
    x = layers.Concatenate(name="aspp_concat")(branches)
    return conv_bn_relu(x, filters, kernel=1, name="aspp_project")
