"""Numbers as people read them on a page; what is None or NaN shows as "-"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import ROUND_DOWN, Decimal

ABSENT = "-"  # stands for a number that there is none of
GAP = "\N{NO-BREAK SPACE}"  # between a number and its unit
Interval = Sequence[float | None] | None


def is_missing(value: float | None) -> bool:
    """Tell whether there is no number."""
    return value is None or math.isnan(value)


def ends(interval: Interval) -> tuple[float, float] | None:
    """Return both ends of an interval, or None if one is missing."""
    if not interval or any(map(is_missing, interval)):
        return None
    low, high = interval
    return low, high


def percent(value: float | None) -> str:
    """Return per cent with two decimals, rounded down."""
    return ABSENT if is_missing(value) else f"{_floored(value)}{GAP}%"


def percent_range(interval: Interval) -> str:
    """Return an interval of per cents."""
    both = ends(interval)
    return f"{_floored(both[0])} to {_floored(both[1])}{GAP}%" if both else ABSENT


def share(value: float | None) -> str:
    """Return a fraction of 1 as per cent, small ones with a decimal more."""
    if is_missing(value):
        return ABSENT
    return f"{100 * value:.{1 if value >= 0.0995 else 2}f}{GAP}%"


def points(value: float | None) -> str:
    """Return a difference with its sign, and 0.00 without one."""
    if is_missing(value):
        return ABSENT
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def points_range(interval: Interval) -> str:
    """Return an interval of differences."""
    both = ends(interval)
    return f"{points(both[0])} to {points(both[1])}" if both else ABSENT


def score(value: float | None) -> str:
    """Return a fraction with four decimals."""
    return ABSENT if is_missing(value) else f"{value:.4f}"


def score_range(interval: Interval) -> str:
    """Return an interval of fractions."""
    both = ends(interval)
    return f"{score(both[0])} to {score(both[1])}" if both else ABSENT


def count(value: float | None) -> str:
    """Return a whole number with commas."""
    return ABSENT if is_missing(value) else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Return bytes as kB or MB."""
    if is_missing(value):
        return ABSENT
    return f"{value / 1e6:.2f}{GAP}MB" if value >= 1e6 else f"{value / 1e3:.1f}{GAP}kB"


def milliseconds(value: float | None) -> str:
    """Return a time."""
    if is_missing(value):
        return ABSENT
    digits = 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}{GAP}ms"


def trend(interval: Interval) -> str:
    """Return what the interval of a change tells: "better", "worse", "even" or "unknown"."""
    both = ends(interval)
    if both is None:
        return "unknown"
    if both[0] > 0:
        return "better"
    return "worse" if both[1] < 0 else "even"


def shift(offsets: Mapping[str, float | None] | None) -> str:
    """Return how far a map lies from another, "rows" and "columns" in pixels."""
    if not offsets or any(map(is_missing, offsets.values())):
        return ABSENT
    return f"{points(offsets['rows'])} down, {points(offsets['columns'])} right"


def moment(written: str) -> str:
    """Return an ISO 8601 time without the T and the seconds."""
    time = datetime.fromisoformat(written)
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()


def _floored(value: float) -> Decimal:
    # By way of text, as 99.52 is a little less than 99.52 in binary.
    return Decimal(str(value)).quantize(Decimal("0.01"), ROUND_DOWN)
