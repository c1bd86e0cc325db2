"""What is wrong with a file, told by its operators, scales and kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kseg.config import Feed

from .kernels import WRONG_SCALE, kernel_differences
from .layerwise import layer_noise
from .operators import Network, Operator

TOLERANCE = 0.01  # of scales that have to be equal
OTHER_KERNEL = 0.25  # error as a share of a kernel's size, which 8 bits stay far below
CLIPPED = 5.0  # per cent of values; extremes of calibration images leave out far fewer
# Where an operator has its input, kernel and bias.
_BIASED = {
    "CONV_2D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}
_SAME_SCALE = (
    "RESHAPE",
    "MAX_POOL_2D",
    "AVERAGE_POOL_2D",
    "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR",
    "TRANSPOSE",
    "PAD",
    "STRIDED_SLICE",
    "DEPTH_TO_SPACE",
    "CONCATENATION",
)


@dataclass(frozen=True)
class Fault:
    """One fault of a file.

    Attributes:
        name: "shift", "transposed", "mirrored", "relabelled", "channels", "normalisation",
            "resize", "scale", "weights", or "result" where none of these explains it.
        sentence: what is wrong, for a person.
        agreement: labels of the file that a model with this fault gives, per cent; None where
            the file's own structure tells.
    """

    name: str
    sentence: str
    agreement: float | None = None


def structural_faults(network: Network) -> list[Fault]:
    """Return what the operators of a `.tflite` file tell by themselves: resizes and scales."""
    found = [_resize_fault(network, operator) for operator in network.operators]
    found += [_scale_fault(network, operator) for operator in network.operators]
    return [fault for fault in found if fault is not None]


def _resize_fault(network: Network, operator: Operator) -> Fault | None:
    if operator.name != "RESIZE_BILINEAR" or operator.options.get("halfPixelCenters"):
        return None
    if set(network.tensors[operator.inputs[0]].shape[1:3]) == {1}:
        return None  # all ways to enlarge a single pixel are one
    aligned = operator.options.get("alignCorners")
    how = "align_corners" if aligned else "corners in place of pixel centres"
    return Fault("resize", f"operator {operator.index}, RESIZE_BILINEAR, enlarges with {how}")


def _scale_fault(network: Network, operator: Operator) -> Fault | None:
    """Return a fault if an operator's scales contradict each other.

    Source: "LiteRT 8-bit quantization specification": a bias has the scale of the input times
    that of the kernel, and what only moves values has one scale on both sides.
    """
    if operator.name in _SAME_SCALE or _is_edge(network, operator):
        return _unequal(network, operator)
    place = _BIASED.get(operator.name)
    if place is None or len(operator.inputs) <= max(place) or operator.inputs[place[2]] < 0:
        return None
    image, kernel, bias = (network.tensors[operator.inputs[index]] for index in place)
    # The rule is int8's; with 16-bit maps the converter itself leaves it.
    if bias.dtype != "int32" or not (image.scales and kernel.scales and bias.scales):
        return None
    product = image.scales[0] * np.asarray(kernel.scales)
    factors = np.asarray(bias.scales) / product
    worst = factors[np.argmax(np.abs(np.log(factors)))]
    if abs(worst - 1) < TOLERANCE:
        return None
    return Fault(
        "scale",
        f"the scales of operator {operator.index}, {operator.name} ({kernel.name}), contradict "
        f"each other: its bias has {worst:.3g} times the scale of its input times its kernel; one "
        "of the three is wrong",
    )


def _is_edge(network: Network, operator: Operator) -> bool:
    """Tell whether an operator gives the image or the result, in bytes, another sign alone."""
    tensors = [network.tensors[index] for index in (*operator.inputs, *operator.outputs)]
    return (
        operator.name == "QUANTIZE"
        and all(tensor.dtype in ("int8", "uint8") for tensor in tensors)
        and (operator.inputs[0] in network.inputs or operator.outputs[0] in network.outputs)
    )


def _unequal(network: Network, operator: Operator) -> Fault | None:
    result = network.tensors[operator.outputs[0]]
    # All that is joined has the result's scale; of other operators, only the first is data.
    joined = operator.inputs if operator.name == "CONCATENATION" else operator.inputs[:1]
    for tensor in (network.tensors[index] for index in joined):
        if not len(tensor.scales) == len(result.scales) == 1:
            continue
        before, after = tensor.scales[0], result.scales[0]
        if abs(after / before - 1) >= TOLERANCE:
            where = f"operator {operator.index}, {operator.name} ({result.name})"
            text = f"{where}, keeps its values, yet its scale goes from {before:.4g} to {after:.4g}"
            return Fault("scale", text)
    return None


def nearest_fault(network: Network, twin: Network) -> Fault | None:
    """Return the first resize by nearest pixel that is bilinear in the float twin.

    Labels hardly tell the two apart where a net is sure, so that agreement stays high.
    """

    def resizes(one: Network, kind: str) -> list[tuple[Operator, tuple[int, ...]]]:
        found = [operator for operator in one.operators if operator.name == f"RESIZE_{kind}"]
        return [(operator, one.results(operator)[0].shape[1:3]) for operator in found]

    wanted = Counter(size for _, size in resizes(twin, "BILINEAR"))
    wanted -= Counter(size for _, size in resizes(network, "BILINEAR"))
    nearest = Counter(size for _, size in resizes(twin, "NEAREST_NEIGHBOR"))
    for operator, size in resizes(network, "NEAREST_NEIGHBOR"):
        nearest[size] -= 1
        if nearest[size] < 0 < wanted[size]:
            where = f"operator {operator.index}, RESIZE_NEAREST_NEIGHBOR to {size[0]} x {size[1]}"
            return Fault("resize", f"{where}, takes the nearest pixel; the model is bilinear there")
    return None


def kernel_fault(path: Path, float_path: Path) -> Fault | None:
    """Return which kernel of a file is not that of its float twin, the most wrong one.

    Kernels are found by their names, which the converter makes; another program's may differ.
    """
    found = kernel_differences(path, float_path)
    scaled = {name: abs(math.log(max(one.factor, 1e-6))) for name, one in found.items()}
    name = max(scaled, key=scaled.get, default=None)
    if name is not None and found[name].error < OTHER_KERNEL and scaled[name] > WRONG_SCALE:
        text = f"the kernel {name} is {found[name].factor:.3g} times the model's in a channel"
        return Fault("scale", text)
    name = max(found, key=lambda key: found[key].error, default=None)
    if name is not None and found[name].error > OTHER_KERNEL:
        share = f"{100 * found[name].error:.0f} %"
        return Fault(
            "weights", f"the kernel {name} differs from the model's by {share} of its size"
        )
    return None


def departure(
    path: Path, float_path: Path, images: Sequence[np.ndarray], *, fed_as: Feed = "bytes"
) -> Fault | None:
    """Return where a quantised file departs from its float twin.

    Args:
        path: the quantised `.tflite` file.
        float_path: a float one of the same model.
        images: uint8 (H, W, 3).
        fed_as: the form of the images that the quantised file is given.
    """
    wrong = kernel_fault(path, float_path)
    if wrong is not None:
        return wrong
    try:
        noises = layer_noise(path, float_path, images, fed_as=fed_as)
    except RuntimeError as error:
        # XNNPACK runs on where LiteRT's own kernels refuse, as of variables that were never set.
        reason = str(error).strip().splitlines()[0]
        return Fault("result", f"the file does not run without XNNPACK: {reason}")
    if not noises:
        return None
    worst = max(noises, key=lambda one: one.lost)
    where = f"operator {worst.operator}, {worst.kind} ({worst.tensor})"
    if worst.clipped > CLIPPED:
        text = f"{worst.clipped:.0f} % of the values of {where} lie outside its scale's range"
        return Fault("scale", text)
    text = f"the results depart at {where}: signal to noise {worst.decibels:.0f} dB"
    return Fault("result", text)
