"""Functions measured in turns, so that whatever else the machine does meets them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

# Seconds: the threads of TensorFlow and onnxruntime wait for more work with the processor busy,
# and would take the next one's second core.
PAUSE = 0.1


def interleaved(
    runs: dict[str, Callable[[], object]], turns: int, *, ahead: int = 0
) -> dict[str, float]:
    """Return the median milliseconds of each function; each turn calls all, with pauses.

    Args:
        runs: what is measured, by name.
        turns: how often each is.
        ahead: calls between a pause and the measured one, for what is called again and again.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            time.sleep(PAUSE)
            for _ in range(ahead):
                run()
            start = time.perf_counter()
            run()
            if turn:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}
