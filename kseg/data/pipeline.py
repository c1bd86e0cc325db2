"""From a data set to batches: list, decode, augment, batch, prefetch, all inside tf.data."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from kseg.data import doctor
from kseg.data.augment import Augmentation, augment, draw, relabel
from kseg.data.dataset import UNKNOWN_ID, ArrayDataset, Dataset, FileDataset, Pair
from kseg.data.rare import RareSampling, aimed, repeated
from kseg.errors import UserError
from kseg.losses.class_weights import PixelCounts, count_pixels
from kseg.machine import free_memory

Source = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
Reader = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]]

_MARK = "kseg cannot use"
_UNKNOWN_IDS = "the mask holds ids other than "
_ASSERTION = re.compile(rf"{_MARK}\] \[(.*?)\] \[(.*?)\] \[([^\]]*)\]", re.DOTALL)
_FROM_PYTHON = re.compile(r"UserError: (.*?)(?:\nTraceback|\Z)", re.DOTALL)
_GONE = re.compile(r"(?:.*(?:\}\} |: ))?(.+); No such file or directory")


def training_batches(
    dataset: Dataset,
    *,
    split: str = "train",
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps: int,
    augmentation: Augmentation | None = None,
    sampling: RareSampling | None = None,
    cache: bool | None = None,
) -> tf.data.Dataset:
    """Return the batches of a training from one step to its end.

    Sample k of step s has the number s * batch_size + k; which file it is and how it is augmented
    follow from the seed and that number alone. So the batches from `start_step` on are exactly
    those an uninterrupted training would have seen. Every epoch has its own order.

    Args:
        dataset: where samples come from.
        split: which of its splits.
        size: (height, width) of the samples.
        batch_size: samples in a batch, over all replicas.
        seed: of all random decisions.
        start_step: first step to make a batch for.
        steps: number of steps of the whole training, so the last batch is that of steps - 1.
        augmentation: how samples are varied; None for the defaults.
        sampling: how rare classes are favoured; None for not at all.
        cache: keep decoded files in memory; None to do so if each is used more than once and all
            fit into half of the memory there is.

    Returns:
        image float32 (B, H, W, 3) from 0 to 255 and mask int32 (B, H, W), 255 where ignored.

    Raises:
        UserError: if the data set has no such split. What is wrong in a file met on the way is
            raised by the iterator: see `name_the_file`.
    """
    augmentation, sampling = augmentation or Augmentation(), sampling or RareSampling()
    count = dataset.length(split)
    if cache is None:
        cache = steps * batch_size > count and fits_in_memory(dataset, split)
    source = cached(dataset, split) if cache else uncached(dataset, split)

    def sample(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if sampling.repeats is None:
            index = shuffled(number, count=count, seed=seed)
        else:
            index = repeated(number, repeats=sampling.repeats, seed=seed)
        image, mask = source(index)
        draws = draw(augmentation, seed=seed, number=number)
        if sampling.crops:
            draws = aimed(draws, mask, size, sampling=sampling, seed=seed, number=number)
        image, mask = augment(augmentation, size, draws)(image, mask)
        return image, tf.cast(mask, tf.int32)

    numbers = tf.data.Dataset.range(start_step * batch_size, steps * batch_size)
    samples = numbers.map(sample, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return samples.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def evaluation_samples(
    dataset: Dataset, split: str, *, limit: int | None = None, only: Sequence[int] | None = None
) -> tf.data.Dataset:
    """Return the samples of a split in order, one at a time, each at its own size.

    Args:
        dataset: where samples come from.
        split: which of its splits.
        limit: stop after so many.
        only: give the samples of these numbers alone.

    Returns:
        image uint8 (h, w, 3) and mask uint8 (h, w), 255 where ignored.
    """
    numbers = range(dataset.length(split))[:limit] if only is None else only
    chosen = tf.data.Dataset.from_tensor_slices(np.asarray(numbers, np.int64))
    samples = chosen.map(uncached(dataset, split), num_parallel_calls=tf.data.AUTOTUNE)
    return samples.prefetch(tf.data.AUTOTUNE)


def read_samples(
    dataset: Dataset, split: str, *, limit: int | None = None, only: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give the samples of `evaluation_samples` as arrays, and name a file that cannot be read.

    Args:
        dataset: where samples come from.
        split: which of its splits.
        limit: stop after so many.
        only: give the samples of these numbers alone.

    Yields:
        image uint8 (h, w, 3) and mask uint8 (h, w), 255 where ignored.

    Raises:
        UserError: naming the file, if one is damaged or holds an unknown id.
    """
    if isinstance(dataset, FileDataset):
        pairs = dataset.pairs(split)
        # TensorFlow would decode an image of any size.
        for pair in pairs[:limit] if only is None else (pairs[number] for number in only):
            doctor.check_headers(pair)
    try:
        yield from evaluation_samples(dataset, split, limit=limit, only=only).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise name_the_file(error, dataset=dataset, split=split) or error from error


