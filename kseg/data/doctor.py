"""Looks at a data set before training: what is wrong, in which file, and how to mend it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kseg.data.dataset import (
    IGNORE_LABEL,
    UNKNOWN_ID,
    ArrayDataset,
    Dataset,
    FileDataset,
    Pair,
)
from kseg.errors import UserError
from kseg.image_files import check_pixels, opened_image

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"
JPEG_START = b"\xff\xd8"

MASKS_DECODED = 64  # of each split, evenly spread; headers are read of all files
IMAGES_DECODED = 16
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_BINARY = {0, 255}


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image file say."""

    height: int
    width: int
    format: str
    bits: int = 8
    colour: str = "RGB"


def check_dataset(dataset: Dataset, splits: Sequence[str]) -> None:
    """Check the structure of a data set before anything is trained on it.

    Reads the headers of all files and decodes some masks of each split, evenly spread.

    Args:
        dataset: what to look at.
        splits: which of its splits.

    Raises:
        UserError: for the first thing that is wrong, naming the file and the remedy.
    """
    for split in splits:
        if dataset.length(split) == 0:
            raise UserError(f"the split {split!r} of {dataset.name} is empty")
        if isinstance(dataset, FileDataset):
            for pair in dataset.pairs(split):
                check_headers(pair)
            for pair in spread(dataset.pairs(split), IMAGES_DECODED):
                decode(pair.image)
        _check_ids(dataset, split)


def most_frequent_size(dataset: Dataset, split: str) -> tuple[int, int]:
    """Return the (height, width) that most samples of a split have; of many, some are looked at."""
    limit = 512 if isinstance(dataset, FileDataset) else 16
    numbers = spread(range(dataset.length(split)), limit)
    sizes = [sample_size(dataset, split, number) for number in numbers]
    (height, width), _ = Counter(sizes).most_common(1)[0]
    return height, width


def sample_size(dataset: Dataset, split: str, number: int) -> tuple[int, int]:
    """Return (height, width) of one sample, from the header of its image where it is a file."""
    if isinstance(dataset, ArrayDataset):
        return dataset.sample(split, number)[1].shape
    header = read_header(dataset.pairs(split)[number].image)
    return header.height, header.width


def check_headers(pair: Pair) -> None:
    """Check both files of a sample without decoding them.

    Raises:
        UserError: if one is damaged, the mask is of the wrong kind, or their sizes differ.
    """
    image, mask = read_header(pair.image), read_header(pair.mask)
    if (mask.format, mask.bits, mask.colour) != ("PNG", 8, "grey"):
        raise UserError(
            f"{pair.mask} is a {mask.bits}-bit {mask.colour} {mask.format}, but a mask must be an "
            f"8-bit grey PNG whose pixels are class ids; {_remedy(mask)}"
        )
    if (image.height, image.width) != (mask.height, mask.width):
        raise UserError(
            f"{pair.image} is {image.width} x {image.height} pixels but its mask {pair.mask} is "
            f"{mask.width} x {mask.height}; make them the same size (resize masks by nearest)"
        )


def read_header(path: Path) -> Header:
    """Read what kind of image a file is, and see that a PNG is whole.

    Raises:
        UserError: if it is missing, empty, truncated, neither PNG nor JPEG, or too large.
    """
    try:
        with path.open("rb") as file:
            start = file.read(33)
            file.seek(-min(len(start), len(PNG_END)), 2)
            end = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise UserError(f"{path} is empty (0 bytes); replace it by an intact copy")
    if start.startswith(PNG_START):
        return _png_header(path, start, end)
    if start.startswith(JPEG_START):
        return _jpeg_header(path)
    raise UserError(
        f"{path} is neither a PNG nor a JPEG, whatever its name says; save it again as PNG"
    )


def unknown_ids(found: Iterable[int], *, where: str, known: str) -> UserError:
    """Return the error for a mask with an id that the data set does not know.

    Args:
        found: the raw ids in the mask.
        where: the mask, for the message.
        known: what `known_ids` says of the data set.
    """
    found = sorted(found)
    hint = _BINARY_HINT if set(found) <= _BINARY else _UNKNOWN_HINT
    return UserError(
        f"{where} holds the ids {', '.join(map(str, found))}, but the ids of the classes are "
        f"{known}; {hint}"
    )


