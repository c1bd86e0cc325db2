"""Thirteen 3 x 3 convolutions in five blocks, a 2 x 2 maximum after each block."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, enter, stay
from kseg.backbones.layers import CAFFE, TORCH, max_pool, normalise
from kseg.registry import BACKBONES
from kseg.weights import APPLICATIONS_URL, Published, load_backbone_weights

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_PUBLISHED = Published(
    "VGG16",
    APPLICATIONS_URL + "vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
    md5="6d6bbae143d832006294945121d1f1fc",
    stem="block1_conv1",
)


@BACKBONES.register("vgg16")
def VGG16(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
    border: int = 0,
    wide_pools: bool = False,
) -> Features:
    """Build the convolutions of VGG16 (configuration D) on an image.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 8, 16 or 32; below 32 the last maxima keep their window and lose their
            stride, and what follows is dilated.
        weights: None, "imagenet", or a `vgg16_..._notop.h5` of keras.applications.
        form: "torch" normalises the image as torchvision does; the layers are the same.
        border: rows and columns of zeros that the first convolution sees on each side of the
            normalised image; 0 is the usual one. Maps of odd size then round up.
        wide_pools: take the maxima over 3 x 3 pixels, centred and never dilated, as DeepLab does.

    Returns:
        Features. `features[stride]` is the last map before the maximum (128, 256, 512, 512 wide;
        the fifth maximum at 32); `features.stages` are the five maxima (pool1 to pool5).

    Raises:
        UserError: if an option is unknown or the weights cannot be had.

    Source:
        Simonyan and Zisserman, ICLR 2015, table 1; dilated as in Chen et al., ICLR 2015.
    """
    check_options(output_stride, form)
    x = normalise(image, CAFFE if form == "keras" else TORCH)
    if border:
        # The convolution adds one of them by itself.
        x = layers.ZeroPadding2D(border - 1, name="border")(x)
    maps, pools = {}, []
    for index, (filters, depth) in enumerate(_BLOCKS):
        stride = 2**index
        for number in range(1, depth + 1):
            name = f"block{index + 1}_conv{number}"
            x = layers.Conv2D(
                filters,
                3,
                padding="same",
                dilation_rate=stay(stride, output_stride).rate,
                # Keras' default halves the power of every map, and nothing here normalises them.
                kernel_initializer="he_normal",
                name=name,
            )(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
        maps[stride] = x
        pool = _wide_pool if wide_pools else max_pool
        x = pool(x, step=enter(2 * stride, output_stride), name=f"block{index + 1}_pool")
        pools.append(x)
    del maps[1]
    features = Features(maps | {32: x}, tuple(pools), output_stride=output_stride)
    load_backbone_weights(image, x, weights, published=_PUBLISHED, form=form)
    return features


def _wide_pool(x: KerasTensor, *, step: Step, name: str) -> KerasTensor:
    x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return layers.MaxPooling2D(3, strides=step.strides, name=name)(x)
