"""The memory that LiteRT plans for the activations of a `.tflite` file."""

from __future__ import annotations

import math
from collections import Counter

from .operators import Network

ALIGNMENT = 64  # kDefaultTensorAlignment of LiteRT
# Operators whose kernels may write over these of their inputs.
IN_PLACE = {"RESHAPE": (0,), "SOFTMAX": (0,), "ADD": (0, 1), "MUL": (0, 1), "SUB": (0, 1)}


def arena_bytes(network: Network) -> int:
    """Return the bytes of LiteRT's plan for all tensors that are not constant.

    The plan is greedy by size: tensors that live from first to last operator come first, then
    the largest; each takes the smallest gap between those alive at the same time, at multiples
    of 64 bytes. Inputs and outputs of the network are never overwritten; some operators write over
    an input that nothing else reads. It is exactly what LiteRT allocates with its reference
    kernels. Other kernels take more for their own work, and a delegate has a plan of its own. The
    weights that a float16 file widens when it is opened are left out.

    Source: tflite/arena_planner.cc and tflite/simple_memory_arena.cc of google-ai-edge/LiteRT,
    commit 7d88950; the algorithm is Greedy by Size of Pisarchyk and Lee, Efficient Memory
    Management for Deep Neural Net Inference, arXiv 2001.03288.
    """
    last = len(network.operators)
    lives = _lifetimes(network)

    def turn(index: int) -> tuple[bool, int, int, int]:
        whole = lives[index] == (0, last)
        return (not whole, 0 if whole else -network.tensors[index].bytes, lives[index][0], index)

    placed: list[tuple[int, int, tuple[int, int]]] = []  # offset, end, lifetime
    for index in sorted(lives, key=turn):
        first, end = lives[index]
        alive = sorted((a, b) for a, b, (start, stop) in placed if start <= end and first <= stop)
        offset = _best_gap(alive, network.tensors[index].bytes)
        placed.append((offset, offset + network.tensors[index].bytes, lives[index]))
    return max((end for _, end, _ in placed), default=0)


def _lifetimes(network: Network) -> dict[int, tuple[int, int]]:
    """Return each tensor that needs memory of its own with its first and last operator.

    What is never read, or read by the client, lives on to one past the last operator.
    """
    never, owner = len(network.operators), _owners(network)
    first = dict.fromkeys(network.inputs, 0)
    last = dict.fromkeys((*network.inputs, *network.outputs), never)
    read: dict[int, int] = {}
    for operator in network.operators:
        for index in operator.outputs if network.fed(operator) else ():
            first.setdefault(owner.get(index, index), operator.index)
        for index in operator.inputs:
            read[owner.get(index, index)] = operator.index
    return {i: (start, last.get(i, read.get(i, never))) for i, start in first.items()}


def _owners(network: Network) -> dict[int, int]:
    """Return the tensors that are written over another one, each with that other."""
    references = Counter((*network.inputs, *network.outputs))
    references.update(index for operator in network.operators for index in operator.inputs)
    owner: dict[int, int] = {}
    for operator in network.operators:
        for place in IN_PLACE.get(operator.name, ()):
            source, result = operator.inputs[place], operator.outputs[0]
            first = owner.get(source, source)
            once = max(references[source], references[first]) == 1
            if _may_own(network, source, result) and (once or operator.name == "RESHAPE"):
                owner[result] = first
                break
    return owner


def _may_own(network: Network, source: int, result: int) -> bool:
    before, after = network.tensors[source], network.tensors[result]
    inside = source not in network.inputs and result not in network.outputs
    return inside and not before.constant and before.bytes == after.bytes > 4


def _best_gap(alive: list[tuple[int, int]], size: int) -> int:
    """Return where `size` bytes go: the smallest gap that holds them, else behind the last."""
    best, least, current = None, math.inf, 0
    for offset, end in alive:
        aligned = -(-current // ALIGNMENT) * ALIGNMENT
        if aligned + size <= offset and offset - aligned < least:
            best, least = aligned, offset - current
        current = max(current, end)
    return -(-current // ALIGNMENT) * ALIGNMENT if best is None else best
