"""Pictures in, class maps and overlays out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kseg.errors import UserError
from kseg.files import replacing
from kseg.inference import read_image
from kseg.overlay import overlay, palette_image

if TYPE_CHECKING:
    import numpy as np

    from kseg.inference import Predictor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class _Task:
    """One picture and where its two results go."""

    image: Path
    mask: Path
    overlay: Path


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    out: Path,
    *,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the class map and an overlay of every picture.

    `photo.jpg` gives `photo.png`, an 8-bit palette PNG whose pixel values are class ids, and
    `photo_overlay.jpg`, both at the picture's own width and height (the overlay plus its legend).
    Sub-folders of a folder are kept below `out`.

    Args:
        predictor: the loaded model file; its palette and class names are used.
        inputs: pictures, and folders that are searched to any depth. Hidden files are left out,
            and so is `out` where it lies in one of the folders.
        out: folder to write to; made where it does not exist.
        on_image: called after each picture with how many are done and how many there are.

    Returns:
        The class map of each picture.

    Raises:
        UserError: before anything is written, if a path does not exist, no picture is found, two
            pictures would give the same file (`a.jpg` and `a.png` of one folder), or a class map
            would replace a file that lies beside its picture; later, if a picture cannot be read.
    """
    tasks = _plan([Path(path) for path in inputs], Path(out))
    for done, task in enumerate(tasks, start=1):
        image = read_image(task.image)
        ids = _labelled(predictor, task.image, image)
        with replacing(task.mask) as temporary:
            palette_image(ids, predictor.palette).save(temporary, format="PNG")
        with replacing(task.overlay) as temporary:
            picture = overlay(image, ids, predictor.classes, predictor.palette)
            picture.save(temporary, format="JPEG", quality=92, subsampling=0)
        if on_image is not None:
            on_image(done, len(tasks))
    return [task.mask for task in tasks]


def pictures(inputs: Sequence[Path], out: Path) -> Iterator[Path]:
    """Yield the pictures that `predict_files` takes, in its order."""
    return (image for path in inputs for image, _ in _images(Path(path), Path(out)))


def _plan(inputs: list[Path], out: Path) -> list[_Task]:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a folder")
    if not inputs:
        raise UserError("no picture is named; name files or folders of them behind the model")
    results = {image: relative for path in inputs for image, relative in _images(path, out)}
    if not results:
        raise UserError(
            f"no picture in {', '.join(map(str, inputs))}; expected files "
            f"that end in {' '.join(SUFFIXES)}"
        )
    tasks = [
        _Task(image, out / f"{stem}.png", out / f"{stem}_overlay.jpg")
        for image, stem in results.items()
    ]
    _check_targets(tasks)
    return tasks


def _images(path: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the pictures of one input, each with its result's path below `out`, less suffix."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_file():
        yield path.resolve(), Path(path.stem)
        return
    mine, theirs = path.resolve(), out.resolve()
    for file in sorted(mine.rglob("*")):
        relative = file.relative_to(mine)
        hidden = any(part.startswith(".") for part in relative.parts)
        earlier = theirs != mine and file.is_relative_to(theirs) and theirs.is_relative_to(mine)
        if file.suffix.lower() in SUFFIXES and not hidden and not earlier and file.is_file():
            yield file, relative.with_suffix("")


def _labelled(predictor: Predictor, path: Path, image: np.ndarray) -> np.ndarray:
    try:
        return predictor.predict(image)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_targets(tasks: list[_Task]) -> None:
    taken: dict[Path, Path] = {}
    images = {task.image for task in tasks}
    for task in tasks:
        for target in (task.mask.resolve(), task.overlay.resolve()):
            if target in taken:
                raise UserError(
                    f"{taken[target]} and {task.image} would both be written to {target}; rename "
                    "one, or predict them in two commands with different --out"
                )
            taken[target] = task.image
            # Perhaps the user's own label of this picture, which no one could bring back.
            beside = target.parent == task.image.parent and target.exists()
            if target in images or beside:
                raise UserError(
                    f"{target} exists already and would be overwritten; name another --out"
                )
