"""HRNet: branches at strides 4, 8, 16 and 32 side by side, which exchange their maps repeatedly."""

from __future__ import annotations

from pathlib import Path

from keras import KerasTensor, layers

from kseg.backbones.features import Features, Form, Step, check_options, check_undilated
from kseg.backbones.layers import PLAIN, TORCH, UNIT, batch_norm, conv, normalise
from kseg.registry import BACKBONES
from kseg.upsampling import resize_to
from kseg.weights import load_backbone_weights

_EPSILON = 1e-5
_LIMITS = {"output_stride": "all strides from 4 to 32 stay side by side, so nothing is dilated"}
_HALVE = Step(2, 1, 1)


@BACKBONES.register("hrnet_w18_small", limits=_LIMITS)
def HRNetW18Small(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build HRNetV2-W18-Small-v2: half the blocks of W18, 3 and 2 modules instead of 4 and 3.

    Args, Returns, Raises, Source, Differs: as `HRNetW48`; branches of 18, 36, 72, 144 channels.
    """
    return _hrnet(image, 18, output_stride, weights, form, blocks=2, modules=(1, 3, 2))


@BACKBONES.register("hrnet_w18", limits=_LIMITS)
def HRNetW18(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build HRNetV2-W18 on an image.

    Args, Returns, Raises, Source, Differs: as `HRNetW48`; branches of 18, 36, 72, 144 channels.
    """
    return _hrnet(image, 18, output_stride, weights, form)


@BACKBONES.register("hrnet_w32", limits=_LIMITS)
def HRNetW32(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build HRNetV2-W32 on an image.

    Args, Returns, Raises, Source, Differs: as `HRNetW48`; branches of 32, 64, 128, 256 channels.
    """
    return _hrnet(image, 32, output_stride, weights, form)


@BACKBONES.register("hrnet_w48", limits=_LIMITS)
def HRNetW48(
    image: KerasTensor,
    *,
    output_stride: int = 32,
    weights: str | Path | None = None,
    form: Form = "keras",
) -> Features:
    """Build HRNetV2-W48 on an image; branches of 48, 96, 192, 384 channels.

    Args:
        image: (B, H, W, 3) RGB 0..255; H and W multiples of 32.
        output_stride: 32, that of the deepest branch; the network never dilates, and its finest
            branch is at stride 4 whatever is asked for.
        weights: None; keras.applications has none.
        form: "keras" pads strided layers at the far border, "torch" on both sides, as the authors.

    Returns:
        Features at strides 4, 8, 16, 32, the four branches after the last exchange: all equally
        deep, so `stages[-2]` is no shallower than `stages[-1]`. At stride 2 is the first
        convolution of the stem, of 64 channels.

    Raises:
        UserError: if an option is unknown, weights are asked for, or `output_stride` is not 32.

    Source:
        Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition",
        PAMI 2020, section 3, arXiv:1908.07919.

    Differs:
        Maps grow with half-pixel centres; the authors' OCR models align corners.
    """
    return _hrnet(image, 48, output_stride, weights, form)


def _hrnet(
    image: KerasTensor,
    width: int,
    output_stride: int,
    weights: str | Path | None,
    form: Form,
    *,
    blocks: int = 4,
    modules: tuple[int, int, int] = (1, 4, 3),
) -> Features:
    check_options(output_stride, form)
    check_undilated(output_stride)
    x = normalise(image, UNIT if form == "keras" else TORCH)
    stem = _conv(x, 64, 3, form, "stem1", step=_HALVE)
    x = _conv(stem, 64, 3, form, "stem2", step=_HALVE)
    for block in range(1, blocks + 1):
        x = _bottleneck(x, 64, form, f"stage1_block{block}")
    branches = [x]
    for stage, count in enumerate(modules, start=2):
        branches = _transition(branches, width, form, f"transition{stage - 1}")
        for module in range(1, count + 1):
            name = f"stage{stage}_module{module}"
            branches = [
                _branch(x, blocks, form, f"{name}_branch{number}")
                for number, x in enumerate(branches, start=1)
            ]
            branches = _exchange(branches, form, name)
    load_backbone_weights(image, branches, weights, published=None, form=form)
    maps = {2: stem} | dict(zip((4, 8, 16, 32), branches, strict=True))
    return Features(maps, tuple(maps.values()), output_stride=output_stride)


def _transition(
    branches: list[KerasTensor], width: int, form: Form, name: str
) -> list[KerasTensor]:
    """Return the branches and one more at half the size of the last; bring the first to `width`."""
    first, *others = branches
    if first.shape[-1] != width:
        first = _conv(first, width, 3, form, f"{name}_branch1")
    number = len(branches) + 1
    filters = width * 2 ** (number - 1)
    new = _conv(branches[-1], filters, 3, form, f"{name}_branch{number}", step=_HALVE)
    return [first, *others, new]


def _branch(x: KerasTensor, blocks: int, form: Form, name: str) -> KerasTensor:
    for block in range(1, blocks + 1):
        x = _basic_block(x, form, f"{name}_block{block}")
    return x


def _exchange(branches: list[KerasTensor], form: Form, name: str) -> list[KerasTensor]:
    """Return for each branch the sum of all branches, brought to its size and width."""
    fused = []
    for target, like in enumerate(branches):
        parts = [
            _bring(x, source, target, like, form, f"{name}_fuse{source + 1}to{target + 1}")
            for source, x in enumerate(branches)
        ]
        x = layers.Add(name=f"{name}_fuse{target + 1}_add")(parts)
        fused.append(layers.ReLU(name=f"{name}_fuse{target + 1}_relu")(x))
    return fused


def _bring(
    x: KerasTensor, source: int, target: int, like: KerasTensor, form: Form, name: str
) -> KerasTensor:
    """Return the map of branch `source` at the size and width of branch `target`, `like`."""
    if source > target:
        x = _conv(x, like.shape[-1], 1, form, name, relu=False)
        return resize_to(x, like, name=f"{name}_resize")
    for number in range(source + 1, target + 1):
        last = number == target
        filters = like.shape[-1] if last else x.shape[-1]
        x = _conv(x, filters, 3, form, f"{name}_{number}", step=_HALVE, relu=not last)
    return x


def _basic_block(x: KerasTensor, form: Form, name: str) -> KerasTensor:
    y = _conv(x, x.shape[-1], 3, form, f"{name}_1")
    y = _conv(y, x.shape[-1], 3, form, f"{name}_2", relu=False)
    y = layers.Add(name=f"{name}_add")([x, y])
    return layers.ReLU(name=f"{name}_out")(y)


def _bottleneck(x: KerasTensor, filters: int, form: Form, name: str) -> KerasTensor:
    y = _conv(x, filters, 1, form, f"{name}_1")
    y = _conv(y, filters, 3, form, f"{name}_2")
    y = _conv(y, 4 * filters, 1, form, f"{name}_3", relu=False)
    if x.shape[-1] != 4 * filters:
        x = _conv(x, 4 * filters, 1, form, f"{name}_shortcut", relu=False)
    y = layers.Add(name=f"{name}_add")([x, y])
    return layers.ReLU(name=f"{name}_out")(y)


def _conv(
    x: KerasTensor,
    filters: int,
    kernel: int,
    form: Form,
    name: str,
    *,
    step: Step = PLAIN,
    relu: bool = True,
) -> KerasTensor:
    x = conv(x, filters, kernel, step=step, form=form, name=f"{name}_conv")
    x = batch_norm(x, epsilon=_EPSILON, name=f"{name}_bn")
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x
