"""The machine that a number was measured on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 4 << 30  # bytes, where a system does not tell its memory
# Versions 2 and 1 of Linux's control groups, as a container sees its own: folder, files of the
# limit and of what is taken, and the words of memory.stat before what of that are files.
CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def machine() -> dict[str, str | int]:
    """Return processor, count of cores and system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
    }


def whole_memory(root: Path = Path("/")) -> int:
    """Return how many bytes of memory this process may have, free or not.

    Args:
        root: where the system tells it.
    """
    bounds = [limit for limit, _ in _containers(root)]
    if hasattr(os, "sysconf"):  # not Windows
        bounds.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(bounds, default=UNKNOWN)


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process may still take, as far as the system tells.

    Files that were read stay in memory until their place is needed. They are free here, in a
    container as on the whole machine (MemAvailable of Linux counts them so, too).

    Args:
        root: where the system tells it.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():  # not Linux
        return UNKNOWN
    available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
    return min([available, *(max(0, limit - taken) for limit, taken in _containers(root))])


def _containers(root: Path) -> Iterator[tuple[int, int]]:
    """Give the limit of a container and what it has taken, files that were read left out."""
    for folder, limit, used, prefix in CGROUPS:
        text = _text(root / folder / limit).strip()
        if text.isdigit():  # not "max"
            held = dict(line.split() for line in _text(root / folder / "memory.stat").splitlines())
            files = sum(int(held.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield int(text), int(_text(root / folder / used) or 0) - files


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _processor() -> str:
    file = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows
    text = file.read_text() if file.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or "unknown processor"
