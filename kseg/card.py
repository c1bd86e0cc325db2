"""What a model file says about itself, so that one file is enough to use it.

A card is a small JSON text named `kseg.json`. It rides inside the file it describes: as a member
of a `.keras` archive, as a zip tail behind a `.tflite` flatbuffer (where the TFLite metadata
convention puts associated files, too), as a metadata entry of an `.onnx` file, and under
`assets.extra/` of a SavedModel.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kseg.errors import UserError
from kseg.options import option_text

MEMBER = "kseg.json"
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ModelCard:
    """Facts that a model file carries.

    Attributes:
        model: registry name of the architecture.
        options: options of its builder, without `backbone_weights`.
        classes: class names, index is the class id.
        palette: one (r, g, b) of 0..255 a class.
        size: height and width of the model's input, pixels.
        dataset: spec of the data it was trained on.
        output: "logits", "probabilities", or "classes" for a file that gives a class map.
        version: the kseg that wrote the file.
    """

    model: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    dataset: str = ""
    output: str = "logits"
    version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the card as JSON text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    def arguments(self) -> list[str]:
        """Return the arguments of `kseg train` that build this model."""
        options = [f"{name}={option_text(value)}" for name, value in self.options.items()]
        return ["--model", self.model, *(word for option in options for word in ("-o", option))]

    @staticmethod
    def from_json(text: str) -> ModelCard:
        """Return the card that `to_json` wrote; lists become tuples again."""
        raw = json.loads(text)
        raw["classes"] = tuple(raw["classes"])
        raw["palette"] = tuple(tuple(color) for color in raw["palette"])
        raw["size"] = tuple(raw["size"])
        raw["options"] = {name: _tuples(value) for name, value in raw["options"].items()}
        return ModelCard(**raw)


def embed(path: Path, card: ModelCard) -> None:
    """Put the card into a `.keras`, `.tflite` or `.onnx` file or a SavedModel folder.

    Args:
        path: the file or folder; it must not hold a card yet.
        card: what to write.

    Raises:
        ValueError: if the file holds a card already.
    """
    if _read_text(path) is not None:
        raise ValueError(f"{path} holds a card already")
    if path.is_dir():
        target = path / "assets.extra" / MEMBER
        target.parent.mkdir(exist_ok=True)
        target.write_text(card.to_json())
        return
    if path.suffix == ".onnx":
        _embed_in_onnx(path, card)
        return
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MEMBER, card.to_json())


def read(path: Path) -> ModelCard | None:
    """Return the card of a model file or SavedModel folder, or None where it carries none.

    Raises:
        UserError: if there is a card and it cannot be read.
    """
    try:
        text = _read_text(path)
        return None if text is None else ModelCard.from_json(text)
    except _DAMAGED as error:
        raise UserError(f"{path}: its {MEMBER} is damaged ({error}); export it again") from error


def _read_text(path: Path) -> str | None:
    if path.is_dir():
        member = path / "assets.extra" / MEMBER
        return member.read_text() if member.is_file() else None
    if path.suffix == ".onnx":
        return _read_onnx(path)
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.read(MEMBER).decode() if MEMBER in archive.namelist() else None


def _embed_in_onnx(path: Path, card: ModelCard) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {MEMBER: card.to_json()})
    onnx.save(model, path)


def _read_onnx(path: Path) -> str | None:
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's; what opens the file says what is wrong with it
        return None
    return next((entry.value for entry in model.metadata_props if entry.key == MEMBER), None)


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
