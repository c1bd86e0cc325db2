"""What one exported file is, and what its proof found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from kseg.config import Feed

REJECTED = ".rejected"


@dataclass(frozen=True)
class Artifact:
    """One exported file or folder.

    Attributes:
        path: where it lies; ends in `.rejected` if it failed its proof.
        target: export format, "tflite", "saved_model" or "onnx".
        variant: number format of the weights, as "float32" or "int8".
        bytes: size on disk.
        sha256: of the file; of a folder, over the names and contents of its files.
        inputs: name of each input to its type and shape.
        outputs: name of each output to its type and shape.
        agreement: pixels labelled as Keras labels them, per cent, at the model's size.
        min_agreement: what it had to reach.
        miou: mean IoU of the file at the labels' own size, as a fraction.
        keras_miou: the same of the Keras model on the same images.
        images: how many images its proof used.
        fed_as: the form of the images that it was given, "bytes" of 0..255 if not normalised.
        milliseconds: median time of one image on one thread; None where it was not measured.
        outside: operators that XNNPACK does not run, with their count; None where this has no
            meaning.
        notes: what a person should know about the file.
        reasons: why it is rejected; none if it is not.
        certificate: path of the page that says all that was found.
    """

    path: Path
    target: str
    variant: str
    bytes: int
    sha256: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    agreement: float
    min_agreement: float
    miou: float
    keras_miou: float
    images: int
    fed_as: Feed = "bytes"
    milliseconds: float | None = None
    outside: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    certificate: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the file passed its proof."""
        return not self.reasons

    @property
    def name(self) -> str:
        """The path below the export folder."""
        depth = 2 if self.target == "saved_model" else 1
        return "/".join(self.path.parts[-depth:])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it, the path by its place in the export folder."""
        # A class absent everywhere has no IoU; neither has a split without any valid pixel.
        scores = {name: _number(getattr(self, name)) for name in ("miou", "keras_miou")}
        return asdict(self) | scores | {"path": self.name, "accepted": self.accepted}


def artifact_table(artifacts: Sequence[Artifact]) -> Table:
    """Return the table that `kseg export` ends with."""
    # Narrow enough that names stay whole in a terminal of 80 columns.
    table = Table(title=_title(artifacts), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("file", no_wrap=True)
    for heading in ("MB", "agree\n%", "mIoU", "Keras\nmIoU", "ms, 1\nthread"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outside XNNPACK", overflow="fold")
    for one in artifacts:
        style = None if one.accepted else "red"
        table.add_row(*_cells(one), style=style)
    return table


def _title(artifacts: Sequence[Artifact]) -> str:
    images = artifacts[0].images if artifacts else 0
    return f"compared with Keras on {images} validation image{'s' if images != 1 else ''}"


def _cells(one: Artifact) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.bytes / 1e6:.2f}",
        floored(one.agreement),
        f"{one.miou:.4f}",
        f"{one.keras_miou:.4f}",
        "-" if one.milliseconds is None else f"{one.milliseconds:.1f}",
        "-" if one.outside is None else _counted(one.outside) or "none",
    )


def floored(percent: float) -> str:
    """Return per cents with two digits, rounded down: only what is all equal is 100.00."""
    return f"{math.floor(round(100 * percent, 6)) / 100:.2f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in operators.items())
