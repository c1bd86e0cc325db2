"""The steps eagerly and inside tf.data, the order of samples, and every kind of bad file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kseg.data import augment, doctor, pipeline
from kseg.data.augment import Augmentation
from kseg.data.dataset import ArrayDataset, Dataset, FileDataset, Pair, open_dataset
from kseg.errors import UserError

SIZE = (32, 48)
PLAIN = Augmentation(scale=(1, 1), flip=False, brightness=0, contrast=0, saturation=0, hue=0)
CLASSES_CSV = "id,name,r,g,b\n0,ground,0,0,0\n1,box,250,0,0\n2,sky,0,0,250\n255,ignore,9,9,9\n"


def draw_pair(folder: Path, split: str, number: int, *, suffix: str = ".png") -> Pair:
    """Write a sample of its own size whose mask has the ids 0, 1, 2 and 255."""
    rng = np.random.default_rng(number)
    height, width = 40 + number, 60 + 2 * number
    mask = np.zeros((height, width), np.uint8)
    mask[:10], mask[20:30, 5:25], mask[:, :2] = 2, 1, 255
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    pair = Pair(
        folder / split / "images" / f"{number}{suffix}", folder / split / "masks" / f"{number}.png"
    )
    for path, array in ((pair.image, image), (pair.mask, mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A `folder` set of five training and two validation samples."""
    (tmp_path / "classes.csv").write_text(CLASSES_CSV)
    for number in range(5):
        draw_pair(tmp_path, "train", number)
    for number in range(2):
        draw_pair(tmp_path, "val", number, suffix=".jpg")
    return tmp_path


class Ramps(ArrayDataset):
    """Images that hold their own column in all channels, masks that hold it too."""

    name = "ramps"
    classes = tuple(f"column {column}" for column in range(200))
    palette = tuple((column, column, column) for column in range(200))

    def __init__(self, count: int = 7) -> None:
        self.count = count

    def length(self, split: str) -> int:
        return self.count

    def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        mask = np.tile(np.arange(100 + index, dtype=np.uint8), (80, 1))
        return np.repeat(mask[:, :, None], 3, 2), mask


