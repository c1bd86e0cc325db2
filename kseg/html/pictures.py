"""A photo under two class maps and their difference, as layers that lie over one another."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from kseg.overlay import Colour, palette_image

LARGEST_MAP = 2048  # pixels of the longer side
LONGEST_PHOTO = 1024  # pixels; no screen shows a picture of the page larger
OUTLINED_WIDTH = 1200  # pixels, about; outlines are drawn finer than small class maps are


RED = (230, 30, 30)  # on a photo made grey and dark
IGNORED = 255  # id of the pixels of a mask that have no class


@dataclass(frozen=True)
class Picture:
    """One image under two class maps that differ.

    Attributes:
        name: of the image file, or "val 17".
        agreement: pixels labelled alike, per cent.
        image: uint8 (H, W, 3).
        reference: uint8 (H, W), class ids that count as right; 255 where none does.
        labels: uint8 (H, W), class ids that are compared with them.
    """

    name: str
    agreement: float
    image: np.ndarray
    reference: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Entry:
    """A class of a legend, its colour as CSS writes it."""

    name: str
    colour: str


@dataclass(frozen=True)
class Swap:
    """How many pixels are of one class in the reference and of another in the labels."""

    reference: str
    label: str
    pixels: int


@dataclass(frozen=True)
class Layers:
    """What a page shows of a picture; images are data URIs.

    Attributes:
        name, agreement: of the picture.
        width, height: of the image.
        photo: the image.
        reference, labels: the two class maps in their colours.
        outline: white lines around the pixels that differ.
        errors: these pixels in red, the others clear.
        differing: how many these are.
        legend: the classes that occur in either map, largest first.
        swaps: the most frequent ways in which the labels differ.
    """

    name: str
    agreement: float
    width: int
    height: int
    photo: str
    reference: str
    labels: str
    outline: str
    errors: str
    differing: int
    legend: list[Entry]
    swaps: list[Swap]


def layers(picture: Picture, classes: Sequence[str], palette: Sequence[Colour]) -> Layers:
    """Return the layers of a picture.

    Args:
        picture: the image and both maps.
        classes: class names, index is the class id.
        palette: one (r, g, b) of 0..255 a class.

    Raises:
        ValueError: if a class map is not of the image's size.
    """
    height, width = picture.image.shape[:2]
    for ids in (picture.reference, picture.labels):
        if ids.shape != (height, width):
            raise ValueError(
                f"{picture.name}: class maps must be {(height, width)} as the image is, "
                f"got {ids.shape}"
            )
    differing = (picture.reference != picture.labels) & (picture.reference != IGNORED)
    return Layers(
        name=picture.name,
        agreement=picture.agreement,
        width=width,
        height=height,
        photo=_photo(picture.image),
        reference=_coloured(_thinned(picture.reference), palette),
        labels=_coloured(_thinned(picture.labels), palette),
        outline=_png(_outline(_thinned(differing)), transparency=0),
        errors=_png(palette_image(_thinned(differing), (RED, RED)), transparency=0),
        differing=int(np.count_nonzero(differing)),
        legend=list(_legend(picture, classes, palette)),
        swaps=list(_swaps(picture, differing, classes)),
    )


def css(colour: Colour) -> str:
    """Return a colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _thinned(pixels: np.ndarray) -> np.ndarray:
    """Return every second, third ... pixel of a map that is larger than a page shows."""
    step = max(1, math.ceil(max(pixels.shape) / LARGEST_MAP))
    return pixels[::step, ::step]


def _photo(image: np.ndarray) -> str:
    photo = Image.fromarray(np.ascontiguousarray(image, np.uint8))
    photo.thumbnail((LONGEST_PHOTO, LONGEST_PHOTO))
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=80, optimize=True)
    return _data_uri("image/jpeg", data)


def _coloured(ids: np.ndarray, palette: Sequence[Colour]) -> str:
    """Return a class map in its colours, clear where it has no class."""
    clear = {"transparency": IGNORED} if (ids == IGNORED).any() else {}
    return _png(palette_image(ids, palette), **clear)


def _png(image: Image.Image, *, transparency: int | None = None) -> str:
    data = io.BytesIO()
    options = {} if transparency is None else {"transparency": transparency}
    image.save(data, "PNG", optimize=True, **options)
    return _data_uri("image/png", data)


def _data_uri(kind: str, data: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _outline(differing: np.ndarray) -> Image.Image:
    """Return white lines around the differing pixels, so that they themselves stay visible.

    The map is enlarged by a whole number first: a line should be thinner than a pixel of it.
    """
    scale = max(1, round(OUTLINED_WIDTH / differing.shape[1]))
    fine = np.repeat(np.repeat(differing, scale, axis=0), scale, axis=1)
    thickness = max(1, round(fine.shape[1] / 600))
    around = ndimage.binary_dilation(fine, np.ones((3, 3), bool), iterations=thickness)
    return Image.fromarray(around & ~fine)


def _legend(picture: Picture, classes: Sequence[str], palette: Sequence[Colour]) -> Iterator[Entry]:
    counts = np.bincount(picture.reference.ravel(), minlength=256)
    counts += np.bincount(picture.labels.ravel(), minlength=256)
    for id_ in np.argsort(-counts, kind="stable"):
        if counts[id_] and (id_ != IGNORED or len(classes) > IGNORED):
            known = id_ < len(palette)
            yield Entry(_class_name(id_, classes), css(palette[id_] if known else (0, 0, 0)))


def _swaps(
    picture: Picture, differing: np.ndarray, classes: Sequence[str], *, most: int = 3
) -> Iterator[Swap]:
    pairs = picture.reference.astype(np.int64) * 256 + picture.labels
    counts = np.bincount(pairs[differing], minlength=65536)
    for pair in np.argsort(-counts, kind="stable")[:most]:
        if counts[pair]:
            reference, label = (_class_name(id_, classes) for id_ in divmod(int(pair), 256))
            yield Swap(reference, label, int(counts[pair]))


def _class_name(id_: int, classes: Sequence[str]) -> str:
    return classes[id_] if id_ < len(classes) else f"class {id_}"
