"""GCN: kernels as large as the map, cut into rows and columns, see whole objects at each scale."""

from __future__ import annotations

from typing import Literal

import keras
from keras import layers

from kseg.backbones.features import Form
from kseg.blocks import check_input
from kseg.errors import UserError
from kseg.registry import BACKBONES, MODELS
from kseg.upsampling import LearnedDeconvolution, resize_to


@MODELS.register("gcn")
def GCN(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    form: Form = "keras",
    kernel: int = 15,
    upsampling: Literal["bilinear", "learned"] = "bilinear",
) -> keras.Model:
    """Build the Global Convolutional Network with boundary refinement.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor; the paper's best is resnet152.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        kernel: side of the large kernels, odd; 7 is common for small images.
        upsampling: "bilinear" resizes; "learned" is the paper's transposed convolution, one
            4x4 kernel a class, trained from the bilinear one.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or the kernel is even.

    Source:
        Peng, Zhang, Yu, Luo, Sun, "Large Kernel Matters: Improve Semantic Segmentation by Global
        Convolutional Network", CVPR 2017, section 3, figure 2, arXiv:1703.02719.

    Differs:
        Bilinear upsampling is the default, as in most re-implementations. Boundary refinement
        begins as the identity.
    """
    check_input(input_shape, num_classes)
    if kernel % 2 == 0:
        raise UserError(f"kernel is {kernel}; it must be odd, or it would shift the map")
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](image, weights=backbone_weights, form=form)
    scores = {}
    for stride in (32, 16, 8, 4):
        x = _global_convolution(features[stride], num_classes, kernel, name=f"gcn{stride}")
        scores[stride] = _boundary_refinement(x, name=f"boundary{stride}")
    x = scores[32]
    for stride in (16, 8, 4, 2, 1):
        x = _double(x, upsampling, name=f"up{stride}")
        if stride in scores:
            x = layers.Add(name=f"up{stride}_add")([x, scores[stride]])
        x = _boundary_refinement(x, name=f"up{stride}_boundary")
    x = layers.Activation("linear", dtype="float32", name="logits")(x)
    return keras.Model(image, {"logits": x}, name="gcn")


def _global_convolution(
    x: keras.KerasTensor, filters: int, kernel: int, *, name: str
) -> keras.KerasTensor:
    """Sum column-then-row and row-then-column; nothing non-linear, or it were no k x k kernel."""
    column, row = (kernel, 1), (1, kernel)
    paths = []
    for path, kernels in (("left", (column, row)), ("right", (row, column))):
        y = x
        for number, shape in enumerate(kernels, start=1):
            y = layers.Conv2D(filters, shape, padding="same", name=f"{name}_{path}{number}")(y)
        paths.append(y)
    return layers.Add(name=name)(paths)


def _boundary_refinement(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    filters = x.shape[-1]
    y = layers.Conv2D(
        filters,
        3,
        padding="same",
        activation="relu",
        kernel_initializer="he_normal",
        name=f"{name}_conv1",
    )(x)
    # Up to six of these lie in a row, without normalisation: random residuals would add up.
    y = layers.Conv2D(filters, 3, padding="same", kernel_initializer="zeros", name=f"{name}_conv2")(
        y
    )
    return layers.Add(name=name)([x, y])


def _double(x: keras.KerasTensor, upsampling: str, *, name: str) -> keras.KerasTensor:
    if upsampling == "learned":
        return LearnedDeconvolution(2, dtype="float32", name=name)(x)
    return resize_to(x, (2 * x.shape[1], 2 * x.shape[2]), name=name)
