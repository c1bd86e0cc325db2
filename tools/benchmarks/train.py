"""Images per second of a training step, beside segmentation-models-pytorch and keras-hub."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.live import Live
from rich.table import Column, Table

from kseg.errors import Failure, UserError
from kseg.registry import nearest
from tools.benchmarks.train_sides import NETS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Train:
    """Images per second of a training step, beside segmentation-models-pytorch and keras-hub.

    The same nets at random weights, cross entropy and SGD with momentum, on one batch that stays
    in memory. kseg's step is that of `kseg train`; smp's is eager torch, in bfloat16 by autocast
    and channels-last; keras-hub's is Keras' `train_on_batch`. Each side has a process of its own;
    turns are taken kseg, smp, keras-hub, kseg, ..., and the median of each counts. Needs
    `pip install 'kseg[peers]'`.
    """

    nets: tuple[str, ...] = tuple(NETS)
    """Which nets."""
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16."""
    jit: bool = False
    """Measure kseg with XLA, too; compiling alone takes minutes on a CPU."""
    batch_size: int = 4
    """Images a step."""
    size: int = 256
    """Height and width of the images."""
    steps: int = 5
    """Steps of a turn."""
    turns: int = 3
    """Turns of each side."""


def benchmark_train(options: Train) -> int:
    """Measure, print a table; 0 if kseg is ahead of each peer everywhere, else 1."""
    for net in options.nets:
        if net not in NETS:
            raise UserError(f"no net {net!r}{nearest(net, NETS)} (there are: {', '.join(NETS)})")
    peers = ("smp", "keras-hub")
    sides = ("kseg", "kseg-jit") if options.jit else ("kseg",)
    net_column = Column("net", overflow="fold")  # a name that is cut tells nothing
    titles = (*sides, *(text for peer in peers for text in (peer, "ratio")))
    table = Table(net_column, "type", *titles)
    table.caption = (
        f"images/s; {options.size} x {options.size}, batch {options.batch_size}, "
        f"{os.cpu_count()} cores"
    )
    ahead = True
    with Live(table):  # a net that fails leaves the rows before it
        for net, precision in itertools.product(options.nets, options.precisions):
            rates = images_per_second(net, precision, options)
            ratios = {peer: rates["kseg"] / rates[peer] for peer in peers if peer in rates}
            ahead &= min(ratios.values()) >= 1
            cells = [f"{rates[side]:.2f}" for side in sides]
            for peer in peers:
                known = peer in rates
                cells += [f"{rates[peer]:.2f}", f"{ratios[peer]:.2f}"] if known else ["-", "-"]
            table.add_row(net, precision, *cells)
    return 0 if ahead else 1


def images_per_second(net: str, precision: str, options: Train) -> dict[str, float]:
    """Return the rate of each side that has this net, by name."""
    sides = {"kseg": ("kseg", precision), "smp": ("smp", precision)}
    if options.jit:
        sides["kseg-jit"] = ("kseg", f"{precision}-jit")
    if NETS[net].hub:
        sides["keras-hub"] = ("keras-hub", precision)
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(_side(side, net, kind, options))
            for name, (side, kind) in sides.items()
        }
        turns = [
            [_seconds(process, options.steps) for process in running.values()]
            for _ in range(options.turns)
        ]
    medians = np.median(turns, axis=0)
    images = options.steps * options.batch_size
    return {name: images / float(time) for name, time in zip(running, medians, strict=True)}


@contextlib.contextmanager
def _side(side: str, net: str, precision: str, options: Train) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "tools.benchmarks.train_sides", side, net, precision]
    words += [str(options.batch_size), str(options.size)]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,  # not a pipe, which would fill up unread
            text=True,
            cwd=ROOT,
        ) as process,
    ):
        if process.stdout.readline() != "ready\n":
            said.seek(0)
            raise Failure(f"{side} {net}: {(said.read().strip().splitlines() or ['?'])[-1]}")
        yield process
        process.stdin.close()


def _seconds(process: subprocess.Popen[str], steps: int) -> float:
    print(steps, file=process.stdin, flush=True)
    return float(process.stdout.readline())
