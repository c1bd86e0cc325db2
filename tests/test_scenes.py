"""The built-in data set: the same everywhere, fair to every class, and no matter of colour."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kseg.data.adapters.scenes import LENGTHS, SIZE, Scenes, draw_scene
from kseg.data.dataset import open_dataset
from kseg.data.drawing import PLAIN, Camera, Canvas, Material, Surface, Weather
from kseg.errors import UserError

CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "pedestrian", "pole", "sign")


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("scenes")


@pytest.fixture(scope="module")
def val(scenes):
    return drawn(scenes, "val", 80)


@pytest.fixture(scope="module")
def train(scenes):
    return drawn(scenes, "train", 80)


def drawn(scenes, split, count):
    images, masks = zip(*(scenes.sample(split, k) for k in range(count)), strict=True)
    return np.stack(images), np.stack(masks)


def test_contract(scenes):
    assert scenes.classes == CLASSES
    assert len(set(scenes.palette)) == len(CLASSES)
    assert {split: scenes.length(split) for split in scenes.splits} == LENGTHS
    assert scenes.sample_name("val", 3) == "scenes val #3"


def test_image_and_mask(train, val):
    for images, masks in (train, val):
        assert images.dtype == masks.dtype == np.uint8
        assert images.shape == (80, *SIZE, 3)
        assert masks.shape == (80, *SIZE)
        assert masks.max() < len(CLASSES)


def test_same_bytes_in_any_order_and_from_any_thread(scenes):
    indices = [5, 0, 17, 5]
    alone = {k: Scenes().sample("train", k) for k in sorted(indices)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda k: scenes.sample("train", k), indices))
    for k, (image, mask) in zip(indices, together, strict=True):
        np.testing.assert_array_equal(image, alone[k][0])
        np.testing.assert_array_equal(mask, alone[k][1])


def test_each_split_seed_and_index_is_another_scene(scenes):
    samples = [
        scenes.sample("train", 0),
        scenes.sample("train", 1),
        scenes.sample("val", 0),
        scenes.sample("test", 0),
        open_dataset("scenes:1").sample("train", 0),
    ]
    masks = [mask.tobytes() for _, mask in samples]
    assert len(set(masks)) == len(masks)


def test_no_image_of_val_is_in_train(train, val):
    assert not {image.tobytes() for image in train[0]} & {image.tobytes() for image in val[0]}


def test_every_class_has_a_sensible_share(val):
    share = np.bincount(val[1].ravel(), minlength=len(CLASSES)) / val[1].size
    assert share.max() < 0.4
    # The rarest, pedestrians, are still some 1000 pixels an image.
    assert share.min() > 0.015
    seen_in = [(val[1] == k).any(axis=(1, 2)).mean() for k in range(len(CLASSES))]
    assert min(seen_in) > 0.8


def test_poles_and_signs_are_wide_enough_to_learn(val):
    for name in ("pole", "sign"):
        widths = run_lengths(val[1] == CLASSES.index(name))
        assert np.median(widths) >= 3


def run_lengths(region):
    """Return the widths of all horizontal runs of True."""
    edges = np.diff(np.pad(region, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=2)
    return np.nonzero(edges == -1)[2] - np.nonzero(edges == 1)[2]


def test_colour_alone_does_not_tell_the_class(train, val):
    images, masks = train[0][::4], train[1][::4]
    means = np.stack([images[masks == k].mean(axis=0) for k in range(len(CLASSES))])
    # |a - b|^2 without |a|^2, which is the same for every class.
    pixels = val[0].reshape(-1, 3)[::5].astype(np.float32)
    truth = val[1].reshape(-1)[::5]
    distance = (means**2).sum(axis=1) - 2 * pixels @ means.T
    assert mean_iou(truth, distance.argmin(axis=1)) < 0.25


def test_place_alone_does_not_tell_the_class(train, val):
    counts = np.stack([(train[1] == k).sum(axis=0) for k in range(len(CLASSES))])
    usual = np.broadcast_to(counts.argmax(axis=0), val[1].shape)
    assert mean_iou(val[1], usual) < 0.25


def mean_iou(truth, guess):
    shares = []
    for k in range(len(CLASSES)):
        both = ((truth == k) & (guess == k)).sum()
        shares.append(both / ((truth == k) | (guess == k)).sum())
    return np.mean(shares)


def test_mask_lies_where_the_image_says(val):
    """Brightness jumps where the class changes: an offset of some pixels would lose the jump."""
    images, masks = val
    grey = images.astype(np.float32).mean(axis=-1)
    jump = np.abs(np.diff(grey, axis=2))
    edge = masks[:, :, 1:] != masks[:, :, :-1]
    shifted = [np.roll(jump, k, axis=2)[edge].mean() for k in (-3, -2, -1, 0, 1, 2, 3)]
    assert np.argmax(shifted) == 3


@pytest.mark.parametrize("seed", range(3))
def test_any_stream_of_chance_draws_a_scene(seed):
    image, mask = draw_scene(np.random.default_rng(seed))
    assert image.shape == (*SIZE, 3)
    assert len(np.unique(mask)) >= 5
    assert image.std() > 10


def test_more_surfaces_than_numbers_keep_their_class():
    camera, light = Camera(200.0, 16.0, 16.0, 1.5), (1.0, 1.0, 1.0)
    weather = Weather(light, light, light, 0.0, light, light, light, 100.0)
    sky = np.zeros((20, 32, 3), np.uint8)
    canvas = Canvas(camera, weather, (32, 32), sky=sky, sky_class=0)
    for k in range(600):
        surface = Surface(1 + k % 7, camera.front(5.0 + k), Material(PLAIN, 1.0, 0.0))
        number = canvas.add(surface)
        assert 0 < number < 256
        assert canvas.surfaces[number].class_id == surface.class_id


@pytest.mark.parametrize("path", ["-1", "data/scenes", "1.5", "²"])
def test_seed_must_be_a_number(path):
    with pytest.raises(UserError, match=r"scenes:7"):
        open_dataset(f"scenes:{path}")


def test_unknown_split(scenes):
    with pytest.raises(UserError, match="val"):
        scenes.sample("vall", 0)


@pytest.mark.parametrize("index", [-1, 80])
def test_index_out_of_range(scenes, index):
    with pytest.raises(IndexError, match="80"):
        scenes.sample("val", index)


def test_drawing_needs_no_tensorflow():
    blocked = "import sys; sys.modules['tensorflow'] = sys.modules['keras'] = None; "
    draw = "from kseg.data.dataset import open_dataset; open_dataset('scenes').sample('val', 0)"
    subprocess.run([sys.executable, "-c", blocked + draw], check=True)