def known_ids(dataset: Dataset) -> str:
    """Return the raw ids a mask may hold, such as "0 to 10, and 11 for ignored pixels"."""
    classes = sorted(raw for raw, id_ in dataset.remap.items() if id_ != IGNORE_LABEL)
    ignored = sorted(raw for raw, id_ in dataset.remap.items() if id_ == IGNORE_LABEL)
    whole = classes == list(range(classes[0], classes[-1] + 1))
    text = f"{classes[0]} to {classes[-1]}" if whole else ", ".join(map(str, classes))
    return text + (f", and {', '.join(map(str, ignored))} for ignored pixels" if ignored else "")


def spread(items: Sequence, limit: int) -> list:
    """Return at most `limit` of the items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[number * (len(items) - 1) // (limit - 1)] for number in range(limit)]


_BINARY_HINT = (
    "it looks like a binary mask saved as 0/255; use 0 and 1 (divide the masks by 255), or "
    "declare 255 as ignored if that is what it means"
)
_UNKNOWN_HINT = "correct the mask, or declare the id as a class or as ignored"


def _check_ids(dataset: Dataset, split: str) -> None:
    table, union = dataset.lookup(), set()
    for number in spread(range(dataset.length(split)), MASKS_DECODED):
        mask, where = _raw_mask(dataset, split, number)
        found = np.unique(mask)
        if UNKNOWN_ID in table[found]:
            raise unknown_ids(found.tolist(), where=where, known=known_ids(dataset))
        union |= set(found.tolist())
    if union == _BINARY:
        raise UserError(
            f"the masks of {dataset.name} {split} hold nothing but 0 and 255, and 255 is ignored, "
            f"so there is one class to learn ({where} for example); {_BINARY_HINT}"
        )
    if all(table[id_] == IGNORE_LABEL for id_ in union):
        raise UserError(
            f"every pixel looked at in the masks of {dataset.name} {split} is ignored "
            f"({where} for example); are these the right masks?"
        )


def _raw_mask(dataset: Dataset, split: str, number: int) -> tuple[np.ndarray, str]:
    if isinstance(dataset, FileDataset):
        path = dataset.pairs(split)[number].mask
        return decode(path), str(path)
    image, mask = dataset.sample(split, number)
    where = dataset.sample_name(split, number)
    check_arrays(image, mask, where=where)
    return mask, where


def check_arrays(image: np.ndarray, mask: np.ndarray, *, where: str) -> None:
    """Raise UserError unless they are uint8 (H, W, 3) and uint8 (H, W)."""
    fits = image.ndim == 3 and image.shape == (*mask.shape, 3)
    if not fits or image.dtype != np.uint8 or mask.dtype != np.uint8:
        raise UserError(
            f"{where}: the image is {image.dtype} {image.shape} and the mask {mask.dtype} "
            f"{mask.shape}; expected uint8 (H, W, 3) and uint8 (H, W) of the same H and W"
        )


def decode(path: Path) -> np.ndarray:
    """Decode an image file in whole; raises UserError naming it if it is damaged."""
    try:
        with opened_image(path) as image:
            return np.asarray(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); replace it by an intact copy, or remove it together "
            f"with its partner"
        ) from error


def _png_header(path: Path, start: bytes, end: bytes) -> Header:
    if len(start) < 33 or end != PNG_END:
        raise UserError(
            f"{path} is truncated: the end of the PNG is missing; replace it by an intact copy, or "
            f"remove it together with its partner"
        )
    width, height = (int.from_bytes(start[at : at + 4], "big") for at in (16, 20))
    check_pixels(path, width, height)
    return Header(height, width, "PNG", start[24], _PNG_COLOURS.get(start[25], "unknown"))


def _jpeg_header(path: Path) -> Header:
    try:
        with opened_image(path) as image:
            return Header(image.height, image.width, "JPEG")
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); replace it by an intact copy") from error


def _remedy(mask: Header) -> str:
    if mask.colour == "palette":
        return (
            "save the palette's indices: Image.fromarray(np.asarray(Image.open(mask))).save(mask)"
        )
    if mask.colour != "grey":
        return "replace each colour by the id of its class and save one grey channel"
    if mask.bits != 8:
        return "save the ids as 8 bits: Image.fromarray(ids.astype(np.uint8)).save(mask)"
    return "save it as PNG; JPEG changes ids"