def read_masks(dataset: Dataset, split: str) -> Iterator[np.ndarray]:
    """Give the masks of a split, uint8 (h, w); of files, the images beside them stay unread.

    Args:
        dataset: where masks come from.
        split: which of its splits.

    Raises:
        UserError: naming the file, if one is damaged or holds an unknown id.
    """
    if not isinstance(dataset, FileDataset):
        yield from (mask for _, mask in read_samples(dataset, split))
        return
    table = dataset.lookup()
    for pair in dataset.pairs(split):
        doctor.check_headers(pair)
        raw = doctor.decode(pair.mask)
        mask = table[raw]
        if (mask == UNKNOWN_ID).any():
            found, known = np.unique(raw).tolist(), doctor.known_ids(dataset)
            raise doctor.unknown_ids(found, where=str(pair.mask), known=known)
        yield mask


def counting(dataset: Dataset) -> Callable[[], PixelCounts]:
    """Return what counts the pixels of the training masks, at its first call only."""
    return functools.cache(lambda: count_pixels(read_masks(dataset, "train"), len(dataset.classes)))


def shuffled(number: tf.Tensor, *, count: int, seed: int) -> tf.Tensor:
    """Return which of `count` files is sample `number`: each once in an epoch, in a new order."""
    epoch, position = number // count, number % count
    key = tf.stack([tf.cast(seed, tf.int64), epoch])
    return tf.random.experimental.index_shuffle(position, key, count - 1)