def batches(dataset: Dataset, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    options = {"size": SIZE, "batch_size": 4, "seed": 3, "steps": 5} | options
    return list(pipeline.training_batches(dataset, **options).as_numpy_iterator())


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


# ----------------------------------------------------------------------------- steps


def draws(**changes) -> augment.Draws:
    values = dict(scale=1.0, y=0.5, x=0.5, brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0)
    values |= {"flip": False} | changes
    return augment.Draws(**{name: tf.constant(value) for name, value in values.items()})


def both_ways(step: augment.Step, image: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Run a step eagerly and inside tf.data; they must agree bit for bit."""
    eager = [tensor.numpy() for tensor in step(tf.constant(image), tf.constant(mask))]
    (inside,) = tf.data.Dataset.from_tensors((image, mask)).map(step).as_numpy_iterator()
    assert all(np.array_equal(a, b) for a, b in zip(eager, inside, strict=True))
    return eager


def ramp(height: int = 40, width: int = 100) -> tuple[np.ndarray, np.ndarray]:
    mask = np.tile(np.arange(width, dtype=np.uint8), (height, 1))
    return np.repeat(mask[:, :, None], 3, 2), mask


@pytest.mark.parametrize("scale", [0.5, 0.77, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("on", [False, True])
def test_mask_moves_with_image(scale: float, on: bool):
    """The image is its own mask: a bilinear pixel is within half a source pixel of the nearest."""
    step = augment.augment(PLAIN, SIZE, draws(scale=scale, flip=on, y=0.3, x=0.8))
    image, mask = both_ways(step, *ramp())
    inside = mask != 255
    difference = np.abs(image[..., 0] - mask)[inside]
    assert difference.max() <= 0.5 + 1e-3
    assert (image[~inside] == augment.PAD_GREY).all()
    if scale == 1.0:
        assert (difference == 0).all()


@pytest.mark.parametrize(
    ("scale", "columns"),
    [(2.0, 24), (1.0, 48), (0.5, 96)],
)
def test_scale_is_relative_to_the_pixels_of_the_source(scale: float, columns: int):
    """A window 48 wide shows 48 / scale columns of the source."""
    _, mask = augment.augment(PLAIN, SIZE, draws(scale=scale))(*map(tf.constant, ramp(100, 120)))
    assert len(np.unique(mask)) == pytest.approx(min(columns, 48), abs=1)
    assert int(mask[0, -1]) - int(mask[0, 0]) == pytest.approx(columns, abs=2)


def test_window_reaches_every_edge():
    """The corner positions show the first and the last pixel of the source."""
    image, mask = ramp(40, 100)
    for x, column, value in ((0.0, 0, 0), (0.99999, -1, 99)):
        _, cut = augment.augment(PLAIN, SIZE, draws(x=x))(tf.constant(image), tf.constant(mask))
        assert cut.numpy()[0, column] == value


def test_small_source_is_padded_not_stretched():
    """A 10 x 20 source in a 32 x 48 sample keeps its 200 pixels; the rest is ignored."""
    image, mask = augment.augment(PLAIN, SIZE, draws())(*map(tf.constant, ramp(10, 20)))
    assert int(tf.reduce_sum(tf.cast(mask != 255, tf.int32))) == 200
    assert int(tf.reduce_sum(tf.cast(image[..., 0] == augment.PAD_GREY, tf.int32))) == 32 * 48 - 200


def test_every_window_fits_its_sample():
    """Whatever is drawn, source and target lie inside their images."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape, size = rng.integers(1, 90, 2), tuple(int(n) for n in rng.integers(1, 90, 2))
        scale, y, x = rng.uniform(0.4, 2.5), *rng.uniform(0, 1, 2)
        window = augment.choose_window(
            tf.constant(shape, tf.int32),
            size,
            scale=tf.constant(scale, tf.float32),
            y=tf.constant(y, tf.float32),
            x=tf.constant(x, tf.float32),
        )
        source, taken, target, given = (tensor.numpy() for tensor in window)
        assert (source >= 0).all() and (taken >= 1).all() and (source + taken <= shape).all()
        assert (target >= 0).all() and (given >= 1).all() and (target + given <= size).all()


def test_flip_turns_both_left_to_right():
    image, mask = ramp()
    turned = both_ways(augment.flip(tf.constant(True)), image, mask)
    assert np.array_equal(turned[0], image[:, ::-1]) and np.array_equal(turned[1], mask[:, ::-1])
    kept = both_ways(augment.flip(tf.constant(False)), image, mask)
    assert np.array_equal(kept[0], image) and np.array_equal(kept[1], mask)


def test_jitter_is_the_identity_by_default():
    image = np.random.default_rng(0).uniform(0, 255, (4, 6, 3)).astype(np.float32)
    step = augment.jitter(*augment.colour_matrix(draws()))
    coloured, _ = both_ways(step, image, np.zeros((4, 6), np.uint8))
    assert np.allclose(coloured, image, atol=2e-3)  # float32 round-off of 255 over three products


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"brightness": 20.0}, (120.0, 170.0, 70.0)),
        ({"contrast": 0.5}, (113.75, 138.75, 88.75)),  # half way to 127.5
        ({"saturation": 0.0}, (123.65,) * 3),  # 0.299 * 100 + 0.587 * 150 + 0.114 * 50
        ({"brightness": 200.0}, (255.0, 255.0, 250.0)),
    ],
)
def test_jitter_numbers(changes: dict, expected: tuple):
    image = np.full((2, 2, 3), (100, 150, 50), np.float32)
    step = augment.jitter(*augment.colour_matrix(draws(**changes)))
    coloured, _ = both_ways(step, image, np.zeros((2, 2), np.uint8))
    assert np.allclose(coloured, expected, atol=2e-3)


def test_hue_keeps_luma_and_a_third_of_a_turn_moves_red_away():
    image = np.full((1, 1, 3), (150, 100, 100), np.float32)
    step = augment.jitter(*augment.colour_matrix(draws(hue=2 * np.pi / 3)))
    (red, green, blue) = step(tf.constant(image), tf.zeros((1, 1), tf.uint8))[0].numpy()[0, 0]
    assert 0.299 * red + 0.587 * green + 0.114 * blue == pytest.approx(114.95, abs=0.1)
    assert max(green, blue) > red + 20


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (1, 1)])
def test_relabel_looks_up_every_pixel(shape: tuple[int, int]):
    """Pairs of pixels are looked up at once, so an odd number of pixels is a case of its own."""
    rng = np.random.default_rng(0)
    table = rng.permutation(256).astype(np.uint8)
    mask = rng.integers(0, 256, shape, np.uint8)
    image = np.zeros((*shape, 3), np.uint8)
    assert np.array_equal(both_ways(augment.relabel(table), image, mask)[1], table[mask])


