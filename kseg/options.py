"""Options as text, to and from the types that a signature declares."""

from __future__ import annotations

import types
import typing
from typing import Any


def convert(text: str, annotation: Any) -> Any:  # noqa: ANN401 (any type a builder may declare)
    """Return the value that a text stands for.

    Args:
        text: for example "1,2,3,6" or "true".
        annotation: the type: int, float, bool, str, a Literal, or a tuple or union of such.

    Raises:
        ValueError: where the text is none of the type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(text, arguments)
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[_known(text, arguments)]
    if origin is tuple:
        return _convert_tuple(text, arguments)
    if annotation is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return words[_known(text.lower(), words)]
    return annotation(text)


def option_text(value: object) -> str:
    """Return the value of a model's option as `-o NAME=VALUE` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _known(text: str, choices: typing.Iterable[object]) -> str:
    if text not in {str(choice) for choice in choices}:
        raise ValueError(text)
    return text


def _convert_union(text: str, members: tuple[Any, ...]) -> object:
    if type(None) in members and text.lower() == "none":
        return None
    for member in members:
        if member is type(None):
            continue
        try:
            return convert(text, member)
        except ValueError:
            continue
    raise ValueError(text)


def _convert_tuple(text: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
    if arguments[-1] is Ellipsis:
        return tuple(convert(part, arguments[0]) for part in parts)
    if len(parts) != len(arguments):
        raise ValueError(text)
    return tuple(convert(part, kind) for part, kind in zip(parts, arguments, strict=True))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def describe(annotation: Any) -> str:  # noqa: ANN401
    """Return in words what a text must be to stand for a value of this type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"written with commas, each {describe(arguments[0])}"
    if arguments:
        return " or ".join(describe(member) for member in arguments)
    return "none" if annotation is type(None) else _WORDS[annotation]
