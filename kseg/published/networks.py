"""The networks of other libraries: how kseg builds each, and what its layers are called there.

Nothing here imports Keras, so that a wrong name is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kseg.data.dataset import VOC_CLASSES
from kseg.errors import UserError
from kseg.registry import nearest

# A pattern of our layer names, and the name there: a template of its groups, or a function.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class Network:
    """A network of another library.

    Attributes:
        model: registry name of the architecture that computes the same.
        options: options of its builder.
        rules: from our layer names to theirs; the first that fits counts.
        size: height and width that the weights suit, pixels.
        classifiers: our layers that are shaped by the number of classes.
        aux: what the names of the training-only head begin with that is our output "aux".
        left_out: what the names of tensors begin with that are not taken, and why.
        halves_swapped: our layers that see the halves of their input the other way round.
        classes: names of the classes, where the weights have as many.
    """

    model: str
    options: Mapping[str, Any]
    rules: tuple[Rule, ...]
    size: tuple[int, int]
    classifiers: tuple[str, ...] = ("logits_conv", "aux_conv", "score_low", "score_high")
    aux: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    halves_swapped: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def theirs(self, layer: str) -> str:
        """Return what a layer of ours is called there; raises KeyError where no rule fits."""
        for pattern, name in self.rules:
            found = re.fullmatch(pattern, layer)
            if found:
                return _filled(name, found)
        raise KeyError(layer)


def network(name: str) -> Network:
    """Return the network that `--as` names; raises UserError with the nearest name."""
    if name not in NETWORKS:
        raise UserError(
            f"no network {name!r}{nearest(name, NETWORKS)} (there are: {', '.join(NETWORKS)})"
        )
    return NETWORKS[name]


def _filled(name: str | Callable[[re.Match[str]], str], found: re.Match[str]) -> str:
    return found.expand(name) if isinstance(name, str) else name(found)


def _under(prefix: str, *rules: Rule) -> tuple[Rule, ...]:
    """Return rules whose names there begin with `prefix`."""

    def prefixed(name: str | Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
        return lambda found: prefix + _filled(name, found)

    return tuple((pattern, prefixed(name)) for pattern, name in rules)


def _conv_bn(ours: str, conv: str, bn: str) -> tuple[Rule, ...]:
    return (f"{ours}_conv", conv), (f"{ours}_bn", bn)


def _separable(ours: str, conv: str, bn: str) -> tuple[Rule, ...]:
    return (
        (f"{ours}_depthwise_conv", f"{conv}.0"),
        (f"{ours}_pointwise_conv", f"{conv}.1"),
        (f"{ours}_pointwise_bn", bn),
    )


def _unit(found: re.Match[str]) -> str:
    """Return for conv3_block1_2_bn layer2.0.bn2; part 0 of a unit is its shortcut."""
    stage, unit, part, kind = found.groups()
    inside = f"downsample.{('conv', 'bn').index(kind)}" if part == "0" else f"{kind}{part}"
    return f"layer{int(stage) - 1}.{int(unit) - 1}.{inside}"


def _block(found: re.Match[str]) -> str:
    """Return for expanded_conv_3_project_bn 4.block.3.1; the stem is 0, the first block 1."""
    block, part, inside = int(found[1] or 0), found[2], found[3]
    expand = ["expand"] if block else []
    gate = ["squeeze_excite"] if block in _GATED else []
    place = [*expand, "depthwise", *gate, "project"].index(part)
    return f"{block + 1}.block.{place}.{_INSIDE[inside]}"


# The blocks of MobileNetV3-Large that have a gate, and the parts of a part.
_GATED = (3, 4, 5, 10, 11, 12, 13, 14)
_INSIDE = {"": "0", "_bn": "1", "_conv": "fc1", "_conv_1": "fc2"}

_RESNET = (
    ("conv1_conv", "conv1"),
    ("conv1_bn", "bn1"),
    (r"conv(\d)_block(\d+)_(\d)_(conv|bn)", _unit),
)
_MOBILENET = (
    ("conv", "0.0"),
    ("conv_bn", "0.1"),
    (r"expanded_conv(?:_(\d+))?_(expand|depthwise|squeeze_excite|project)(\w*)", _block),
    ("conv_1", "16.0"),
    ("conv_1_bn", "16.1"),
)

_DEEPLAB_HEAD = _under(
    "classifier.",
    *_conv_bn("aspp_1x1", "0.convs.0.0", "0.convs.0.1"),
    *_conv_bn("aspp_rate12", "0.convs.1.0", "0.convs.1.1"),
    *_conv_bn("aspp_rate24", "0.convs.2.0", "0.convs.2.1"),
    *_conv_bn("aspp_rate36", "0.convs.3.0", "0.convs.3.1"),
    *_conv_bn("aspp_image", "0.convs.4.1", "0.convs.4.2"),
    *_conv_bn("aspp_project", "0.project.0", "0.project.1"),
    *_conv_bn("head", "1", "2"),
    ("logits_conv", "4"),
)
_FCN = _under("classifier.", *_conv_bn("logits_head", "0", "1"), ("logits_conv", "4"))
_LRASPP = _under(
    "classifier.",
    *_conv_bn("head", "cbr.0", "cbr.1"),
    ("gate_conv", "scale.1"),
    ("score_low", "low_classifier"),
    ("score_high", "high_classifier"),
)
_TORCHVISION_AUX = _under("aux_classifier.", *_conv_bn("aux_head", "0", "1"), ("aux_conv", "4"))

_SMP_UNET = (
    *_conv_bn("up16_([12])", r"decoder.blocks.0.conv\1.0", r"decoder.blocks.0.conv\1.1"),
    *_conv_bn("up8_([12])", r"decoder.blocks.1.conv\1.0", r"decoder.blocks.1.conv\1.1"),
    *_conv_bn("up4_([12])", r"decoder.blocks.2.conv\1.0", r"decoder.blocks.2.conv\1.1"),
    *_conv_bn("up2_([12])", r"decoder.blocks.3.conv\1.0", r"decoder.blocks.3.conv\1.1"),
    *_conv_bn("up1_([12])", r"decoder.blocks.4.conv\1.0", r"decoder.blocks.4.conv\1.1"),
    ("logits_conv", "segmentation_head.0"),
)
_SMP_DEEPLABPLUS = (
    *_conv_bn("aspp_1x1", "decoder.aspp.0.convs.0.0", "decoder.aspp.0.convs.0.1"),
    *_separable("aspp_rate12", "decoder.aspp.0.convs.1.0", "decoder.aspp.0.convs.1.1"),
    *_separable("aspp_rate24", "decoder.aspp.0.convs.2.0", "decoder.aspp.0.convs.2.1"),
    *_separable("aspp_rate36", "decoder.aspp.0.convs.3.0", "decoder.aspp.0.convs.3.1"),
    *_conv_bn("aspp_image", "decoder.aspp.0.convs.4.1", "decoder.aspp.0.convs.4.2"),
    *_conv_bn("aspp_project", "decoder.aspp.0.project.0", "decoder.aspp.0.project.1"),
    *_separable("head", "decoder.aspp.1", "decoder.aspp.2"),
    *_conv_bn("low_level", "decoder.block1.0", "decoder.block1.1"),
    *_separable("decoder1", "decoder.block2.0", "decoder.block2.1"),
    ("logits_conv", "segmentation_head.0"),
)
_SMP_PSPNET = (
    *_conv_bn("pyramid1", "decoder.psp.blocks.0.pool.1.0", "decoder.psp.blocks.0.pool.1.1"),
    *_conv_bn("pyramid2", "decoder.psp.blocks.1.pool.1.0", "decoder.psp.blocks.1.pool.1.1"),
    *_conv_bn("pyramid3", "decoder.psp.blocks.2.pool.1.0", "decoder.psp.blocks.2.pool.1.1"),
    *_conv_bn("pyramid6", "decoder.psp.blocks.3.pool.1.0", "decoder.psp.blocks.3.pool.1.1"),
    *_conv_bn("head", "decoder.conv.0", "decoder.conv.1"),
    ("logits_conv", "segmentation_head.0"),
)

# What is in some files and not taken, and why.
_OTHER_AUX = {"aux_classifier.": "it reads a shallower map than kseg's auxiliary head"}
_IMAGE_HEAD = {"classification_head.": "it labels whole images"}
_UNUSED = {
    f"encoder.layer{stage}.": "smp's PSPNet stops at stride 8 and does not use it"
    for stage in (3, 4)
}


def _torchvision_resnet(
    model: str, backbone: str, head: tuple[Rule, ...], options: Mapping[str, Any]
) -> Network:
    return Network(
        model,
        {"backbone": backbone, "form": "torch", **options},
        (*_under("backbone.", *_RESNET), *head, *_TORCHVISION_AUX),
        _TORCHVISION_SIZE,
        aux="aux_classifier.",
        classes=VOC_CLASSES,
    )


def _torchvision_mobilenet(
    model: str, head: tuple[Rule, ...], options: Mapping[str, Any]
) -> Network:
    return Network(
        model,
        {"backbone": "mobilenetv3_large_torchvision", "form": "torch", **options},
        (*_under("backbone.", *_MOBILENET), *head),
        _TORCHVISION_SIZE,
        left_out=_OTHER_AUX,
        classes=VOC_CLASSES,
    )


def _smp(
    model: str, encoder: str, decoder: tuple[Rule, ...], options: Mapping[str, Any]
) -> Network:
    pyramid = model == "pspnet"
    return Network(
        model,
        {"backbone": encoder, "form": "torch", **options},
        (*_under("encoder.", *_RESNET), *decoder),
        _SMP_SIZE,
        left_out=_IMAGE_HEAD | (_UNUSED if pyramid else {}),
        # Their pyramid stands before the map that it is made of, ours behind.
        halves_swapped=("head_conv",) if pyramid else (),
    )


# torchvision's own evaluation resizes the shorter side to 520; smp leaves the size to its user.
_TORCHVISION_SIZE, _SMP_SIZE = (520, 520), (512, 512)
_DEEPLAB = {"multi_grid": (), "head_conv": True, "dropout": 0.5}
_DEEPLAB_8 = {"output_stride": 8, **_DEEPLAB}
_DEEPLAB_16 = {"output_stride": 16, "rates": (12, 24, 36), **_DEEPLAB}
_UNET = {"upsampling": "nearest", "classifier_kernel": 3}
_DEEPLABPLUS = {
    "output_stride": 16,
    "even_dilation": True,
    "rates": (12, 24, 36),
    "inner_bn": False,
    "head_conv": True,
    "decoder_convs": 1,
    "align_corners": True,
    "dropout": 0.5,
}
_PSPNET = {
    "stages": 3,
    "output_stride": 32,
    "single_cell_bn": False,
    "align_corners": True,
    "head_kernel": 1,
    "classifier_kernel": 3,
    "dropout": 0.2,
}
_ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

NETWORKS: dict[str, Network] = {
    "torchvision:fcn_resnet50": _torchvision_resnet("fcn_resnet", "resnet50", _FCN, {}),
    "torchvision:fcn_resnet101": _torchvision_resnet("fcn_resnet", "resnet101", _FCN, {}),
    "torchvision:deeplabv3_resnet50": _torchvision_resnet(
        "deeplabv3", "resnet50", _DEEPLAB_HEAD, _DEEPLAB_8
    ),
    "torchvision:deeplabv3_resnet101": _torchvision_resnet(
        "deeplabv3", "resnet101", _DEEPLAB_HEAD, _DEEPLAB_8
    ),
    "torchvision:deeplabv3_mobilenet_v3_large": _torchvision_mobilenet(
        "deeplabv3", _DEEPLAB_HEAD, _DEEPLAB_16
    ),
    "torchvision:lraspp_mobilenet_v3_large": _torchvision_mobilenet("lraspp", _LRASPP, {}),
    **{f"smp:unet_{name}": _smp("unet_backbone", name, _SMP_UNET, _UNET) for name in _ENCODERS},
    **{
        f"smp:deeplabv3plus_{name}": _smp("deeplabv3plus", name, _SMP_DEEPLABPLUS, _DEEPLABPLUS)
        for name in _ENCODERS
    },
    **{f"smp:pspnet_{name}": _smp("pspnet", name, _SMP_PSPNET, _PSPNET) for name in _ENCODERS},
}
