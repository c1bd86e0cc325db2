"""Layers all backbones are made of, with the padding that published weights were trained with."""

from __future__ import annotations

from typing import NamedTuple

from keras import KerasTensor, layers

from kseg.backbones.features import Form, Step

PLAIN = Step(1, 1, 1)


class Normalisation(NamedTuple):
    """A map of RGB 0..255 to what weights expect: `image * scale + offset`, channel by channel."""

    scale: tuple[float, float, float]
    offset: tuple[float, float, float]


CAFFE = Normalisation((1.0, 1.0, 1.0), (-123.68, -116.779, -103.939))
UNIT = Normalisation((1 / 127.5,) * 3, (-1.0,) * 3)
TORCH = Normalisation(
    (1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225)),
    (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
)


def normalise(image: KerasTensor, normalisation: Normalisation) -> KerasTensor:
    """Return the image (B, H, W, 3), RGB 0..255, scaled as the weights expect it."""
    scale, offset = normalisation
    return layers.Rescaling(list(scale), list(offset), name="rescale")(image)


def conv(
    x: KerasTensor,
    filters: int,
    kernel: int,
    *,
    step: Step = PLAIN,
    form: Form,
    use_bias: bool = False,
    name: str,
) -> KerasTensor:
    """Return `x` convolved, strided or dilated as `step` says and padded as `form` does."""
    x, padding = _padded(x, kernel, step, form, name)
    return layers.Conv2D(
        filters,
        kernel,
        strides=step.strides,
        dilation_rate=step.entry if kernel > 1 else 1,
        padding=padding,
        use_bias=use_bias,
        name=name,
    )(x)


def depthwise_conv(
    x: KerasTensor, kernel: int, *, step: Step = PLAIN, form: Form, name: str
) -> KerasTensor:
    """Return `x` convolved channel by channel, without bias; options as in `conv`."""
    x, padding = _padded(x, kernel, step, form, name)
    return layers.DepthwiseConv2D(
        kernel,
        strides=step.strides,
        dilation_rate=step.entry,
        padding=padding,
        use_bias=False,
        name=name,
    )(x)


def batch_norm(x: KerasTensor, *, epsilon: float, name: str) -> KerasTensor:
    """Return `x` batch-normalised; momentum 0.9 suits the short runs of segmentation."""
    return layers.BatchNormalization(momentum=0.9, epsilon=epsilon, name=name)(x)


def max_pool(x: KerasTensor, *, step: Step, name: str) -> KerasTensor:
    """Return the maximum over windows of 2 x 2 pixels that lie `step.entry` apart.

    Args:
        x: a map (B, H, W, C) without negative values (zeros are padded at the far border).
        step: stride 2, or 1 and the distance of the window's pixels.
        name: of the last layer.
    """
    if step.entry == 1:
        return layers.MaxPooling2D(2, strides=step.strides, padding="same", name=name)(x)
    return layers.Maximum(name=name)(_corners(x, step.entry, name))


def average_pool(x: KerasTensor, *, step: Step, name: str) -> KerasTensor:
    """Return the mean over windows of 2 x 2 pixels that lie `step.entry` apart.

    Args:
        x: a map (B, H, W, C) of even sides where it is strided; else zeros at the far border count.
        step: stride 2, or 1 and the distance of the window's pixels.
        name: of the last layer.
    """
    if step.strides == 2:
        return layers.AveragePooling2D(2, name=name)(x)
    return layers.Average(name=name)(_corners(x, step.entry, name))


def _corners(x: KerasTensor, rate: int, name: str) -> list[KerasTensor]:
    """Return `x`, and `x` moved by `rate` pixels up, left and both; zeros come in."""
    padded = layers.ZeroPadding2D(((0, rate), (0, rate)), name=f"{name}_pad")(x)
    return [
        layers.Cropping2D(((i, rate - i), (j, rate - j)), name=f"{name}_crop_{i}_{j}")(padded)
        for i in (0, rate)
        for j in (0, rate)
    ]


def _padded(
    x: KerasTensor, kernel: int, step: Step, form: Form, name: str
) -> tuple[KerasTensor, str]:
    """Return `x` padded where Keras's "same" would be wrong, and the padding left to the layer."""
    # "same" strides as keras.applications (pads the far side) and dilates as torch (symmetric).
    fits = step.strides == (2 if form == "keras" else 1)
    if kernel == 1 or fits or not step.downsamples:
        return x, "same"
    near = kernel // 2 - 1 if form == "keras" else kernel // 2
    far = kernel - 1 - near
    margin = (step.entry * near, step.entry * far)
    return layers.ZeroPadding2D((margin, margin), name=f"{name}_pad")(x), "valid"
