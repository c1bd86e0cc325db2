"""FCN: a classifier read as convolutions gives coarse scores, and shallower maps refine them."""

from __future__ import annotations

from typing import Any, Literal

import keras
import numpy as np
from keras import layers, ops

from kseg.backbones.features import Form
from kseg.blocks import check_input, fcn_head, resize_to
from kseg.registry import BACKBONES, MODELS

Upsampling = Literal["bilinear", "fixed", "learned"]


@MODELS.register("fcn")
def FCN(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "vgg16",
    backbone_weights: str | None = None,
    form: Form = "keras",
    finest_stride: Literal[8, 16, 32] = 8,
    upsampling: Upsampling = "bilinear",
    fc_channels: int = 4096,
    dropout: float = 0.5,
) -> keras.Model:
    """Build FCN-32s, FCN-16s or FCN-8s.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        finest_stride: 32, 16 or 8: the finest map whose scores are added.
        upsampling: "bilinear" resizes; "fixed" and "learned" are transposed convolutions, one
            bilinear kernel a class, constant or trained from there.
        fc_channels: channels of fc6 and fc7; 1024 suits small devices.
        dropout: rate after fc6 and fc7.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation",
        CVPR 2015, section 4, arXiv:1411.4038; the scaled skips are those of "FCN-8s at once",
        github.com/shelhamer/fcn.berkeleyvision.org.

    Differs:
        fc6 pads by "same" instead of 100 pixels around the image, so nothing is cropped. fc6 and
        fc7 start at random, as the convolutional ImageNet files do not hold them.
    """
    check_input(input_shape, num_classes)
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](image, weights=backbone_weights, form=form)
    x = features.stages[-1]
    for name, kernel in (("fc6", 7), ("fc7", 1)):
        x = layers.Conv2D(
            fc_channels,
            kernel,
            padding="same",
            activation="relu",
            kernel_initializer="he_normal",
            name=name,
        )(x)
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    x = layers.Conv2D(num_classes, 1, name="score32")(x)
    for stage, stride, scale in ((3, 16, 1e-2), (2, 8, 1e-4)):
        if stride >= finest_stride:
            x = _upsample(x, 2, upsampling, name=f"up{stride}")
            x = _add_scores(x, features.stages[stage], scale, stride)
    x = _upsample(x, finest_stride, upsampling, name="up1")
    x = layers.Activation("linear", dtype="float32", name="logits")(x)
    return keras.Model(image, {"logits": x}, name="fcn")


@MODELS.register("fcn_resnet", aux={"aux": (None, 0.4)})
def FCNResNet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    form: Form = "keras",
    output_stride: Literal[8, 16, 32] = 8,
    dropout: float = 0.1,
    aux: bool = False,
) -> keras.Model:
    """Build torchvision's FCN: a dilated backbone and one head on its deepest map.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        output_stride: stride at which the backbone starts to dilate.
        dropout: rate in front of the classifier.
        aux: add a training-only head on the last but one stage, of weight 0.4.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32.

    Source:
        torchvision, `models/segmentation/fcn.py` (`fcn_resnet50`, `fcn_resnet101`).

    Differs:
        Weights for the auxiliary loss as in torchvision's reference training, 0.4 rather than 0.5.
    """
    check_input(input_shape, num_classes)
    size = input_shape[:2]
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](
        image, output_stride=output_stride, weights=backbone_weights, form=form
    )
    outputs = {"logits": fcn_head(features.stages[-1], num_classes, size, dropout=dropout)}
    if aux:
        outputs["aux"] = fcn_head(features.stages[-2], num_classes, size, name="aux")
    return keras.Model(image, outputs, name="fcn_resnet")


def _add_scores(
    x: keras.KerasTensor, feature: keras.KerasTensor, scale: float, stride: int
) -> keras.KerasTensor:
    feature = layers.Rescaling(scale, name=f"scale{stride}")(feature)
    # Zeros, as in the paper: training starts from the coarse scores alone.
    score = layers.Conv2D(x.shape[-1], 1, kernel_initializer="zeros", name=f"score{stride}")
    return layers.Add(name=f"add{stride}")([x, score(feature)])


def _upsample(
    x: keras.KerasTensor, factor: int, upsampling: Upsampling, *, name: str
) -> keras.KerasTensor:
    if upsampling == "bilinear":
        return resize_to(x, (factor * x.shape[1], factor * x.shape[2]), name=name)
    layer = FixedDeconvolution if upsampling == "fixed" else LearnedDeconvolution
    return layer(factor, dtype="float32", name=name)(x)


def bilinear_kernel(factor: int, channels: int) -> np.ndarray:
    """Return (2 factor, 2 factor, channels): the tent that enlarges by an even factor.

    Example:
        >>> bilinear_kernel(2, 1)[0, :, 0]
        array([0.0625, 0.1875, 0.1875, 0.0625], dtype=float32)
    """
    tent = 1 - np.abs(np.arange(2 * factor) - (factor - 0.5)) / factor
    kernel = np.outer(tent, tent)[..., None]
    return np.repeat(kernel, channels, axis=-1).astype("float32")


@keras.saving.register_keras_serializable("kseg")
class FixedDeconvolution(layers.Layer):
    """Enlarge by a transposed convolution, each channel by the same bilinear kernel.

    Equal to a half-pixel bilinear resize but for a border of factor / 2 pixels, where the
    transposed convolution sees zeros and the resize the edge.
    """

    def __init__(self, factor: int, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the even factor; `kwargs` are those of `keras.layers.Layer`."""
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return `x` (B, h, w, C) as (B, factor h, factor w, C)."""
        kernel = ops.convert_to_tensor(bilinear_kernel(self.factor, x.shape[-1]), x.dtype)
        return self._deconvolve(x, kernel)

    def _deconvolve(self, x: keras.KerasTensor, kernel: keras.KerasTensor) -> keras.KerasTensor:
        # No backend has a grouped transposed convolution, so the kernel is a diagonal matrix.
        kernel = kernel[..., None] * ops.eye(x.shape[-1], dtype=kernel.dtype)
        return ops.conv_transpose(x, kernel, strides=self.factor, padding="same")

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took."""
        return super().get_config() | {"factor": self.factor}


@keras.saving.register_keras_serializable("kseg")
class LearnedDeconvolution(FixedDeconvolution):
    """`FixedDeconvolution` whose kernels, one a channel, are trained from the bilinear one."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the kernel (2 factor, 2 factor, C)."""
        kernel = bilinear_kernel(self.factor, input_shape[-1])
        self.kernel = self.add_weight(
            name="kernel",
            shape=kernel.shape,
            initializer=lambda shape, dtype: ops.convert_to_tensor(kernel, dtype),
        )

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return `x` (B, h, w, C) as (B, factor h, factor w, C)."""
        return self._deconvolve(x, self.kernel)
