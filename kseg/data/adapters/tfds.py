"""Any set of the TensorFlow Datasets catalogue that has an image and a mask."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kseg.data.dataset import IGNORE_LABEL, ArrayDataset, voc_palette
from kseg.errors import UserError
from kseg.registry import DATASETS

IMAGE_KEYS = ("image", "image_left")
MASK_KEYS = ("segmentation_mask", "segmentation_label", "annotation", "mask", "label_map")
VAL_SPLITS = ("validation", "val", "test")

# Sets whose ids mean something the features do not say: raw ids in order, and their names.
_KNOWN = {"oxford_iiit_pet": ((1, 2, 3), ("pet", "background", "border"))}


@DATASETS.register("tfds")
class TensorFlowDatasets(ArrayDataset):
    """A set of the TensorFlow Datasets catalogue, `tfds:NAME` or `tfds:NAME:CONFIG`.

    Any set with an image and a segmentation mask will do, such as `tfds:oxford_iiit_pet`. It is
    downloaded and prepared on first use, in the folder the environment variable TFDS_DATA_DIR
    names, or else in ~/tensorflow_datasets. Where the set does not say how many classes it has,
    all masks of its training split are looked at once. The val split is the set's "validation";
    without one, its "test"; without that, the last tenth of "train".

    Source: https://www.tensorflow.org/datasets
    """

    licence = "see the set's page"
    homepage = "https://www.tensorflow.org/datasets/catalog/overview"

    def __init__(self, path: str | None) -> None:
        """Open, and if need be download, a set; raises UserError if it cannot be used."""
        if not path:
            raise UserError("tfds needs the name of a set: tfds:NAME, such as tfds:oxford_iiit_pet")
        self.name = f"tfds:{path}"
        builder = _builder(path)
        self._features = builder.info.features
        self._image_key = _image_key(self.name, self._features)
        self._mask_key = _mask_key(self.name, self._features)
        _prepare(builder)
        self._records = _splits(builder, self._skipped())
        self.splits = tuple(self._records)
        self._ids, self.classes = self._find_classes(builder.name)
        self.palette = voc_palette(len(self.classes))

    @property
    def remap(self) -> Mapping[int, int]:
        """The set's ids to 0, 1, 2, ...; 255 stays ignored."""
        return {raw: id_ for id_, raw in enumerate(self._ids)} | {IGNORE_LABEL: IGNORE_LABEL}

    def length(self, split: str) -> int:
        """Return the number of samples of a split."""
        self.check_split(split)
        return len(self._records[split])

    def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one sample: uint8 (H, W, 3), and uint8 (H, W) of the set's own ids."""
        self.check_split(split)
        example = self._example(split, index)
        where = self.sample_name(split, index)
        image = _rgb(example[self._image_key])
        mask = _ids(example[self._mask_key], where=where)
        if image.shape[:2] != mask.shape:
            raise UserError(
                f"{where}: the image is {image.shape[1]} x {image.shape[0]} pixels but its mask "
                f"{mask.shape[1]} x {mask.shape[0]}; is {self._mask_key!r} the mask of "
                f"{self._image_key!r}?"
            )
        return image, mask

    def _example(self, split: str, index: int) -> Mapping[str, Any]:
        record = self._records[split][index]
        if isinstance(record, bytes):
            return self._features.deserialize_example_np(record, decoders=self._skipped())
        return record

    def _skipped(self) -> dict[str, Any]:
        from tensorflow_datasets import decode

        # The bytes as they were stored: the set's own decoder wants OpenCV, and says so.
        return {self._image_key: decode.SkipDecoding(), self._mask_key: decode.SkipDecoding()}

    def _find_classes(self, builder_name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        if builder_name in _KNOWN:
            return _KNOWN[builder_name]
        feature = self._features[self._mask_key]
        if getattr(feature, "num_classes", None):
            names = feature.names
            return tuple(range(len(names))), tuple(names)
        ids = self._found_ids()
        return ids, tuple(f"class {raw}" for raw in ids)

    def _found_ids(self) -> tuple[int, ...]:
        found: set[int] = set()
        for index in range(self.length("train")):
            mask = self._example("train", index)[self._mask_key]
            found |= set(np.unique(_ids(mask, where=self.sample_name("train", index))).tolist())
        found -= {IGNORE_LABEL}
        if len(found) < 2:
            raise UserError(
                f"the masks of {self.name} train hold {len(found)} different id(s) besides 255; "
                f"two classes at least are needed"
            )
        # An id that the training split lacks may still be in another.
        return tuple(range(min(found), max(found) + 1))


class TFRecordFiles(Sequence[bytes]):
    """The records of some TFRecord files, by number.

    A record is its length (8 bytes, little-endian), a checksum (4), the data, a checksum (4); one
    jump from length to length finds where all records begin.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Find the records; reads 8 bytes of each."""
        self._places = [place for file in files for place in _places(Path(file))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        path, start, count = self._places[index]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(count)


class _Part(Sequence):
    """The records from one number to another."""

    def __init__(self, records: Sequence, first: int, last: int) -> None:
        self._records, self._first, self._last = records, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        return self._records[self._first + index]


def _builder(path: str) -> Any:  # noqa: ANN401
    import tensorflow_datasets as tfds

    name = path.replace(":", "/", 1)
    try:
        return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"TensorFlow Datasets has no set {name!r}: {str(error).splitlines()[0]}; see "
            f"{TensorFlowDatasets.homepage}"
        ) from error
    except ValueError as error:  # no such configuration
        raise UserError(f"TensorFlow Datasets cannot open {name!r}: {error}") from error


def _prepare(builder: Any) -> None:  # noqa: ANN401
    try:
        builder.download_and_prepare()
    except (ValueError, AssertionError, OSError) as error:  # OSError: the network's errors too
        raise UserError(
            f"TensorFlow Datasets cannot prepare {builder.name!r}: {error}; if the set is on this "
            f"machine, let TFDS_DATA_DIR name the folder it is in"
        ) from error


def _splits(builder: Any, decoders: Mapping[str, Any]) -> dict[str, Sequence]:  # noqa: ANN401
    there = tuple(builder.info.splits)
    train = _records(builder, "train", decoders)
    val = next((name for name in VAL_SPLITS if name in there), None)
    if val is None:
        kept = len(train) - -(-len(train) // 10)
        return {"train": _Part(train, 0, kept), "val": _Part(train, kept, len(train))}
    splits = {"train": train, "val": _records(builder, val, decoders)}
    if val != "test" and "test" in there:
        splits["test"] = _records(builder, "test", decoders)
    return splits


def _records(builder: Any, split: str, decoders: Mapping[str, Any]) -> Sequence:  # noqa: ANN401
    there = tuple(builder.info.splits)
    if there and split not in there:
        raise UserError(
            f"tfds:{builder.name} has no split {split!r} (there are: {', '.join(there)})"
        )
    file_format = builder.info.file_format
    if there and file_format is not None and file_format.value == "tfrecord":
        return TFRecordFiles(builder.info.splits[split].filepaths)
    return builder.as_data_source(split, decoders=dict(decoders))


def _places(path: Path) -> list[tuple[Path, int, int]]:
    places, start, end = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while start < end:
            file.seek(start)
            (count,) = struct.unpack("<Q", file.read(8))
            places.append((path, start + 12, count))
            start += 12 + count + 4
    return places


def _image_key(name: str, features: Mapping[str, Any]) -> str:
    images = [key for key in _pictures(features) if features[key].shape[-1] in (3, 4)]
    found = [key for key in IMAGE_KEYS if key in _pictures(features)] + images
    if not found:
        raise UserError(f"{name} has no image; its features are: {', '.join(features)}")
    return found[0]


def _mask_key(name: str, features: Mapping[str, Any]) -> str:
    pictures = _pictures(features)
    others = [key for key in pictures if hasattr(features[key], "num_classes")]
    found = [key for key in MASK_KEYS if key in pictures] + others
    if not found:
        raise UserError(
            f"{name} has no segmentation mask: none of {', '.join(MASK_KEYS)} is an image among "
            f"its features ({', '.join(features)})"
        )
    return found[0]


def _pictures(features: Mapping[str, Any]) -> list[str]:
    from tensorflow_datasets import features as kinds

    return [key for key, feature in features.items() if isinstance(feature, kinds.Image)]


def _rgb(stored: bytes | np.ndarray) -> np.ndarray:
    return np.array(_opened(stored).convert("RGB"))


def _ids(stored: bytes | np.ndarray, *, where: str) -> np.ndarray:
    mask = np.asarray(_opened(stored))
    if mask.ndim == 3:
        # Some sets store a grey mask three times over.
        if (mask != mask[:, :, :1]).any():
            raise UserError(f"{where}: the mask is in colours, not in class ids; kseg needs ids")
        mask = mask[:, :, 0]
    if mask.max(initial=0) > 255:
        raise UserError(f"{where}: the mask holds the id {mask.max()}; 255 is the largest possible")
    return mask.astype(np.uint8)


def _opened(stored: bytes | np.ndarray) -> Image.Image:
    if isinstance(stored, np.ndarray) and stored.dtype == np.uint8:
        return Image.fromarray(stored.squeeze(-1) if stored.shape[-1] == 1 else stored)
    return Image.open(io.BytesIO(stored))
