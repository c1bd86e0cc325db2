"""What a training shows while it runs: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kseg.config import TrainConfig

LINES = 20  # plain lines of a whole training in a pipe
_MEMORY = 20  # steps that the shown speed is averaged over
_COMPILED = 2  # steps at the start of a process that are slow


class Display:
    """Progress of one training, as a context manager around its loop.

    Attributes:
        images_per_second: recent speed; 0 before the second step.
    """

    def __init__(self, config: TrainConfig, *, done: int, console: Console | None = None) -> None:
        """Prepare a display.

        Args:
            config: a resolved configuration; its steps and batch size are used.
            done: steps that a resumed run has behind it.
            console: where to write; standard output if None.
        """
        self.images_per_second = 0.0
        self._config = config
        self._console = console or Console()
        self._miou = ""
        self._every = max(1, config.steps // LINES)
        self._times: list[float] = []
        self._rate = 0.0  # of the steps before, while a new one has not been measured
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=config.steps, completed=done, text="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(
        self, parameters: int, classes: Sequence[str], weights: Sequence[float] | None
    ) -> None:
        """Say what is trained: the model, its trainable `parameters`, the classes' weights."""
        config = self._config
        height, width = config.size
        self._console.print(
            f"{config.model}: {parameters / 1e6:.2f} M parameters; {config.steps} steps of "
            f"{config.batch_size} windows of {height} x {width}, {config.precision}",
            highlight=False,
            soft_wrap=True,
        )
        if weights is not None:
            ranked = sorted(zip(weights, classes, strict=True))
            ends = " to ".join(f"{weight:.2f} ({name})" for weight, name in (ranked[0], ranked[-1]))
            text = f"class weights ({config.class_weights}): {ends}"
            self._console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def slow(self) -> None:
        """Say that the precision that was asked for only costs time on this machine."""
        self._console.print(
            f"{self._config.precision} can be over ten times slower than float32 on this "
            "processor: stop here and start again with --precision float32.",
            highlight=False,
            soft_wrap=True,
        )

    def update(self, step: int, *, loss: float, learning_rate: float) -> None:
        """Show one finished step."""
        rate = self._steps_per_second()
        self.images_per_second = rate * self._config.batch_size
        # Not known before the second step, or where each step has a validation behind it.
        speed = f"{rate:.2f} steps/s {self.images_per_second:.1f} img/s " if rate else ""
        text = f"{speed}loss {loss:.3f} lr {learning_rate:.1e}{self._miou}"
        self._progress.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and step % self._every == 0:
            left = f" left {_clock((self._config.steps - step) / rate)}" if rate else ""
            self._console.print(f"step {step}/{self._config.steps} {text}{left}", soft_wrap=True)

    def validated(self, step: int, miou: float, *, best: bool) -> None:
        """Show a validation: `miou`, a fraction, and whether best.keras is from it."""
        self._miou = f" mIoU {miou:.3f}"
        mark = " (best)" if best else ""
        self._console.print(f"step {step}: validation mIoU {miou:.4f}{mark}", highlight=False)
        # The time of the validation is not the time of a step.
        self._times.clear()

    def _steps_per_second(self) -> float:
        self._times = [*self._times[-_MEMORY:], time.monotonic()]
        passed = self._times[-1] - self._times[0]
        if passed:
            self._rate = (len(self._times) - 1) / passed
        return self._rate


class Pace:
    """Mean loss and speed of the steps since the last row, and how long they waited for data."""

    def __init__(self, batch_size: int) -> None:
        """Begin; the first two steps are compiled while they run, so their time is left out."""
        self._batch_size = batch_size
        self._losses: list[float] = []
        self._waiting = self._working = 0.0
        self._steps = self._timed = 0
        self._since = time.monotonic()

    def waits(self) -> None:
        """Say that the next batch is waited for from now on."""
        self._since = time.monotonic()

    def works(self) -> None:
        """Say that a batch has come."""
        self._waiting += self._passed() if self._steps >= _COMPILED else 0.0

    def done(self, loss: float) -> None:
        """Say that its step is finished."""
        if self._steps >= _COMPILED:
            self._working += self._passed()
            self._timed += 1
        self._steps += 1
        self._losses.append(loss)

    def row(self) -> dict[str, float]:
        """Return what `Run.steps_file` holds of these steps, and begin anew."""
        whole = self._waiting + self._working
        row = {"loss": sum(self._losses) / len(self._losses)}
        if whole:
            row["images_per_second"] = self._timed * self._batch_size / whole
            row["waiting"] = self._waiting / whole
        self._losses, self._waiting, self._working, self._timed = [], 0.0, 0.0, 0
        return row

    def _passed(self) -> float:
        before, self._since = self._since, time.monotonic()
        return self._since - before


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal while images are worked through; nothing in a pipe.

    Args:
        what: stands before the bar, as "evaluating".

    Yields:
        To be called with how many are done and how many there are.
    """
    console = Console()
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
