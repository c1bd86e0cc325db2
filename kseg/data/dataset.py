"""What a data set answers: its classes, and the image and mask of every sample of every split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kseg.errors import UserError
from kseg.registry import DATASETS, nearest

IGNORE_LABEL = 255
UNKNOWN_ID = 254  # where `lookup` sends a raw id that is neither a class nor ignored

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MASK_SUFFIXES = (".png",)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Pair:
    """The two files of one sample."""

    image: Path
    mask: Path


class Dataset(ABC):
    """Labelled images in named splits; an adapter derives from one of the two kinds below.

    An adapter is registered as `@DATASETS.register("name")` and is called with the text that
    stands behind the colon of `name:PATH`, or None. It sets these attributes on itself or on its
    class.

    Attributes:
        name: what people type.
        classes: the name of each class id, from 0.
        palette: one (r, g, b) for each class.
        splits: names of the splits there are, among "train", "val" and "test".
        licence: under what terms the data may be used.
        homepage: where the data comes from.
        epochs: passes over the training split that a training takes unless told otherwise.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    splits: tuple[str, ...] = ("train", "val")
    licence: str = "unknown"
    homepage: str = ""
    epochs: float = 30.0

    @property
    def remap(self) -> Mapping[int, int]:
        """Raw id in a mask to class id, or to 255 for pixels that do not count."""
        return {id_: id_ for id_ in range(len(self.classes))} | {IGNORE_LABEL: IGNORE_LABEL}

    @abstractmethod
    def length(self, split: str) -> int:
        """Return the number of samples of a split; raises UserError if there is no such split."""

    @abstractmethod
    def sample_name(self, split: str, index: int) -> str:
        """Return what to call a sample in a message: a path or "scenes val #3"."""

    def lookup(self) -> np.ndarray:
        """Return `remap` as a table of 256 uint8; raw ids without meaning become UNKNOWN_ID."""
        table = np.full(256, UNKNOWN_ID, np.uint8)
        for raw, id_ in self.remap.items():
            table[raw] = id_
        return table

    def check_split(self, split: str) -> None:
        """Raise UserError unless the data set has this split."""
        if split not in self.splits:
            raise UserError(
                f"{self.name} has no split {split!r}{nearest(split, self.splits)} "
                f"(there are: {', '.join(self.splits) or 'none'})"
            )


class FileDataset(Dataset):
    """A data set of image files with a mask file each."""

    def pairs(self, split: str) -> list[Pair]:
        """Return the files of a split, in order of their names.

        Raises:
            UserError: if a folder is missing or empty, or a file has no partner.
        """
        if split not in self._found():
            self._found()[split] = self.find_pairs(split)
        return self._found()[split]

    @abstractmethod
    def find_pairs(self, split: str) -> list[Pair]:
        """Look for the files of a split on disk; called once per split."""

    def length(self, split: str) -> int:
        """Return the number of samples of a split."""
        return len(self.pairs(split))

    def sample_name(self, split: str, index: int) -> str:
        """Return the path of the image."""
        return str(self.pairs(split)[index].image)

    def _found(self) -> dict[str, list[Pair]]:
        return self.__dict__.setdefault("_pairs", {})


class ArrayDataset(Dataset):
    """A data set that makes or looks up its samples by number."""

    @abstractmethod
    def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one sample, always the same for the same number, from any thread.

        Returns:
            The image, uint8 (H, W, 3), and the mask of raw ids, uint8 (H, W); the pipeline
            applies `remap`.
        """

    def sample_name(self, split: str, index: int) -> str:
        """Return for example "scenes val #3"."""
        return f"{self.name} {split} #{index}"


def open_dataset(spec: str) -> Dataset:
    """Open a data set named on the command line.

    Args:
        spec: `NAME` or `NAME:PATH`, such as `camvid:data/camvid` or `tfds:oxford_iiit_pet`.

    Raises:
        UserError: if there is no such data set, or it is not where the path says.
    """
    name, _, path = spec.partition(":")
    return DATASETS[name](path or None)


def existing_folder(path: str | None, *, name: str, tree: str) -> Path:
    """Return the folder a data set lives in.

    Args:
        path: what stood behind the colon of the spec, or None.
        name: the data set, for the message.
        tree: a drawing of the files expected there, for the message.

    Raises:
        UserError: if no path was given or it is not a folder.
    """
    if path is None:
        raise UserError(f"{name} needs the folder it is in: {name}:PATH, where PATH holds\n{tree}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; {name}:PATH expects PATH to be a folder with\n{tree}"
        )
    return folder


def pair_by_stem(images: Path, masks: Path, *, tree: str) -> list[Pair]:
    """Pair the files of two folders by their names without suffix, in order of these names.

    Args:
        images: folder of .png, .jpg or .jpeg images.
        masks: folder of .png masks.
        tree: a drawing of the files expected, for the message.

    Raises:
        UserError: if a folder is missing or empty, a name is there twice or has no partner.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; expected in {folder.parent}\n{tree}")
    image_of = _by_stem(images, IMAGE_SUFFIXES)
    mask_of = _by_stem(masks, MASK_SUFFIXES)
    if not image_of and not mask_of:
        raise UserError(
            f"no images in {images}: the split is empty; put .png or .jpg files there, and a mask "
            f"of the same name for each in {masks}"
        )
    _check_partners(image_of, mask_of, masks, "image", "mask (an 8-bit grey .png)")
    _check_partners(mask_of, image_of, images, "mask", "image (.png, .jpg or .jpeg)")
    return [Pair(image_of[stem], mask_of[stem]) for stem in sorted(image_of)]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files = [
        file
        for file in sorted(folder.iterdir())
        # Archives made on a Mac hold a "._name.png" beside each name.png.
        if file.suffix.lower() in suffixes and not file.name.startswith(".")
    ]
    stem, count = max(Counter(file.stem for file in files).items(), key=_count, default=("", 0))
    if count > 1:
        twice = ", ".join(file.name for file in files if file.stem == stem)
        raise UserError(f"{folder} holds {stem!r} more than once ({twice}); keep one of them")
    return {file.stem: file for file in files}


def _count(item: tuple[str, int]) -> int:
    return item[1]


def _check_partners(
    ours: Mapping[str, Path], theirs: Mapping[str, Path], folder: Path, kind: str, partner: str
) -> None:
    alone = [str(file) for stem, file in ours.items() if stem not in theirs]
    if alone:
        raise UserError(
            f"{kind} without {partner.split()[0]}: {listing(alone)}; expected in {folder} a "
            f"{partner} with the same name as each {kind}: add it, or remove the {kind}"
        )


def voc_palette(count: int) -> tuple[Colour, ...]:
    """Return colours that tell neighbouring ids apart, as PASCAL VOC makes them.

    Source: VOC development kit, `VOClabelcolormap.m`: the bits of the id, three by three, become
    the high bits of red, green and blue.
    """
    bits = [[(id_ >> bit) & 1 for bit in range(9)] for id_ in range(count)]
    return tuple(
        tuple(sum(one[3 * k + channel] << (7 - k) for k in range(3)) for channel in range(3))
        for one in bits
    )


# Of PASCAL VOC, as its development kit orders them; their colours are `voc_palette(21)`.
VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def listing(items: Iterable[str], *, shown: int = 3) -> str:
    """Return the first few items as text and how many more there are."""
    items = list(items)
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