def uncached(dataset: Dataset, split: str) -> Source:
    """Return the function from index to (image, mask) that makes the sample anew each time."""
    read = _files(dataset, split) if isinstance(dataset, FileDataset) else _arrays(dataset, split)
    translate = relabel(dataset.lookup())

    def source(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, mask, names = read(index)
        image, mask = translate(image, mask)
        why = f"{_UNKNOWN_IDS}{doctor.known_ids(dataset)}"
        with tf.control_dependencies([_check(tf.reduce_all(mask != UNKNOWN_ID), names, why)]):
            return image, tf.identity(mask)

    return source


def cached(dataset: Dataset, split: str) -> Source:
    """Return the function from index to (image, mask) that makes each sample only once."""
    make = uncached(dataset, split)
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    missing = np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8)

    def keep(index: int, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept[index] = image.copy(), mask.copy()  # the arrays given are TensorFlow's own memory
        return kept[index]

    look = _from_python(lambda index: kept.get(index, missing))
    store = _from_python(keep)

    def source(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, mask = look(index)
        return tf.cond(tf.size(mask) > 0, lambda: (image, mask), lambda: store(index, *make(index)))

    return source


def fits_in_memory(dataset: Dataset, split: str) -> bool:
    """Return whether a split, decoded, takes less than half of the memory that is free."""
    count = dataset.length(split)
    numbers = doctor.spread(range(count), 16)
    pixels = [math.prod(doctor.sample_size(dataset, split, number)) for number in numbers]
    return 4.0 * count * float(np.mean(pixels)) < 0.5 * free_memory()


def name_the_file(
    error: Exception, *, dataset: Dataset | None = None, split: str = "train"
) -> UserError | None:
    """Turn an error of a pipeline into a message about the file that caused it.

    Args:
        error: what iterating over the batches or samples raised.
        dataset: where the samples come from. Damage inside a file that is whole to its end shows
            only in the decoder, which names nothing; then all files of the split are decoded to
            find the one.
        split: which split was read.

    Returns:
        What is wrong in which file and what to do, or None if the error is not about a file.
    """
    text = str(error)
    if match := _ASSERTION.search(text):
        return _diagnosis(*match.groups())
    if match := _FROM_PYTHON.search(text):
        return UserError(match[1].strip())
    if match := _GONE.search(text):
        return UserError(f"{match[1]} has gone since the data set was listed")
    if isinstance(dataset, FileDataset) and isinstance(error, tf.errors.OpError):
        return _damaged(dataset.pairs(split))
    return None


def _files(dataset: FileDataset, split: str) -> Reader:
    images = tf.constant([str(pair.image) for pair in dataset.pairs(split)])
    masks = tf.constant([str(pair.mask) for pair in dataset.pairs(split)])

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        names = [tf.gather(images, index), tf.gather(masks, index)]
        image, mask = _decode_image(names), _decode_mask(names)
        same = tf.reduce_all(tf.shape(image)[:2] == tf.shape(mask))
        with tf.control_dependencies([_check(same, names, "they differ in size")]):
            return tf.identity(image), mask, names

    return read


def _arrays(dataset: ArrayDataset, split: str) -> Reader:
    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = dataset.sample(split, index)
        doctor.check_arrays(image, mask, where=dataset.sample_name(split, index))
        return image, mask

    source = _from_python(load)

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        name = tf.strings.join([f"{dataset.name} {split} #", tf.strings.as_string(index)])
        return *source(index), [name, name]

    return read


def _from_python(function: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Source:
    def source(index: tf.Tensor, *arrays: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, mask = tf.numpy_function(
            lambda number, *arrays: function(int(number), *arrays),
            [index, *arrays],
            [tf.uint8, tf.uint8],
        )
        return tf.ensure_shape(image, (None, None, 3)), tf.ensure_shape(mask, (None, None))

    return source


def _decode_image(names: list[tf.Tensor]) -> tf.Tensor:
    raw = tf.io.read_file(names[0])
    jpeg = _head(raw, 2) == doctor.JPEG_START
    with tf.control_dependencies(
        [_check(_is_whole_png(raw) | jpeg, names, "the image is damaged")]
    ):
        # By its bytes, whatever its name says; and as Pillow decodes, which `predict` reads with:
        # the default's errors of up to 7 of 255 change mIoU by more than int8 does.
        return tf.cond(
            jpeg,
            lambda: tf.io.decode_jpeg(raw, channels=3, dct_method="INTEGER_ACCURATE"),
            lambda: tf.io.decode_png(raw, channels=3),
        )


def _decode_mask(names: list[tf.Tensor]) -> tf.Tensor:
    raw = tf.io.read_file(names[1])
    # Bit depth and colour type. Any other kind decodes to something that is not the ids: a
    # palette to the brightness of its colours, 16 bits to the high byte.
    grey = tf.strings.substr(raw, tf.minimum(24, tf.strings.length(raw)), 2) == b"\x08\x00"
    why = "the mask is damaged or not an 8-bit grey PNG"
    with tf.control_dependencies([_check(_is_whole_png(raw) & grey, names, why)]):
        return tf.io.decode_png(raw, channels=1)[:, :, 0]


def _is_whole_png(raw: tf.Tensor) -> tf.Tensor:
    count = len(doctor.PNG_END)
    tail = tf.strings.substr(raw, tf.maximum(0, tf.strings.length(raw) - count), count)
    return (_head(raw, 8) == doctor.PNG_START) & (tail == doctor.PNG_END)


def _head(raw: tf.Tensor, count: int) -> tf.Tensor:
    return tf.strings.substr(raw, 0, count)


def _check(fits: tf.Tensor, names: list[tf.Tensor], why: str) -> tf.Operation | None:
    return tf.debugging.Assert(fits, [_MARK, *names, why])


def _diagnosis(image: str, mask: str, why: str) -> UserError:
    pair = Pair(Path(image), Path(mask))
    if not pair.mask.exists():
        return UserError(f"{image}: {why}")
    try:
        doctor.check_headers(pair)
        found = np.unique(doctor.decode(pair.mask))
    except UserError as error:
        return error
    if why.startswith(_UNKNOWN_IDS):
        known = why.removeprefix(_UNKNOWN_IDS)
        return doctor.unknown_ids(found.tolist(), where=mask, known=known)
    return UserError(f"{image} with {mask}: {why}")


def _damaged(pairs: Iterable[Pair]) -> UserError | None:
    for path in itertools.chain.from_iterable((pair.image, pair.mask) for pair in pairs):
        try:
            doctor.decode(path)
        except UserError as error:
            return error
    return None
