"""What `kseg inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .delegates import NOT_LISTED
from .inspection import TWIN, Inspection, Reach
from .speed import Speed, Timing, blamed, counted, little_gained, total

BY_ACTIVATION = ("HARD_SWISH", "GELU")  # what another activation of the model replaces
CLASS_MAP = {"ARG_MAX", "CAST"}  # what --output logits leaves out
BY_INTERFACE = ("ARG_MAX", "CAST", "QUANTIZE", "DEQUANTIZE")  # at the edges of kseg's files


def show(inspection: Inspection) -> None:
    """Print what a person needs to know of a file before it flies."""
    console = Console(highlight=False, emoji=False)
    for part in _parts(inspection):
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(found: Inspection) -> Iterator[Table | Text | str]:
    yield _whole(str(found.file), style="bold")
    yield _summary(found)
    yield _operator_table(found)
    yield from _quantisation(found)
    yield _delegate_table(found)
    yield from _delegate_notes(found)
    yield from _verdict(found)


def _whole(line: str, *, style: str = "") -> Text:
    """Return a line that is never broken, so that a path or an address can be copied."""
    return Text(line, style=style)


def _table(first: str, *headings: str) -> Table:
    """Return a table whose other columns are numbers, set to the right."""
    table = Table(first, box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _summary(found: Inspection) -> str:
    kind = "quantised" if found.quantised else "float"
    if not found.quantised and any(name.startswith("int") for name in found.weights):
        kind = "float with integer weights"
    through = " to ".join(", ".join(one.values()) for one in (found.inputs, found.outputs))
    return (
        f"{kind}, {found.bytes / 1e6:.2f} MB, {through}\n"
        f"{found.operators} operators, {found.macs / 1e9:.2f} GMACs, arena "
        f"{found.arena / 1e6:.2f} MB (activations, by LiteRT's plan)\n"
    )


def _operator_table(found: Inspection) -> Table:
    table = _table("operator", "count", "on XNNPACK", "MACs")
    table.add_column("type")
    for kind in found.kinds:
        inside = kind.count - kind.outside
        table.add_row(
            kind.name,
            str(kind.count),
            "all" if not kind.outside else f"{inside} of {kind.count}" if inside else "none",
            _percent(kind.macs, found.macs) if kind.macs else "",
            ", ".join(kind.dtypes),
            style="yellow" if kind.outside else None,
        )
    return table


def _quantisation(found: Inspection) -> Iterator[str]:
    listed = ", ".join(f"{count} {kind}" for kind, count in found.weights.items())
    yield f"\nweights: {listed or 'none'}"
    if found.quantised:
        names = ", ".join(counted(name, count) for name, count in found.floats.items())
        yield f"in float, for want of an int8 kernel: {names or 'none'}"


def _delegate_table(found: Inspection) -> Table:
    table = _table("\ndelegate", "\ntakes", "\nMACs")
    table.add_column("\nleaves to the processor")
    for reach in found.reaches:
        table.add_row(
            reach.delegate,
            f"{reach.taken} of {found.operators}",
            _percent(reach.macs, found.macs),
            _left(reach),
        )
    return table


def _left(reach: Reach) -> str:
    if not reach.taken and not reach.whole and len(reach.refused) > 3:
        return f"everything: {reach.refused[0].reason}"
    parts = [
        counted(one.name, one.count) + (f" ({one.reason})" if one.reason != NOT_LISTED else "")
        for one in reach.refused
    ]
    behind = f"all from the first {reach.stops} on: " if reach.stops else ""
    listed = behind + ", ".join(parts)
    if reach.whole and parts:
        only_map = {one.name for one in reach.refused} <= CLASS_MAP
        return f"does not run: {listed}" + ("; take --output logits" if only_map else "")
    return listed or "nothing"


def _delegate_notes(found: Inspection) -> Iterator[Text | str]:
    yield (
        "\nXNNPACK was run here. All others are by rules that stand where it says below, and were "
        "not run; an operator without a reason is not in their lists."
    )
    for reach in found.reaches:
        if not reach.ran:
            unsure = f"; {', '.join(reach.unsure)} only at some sizes" if reach.unsure else ""
            yield f"{reach.delegate}: {reach.note}{unsure}"
            yield _whole(f"  {reach.source}", style="dim")


def _verdict(found: Inspection) -> Iterator[Table | str]:
    """Say how fast the file is, and which operators are to blame if it is slower than in float."""
    speed = found.speed
    yield f"\n[bold]speed[/], one thread of {found.machine['processor']}:"
    yield f"{speed.milliseconds:.1f} ms" if speed.twin is None else _comparison(speed)
    if speed.twin is None and "int8" in " ".join(found.weights):
        yield f"no {TWIN} beside it to compare with; name one by --against"
    groups = blamed(speed)
    if groups:
        what = "outside XNNPACK" if speed.twin is None else "slower than in float"
        yield f"\n{what}, each run alone:"
        yield _timing_table(groups)
    if speed.twin is not None and not speed.faster:
        yield from _advice(found, groups)


def _comparison(speed: Speed) -> str:
    ratio = speed.milliseconds / speed.twin_milliseconds
    times = f"{speed.milliseconds:.1f} ms, {speed.twin.name} {speed.twin_milliseconds:.1f} ms"
    if speed.faster:
        return f"{times}: [green]{1 / ratio:.2f} times faster than float[/]"
    if ratio * ratio < 1.1:
        return f"{times}: [red]no faster than float[/]"
    return f"{times}: [red]{ratio:.2f} times slower than float[/]"


def _timing_table(groups: Sequence[Sequence[Timing]]) -> Table:
    floats = any(one.twin_milliseconds is not None for group in groups for one in group)
    more = ("ms in float",) if floats else ()
    table = _table("operator", "count", "on XNNPACK", "ms", *more)
    for group in groups:
        inside = sum(not one.outside for one in group)
        twins = [one.twin_milliseconds for one in group if one.twin_milliseconds is not None]
        cells = [str(len(group)), str(inside or "none"), f"{total(group):.2f}"]
        cells += [f"{sum(twins):.2f}" if twins else "-"] if floats else []
        table.add_row(group[0].name, *cells)
    return table


def _advice(found: Inspection, groups: Sequence[Sequence[Timing]]) -> Iterator[str]:
    gain = little_gained(found.speed)
    if not found.speed.explained:
        rest = gain or "the rest is spread over many operators"
        yield f"This does not explain all of it: {rest}."
    if gain:
        yield (
            f"To do: use {found.speed.twin.name} on such processors. Those with dot products "
            "of int8 (VNNI; on Arm, dotprod or i8mm) run int8 files faster."
        )
    # Where no kernel gains, a model without the operators on XNNPACK would not be faster.
    names = [group[0].name for group in groups if group[0].outside or gain is None]
    options = f"`kseg models {found.model}`" if found.model else "`kseg models NAME`"
    if set(names) & set(BY_ACTIVATION):
        yield (
            "To do for HARD_SWISH or GELU: train it with -o activation=relu6, where "
            f"{options} shows that option."
        )
    edges = [name for name in names if name in BY_INTERFACE]
    if edges:
        yield f"To do for {', '.join(edges)}: see `kseg export` for other --input and --output."
    others = [name for name in names if name not in (*BY_ACTIVATION, *BY_INTERFACE)]
    if others:
        yield (
            f"To do for {', '.join(others)}: use {found.speed.twin.name} on such processors, or "
            f"choose a model without them; {options} shows options."
        )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
