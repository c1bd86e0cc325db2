"""Line charts as a page draws them: points in a box of fixed size, and the ticks of both axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560.0, 240.0  # of the box, in units that the page scales
TICKS = 5  # of an axis, about
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the box's units, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        path: its points as SVG's polyline takes them.
        dots: the same as pairs, to be marked where there are few.
        last: its last value.
    """

    name: str
    path: str
    dots: tuple[tuple[float, float], ...]
    last: float


@dataclass(frozen=True)
class Chart:
    """Lines over two axes.

    Attributes:
        title: what is shown, for a person who cannot see it too.
        x_label, y_label: what the axes are.
        lines: in the order of the legend.
        x_ticks, y_ticks: from left to right, and from below to above.
        width, height: of the box.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = HEIGHT


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Chart | None:
    """Return a chart of named lines, or None if none of them has a finite point.

    Args:
        series: name of each line to its (x, y); points that are not finite are left out.
        title: what is shown.
        x_label: what x is.
        y_label: what y is.
        x_range: ends of the x axis; those of the points by default.
        y_range: ends of the y axis; round numbers around the points by default.
    """
    known = {
        name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()
    }
    xs, ys = ([p[axis] for points in known.values() for p in points] for axis in (0, 1))
    if not xs:
        return None
    x_ends = x_range or (min(xs), max(xs))
    y_marks = ticks(*(y_range or (min(ys), max(ys))))
    y_ends = y_range or (y_marks[0], y_marks[-1])
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        lines=tuple(
            _line(name, points, x_ends, y_ends) for name, points in known.items() if points
        ),
        x_ticks=tuple(_axis(x_ends, WIDTH)),
        y_ticks=tuple(_axis(y_ends, HEIGHT, upwards=True)),
    )


def ticks(low: float, high: float, *, most: int = TICKS) -> list[float]:
    """Return round numbers from below `low` to above `high`, a step of 1, 2 or 5 apart.

    Example:
        >>> ticks(0.13, 0.58)
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * most >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _finite(points: Points) -> list[tuple[float, float]]:
    return [point for point in points if all(map(math.isfinite, point))]


def _line(
    name: str, points: Points, x_ends: tuple[float, float], y_ends: tuple[float, float]
) -> Line:
    placed = tuple(
        (round(_place(x, x_ends, WIDTH), 1), round(HEIGHT - _place(y, y_ends, HEIGHT), 1))
        for x, y in points
    )
    path = " ".join(f"{x:g},{y:g}" for x, y in placed)
    return Line(name, path, placed, points[-1][1])


def _axis(ends: tuple[float, float], length: float, *, upwards: bool = False) -> list[Tick]:
    """Return the round numbers between the ends of an axis."""
    low, high = ends
    slack = 1e-9 * (high - low)
    found = []
    for value in ticks(low, high):
        if low - slack <= value <= high + slack:
            at = _place(value, ends, length)
            found.append(Tick(round(length - at if upwards else at, 1), f"{value:,.10g}"))
    return found


def _place(value: float, ends: tuple[float, float], length: float) -> float:
    low, high = ends
    return length * (value - low) / (high - low) if high > low else length / 2
