"""Which operators of a `.tflite` file XNNPACK runs on this machine, found by running."""

from __future__ import annotations

from pathlib import Path

from ai_edge_litert.interpreter import Interpreter, OpResolverType

from kseg.errors import UserError
from kseg.quiet import quiet


def outside_xnnpack(path: Path) -> list[int]:
    """Return the indices of the operators that XNNPACK does not run here, found by running.

    An interpreter with XNNPACK keeps the original operators and adds one DELEGATE for each part
    that it took over; going back from the outputs of a DELEGATE to its inputs finds that part.

    Raises:
        UserError: if LiteRT cannot open the file.
    """
    # A private method, as the public interface has no list of operators.
    plain = _interpreter(path, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)._get_ops_details()
    made_by = {int(tensor): one["index"] for one in plain for tensor in one["outputs"]}
    by_index = {one["index"]: one for one in plain}
    taken: set[int] = set()
    for part in _interpreter(path, OpResolverType.AUTO)._get_ops_details():
        if part["op_name"] == "DELEGATE":
            taken |= _between(part, by_index, made_by)
    return [one["index"] for one in plain if one["index"] not in taken]


def _interpreter(path: Path, resolver: OpResolverType) -> Interpreter:
    try:
        with quiet():
            interpreter = Interpreter(
                model_path=str(path), num_threads=1, experimental_op_resolver_type=resolver
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be run by LiteRT: {reason[0]}") from error
    return interpreter


def _between(part: dict, by_index: dict[int, dict], made_by: dict[int, int]) -> set[int]:
    """Return the operators on the way from a part's inputs to its outputs."""
    found: set[int] = set()
    edge = {int(tensor) for tensor in part["inputs"]}
    waiting = [int(tensor) for tensor in part["outputs"]]
    while waiting:
        tensor = waiting.pop()
        one = made_by.get(tensor)
        if tensor in edge or one is None or one in found:
            continue
        found.add(one)
        waiting += [int(source) for source in by_index[one]["inputs"]]
    return found
