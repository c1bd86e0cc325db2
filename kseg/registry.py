"""Names people type, and what stands behind them: one decorator puts a thing into its registry."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kseg.errors import UserError

T = TypeVar("T", bound=Callable[..., Any])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name closest to `name`, or an empty string."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    longer = [one for one in known if name and one.startswith(name)]
    found = longer or close
    return f"; did you mean {found[0]}?" if found else ""


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    Attributes:
        name: what people type.
        item: the builder, class or function.
        aux: training-only outputs of a model: name to (loss, weight); a loss of None is the
            run's own loss.
        limits: what a model cannot do, name of the contract to the reason.
        variants: options of a model, as `-o` takes them, that get a row of their own in tables.
    """

    name: str
    item: Callable[..., Any]
    aux: Mapping[str, tuple[Any, float]] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[str, ...] = ()

    def losses(self, main: T, outputs: Iterable[str]) -> dict[str, tuple[T, float]]:
        """Return loss and weight of each output of a model, `main` for "logits"."""
        extra = {name: self.aux[name] for name in outputs if name != "logits"}
        return {"logits": (main, 1.0)} | {n: (loss or main, w) for n, (loss, w) in extra.items()}


class Registry:
    """A mapping from names to things that fills itself by importing one package on first use."""

    def __init__(self, kind: str, package: str) -> None:
        """Make an empty registry.

        Args:
            kind: what it holds, for messages ("model").
            package: the package whose modules register themselves when imported.
        """
        self.kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        name: str,
        *,
        aux: Mapping[str, tuple[Any, float]] | None = None,
        limits: Mapping[str, str] | None = None,
        variants: Sequence[str] = (),
    ) -> Callable[[T], T]:
        """Return a decorator that registers its function or class under `name`.

        Raises:
            ValueError: if the name is taken.
        """

        def add(item: T) -> T:
            if name in self._entries:
                raise ValueError(f"a {self.kind} named {name!r} is registered already")
            self._entries[name] = Entry(
                name, item, dict(aux or {}), dict(limits or {}), tuple(variants)
            )
            return item

        return add

    def entry(self, name: str) -> Entry:
        """Return everything known of `name`; raises UserError with the nearest name."""
        self._fill()
        if name not in self._entries:
            raise UserError(
                f"no {self.kind} {name!r}{nearest(name, self._entries)} "
                f"(there are: {', '.join(sorted(self._entries))})"
            )
        return self._entries[name]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.entry(name).item

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._fill()
        return len(self._entries)

    def _fill(self) -> None:
        importlib.import_module(self._package)


MODELS = Registry("model", "kseg.models")
BACKBONES = Registry("backbone", "kseg.backbones")
LOSSES = Registry("loss", "kseg.losses")
HEAD_LOSSES = Registry("loss of a head", "kseg.losses")
METRICS = Registry("metric", "kseg.metrics")
DATASETS = Registry("data set", "kseg.data.adapters")
