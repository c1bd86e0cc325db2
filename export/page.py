"""The export certificate as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kseg.html import render
from kseg.html.numbers import ends, is_missing
from kseg.html.pictures import Picture, layers
from kseg.overlay import Colour

TEMPLATE = "certificate.html.jinja"
NARROWEST_SCALE = 0.5  # points of IoU; smaller changes shall not look large in a bar


def certificate_page(
    certificate: Mapping[str, Any],
    pictures: Mapping[str, Sequence[Picture]],
    *,
    palette: Sequence[Colour],
) -> str:
    """Return the HTML page of a certificate.

    The page holds its styles, its script and its pictures, and forbids the browser to load
    anything else. Agreements are rounded down, so that one just below its limit does not look as
    if it reached it; what is None or NaN shows as "-".

    Args:
        certificate: what `certificate.json` holds.
        pictures: path of a file, as the certificate has it, to its worst disagreements; the
            reference of each is what the Keras model answers.
        palette: one (r, g, b) of 0..255 a class.

    Returns:
        A whole HTML document; write it as UTF-8.

    Raises:
        ValueError: if the class maps of a picture are not of its image's size.
    """
    classes = certificate["data"]["classes"]
    splits = {
        path: [layers(one, classes, palette) for one in shown] for path, shown in pictures.items()
    }
    values = {"certificate": certificate, "splits": splits}
    return render(__package__, TEMPLATE, values, filters={"bars": _bars, "reach": _reach})


@dataclass(frozen=True)
class _Bar:
    """Where a class's interval and its change lie, in per cent of the bar's width."""

    left: float
    width: float
    dot: float


def _reach(classes: Sequence[Mapping[str, Any]]) -> float:
    """Return how many points of IoU the bars of these classes reach to either side."""
    found = [abs(end) for one in classes for end in ends(one["interval"]) or ()]
    return max([NARROWEST_SCALE, *found])


def _bars(classes: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], _Bar | None]]:
    """Return each class with its bar, all on one scale around zero; None without an interval."""
    reach = _reach(classes)
    return [(one, _bar(one, reach)) for one in classes]


def _bar(one: Mapping[str, Any], reach: float) -> _Bar | None:
    both = ends(one["interval"])
    if both is None or is_missing(one["change"]):
        return None
    low, high, change = (50 + 50 * points / reach for points in (*both, one["change"]))
    # A bootstrap interval need not hold the change itself, yet the dot must stay in the bar.
    return _Bar(low, high - low, min(max(change, 0.0), 100.0))
