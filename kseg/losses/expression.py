"""What `--loss` says: one loss or a weighted sum, with options, as `ce+0.5*dice:smoothing=1`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from rich.markup import escape
from rich.table import Table

from kseg.errors import UserError
from kseg.losses.heads import brought_by
from kseg.losses.sum_of_losses import SumOfLosses
from kseg.options import convert, describe, option_text
from kseg.registry import HEAD_LOSSES, LOSSES, nearest

SYNTAX = "ce+0.5*dice:smoothing=1,background=false"
CHANGING = "dice+0.01..1*boundary_distance"  # as Kervadec et al. train
# Arguments of losses that the training sets, or nobody.
GIVEN = ("class_weights", "ignore_label", "name", "reduction")


@dataclass(frozen=True)
class Term:
    """One loss of a sum.

    Attributes:
        weight: its factor; (first, last) of one that changes along the training.
        name: its registry name.
        options: what it was given, by option.
    """

    weight: float | tuple[float, float]
    name: str
    options: Mapping[str, Any]


def parse_loss(text: str) -> tuple[Term, ...]:
    """Read the text of `--loss`.

    Args:
        text: terms joined by `+`; a term is `NAME` or `WEIGHT*NAME`, and `:OPTION=VALUE,...` may
            follow. A weight is a number, or `FIRST..LAST`: what it is in the first step of the
            training and in the last.

    Returns:
        The terms in their order.

    Raises:
        UserError: if a term is empty or its weight no number above 0, there is no such loss or
            option, or a value is not of the option's type.

    Example:
        >>> parse_loss("ce+0.5*tversky:alpha=0.3,beta=0.7")
        (Term(1.0, "ce", {}), Term(0.5, "tversky", {"alpha": 0.3, "beta": 0.7}))
        >>> parse_loss("dice+0.01..1*boundary_distance")
        (Term(1.0, "dice", {}), Term((0.01, 1.0), "boundary_distance", {}))
    """
    return tuple(_term(part.strip(), text) for part in text.split("+"))


def build_loss(text: str, *, class_weights: Sequence[float] | None = None) -> keras.losses.Loss:
    """Make the loss that a text describes.

    Args:
        text: as of `parse_loss`.
        class_weights: one factor a class, for those terms that take them.

    Returns:
        The loss itself where it is a single one of weight 1, else a `SumOfLosses`.

    Raises:
        UserError: as `parse_loss`, or if a loss refuses the value of an option.
    """
    terms = parse_loss(text)
    losses = [_built(term, class_weights) for term in terms]
    if len(terms) == 1 and terms[0].weight == 1:
        return losses[0]
    return SumOfLosses(losses, [term.weight for term in terms])


def takes_class_weights(name: str) -> bool:
    """Tell whether a loss of the registry takes class weights."""
    return "class_weights" in inspect.signature(LOSSES[name]).parameters


def loss_options(name: str) -> dict[str, inspect.Parameter]:
    """Return what may follow the colon behind a loss, the annotations as types."""
    parameters = inspect.signature(LOSSES[name], eval_str=True).parameters
    return {option: one for option, one in parameters.items() if option not in GIVEN}


def listed() -> Table:
    """Return a table of all losses and their options; a star marks those with class weights."""
    table = Table("loss", "what it is", "options", box=None)
    for name in LOSSES:
        defaults = {option: one.default for option, one in loss_options(name).items()}
        star = " *" if takes_class_weights(name) else ""
        texts = (f"{option}={_short(value)}" for option, value in defaults.items())
        summary = inspect.getdoc(LOSSES[name]).splitlines()[0]
        table.add_row(name + star, escape(summary), "\n".join(texts))
    return table


def listed_of_heads() -> Table:
    """Return a table of the losses that models bring for their heads."""
    table = Table("loss of a head", "what it is", "brought by", box=None)
    for name in HEAD_LOSSES:
        summary = inspect.getdoc(HEAD_LOSSES[name]).splitlines()[0]
        table.add_row(name, escape(summary), ", ".join(brought_by(HEAD_LOSSES[name])))
    return table


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else option_text(value)


def _term(part: str, text: str) -> Term:
    weight, star, rest = part.partition("*")
    name, _, options = (rest if star else part).partition(":")
    name = name.strip()
    if not name:
        raise UserError(f"--loss {text}: a term is empty; expected for example {SYNTAX}")
    if name in HEAD_LOSSES:
        models = " and ".join(brought_by(HEAD_LOSSES[name]))
        raise UserError(
            f"--loss {text}: {name} judges a head of {models}, which brings it along; name another "
            "loss for the logits"
        )
    LOSSES.entry(name)
    pairs = [_option(name, pair) for pair in options.split(",") if pair.strip()]
    return Term(_weight(weight, text) if star else 1.0, name, dict(pairs))


def _weight(weight: str, text: str) -> float | tuple[float, float]:
    first, dots, last = weight.partition("..")
    try:
        found = float(first), float(last if dots else first)
    except ValueError:
        found = math.nan, math.nan
    # A term may come in at 0 or end there, but not be 0 all along.
    if not (all(0 <= end < math.inf for end in found) and any(found)):
        raise UserError(
            f"--loss {text}: the weight {weight.strip()!r} is no number above 0 and no FIRST..LAST "
            f"of a weight that changes; expected for example {SYNTAX} or {CHANGING}"
        )
    return found if dots else found[0]


def _option(name: str, pair: str) -> tuple[str, Any]:
    option, sign, value = (part.strip() for part in pair.partition("="))
    option = option.replace("-", "_")
    known = loss_options(name)
    if not sign:
        raise UserError(f"loss {name}: expected OPTION=VALUE behind the colon, found {pair!r}")
    if option not in known:
        has = f"it has: {', '.join(known)}" if known else "it has none"
        raise UserError(f"loss {name} has no option {option!r}{nearest(option, known)} ({has})")
    kind = known[option].annotation
    try:
        converted = convert(value, kind)
    except ValueError:
        converted = math.nan
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"option {option} of loss {name} is {value!r}; it must be {describe(kind)}")
    return option, converted


def _built(term: Term, class_weights: Sequence[float] | None) -> keras.losses.Loss:
    weights = {"class_weights": class_weights} if takes_class_weights(term.name) else {}
    try:
        return LOSSES[term.name](**term.options, **weights)
    except ValueError as error:
        raise UserError(f"loss {term.name}: {error}") from error
