"""The rules that tables of accelerators are made of: each says what stands against an operator."""

from __future__ import annotations

import math
from collections.abc import Callable

from .operators import Network, Operator, Tensor

# What stands against an operator, in few words; "" where nothing does.
Rule = Callable[[Network, Operator], str]

FLOAT = ("float32", "float16")
BYTES = ("int8", "uint8")
SAME, VALID = 0, 1  # the schema's Padding


def every(*dtypes: str) -> Rule:
    """All tensors between operators are of these types."""
    return lambda network, one: fed(*dtypes)(network, one) or given(*dtypes)(network, one)


def fed(*dtypes: str) -> Rule:
    """All inputs that are not constant are of these types."""

    def rule(network: Network, one: Operator) -> str:
        wrong = [tensor.dtype for tensor in network.fed(one) if tensor.dtype not in dtypes]
        return f"{wrong[0]} input" if wrong else ""

    return rule


def given(*dtypes: str) -> Rule:
    """All outputs are of these types."""

    def rule(network: Network, one: Operator) -> str:
        wrong = [tensor.dtype for tensor in network.results(one) if tensor.dtype not in dtypes]
        return f"{wrong[0]} output" if wrong else ""

    return rule


def rank(most: int) -> Rule:
    """No tensor has more axes."""

    def rule(network: Network, one: Operator) -> str:
        ranks = [len(tensor.shape) for tensor in (*network.sources(one), *network.results(one))]
        return f"more than {most} axes" if max(ranks, default=0) > most else ""

    return rule


def version(most: int) -> Rule:
    """The operator is of this version or an older one."""
    return lambda network, one: f"version {one.version}" if one.version > most else ""


def activation(*names: str) -> Rule:
    """The fused activation is one of these, or there is none."""
    return lambda network, one: "" if one.activation in ("NONE", *names) else "fused activation"


def constant(*places: int) -> Rule:
    """The inputs at these places are constants, or left out."""

    def rule(network: Network, one: Operator) -> str:
        there = [one.inputs[place] for place in places if place < len(one.inputs)]
        free = [i for i in there if i >= 0 and not network.tensors[i].constant]
        return "operand not constant" if free else ""

    return rule


def inputs(*counts: int) -> Rule:
    """It has so many inputs, constants too."""
    return lambda network, one: "" if len(one.inputs) in counts else f"{len(one.inputs)} inputs"


def runtime_inputs(*counts: int) -> Rule:
    """It has so many inputs that are not constant."""

    def rule(network: Network, one: Operator) -> str:
        count = len(network.fed(one))
        return "" if count in counts else f"{count} inputs that are not constant"

    return rule


def option(name: str, *values: float, why: str) -> Rule:
    """The field of its options has one of these values; the first is the default."""
    return lambda network, one: "" if one.options.get(name, values[0]) in values else why


def stride(most: int) -> Rule:
    """It strides by no more."""
    return lambda network, one: f"stride above {most}" if max(_strides(one)) > most else ""


def long_stride_needs_valid(network: Network, one: Operator) -> str:
    """A stride above 3 comes without padding and without dilation."""
    dilated = max(_dilations(one)) > 1
    same = one.options.get("padding", VALID) == SAME
    return "stride above 3" if max(_strides(one)) > 3 and (dilated or same) else ""


def undilated(network: Network, one: Operator) -> str:
    """It does not dilate."""
    return "dilation" if max(_dilations(one)) > 1 else ""


def equal_dilation(network: Network, one: Operator) -> str:
    """It dilates both axes alike."""
    height, width = _dilations(one)
    return "dilation differs by axis" if height != width else ""


def dilation_without_stride(network: Network, one: Operator) -> str:
    """It does not both dilate and stride."""
    return "dilation with stride" if max(_dilations(one)) > 1 and max(_strides(one)) > 1 else ""


def one_depth(network: Network, one: Operator) -> str:
    """A depthwise convolution of several channels makes one of each."""
    channels = network.sources(one)[0].shape[-1]
    return "depth multiplier" if one.options.get("depthMultiplier", 1) > 1 < channels else ""


def static(*free: int) -> Rule:
    """No axis but these may change from call to call."""

    def rule(network: Network, one: Operator) -> str:
        tensors = (*network.sources(one), *network.results(one))
        changing = {axis for tensor in tensors for axis in tensor.dynamic}
        return "shape not fixed" if changing - set(free) else ""

    return rule


def one_image(network: Network, one: Operator) -> str:
    """It takes one image a call."""
    fed = network.fed(one)
    return "batch above 1" if fed and len(fed[0].shape) == 4 and fed[0].shape[0] > 1 else ""


def three_axes(network: Network, one: Operator) -> str:
    """Of more than three axes, only the innermost three are longer than 1."""
    tensors = (*network.fed(one), *network.results(one))
    long = any(math.prod(tensor.shape[:-3]) > 1 for tensor in tensors)
    return "more than 3 axes longer than 1" if long else ""


def broadcast(network: Network, one: Operator) -> str:
    """Two inputs of unequal rank fit from the last axis on."""
    first, second = (tensor.shape for tensor in network.sources(one)[:2])
    if len(first) == len(second) or min(len(first), len(second)) < 2:
        return ""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return "" if all(a == b or 1 in (a, b) for a, b in pairs) else "shapes do not broadcast"


