"""STDC: blocks whose convolutions halve in width and are joined, so that depth costs little."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, check_undilated
from kseg.backbones.layers import PLAIN, TORCH, UNIT, batch_norm, conv, depthwise_conv, normalise
from kseg.registry import BACKBONES
from kseg.weights import load_backbone_weights

_EPSILON = 1e-5
_LIMITS = {"output_stride": "made for decoders that take stride 32; its blocks never dilate"}
_HALVE = Step(2, 1, 1)


@BACKBONES.register("stdc1", limits=_LIMITS)
def STDC1(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build STDC1 (STDCNet813), two blocks a stage; maps of 32, 64, 256, 512, 1024 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 32; the network never dilates.
        weights: None; keras.applications has none.
        form: "keras" pads strided layers at the far border, "torch" on both sides, as the authors.

    Returns:
        Features at strides 2, 4, 8, 16, 32.

    Raises:
        UserError: if an option is unknown, weights are asked for, or `output_stride` is not 32.

    Source:
        Fan, Lai, Huang, Wei, Chai, Luo, Wei, "Rethinking BiSeNet For Real-time Semantic
        Segmentation", CVPR 2021, section 3.1 and table 2, arXiv:2104.13188;
        github.com/MichaelFan01/STDC-Seg.

    Differs:
        Without the 1x1 convolution behind the last stage, as the authors segment by default.
        Form keras leaves the border out of an average, where the authors' torch counts zeros.
    """
    return _stdc(image, (2, 2, 2), output_stride, weights, form)


@BACKBONES.register("stdc2", limits=_LIMITS)
def STDC2(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build STDC2 (STDCNet1446): 4, 5 and 3 blocks in the three stages.

    Args, Returns, Raises, Source, Differs: as `STDC1`.
    """
    return _stdc(image, (4, 5, 3), output_stride, weights, form)


def _stdc(
    image: KerasTensor,
    depths: tuple[int, int, int],
    output_stride: int,
    weights: str | Path | None,
    form: Form,
) -> Features:
    check_options(output_stride, form)
    check_undilated(output_stride)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    x = stem = _conv_x(x, 32, 3, form, "convx1", step=_HALVE)
    x = _conv_x(x, 64, 3, form, "convx2", step=_HALVE)
    maps = {2: stem, 4: x}
    for stage, depth in enumerate(depths, start=3):
        for block in range(1, depth + 1):
            step = _HALVE if block == 1 else PLAIN
            x = _short_term_dense_concatenate(
                x, 32 * 2**stage, step, form, f"stage{stage}_block{block}"
            )
        maps[2**stage] = x
    load_backbone_weights(image, x, weights, published=None, form=form)
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _short_term_dense_concatenate(
    x: KerasTensor, filters: int, step: Step, form: Form, name: str
) -> KerasTensor:
    """Return four convolutions' maps of 1/2, 1/4, 1/8 and 1/8 of the channels, side by side."""
    first = x = _conv_x(x, filters // 2, 1, form, f"{name}_1")
    if step.downsamples:
        x = depthwise_conv(x, 3, step=step, form=form, name=f"{name}_down_conv")
        x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_down_bn")
        first = _average_pool(first, form, f"{name}_pool")
    maps = [first]
    for number, part in enumerate((4, 8, 8), start=2):
        x = _conv_x(x, filters // part, 3, form, f"{name}_{number}")
        maps.append(x)
    return layers.Concatenate(name=f"{name}_concat")(maps)


def _average_pool(x: KerasTensor, form: Form, name: str) -> KerasTensor:
    """Return `x` at half its size, the mean of 3 x 3 pixels."""
    if form == "keras":
        return layers.AveragePooling2D(3, strides=2, padding="same", name=name)(x)
    x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return layers.AveragePooling2D(3, strides=2, name=name)(x)


def _conv_x(
    x: KerasTensor, filters: int, kernel: int, form: Form, name: str, *, step: Step = PLAIN
) -> KerasTensor:
    """Convolution, batch normalisation, ReLU."""
    x = conv(x, filters, kernel, step=step, form=form, name=f"{name}_conv")
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x)
