"""The full state of a training: written atomically, found again, checked."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kseg.errors import UserError
from kseg.files import replacing

STATE = "state.safetensors"
KEPT = 2


def save(
    folder: Path, *, step: int, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> Path:
    """Write checkpoints/step-N and drop all but the newest two.

    Args:
        folder: the run's checkpoints folder.
        step: number of finished steps.
        tensors: every variable of the training by name.
        facts: small things that belong to the state, as JSON.

    Returns:
        The folder written.

    Raises:
        UserError: if the disk is full; the older checkpoints are untouched.
    """
    target = folder / f"step-{step}"
    with replacing(target) as temporary:
        temporary.mkdir(parents=True)
        metadata = {"step": str(step), "facts": json.dumps(dict(facts))}
        _write(dict(tensors), temporary / STATE, metadata)
    for old in steps(folder)[:-KEPT]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return target


def _write(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # It wraps the system's error in text; the number decides what the user is told.
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def steps(folder: Path) -> list[int]:
    """Return the steps of which a whole checkpoint exists, ascending."""
    found = [path.parent.name.removeprefix("step-") for path in folder.glob(f"step-*/{STATE}")]
    return sorted(int(text) for text in found if text.isdigit())


def load(folder: Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read checkpoints/step-N.

    Returns:
        The tensors by name, and the facts saved beside them.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / f"step-{step}" / STATE
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove {path.parent} to continue from the "
            "checkpoint before it"
        ) from error


def check(path: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple]) -> None:
    """Check that a checkpoint holds what a training needs.

    Args:
        path: for the message.
        tensors: what was read.
        expected: shape of each variable by name.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
    """
    for name in sorted(tensors.keys() | expected.keys()):
        have = tuple(tensors[name].shape) if name in tensors else None
        want = tuple(expected[name]) if name in expected else None
        if have != want:
            raise UserError(
                f"{path} is of another architecture or optimiser: {name} is "
                f"{have or 'missing'} there, {want or 'unknown'} here"
            )


def check_space(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a training's files will fit on the disk.

    Args:
        folder: where they go; it need not exist yet.
        shapes: of every tensor of the state, float32 or smaller.

    Raises:
        UserError: if there is less room than for the checkpoints kept, one being written, and
            the model files.
    """
    needed = (KEPT + 2) * 4 * sum(math.prod(shape) for shape in shapes.values())
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(
            f"{folder}: a training of this model needs {needed / 1e6:.0f} MB there and "
            f"{free / 1e6:.0f} MB are free; free some space or name another disk with --run"
        )


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 over names, shapes and bytes: equal digests are equal states."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()