def test_draws_are_a_function_of_seed_and_number():
    def drawn(seed: int, number: int) -> list[float]:
        values = augment.draw(Augmentation(), seed=seed, number=tf.constant(number, tf.int64))
        return [float(value) for value in values]

    assert drawn(1, 5) == drawn(1, 5)
    assert drawn(1, 5) != drawn(2, 5) and drawn(1, 5) != drawn(1, 6)


def test_draws_cover_what_they_should():
    """Of 400 samples: half flipped, the median scale 1, all within their limits."""
    numbers = tf.data.Dataset.range(400)
    many = numbers.map(lambda n: augment.draw(Augmentation(), seed=0, number=n)).batch(400)
    (drawn,) = many.as_numpy_iterator()
    assert 0.5 <= drawn.scale.min() and drawn.scale.max() <= 2.0
    assert np.median(drawn.scale) == pytest.approx(1.0, abs=0.12)  # 3 sigma of the median
    assert np.mean(drawn.flip) == pytest.approx(0.5, abs=0.075)  # 3 sigma of 400 coins
    assert 0.7 <= drawn.contrast.min() and drawn.contrast.max() <= 1.3


# ----------------------------------------------------------------------------- order, caching


def test_batches_have_the_agreed_shapes(folder: Path):
    image, mask = batches(open_dataset(f"folder:{folder}"))[0]
    assert image.shape == (4, *SIZE, 3) and image.dtype == np.float32
    assert mask.shape == (4, *SIZE) and mask.dtype == np.int32
    assert image.min() >= 0 and image.max() <= 255
    assert set(np.unique(mask)) <= {0, 1, 2, 255}


@pytest.mark.parametrize("cache", [False, True])
def test_two_runs_are_equal_and_a_resumed_one_is_the_tail(folder: Path, cache: bool):
    """Parallel maps, two epochs and a bit; the tail begins within an epoch."""
    dataset = open_dataset(f"folder:{folder}")
    whole = batches(dataset, cache=cache)
    assert len(whole) == 5
    assert same(whole, batches(dataset, cache=cache))
    assert same(whole[3:], batches(dataset, cache=cache, start_step=3))
    assert not same(whole, batches(dataset, cache=cache, seed=4))


def test_cache_changes_nothing(folder: Path):
    dataset = open_dataset(f"folder:{folder}")
    assert same(batches(dataset, cache=False), batches(dataset, cache=True))


@pytest.mark.parametrize("cache", [False, True])
def test_arrays_go_the_same_way(cache: bool):
    whole = batches(Ramps(), cache=cache)
    assert same(whole[2:], batches(Ramps(), cache=cache, start_step=2))


