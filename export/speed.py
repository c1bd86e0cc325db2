"""How long a `.tflite` file and its operators take here, on one thread of LiteRT.

The Python package has no profiler: an operator is timed in a file of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from kseg.errors import UserError
from kseg.quiet import quiet

from .operators import Network, Operator, operator_macs, read_network, single_operator
from .xnnpack import outside_xnnpack

ROUNDS, SECONDS = 30, 8.0  # of whole files
ALONE_ROUNDS, ALONE_SECONDS = 30, 0.4  # of one operator
COSTLY = 12  # operators on XNNPACK that are timed where those outside it are not to blame
FASTER = 0.95  # less is noise
BLAMED = 0.05  # the share of all excess that is worth a word
GAIN = 0.8  # of their time in float is the least that kernels gain where int8 products are fast


@dataclass(frozen=True)
class Timing:
    """One operator, run alone.

    Attributes:
        index: of the operator in the file.
        name: of the operator.
        outside: whether XNNPACK leaves it out in this file.
        milliseconds: median.
        twin_milliseconds: of the operator with the same output in the float file; None where
            there is none.
    """

    index: int
    name: str
    outside: bool
    milliseconds: float
    twin_milliseconds: float | None = None

    @property
    def excess(self) -> float:
        """What it takes more than in float, milliseconds."""
        return self.milliseconds - (self.twin_milliseconds or 0.0)


@dataclass(frozen=True)
class Speed:
    """What was measured on one thread.

    Attributes:
        milliseconds: median of the whole file.
        twin: the float file it was compared with; None if there was none.
        twin_milliseconds: median of that, its runs between those of the file.
        operators: those that were timed alone.
    """

    milliseconds: float
    twin: Path | None
    twin_milliseconds: float | None
    operators: tuple[Timing, ...]

    @property
    def faster(self) -> bool:
        """Whether the file is faster than its float twin by more than noise."""
        twin = self.twin_milliseconds
        return twin is not None and self.milliseconds < FASTER * twin

    @property
    def explained(self) -> bool:
        """Whether the file would be faster than its twin if no operator were slower."""
        excess = sum(max(one.excess, 0.0) for one in self.operators)
        twin = self.twin_milliseconds
        return twin is not None and self.milliseconds - excess < FASTER * twin


@dataclass(frozen=True)
class TwinFile:
    """The float file of the same model.

    Attributes:
        path: where it lies.
        network: what it is made of.
        outside: its operators that XNNPACK leaves out.
    """

    path: Path
    network: Network
    outside: Collection[int]


def measure(
    path: Path, network: Network, *, outside: Collection[int], twin: TwinFile | None
) -> Speed:
    """Time a file, and alone those of its operators that may make it slow.

    Without a twin these are the operators outside XNNPACK. With one, nothing more is timed if the
    file is faster; else those outside XNNPACK, and if they do not explain it, the costliest others.

    Raises:
        UserError: if LiteRT cannot run a file.
    """
    if twin is None:
        (whole,) = medians([runner(path)], rounds=ROUNDS, seconds=SECONDS)
        return Speed(whole, None, None, _alone(path, network, outside, outside, None))
    whole, other = medians([runner(path), runner(twin.path)], rounds=ROUNDS, seconds=SECONDS)
    speed = Speed(whole, twin.path, other, ())
    if speed.faster:
        return speed
    speed = Speed(whole, twin.path, other, _alone(path, network, outside, outside, twin))
    if speed.explained:
        return speed
    more = _costliest(network, without=outside)
    found = (*speed.operators, *_alone(path, network, more, outside, twin))
    return Speed(whole, twin.path, other, found)


def why_slower(path: Path, twin: Path) -> str | None:
    """Return why a file is not faster than its float twin, in one sentence; None if it is faster.

    Both are timed on one thread, and alone those operators that may be to blame.
    """
    network, other = read_network(path), read_network(twin)
    outside = outside_xnnpack(path)
    speed = measure(
        path, network, outside=outside, twin=TwinFile(twin, other, outside_xnnpack(twin))
    )
    if speed.faster:
        return None
    took = [*filter(None, [little_gained(speed)]), *map(_took, blamed(speed)[:3])]
    text = f"no faster than {twin.name} here ({_plain_comparison(speed)})"
    return f"{text}: {'; '.join(took)}" if took else text


def blamed(speed: Speed) -> list[list[Timing]]:
    """Return the timed operators by name, those with the most excess first."""
    groups = [
        [one for one in speed.operators if one.name == name]
        for name in dict.fromkeys(one.name for one in speed.operators)
    ]
    total = sum(max(_excess(group), 0) for group in groups)
    worth = [group for group in groups if _excess(group) > BLAMED * total]
    return sorted(worth, key=_excess, reverse=True)


def little_gained(speed: Speed) -> str | None:
    """Return how little integers gain on XNNPACK here, where they do; None where they gain.

    No operator need be slower than in float for it: a processor without dot products of int8 does
    not compute any faster than with float32.
    """
    known = [one for one in speed.operators if not one.outside and one.twin_milliseconds]
    before = sum(one.twin_milliseconds for one in known)
    if total(known) <= GAIN * before:
        return None
    kinds = "the costliest operators" if len(known) > 1 else known[0].name
    return (
        f"on XNNPACK {kinds} take {total(known):.1f} ms instead of {before:.1f}, "
        "whose int8 kernels gain little on this processor"
    )


def _excess(group: Sequence[Timing]) -> float:
    return sum(one.excess for one in group)


def total(group: Sequence[Timing]) -> float:
    """Return what operators take together, milliseconds."""
    return sum(one.milliseconds for one in group)


def medians(runs: Sequence[Callable[[], None]], *, rounds: int, seconds: float) -> list[float]:
    """Return the median time of each, in milliseconds; they take turns after a first round.

    Args:
        runs: what is timed.
        rounds: how often, at most.
        seconds: when to stop before that, but not before each was timed once.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < rounds and (not times[0] or time.perf_counter() < end):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) for taken in times]


