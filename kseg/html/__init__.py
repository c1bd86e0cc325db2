"""Pages that open anywhere and load nothing: styles, script and pictures are part of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from . import numbers


def with_code(text: str) -> Markup:
    """Return a sentence as HTML, with what stands between `backticks` as code."""
    parts = enumerate(str(escape(text)).split("`"))
    return Markup("".join(f"<code>{part}</code>" if n % 2 else part for n, part in parts))


_FILTERS: dict[str, Callable[..., Any]] = {
    "code": with_code,
    "count": numbers.count,
    "moment": numbers.moment,
    "ms": numbers.milliseconds,
    "percent": numbers.percent,
    "percent_range": numbers.percent_range,
    "points": numbers.points,
    "points_range": numbers.points_range,
    "score": numbers.score,
    "score_range": numbers.score_range,
    "share": numbers.share,
    "shift": numbers.shift,
    "size": numbers.size,
    "trend": numbers.trend,
}


def render(
    package: str,
    template: str,
    values: Mapping[str, Any],
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> str:
    """Return a page made from a template, which may include the parts that lie in this package.

    Args:
        package: where the template lies.
        template: its file name.
        values: what it fills in; text is escaped.
        filters: further ones that it uses.

    Returns:
        A whole HTML document; write it as UTF-8.
    """

    def source(name: str) -> str | None:
        found = (files(place).joinpath(name) for place in (package, __name__))
        return next((one.read_text(encoding="utf-8") for one in found if one.is_file()), None)

    environment = Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {**_FILTERS, **(filters or {})}
    return environment.get_template(template).render(values)
