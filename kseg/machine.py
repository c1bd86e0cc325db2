"""The machine that a number was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Return processor, count of cores and system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
    }


def whole_memory() -> int:
    """Return how many bytes of memory this process may have, free or not.

    What is free is no measure of what fits: files that were read count as taken until their
    place is needed.
    """
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else "max"
    bounds = [int(text)] if text.isdigit() else []
    if hasattr(os, "sysconf"):  # not Windows
        bounds.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(bounds, default=4 << 30)


def _processor() -> str:
    file = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows
    text = file.read_text() if file.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or "unknown processor"