def equal_batches(network: Network, one: Operator) -> str:
    """All axes but the last two are alike."""
    first, second = (tensor.shape for tensor in network.sources(one)[:2])
    return "" if first[:-2] == second[:-2] else "shapes broadcast"


def not_both_resizings(network: Network, one: Operator) -> str:
    """A resize does not align corners and halve pixels at once."""
    both = one.options.get("alignCorners") and one.options.get("halfPixelCenters")
    return "aligned corners with half pixels" if both else ""


def side_at_most(most: int) -> Rule:
    """The result is no higher and no wider."""

    def rule(network: Network, one: Operator) -> str:
        return f"side above {most}" if max(network.results(one)[0].shape[1:3]) > most else ""

    return rule


def window(most: int) -> Rule:
    """Of integers, the pooled windows have at most so many elements."""

    def rule(network: Network, one: Operator) -> str:
        large = one.options["filterHeight"] * one.options["filterWidth"] > most
        return f"window above {most}" if large and network.fed(one)[0].dtype in BYTES else ""

    return rule


def ethos_pool(network: Network, one: Operator) -> str:
    """The window is one that Vela takes: with padding, 8 on a side; else 256."""
    height, width = one.options["filterHeight"], one.options["filterWidth"]
    if one.options["padding"] == SAME and one.name == "AVERAGE_POOL_2D":
        return "window side above 8" if max(height, width) > 8 else ""
    return "window too large" if height > 256 or height * width > 256 * 256 else ""


def ethos_resize(network: Network, one: Operator) -> str:
    """The resize is one that Vela takes: by 2, or without half pixels by 4 and 8, too."""
    before, after = network.fed(one)[0].shape[1:3], network.results(one)[0].shape[1:3]
    if before in (after, (1, 1)):
        return ""
    less = 1 if one.options.get("alignCorners") else 0
    scales = {(b - less) / max(a - less, 1) for a, b in zip(before, after, strict=True)}
    allowed = {2} if one.options.get("halfPixelCenters") else {2, 4, 8}
    return "" if len(scales) == 1 and scales <= allowed else "not a doubling"


def ethos_mean(network: Network, one: Operator) -> str:
    """A mean over channels needs one axis of length 1."""
    shape, axes = network.fed(one)[0].shape, network.sources(one)[1].values
    over_depth = any(axis % len(shape) == len(shape) - 1 for axis in axes)
    return "over the channels" if over_depth and min(shape[-3:]) > 1 else ""


def last_axis(most: int) -> Rule:
    """The operator goes along the last axis, which is no longer than this."""

    def rule(network: Network, one: Operator) -> str:
        image, axis = network.sources(one)[:2]
        if axis.values and axis.values[0] % len(image.shape) != len(image.shape) - 1:
            return "not along the last axis"
        return f"more than {most} channels" if image.shape[-1] > most else ""

    return rule


def quantised(network: Network, one: Operator) -> str:
    """All tensors between operators have scales."""
    bare = [t for t in (*network.fed(one), *network.results(one)) if not t.scales]
    return "not quantised" if bare else ""


def weights_in_bytes(network: Network, one: Operator) -> str:
    """The weights have 8 bits."""
    return "" if network.sources(one)[1].dtype in BYTES else "weights not 8 bits"


def equal_scales(network: Network, one: Operator) -> str:
    """Inputs and output share one scale and zero point."""

    def scaling(tensor: Tensor) -> tuple[tuple[float, ...], tuple[int, ...]]:
        return tensor.scales, tensor.zero_points

    target = scaling(network.results(one)[0])
    return "" if all(scaling(t) == target for t in network.sources(one)) else "scales differ"


def area(most: int) -> Rule:
    """The input has at most so many positions."""

    def rule(network: Network, one: Operator) -> str:
        area = math.prod(network.fed(one)[0].shape[-3:-1])
        return f"more than {most} positions" if area > most else ""

    return rule


def vector(most: int) -> Rule:
    """The result is one vector of at most so many elements."""

    def rule(network: Network, one: Operator) -> str:
        shape = network.results(one)[0].shape
        return "" if math.prod(shape) == shape[-1] <= most else "not one vector"

    return rule


def not_over_batch(network: Network, one: Operator) -> str:
    """The batch is not padded, and nothing is reduced over it."""
    values = network.sources(one)[1].values
    touched = any(values[:2]) if one.name == "PAD" else 0 in values
    return "over the batch" if touched else ""


def transposed_stride(network: Network, one: Operator) -> str:
    """A transposed convolution strides by 1 or 2."""
    return "" if _strides(one) in ((1, 1), (2, 2)) else "stride neither 1 nor 2"


def filter_in_type(network: Network, one: Operator) -> str:
    """Weights are float with float activations, 8 bits with integers."""
    activation, weights = network.sources(one)[0].dtype, network.sources(one)[1].dtype
    same = weights == "float32" if activation == "float32" else weights in ("int8", "int4")
    return "" if same else "weights and activations of two kinds"


def _strides(one: Operator) -> tuple[int, int]:
    return one.options.get("strideH", 1), one.options.get("strideW", 1)


def _dilations(one: Operator) -> tuple[int, int]:
    return one.options.get("dilationHFactor", 1), one.options.get("dilationWFactor", 1)
