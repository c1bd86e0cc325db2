"""The pre-flight of a `.tflite` file: operators, quantisation, accelerators, memory, speed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kseg import card as cards
from kseg.artifact import REJECTED
from kseg.errors import UserError
from kseg.files import write_text
from kseg.machine import machine

from .arena import arena_bytes
from .delegates import DELEGATES, NOT_LISTED, Delegate, refusals
from .operators import (
    Network,
    Tensor,
    float_operators,
    is_quantised,
    macs,
    operator_macs,
    read_network,
)
from .speed import Speed, TwinFile, measure
from .xnnpack import outside_xnnpack

TWIN = "model-float32.tflite"
XNNPACK = "XNNPACK"


@dataclass(frozen=True)
class Kind:
    """All operators of one name.

    Attributes:
        name: as "CONV_2D".
        dtypes: types of their outputs.
        count: how many.
        outside: how many of them XNNPACK leaves out.
        macs: multiply-accumulates of all.
    """

    name: str
    dtypes: tuple[str, ...]
    count: int
    outside: int
    macs: int


@dataclass(frozen=True)
class Refused:
    """Operators of one name that a delegate cannot take for one reason."""

    name: str
    reason: str
    count: int


@dataclass(frozen=True)
class Reach:
    """What one delegate takes of the file.

    Attributes:
        delegate: its name.
        ran: whether this was found by running; else by published rules.
        taken: how many operators it takes.
        macs: multiply-accumulates of these.
        refused: the operators that it cannot take.
        unsure: names of operators that count as taken, though some of their sizes are refused.
        stops: the name of the first refused operator, if all behind it are left out, too.
        whole: whether one refused operator keeps the whole file from running.
        source: where the rules stand.
        version: of the source.
        note: what else a person should know.
    """

    delegate: str
    ran: bool
    taken: int
    macs: int
    refused: tuple[Refused, ...]
    unsure: tuple[str, ...]
    stops: str
    whole: bool
    source: str
    version: str
    note: str


@dataclass(frozen=True)
class Inspection:
    """All that was found of a file.

    Attributes:
        file: its path.
        model: registry name of the architecture, "" if the file carries no card of kseg.
        bytes: size on disk.
        inputs: name of each input to its type and shape.
        outputs: name of each output to its type and shape.
        quantised: whether activations are integers.
        weights: kind of the weights of convolutions and the like, to their count.
        floats: operators of a quantised file that compute in float, to their count.
        operators: how many there are.
        kinds: the same by name, most multiply-accumulates first.
        macs: multiply-accumulates of one call.
        arena: bytes of LiteRT's plan for activations, without a delegate.
        reaches: what XNNPACK and the accelerators of others take.
        speed: what was measured here.
        machine: where that was.
    """

    file: Path
    model: str
    bytes: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    quantised: bool
    weights: Mapping[str, int]
    floats: Mapping[str, int]
    operators: int
    kinds: tuple[Kind, ...]
    macs: int
    arena: int
    reaches: tuple[Reach, ...]
    speed: Speed
    machine: Mapping[str, str | int]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        verdict = {"faster": self.speed.faster, "explained": self.speed.explained}
        raw = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return raw | {"speed": raw["speed"] | (verdict if self.speed.twin else {})}

    def save_json(self, path: Path) -> None:
        """Write `to_json` to a file, which is either whole or untouched."""
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")


def inspect_file(path: Path, *, against: Path | None = None) -> Inspection:
    """Look at a `.tflite` file, and time it on one thread.

    Args:
        path: the file.
        against: its float twin, to compare the speed with; by default the file named
            `model-float32.tflite` beside it, if this one has integers.

    Raises:
        OSError: if a file is not there.
        UserError: if a file is no `.tflite`, is damaged, or is no twin of the other.
    """
    network = read_network(path)
    outside = outside_xnnpack(path)
    twin = _twin(path, network, against)
    card = cards.read(path)
    return Inspection(
        file=path,
        model="" if card is None else card.model,
        bytes=path.stat().st_size,
        inputs={network.tensors[i].name: _typed(network.tensors[i]) for i in network.inputs},
        outputs={network.tensors[i].name: _typed(network.tensors[i]) for i in network.outputs},
        quantised=is_quantised(network),
        weights=_weights(network),
        floats=dict(Counter(one.name for one in float_operators(network))),
        operators=len(network.operators),
        kinds=_kinds(network, outside),
        macs=macs(network),
        arena=arena_bytes(network),
        reaches=(_reach_here(network, outside), *(_reach(one, network) for one in DELEGATES)),
        speed=measure(path, network, outside=outside, twin=twin),
        machine=machine(),
    )


def _twin(path: Path, network: Network, against: Path | None) -> TwinFile | None:
    """Return the float file to compare with, if there is one."""
    beside = path.with_name(_twin_name(path))
    if against is None and (_is_float(network) or not beside.is_file()):
        return None
    other = read_network(against or beside)
    if _shapes(network) != _shapes(other) or not _is_float(other):
        if against is None:
            return None
        raise UserError(
            f"{against} is no float twin of {path}: --against takes the float file of the same "
            "model and size"
        )
    return TwinFile(against or beside, other, outside_xnnpack(against or beside))


def _twin_name(path: Path) -> str:
    """Return the name of the float file: that of an export for several sizes keeps the size."""
    size = re.search(r"-\d+x\d+(?=\.tflite)", path.name.removesuffix(REJECTED))
    return TWIN.replace(".tflite", f"{size[0]}.tflite") if size else TWIN


def _is_float(network: Network) -> bool:
    """Tell whether neither activations nor weights are integers."""
    return not is_quantised(network) and all(name.startswith("float") for name in _weights(network))


def _shapes(network: Network) -> list[tuple[int, ...]]:
    return [network.tensors[index].shape for index in (*network.inputs, *network.outputs)]


def _typed(tensor: Tensor) -> str:
    return f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _weights(network: Network) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for one in network.operators:
        if operator_macs(network, one) and len(network.sources(one)) > 1:
            weights = network.sources(one)[1]
            if weights.constant:
                how = " per channel" if weights.axis is not None else " per tensor"
                kinds[weights.dtype + (how if weights.scales else "")] += 1
    return dict(kinds)


def _kinds(network: Network, outside: Collection[int]) -> tuple[Kind, ...]:
    kinds = []
    for name in dict.fromkeys(one.name for one in network.operators):
        ours = [one for one in network.operators if one.name == name]
        dtypes = dict.fromkeys(tensor.dtype for one in ours for tensor in network.results(one))
        left = sum(one.index in outside for one in ours)
        products = sum(operator_macs(network, one) for one in ours)
        kinds.append(Kind(name, tuple(dtypes), len(ours), left, products))
    return tuple(sorted(kinds, key=lambda kind: (-kind.macs, -kind.count)))


def _reach_here(network: Network, outside: Sequence[int]) -> Reach:
    names = Counter(network.operators[index].name for index in outside)
    refused = tuple(Refused(name, NOT_LISTED, count) for name, count in names.items())
    return Reach(
        delegate=XNNPACK,
        ran=True,
        taken=len(network.operators) - len(outside),
        macs=_macs_without(network, outside),
        refused=refused,
        unsure=(),
        stops="",
        whole=False,
        source="LiteRT on this machine",
        version="",
        note="",
    )


def _reach(delegate: Delegate, network: Network) -> Reach:
    found = refusals(delegate, network)
    left = {one.index for one in found}
    if delegate.stops and found:
        left = set(range(found[0].index, len(network.operators)))
    if delegate.whole and found:
        left = set(range(len(network.operators)))
    groups = Counter((one.name, one.reason) for one in found)
    taken = {one.name for one in network.operators if one.index not in left}
    return Reach(
        delegate=delegate.name,
        ran=False,
        taken=len(network.operators) - len(left),
        macs=_macs_without(network, left),
        refused=tuple(Refused(*group, count) for group, count in groups.items()),
        unsure=tuple(name for name in delegate.unsure if name in taken),
        stops=found[0].name if delegate.stops and found else "",
        whole=delegate.whole,
        source=delegate.source,
        version=delegate.version,
        note=delegate.note,
    )


def _macs_without(network: Network, left: Collection[int]) -> int:
    return sum(operator_macs(network, one) for one in network.operators if one.index not in left)
