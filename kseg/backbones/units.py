"""What only some backbones can be asked for: dilation unit by unit, a deep stem, an activation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

from kseg.backbones.features import Features
from kseg.errors import UserError
from kseg.registry import BACKBONES

_WORDS = {
    "rates": "dilation rates for single units",
    "deep_stem": "deep stem",
    "even_dilation": "even dilation",
    "activation": "activation to choose",
}


def configured(
    backbone: str,
    *,
    rates: Mapping[int, tuple[int, ...]],
    insist: bool = False,
    deep_stem: bool = False,
) -> Callable[..., Features]:
    """Return the builder of a backbone, told the dilation rates of its units and its stem.

    Args:
        backbone: registry name.
        rates: as `ResNet50` takes them; a backbone without such units keeps its own dilation.
        insist: the user asked for these rates, rather than the architecture by default: they
            must not be dropped.
        deep_stem: as `ResNet50` takes it.

    Returns:
        What `BACKBONES[backbone]` is, to be called with the image and the other options.

    Raises:
        UserError: where the backbone cannot do what was asked for, naming those that can.
    """
    if not (insist or _takes(backbone, "rates")):
        rates = {}
    options = {name: value for name, value in (("rates", rates), ("deep_stem", deep_stem)) if value}
    for option in options:
        if not _takes(backbone, option):
            raise _lacking(backbone, option, [option])
    return functools.partial(BACKBONES[backbone], **options)


def evenly_dilated(backbone: str, output_stride: int) -> Callable[..., Features]:
    """Return the builder of a ResNet, told to dilate all units of a stage alike.

    Args:
        backbone: registry name.
        output_stride: at which the builder will be asked to start dilating.

    Returns:
        What `BACKBONES[backbone]` is, to be called with the image and the other options.

    Raises:
        UserError: where the backbone cannot do so, naming those that can.
    """
    if _takes(backbone, "rates"):
        return functools.partial(BACKBONES[backbone], rates=even_rates(output_stride))
    if _takes(backbone, "even_dilation"):
        return functools.partial(BACKBONES[backbone], even_dilation=True)
    raise _lacking(backbone, "even_dilation", ["rates", "even_dilation"])


def activated(backbone: str, activation: str | None) -> Callable[..., Features]:
    """Return the builder of a backbone, told which activation to put in place of its slow one.

    Args:
        backbone: registry name.
        activation: None for the backbone's own.

    Returns:
        What `BACKBONES[backbone]` is, to be called with the image and the other options.

    Raises:
        UserError: where the backbone has none to choose, naming those that have, or not this one.
    """
    if activation is None:
        return BACKBONES[backbone]
    if not _takes(backbone, "activation"):
        raise _lacking(backbone, "activation", ["activation"])
    return functools.partial(BACKBONES[backbone], activation=activation)


def even_rates(output_stride: int) -> dict[int, tuple[int, ...]]:
    """Return the rates that dilate all units of a stage alike, as in Caffe's networks.

    `output_stride` alone leaves the first unit of a stage at the rate of what came before
    (`features.enter`).
    """
    return {stride: (stride // output_stride,) for stride in (16, 32) if stride > output_stride}


def _lacking(backbone: str, wish: str, options: list[str]) -> UserError:
    able = [name for name in BACKBONES if any(_takes(name, option) for option in options)]
    return UserError(f"backbone {backbone} has no {_WORDS[wish]}; these have: {', '.join(able)}")


def _takes(backbone: str, option: str) -> bool:
    return option in inspect.signature(BACKBONES[backbone]).parameters
