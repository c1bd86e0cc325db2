"""One registered thing on a terminal: what it is, what it takes, where it is from."""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kseg.options import option_text

# What every builder takes alike, and nobody can set.
_GIVEN = ("input_shape", "num_classes", "image", "self", "kwargs")
_SECTIONS = ("Args", "Returns", "Raises", "Source", "Differs", "Example", "Attributes")


def page(item: Callable[..., Any], *, options: str, without: Collection[str] = ()) -> Group:
    """Return a builder's or class's docstring, its arguments as a table, as wide as the terminal.

    Args:
        item: any registered function or class with a Google-style docstring.
        options: title of the table, for example "options, by -o NAME=VALUE".
        without: arguments to leave out.
    """
    head, sections = _parsed(_docstring(item))
    parts: list[RenderableType] = [Text(paragraph + "\n") for paragraph in _paragraphs(head)]
    rows = [row for row in _rows(item, _arguments(item, sections)) if row[0] not in without]
    if rows:
        parts += [Text(options, style="bold"), _table(rows)]
    for title in ("Returns", "Raises", "Source", "Differs", "Example"):
        if title in sections:
            text = Text("\n\n".join(_paragraphs(sections[title])))
            parts += [Text(f"\n{title}", style="bold"), Padding(text, (0, 0, 0, 2))]
    return Group(*parts)


def _table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table("option", "default", "meaning", box=None, pad_edge=False)
    for name, default, meaning in rows:
        table.add_row(Text(name), Text(default), Text(meaning))
    return table


def _rows(item: Callable[..., Any], meanings: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    kinds = typing.get_type_hints(item.__init__ if inspect.isclass(item) else item)
    for name, parameter in inspect.signature(item).parameters.items():
        if name not in _GIVEN:
            meaning = meanings.get(name, "") + _choices(kinds.get(name))
            required = parameter.default is inspect.Parameter.empty
            default = "" if required else option_text(parameter.default)
            yield name, default, meaning.strip()


def _choices(kind: object) -> str:
    """Return " (one of a, b)" for a type that is, or may be, a Literal."""
    kinds = (kind, *typing.get_args(kind))
    for one in kinds:
        if typing.get_origin(one) is typing.Literal:
            return f" ({', '.join(map(str, typing.get_args(one)))})"
    return ""


def _docstring(item: Callable[..., Any]) -> str:
    """Return a docstring; where it says "Args, Source: as `Sibling`", with the sibling's."""
    text = inspect.getdoc(item) or ""
    reference = re.search(r"^Args,[^:]*: as `(\w+)`[.,;]? ?", text, re.MULTILINE)
    if not reference:
        return text
    own = text[: reference.start()] + text[reference.end() :]
    sibling = inspect.getdoc(getattr(inspect.getmodule(item), reference[1])) or ""
    return own.strip() + "\n\n" + sibling[sibling.index("Args:") :]


def _arguments(item: Callable[..., Any], sections: dict[str, str]) -> dict[str, str]:
    """Return the meaning of each argument; a class may have them at its `__init__`."""
    if "Args" not in sections and inspect.isclass(item):
        sections = _parsed(inspect.getdoc(item.__init__) or "")[1]
    text = textwrap.dedent(sections.get("Args", ""))
    found = re.findall(r"^([\w, *]+)(?: \([^)]*\))?:((?:.*\n?)(?:[ \t]+.*\n?|\n)*)", text, re.M)
    return {
        name.strip(" *"): " ".join(meaning.split())
        for names, meaning in found
        for name in names.split(",")
    }


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """Return what stands before the sections of a docstring, and each of them."""
    parts = re.split(rf"^({'|'.join(_SECTIONS)}):(.*)$", text, flags=re.MULTILINE)
    sections = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return parts[0], {title: line + textwrap.dedent(rest) for title, line, rest in sections}


def _paragraphs(text: str) -> list[str]:
    """Return the blocks of a text, each on one line; drawings and code stay as they are."""
    blocks = [block for block in text.strip("\n").split("\n\n") if block.strip()]
    return [block if _is_drawn(block) else " ".join(block.split()) for block in blocks]


def _is_drawn(block: str) -> bool:
    return any(line.startswith((" ", ">>>")) for line in block.splitlines())