def runner(file: Path | bytes, *, xnnpack: bool = True) -> Callable[[], None]:
    """Return the call that runs a file once on one thread, on the same noise each time.

    Raises:
        UserError: if LiteRT cannot run it.
    """
    kind = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    content = {"model_path": str(file)} if isinstance(file, Path) else {"model_content": file}
    try:
        with quiet():
            interpreter = Interpreter(**content, num_threads=1, experimental_op_resolver_type=kind)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        named = file if isinstance(file, Path) else "an operator alone"
        raise UserError(f"{named} cannot be run by LiteRT: {error}") from error
    random = np.random.default_rng(0)
    for given in interpreter.get_input_details():
        interpreter.set_tensor(given["index"], _noise(random, given["shape"], given["dtype"]))
    return interpreter.invoke


def _noise(random: np.random.Generator, shape: np.ndarray, dtype: type) -> np.ndarray:
    if dtype in (np.uint8, np.int8):
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    if np.issubdtype(dtype, np.floating):
        return random.standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)  # indices: 0 is always one


def _alone(
    path: Path,
    network: Network,
    indices: Collection[int],
    outside: Collection[int],
    twin: TwinFile | None,
) -> tuple[Timing, ...]:
    """Time operators alone; of those that are alike in all but their weights, the first."""
    found: dict[tuple, tuple[float, float | None]] = {}
    timings = []
    for index in sorted(indices):
        operator = network.operators[index]
        other = None if twin is None else _same(network, operator, twin.network)
        key = (_likeness(network, operator), other is None)
        if key not in found:
            runs = [runner(single_operator(path, index), xnnpack=index not in outside)]
            if other is not None:
                alone = single_operator(twin.path, other.index)
                runs.append(runner(alone, xnnpack=other.index not in twin.outside))
            times = medians(runs, rounds=ALONE_ROUNDS, seconds=ALONE_SECONDS)
            found[key] = (times[0], times[1] if other is not None else None)
        timings.append(Timing(index, operator.name, index in outside, *found[key]))
    return tuple(timings)


def _same(network: Network, operator: Operator, other: Network) -> Operator | None:
    """Return the operator of another file that has the same name and output."""
    names = {tensor.name for tensor in network.results(operator)}
    for one in other.operators:
        if one.name == operator.name and names & {tensor.name for tensor in other.results(one)}:
            return one
    return None


def _likeness(network: Network, operator: Operator) -> tuple:
    tensors = (*network.sources(operator), *network.results(operator))
    options = tuple(sorted((name, str(value)) for name, value in operator.options.items()))
    return operator.name, options, tuple((tensor.dtype, tensor.shape) for tensor in tensors)


def _costliest(network: Network, *, without: Collection[int]) -> list[int]:
    def cost(operator: Operator) -> tuple[int, int]:
        written = sum(tensor.bytes for tensor in network.results(operator))
        return operator_macs(network, operator), written

    others = [one for one in network.operators if one.index not in without]
    return [one.index for one in sorted(others, key=cost, reverse=True)[:COSTLY]]


def _took(group: Sequence[Timing]) -> str:
    name = counted(group[0].name, len(group))
    known = [one.twin_milliseconds for one in group if one.twin_milliseconds is not None]
    before = f" instead of {sum(known):.1f}" if known else ""
    where = " outside XNNPACK" if group[0].outside else ""
    return f"{name}{where} take {total(group):.1f} ms{before}"


def _plain_comparison(speed: Speed) -> str:
    return f"{speed.milliseconds:.1f} against {speed.twin_milliseconds:.1f} ms"


def counted(name: str, count: int) -> str:
    """Return "CONV_2D" of one, "3 CONV_2D" of three."""
    return name if count == 1 else f"{count} {name}"
