"""Where a quantised file departs from the float one: signal to noise, operator by operator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from kseg.config import Feed
from kseg.quiet import quiet
from kseg.runtimes import set_image

from .operators import Network, read_network

_SILENT = 1e-30  # power below which a map counts as zero


@dataclass(frozen=True)
class Noise:
    """How far the result of one operator lies from the float file's.

    Attributes:
        operator: its index in the quantised file.
        kind: as "CONV_2D".
        tensor: name of its result.
        decibels: signal to noise ratio of the result, over all images.
        before: the lowest ratio among its inputs; infinite where they are the image's own bytes.
        clipped: share of the float values that lie outside the result's range, per cent.
    """

    operator: int
    kind: str
    tensor: str
    decibels: float
    before: float
    clipped: float

    @property
    def lost(self) -> float:
        """What the operator itself adds, as a share of the signal's power."""
        earlier = 0.0 if math.isinf(self.before) else 10 ** (-self.before / 10)
        return max(10 ** (-self.decibels / 10) - earlier, 0.0)


def layer_noise(
    path: Path, float_path: Path, images: Sequence[np.ndarray], *, fed_as: Feed = "bytes"
) -> list[Noise]:
    """Compare two files of one model on images, operator by operator.

    Results are found in both by their names, which the converter keeps; those that only one
    file has are left out.

    Args:
        path: the quantised file.
        float_path: the float file.
        images: uint8 (H, W, 3).
        fed_as: the form of the images that the quantised file is given.

    Returns:
        One entry an operator that both have, in the order of the file.
    """
    network = read_network(path)
    ours, theirs = interpreter_of_all(path), interpreter_of_all(float_path)
    names = _shared(ours, theirs, network)
    sums = {name: np.zeros(3) for name in names}  # signal, noise, share clipped
    for image in images:
        for name, value, wanted in _results(ours, theirs, names, image, fed_as):
            power, error = np.sum(wanted**2), np.sum((value - wanted) ** 2)
            sums[name] += power, error, _clipped(network, names[name][0], wanted)
    return list(_noises(network, names, sums, count=len(images)))


def _noises(
    network: Network, names: dict[str, tuple[int, int]], sums: dict[str, np.ndarray], *, count: int
) -> Iterator[Noise]:
    decibels = {names[name][0]: _decibels(*found[:2]) for name, found in sums.items()}
    for operator in network.operators:
        index = operator.outputs[0]
        name = network.tensors[index].name
        if index not in decibels or name not in names:
            continue
        before = min((decibels.get(one, math.inf) for one in operator.inputs), default=math.inf)
        clipped = float(100 * sums[name][2] / count)
        yield Noise(operator.index, operator.name, name, decibels[index], before, clipped)


def _decibels(power: float, error: float) -> float:
    return math.inf if error <= _SILENT else 10 * math.log10(max(power, _SILENT) / error)


def interpreter_of_all(path: Path) -> Interpreter:
    """Return an interpreter that keeps every result, which delegates would not."""
    with quiet():
        interpreter = Interpreter(
            model_path=str(path),
            num_threads=1,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        interpreter.allocate_tensors()
    return interpreter


def _shared(ours: Interpreter, theirs: Interpreter, network: Network) -> dict[str, tuple[int, int]]:
    """Return by name the index, in each file, of the results that both have in one shape."""
    made = {index for operator in network.operators for index in operator.outputs}
    float_ones = {t["name"]: t for t in theirs.get_tensor_details() if t["dtype"] == np.float32}
    return {
        tensor["name"]: (tensor["index"], float_ones[tensor["name"]]["index"])
        for tensor in ours.get_tensor_details()
        if tensor["index"] in made
        and tensor["dtype"] in (np.int8, np.int16)
        and tensor["name"] in float_ones
        and tuple(tensor["shape"]) == tuple(float_ones[tensor["name"]]["shape"])
    }


def _results(
    ours: Interpreter,
    theirs: Interpreter,
    names: dict[str, tuple[int, int]],
    image: np.ndarray,
    fed_as: Feed,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Give name, value and float value of each result on an image."""
    for interpreter, form in ((ours, fed_as), (theirs, "bytes")):
        set_image(interpreter, image, fed_as=form)
        interpreter.invoke()
    details = {tensor["index"]: tensor for tensor in ours.get_tensor_details()}
    for name, (mine, other) in names.items():
        scale, zero = details[mine]["quantization"]
        raw = ours.get_tensor(mine).astype(np.float32)
        yield name, (raw - zero) * np.float32(scale), theirs.get_tensor(other)


def _clipped(network: Network, index: int, wanted: np.ndarray) -> float:
    tensor = network.tensors[index]
    limits = np.iinfo(tensor.dtype)
    scale, zero = tensor.scales[0], tensor.zero_points[0]
    # Half a step beyond the last value still rounds to it.
    low, high = (
        (limit - zero + side) * scale for limit, side in ((limits.min, -1), (limits.max, 1))
    )
    return float(np.mean((wanted < low) | (wanted > high)))