def test_cached_arrays_are_made_once():
    made = []

    class Counted(Ramps):
        def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
            made.append(index)
            return super().sample(split, index)

    batches(Counted(), cache=True, steps=20, augmentation=PLAIN)
    # Two threads may meet at the same missing sample, so a few are made twice, but not 80.
    assert set(made) == set(range(7)) and len(made) <= 14


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_sample_comes_once_an_epoch(count: int):
    numbers = range(3 * count)
    order = [int(pipeline.shuffled(tf.constant(n, tf.int64), count=count, seed=0)) for n in numbers]
    epochs = [order[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 7 or epochs[0] != epochs[1]


def test_masks_alone_are_those_beside_the_images(folder: Path):
    for dataset in (open_dataset(f"folder:{folder}"), Ramps()):
        both = [mask for _, mask in pipeline.read_samples(dataset, "train")]
        alone = list(pipeline.read_masks(dataset, "train"))
        assert len(alone) == len(both) > 0
        for one, other in zip(alone, both, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_mask_with_an_unknown_id_is_named_when_read_alone(folder: Path):
    Image.fromarray(np.full((43, 66), 7, np.uint8)).save(folder / "train" / "masks" / "3.png")
    with pytest.raises(UserError, match=r"masks/3\.png"):
        list(pipeline.read_masks(open_dataset(f"folder:{folder}"), "train"))


def test_evaluation_keeps_order_and_sizes(folder: Path):
    dataset = open_dataset(f"folder:{folder}")
    samples = list(pipeline.evaluation_samples(dataset, "val").as_numpy_iterator())
    assert [mask.shape for _, mask in samples] == [(40, 60), (41, 62)]
    assert samples[0][0].dtype == np.uint8 and samples[0][0].shape == (40, 60, 3)
    assert np.array_equal(samples[0][1], np.asarray(Image.open(dataset.pairs("val")[0].mask)))
    assert len(list(pipeline.evaluation_samples(dataset, "val", limit=1))) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_kind_become_rgb(folder: Path, mode: str):
    dataset = open_dataset(f"folder:{folder}")
    path = dataset.pairs("train")[0].image
    before = Image.open(path)
    before.convert(mode).save(path)
    image, _ = next(pipeline.evaluation_samples(dataset, "train").as_numpy_iterator())
    assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_cache_is_for_what_fits(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Five samples of about 42 x 64 x 4 bytes: 54 kB, so 60 kB free are too little for half."""
    dataset = open_dataset(f"folder:{folder}")
    assert pipeline.fits_in_memory(dataset, "train")
    monkeypatch.setattr(pipeline, "free_memory", lambda: 60_000)
    assert not pipeline.fits_in_memory(dataset, "train")


# ----------------------------------------------------------------------------- bad input


def _remove_split(pair: Pair) -> None:
    for file in (*pair.image.parent.iterdir(), *pair.mask.parent.iterdir()):
        file.unlink()
    pair.image.parent.rmdir()


def _empty_split(pair: Pair) -> None:
    for file in (*pair.image.parent.iterdir(), *pair.mask.parent.iterdir()):
        file.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _damage_inside(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def _resave(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def _edit(path: Path, old: int, new: int) -> None:
    mask = np.array(Image.open(path))
    mask[mask == old] = new
    _resave(path, mask)


# What to do to a sample, the words of the message, and whether it says so by the mask's name.
STRUCTURE = {
    "missing folder": (_remove_split, ["no folder", "train/images/", "classes.csv"], None),
    "empty split": (_empty_split, ["no images in", "empty", "put .png or .jpg"], None),
    "no mask": (lambda p: p.mask.unlink(), ["image without mask", "add it, or remove"], "image"),
    "no image": (lambda p: p.image.unlink(), ["mask without image", "add it, or remove"], "mask"),
}
FILES = {
    "sizes differ": (
        lambda p: _resave(p.mask, np.zeros((8, 9), np.uint8)),
        ["62 x 41", "9 x 8", "same size"],
        "mask",
    ),
    "truncated image": (lambda p: _truncate(p.image), ["truncated", "replace"], "image"),
    "truncated mask": (lambda p: _truncate(p.mask), ["truncated", "replace"], "mask"),
    "empty image": (lambda p: p.image.write_bytes(b""), ["empty", "replace"], "image"),
    "empty mask": (lambda p: p.mask.write_bytes(b""), ["empty", "replace"], "mask"),
    "damaged image": (lambda p: _damage_inside(p.image), ["damaged", "replace"], "image"),
    "not an image": (lambda p: p.image.write_text("hello"), ["neither a PNG nor"], "image"),
    "palette mask": (
        lambda p: _resave(p.mask, np.asarray(Image.open(p.mask)), "P"),
        ["8-bit palette PNG", "8-bit grey PNG", "indices"],
        "mask",
    ),
    "RGB mask": (
        lambda p: _resave(p.mask, np.asarray(Image.open(p.mask)), "RGB"),
        ["8-bit RGB PNG", "8-bit grey PNG", "replace each colour"],
        "mask",
    ),
    "16-bit mask": (
        lambda p: _resave(p.mask, np.asarray(Image.open(p.mask)).astype(np.uint16)),
        ["16-bit grey PNG", "8-bit grey PNG", "astype(np.uint8)"],
        "mask",
    ),
    "1-bit mask": (
        lambda p: _resave(p.mask, np.asarray(Image.open(p.mask)), "1"),
        ["1-bit grey PNG", "8-bit grey PNG"],
        "mask",
    ),
    "unknown id": (
        lambda p: _edit(p.mask, 1, 7),
        ["ids 0, 2, 7, 255", "0 to 2, and 255 for ignored pixels", "correct the mask"],
        "mask",
    ),
}


def _message(text: str, words: list[str], path: Path | None) -> None:
    assert all(word in text for word in words), text
    assert path is None or str(path) in text, text


@pytest.mark.parametrize("name", STRUCTURE | FILES)
def test_check_dataset_names_the_file_and_the_remedy(folder: Path, name: str):
    spoil, words, which = (STRUCTURE | FILES)[name]
    pair = open_dataset(f"folder:{folder}").pairs("train")[1]
    spoil(pair)
    with pytest.raises(UserError) as caught:
        doctor.check_dataset(open_dataset(f"folder:{folder}"), ["train", "val"])
    _message(str(caught.value), words, getattr(pair, which) if which else None)


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, False) for name in FILES), ("RGB mask", True)]
)
def test_a_file_gone_bad_during_training_is_named(folder: Path, name: str, cache: bool):
    spoil, words, which = FILES[name]
    dataset = open_dataset(f"folder:{folder}")
    pair = dataset.pairs("train")[1]
    spoil(pair)
    with pytest.raises(tf.errors.OpError) as caught:
        batches(dataset, cache=cache)
    error = pipeline.name_the_file(caught.value, dataset=dataset)
    assert isinstance(error, UserError)
    _message(str(error), words, getattr(pair, which))


def test_a_file_removed_during_training_is_named(folder: Path):
    dataset = open_dataset(f"folder:{folder}")
    path = dataset.pairs("train")[1].image
    path.unlink()
    with pytest.raises(tf.errors.OpError) as caught:
        batches(dataset, cache=False)
    assert str(pipeline.name_the_file(caught.value)).startswith(f"{path} has gone")


def test_odd_characters_in_a_path_survive(tmp_path: Path):
    odd = tmp_path / "süd [1] ] x"
    (odd / "train").mkdir(parents=True)
    (odd / "classes.csv").write_text(CLASSES_CSV)
    pair = draw_pair(odd, "train", 0)
    dataset = open_dataset(f"folder:{odd}")
    _truncate(pair.mask)
    with pytest.raises(tf.errors.OpError) as caught:
        batches(dataset, cache=False)
    assert str(pair.mask) in str(pipeline.name_the_file(caught.value))


def test_bad_arrays_are_named():
    class Wrong(Ramps):
        def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
            image, mask = super().sample(split, index)
            return image, mask if index != 3 else mask.astype(np.int32)

    with pytest.raises(UserError, match="ramps train #3: .* mask int32"):
        doctor.check_dataset(Wrong(), ["train"])
    with pytest.raises(tf.errors.OpError) as caught:
        batches(Wrong(), cache=False)
    assert "ramps train #3: " in str(pipeline.name_the_file(caught.value))


def test_other_errors_are_not_explained_away():
    assert pipeline.name_the_file(ValueError("something else")) is None


@pytest.mark.parametrize("ignored", ["", "255,ignore,9,9,9\n"])
def test_binary_masks_saved_as_0_and_255_are_recognised(folder: Path, ignored: str):
    """Also where 255 is declared as ignored: then there would be one class to learn."""
    (folder / "classes.csv").write_text("id,name,r,g,b\n0,not,0,0,0\n1,it,250,0,0\n" + ignored)
    dataset = open_dataset(f"folder:{folder}")
    for pair in dataset.pairs("train"):
        _edit(pair.mask, 1, 255)
        _edit(pair.mask, 2, 0)
    with pytest.raises(UserError, match=r"binary mask saved as 0/255; use 0 and 1") as caught:
        doctor.check_dataset(dataset, ["train"])
    assert "train/masks/" in str(caught.value)


def test_sound_data_passes(folder: Path):
    dataset = open_dataset(f"folder:{folder}")
    doctor.check_dataset(dataset, ["train", "val"])
    doctor.check_dataset(Ramps(), ["train"])
    assert doctor.most_frequent_size(Ramps(1), "train") == (80, 100)
    draw_pair(folder, "train", 3, suffix=".png")
    assert doctor.most_frequent_size(dataset, "val") in ((40, 60), (41, 62))


def test_most_frequent_size_counts(folder: Path):
    dataset = open_dataset(f"folder:{folder}")
    assert isinstance(dataset, FileDataset)
    for pair in dataset.pairs("train")[:2]:
        _resave(pair.image, np.zeros((50, 70, 3), np.uint8))
    assert doctor.most_frequent_size(dataset, "train") == (50, 70)
