"""Writing that never destroys what was there: temporary name, sync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kseg.errors import UserError

_WRITING, _OLD = ".writing-", ".old-"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path`.

    The file (or every file of the folder) is synced before it is renamed, so that a crash or a
    full disk leaves either the old content or the new one. On failure the temporary is removed.

    Args:
        path: file or folder to write.

    Yields:
        Where to write: same suffix, same folder; a folder is not made.

    Raises:
        UserError: if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_WRITING}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _sync_tree(temporary)
        _put(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; what was there before is untouched. "
                "Free some space, then go on"
            ) from error
        raise
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing below `folder`; finished files stay."""
    for leftover in [*folder.rglob(f"{_WRITING}*"), *folder.rglob(f"{_OLD}*")]:
        _remove(leftover)


def _put(temporary: Path, path: Path) -> None:
    if temporary.is_dir() and path.exists():
        # A folder cannot be replaced in one step: the old one steps aside first.
        aside = path.with_name(f"{_OLD}{os.getpid()}-{path.name}")
        os.rename(path, aside)
        os.rename(temporary, path)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, path)
    _sync(path.parent)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
