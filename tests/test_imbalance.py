"""Rare classes: their weights, repeated images, windows aimed at them; all of it resumable."""

import math

import numpy as np
import pytest
import tensorflow as tf
from street import train_words

from kseg import checkpoint
from kseg.cli import main
from kseg.config import TrainConfig
from kseg.data.augment import Augmentation, choose_window, draw
from kseg.data.dataset import ArrayDataset
from kseg.data.pipeline import shuffled, training_batches
from kseg.data.rare import RareSampling, aimed, rarity, repeat_factors, repeated
from kseg.errors import UserError
from kseg.losses.class_weights import (
    PixelCounts,
    effective_weights,
    inverse_weights,
    weights_for,
)
from kseg.runs import Run
from kseg.train import train
from tools.benchmarks import imbalance

PLAIN = Augmentation(scale=(1, 1), flip=False, brightness=0, contrast=0, saturation=0, hue=0)


# Class weights: 75 pixels of one class, 25 of another.
COUNTS = PixelCounts(np.array([[50, 0], [25, 25]]))


def test_inverse_weights_by_hand():
    np.testing.assert_allclose(inverse_weights(COUNTS), [4 / 3, 4])
    # Scaled so that the mean weight of a pixel is 1: each class then weighs 1/2 in all.
    weights = weights_for("inverse", ["a", "b"], lambda: COUNTS)
    np.testing.assert_allclose(weights, [2 / 3, 2])


def test_effective_weights_by_hand():
    # 1 + 1/2 + 1/4 = 1.75 effective pixels of 3, and of 1 pixel 1.
    counts = PixelCounts(np.array([[3, 1, 0]]))
    np.testing.assert_allclose(effective_weights(counts, beta=0.5), [1 / 1.75, 1, 1])
    np.testing.assert_allclose(effective_weights(counts, beta=0.0), [1, 1, 1])


def test_effective_weights_are_inverse_for_beta_near_1_and_level_common_classes():
    counts = PixelCounts(np.array([[10**9, 10**8, 10**3, 10]]))
    near = effective_weights(counts, beta=1 - 1e-13)
    np.testing.assert_allclose(near * counts.pixels, 1.0, rtol=1e-3)
    # The default: 1 / (1 - beta) is the mean of the classes, 2.75e8 pixels.
    common, less, rare, rarest = effective_weights(counts)
    assert less / common == pytest.approx(
        -math.expm1(-(10**9) / 2.7500025e8) / -math.expm1(-(10**8) / 2.7500025e8), rel=1e-6
    )
    assert rarest / rare == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("text", ["effective:1", "effective:-0.1", "effective:x", "effective:"])
def test_a_wrong_beta_is_named(text):
    with pytest.raises(UserError, match="expected a number in 0..1, below 1"):
        weights_for(text, ["a", "b"], lambda: COUNTS)


def test_beta_is_taken_from_the_text():
    # As by hand above, scaled: shares 3/4 and 1/4.
    counts = PixelCounts(np.array([[3, 1]]))
    raw = np.array([1 / 1.75, 1])
    expected = raw / (raw @ [0.75, 0.25])
    np.testing.assert_allclose(weights_for("effective:0.5", ["a", "b"], lambda: counts), expected)


def test_prior_of_an_absent_class_is_that_of_one_pixel():
    np.testing.assert_allclose(PixelCounts(np.array([[6, 0, 3]])).prior, [0.6, 0.1, 0.3])


# Repeated images


def test_repeat_factors_by_hand():
    # Of eight images one holds class 2 and two class 1. At t = 1/2: sqrt(1/2 / 1/8) = 2 and
    # sqrt(1/2 / 1/4) = 1.414; an image with both follows the rarer.
    presence = np.array([[1, 1, 1], [1, 1, 0], *[[1, 0, 0]] * 6]) > 0
    root = math.sqrt(2)
    np.testing.assert_allclose(repeat_factors(presence, 0.5), [2, root, *[1] * 6])
    np.testing.assert_array_equal(repeat_factors(presence, 0.125), 1.0)


def test_repeat_factors_of_images_and_classes_without_a_pixel():
    presence = np.array([[1, 0, 0], [0, 0, 0]]) > 0
    np.testing.assert_allclose(repeat_factors(presence, 1.0), [math.sqrt(2), 1])


def files(repeats, epochs, seed=0):
    """Return which files the epochs have, (epochs, samples of one)."""
    count = math.ceil(repeats.sum())
    numbers = tf.data.Dataset.range(epochs * count)
    found = numbers.map(lambda n: repeated(n, repeats=repeats, seed=seed))
    return np.array(list(found.as_numpy_iterator())).reshape(epochs, count)


def test_an_epoch_has_each_file_as_often_as_wanted():
    repeats = np.array([1.0, 2.3, 1.0, 3.0, 1.0, 1.7])  # ten in all
    epochs = files(repeats, 200)
    assert epochs.shape == (200, 10)
    times = np.stack([np.bincount(epoch, minlength=6) for epoch in epochs])
    assert (times >= np.floor(repeats)).all() and (times <= np.ceil(repeats)).all()
    # 200 draws of a chance of 0.3: three deviations are 0.1.
    np.testing.assert_allclose(times.mean(axis=0), repeats, atol=0.1)


def test_a_sum_that_is_no_whole_number_leaves_no_file_out():
    repeats = np.array([1.0, 1.3, 1.0])
    for epoch in files(repeats, 50):
        assert set(epoch) == {0, 1, 2} and len(epoch) == 4


def test_order_changes_with_epoch_and_seed():
    repeats = np.array([1.0, 2.0, 1.5, 1.5])
    first, second = files(repeats, 2)
    assert list(first) != list(second)
    assert not np.array_equal(files(repeats, 2, seed=1), [first, second])
    np.testing.assert_array_equal(files(repeats, 2), [first, second])


def test_factors_of_one_have_each_file_once():
    for epoch in files(np.ones(7), 5):
        assert sorted(epoch) == list(range(7))


# Aimed windows


class Corners(ArrayDataset):
    """A common class 0, and a pixel each of the classes 1 and 2 in two corners of some images."""

    name = "corners"
    classes = ("ground", "rare", "rarer")
    palette = ((0, 0, 0), (1, 1, 1), (2, 2, 2))

    def length(self, split):
        return 5

    def sample(self, split, index):
        mask = np.zeros((60, 80), np.uint8)
        mask[0, 0] = 1 if index < 4 else 0
        mask[59, 79] = 2 if index == 0 else 0
        return np.repeat(mask[..., None], 3, -1), mask


def test_rarity_is_one_over_pixels():
    np.testing.assert_allclose(rarity(np.array([10, 0, 30])), [3 / 4, 0, 1 / 4])
    np.testing.assert_array_equal(rarity(np.array([0, 0])), [0, 0])


def batches(**options):
    options = {"size": (16, 16), "batch_size": 5, "seed": 1, "steps": 12} | options
    return list(training_batches(Corners(), augmentation=PLAIN, **options).as_numpy_iterator())


def test_every_window_aimed_at_a_class_shows_it():
    sampling = RareSampling(crops=1.0, rarity=np.array([0.0, 0.5, 0.5]))
    masks = np.concatenate([mask for _, mask in batches(sampling=sampling)])
    # Each epoch is a batch of the five images; the one without a rare class is cut anywhere.
    with_rare = (masks > 0).any(axis=(1, 2))
    assert with_rare.sum() >= 48
    # Without: the two corners are 2 of 45 * 65 places.
    plain = np.concatenate([mask for _, mask in batches()])
    assert (plain > 0).any(axis=(1, 2)).sum() < 6


def test_the_class_is_drawn_by_rarity():
    sampling = RareSampling(crops=1.0, rarity=np.array([0.0, 0.1, 0.9]))
    mask = Corners().sample("train", 0)[1]
    rarer = np.mean([(one == 2).any() for one in windows(mask, sampling, 200)])
    assert rarer == pytest.approx(0.9, abs=0.07)  # three deviations of 200 draws


def windows(mask, sampling, count, scale=1.0, size=(16, 16)):
    """Return the part of the mask that each of the first samples shows."""
    augmentation = Augmentation(scale=(scale, scale))

    def place(number):
        draws = draw(augmentation, seed=0, number=number)
        draws = aimed(draws, mask, size, sampling=sampling, seed=0, number=number)
        window = choose_window(tf.shape(mask), size, scale=draws.scale, y=draws.y, x=draws.x)
        return window.source, window.source_size

    found = tf.data.Dataset.range(count).map(place).as_numpy_iterator()
    return [mask[top : top + rows, left : left + columns] for (top, left), (rows, columns) in found]


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.7])
def test_the_window_shows_the_pixel_wherever_it_is_and_at_every_scale(scale):
    sampling = RareSampling(crops=1.0, rarity=np.array([0.0, 1.0]))
    for place in [(0, 0), (39, 49), (17, 3)]:
        mask = np.zeros((40, 50), np.uint8)
        mask[place] = 1
        assert all((one == 1).any() for one in windows(mask, sampling, 20, scale))


def test_the_pixel_lies_anywhere_in_the_window():
    sampling = RareSampling(crops=1.0, rarity=np.array([0.0, 1.0]))
    mask = np.zeros((60, 60), np.uint8)
    mask[30, 30] = 1
    places = np.array([np.argwhere(one)[0] for one in windows(mask, sampling, 150)])
    assert places.min() <= 1 and places.max() >= 14
    np.testing.assert_allclose(places.mean(axis=0), 7.5, atol=1.2)  # deviation 4.6 / sqrt(150)


def test_an_image_without_any_rare_class_is_cut_as_drawn():
    sampling = RareSampling(crops=1.0, rarity=np.array([0.0, 1.0]))
    for ids in (0, 255):
        mask = tf.fill((60, 80), tf.constant(ids, tf.uint8))
        number = tf.constant(4, tf.int64)
        draws = draw(PLAIN, seed=0, number=number)
        again = aimed(draws, mask, (16, 16), sampling=sampling, seed=0, number=number)
        assert (again.y, again.x) == (draws.y, draws.x)


def test_a_share_of_the_samples_is_aimed():
    sampling = RareSampling(crops=0.3, rarity=np.array([0.0, 1.0, 0.0]))
    shown = [(one == 1).any() for one in windows(Corners().sample("train", 1)[1], sampling, 300)]
    assert np.mean(shown) == pytest.approx(0.3, abs=0.08)  # three deviations of 300 draws


def test_sampling_leaves_all_other_decisions():
    sampling = RareSampling(crops=1.0, rarity=np.array([0.0, 1.0, 0.0]))
    mask, number = tf.constant(Corners().sample("train", 1)[1]), tf.constant(9, tf.int64)
    draws = draw(Augmentation(), seed=0, number=number)
    again = aimed(draws, mask, (16, 16), sampling=sampling, seed=0, number=number)
    assert again._replace(y=draws.y, x=draws.x) == draws


def test_batches_from_a_later_step_are_those_of_the_whole_training():
    sampling = RareSampling(
        repeats=np.array([2.3, 1.0, 1.0, 1.0, 1.0]), crops=0.5, rarity=np.array([0.0, 0.5, 0.5])
    )
    whole, rest = batches(sampling=sampling), batches(sampling=sampling, start_step=7)
    assert len(rest) == 5
    for (image, mask), (other_image, other_mask) in zip(whole[7:], rest, strict=True):
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(mask, other_mask)


def test_the_default_samples_as_before():
    for (image, mask), (again, same) in zip(
        batches(), batches(sampling=RareSampling()), strict=True
    ):
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(mask, same)
    order = [int(shuffled(tf.constant(n, tf.int64), count=5, seed=1)) for n in range(5)]
    assert sorted(order) == list(range(5))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--repeat-rare", "2"], "--repeat-rare must lie in 0..1"),
        (["--rare-crops", "-0.5"], "--rare-crops must lie in 0..1"),
        (["--logit-adjustment", "-1"], "--logit-adjustment must lie in 0..10"),
        (["--class-weights", "effective:2"], "BETA is '2'"),
        (["--class-weights", "invers"], "did you mean inverse"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(words, told, street, tmp_path, capsys):
    assert main(train_words(street, tmp_path / "run", *words)) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_training_with_all_of_it_resumes_bit_for_bit(street, tmp_path):
    from test_train import Crash, small

    def config(folder):
        return small(
            street, folder, loss="ce+0.5*dice", class_weights="effective", logit_adjustment=0.5
        ), {"repeat_rare": 1.0, "rare_crops": 0.5}

    from dataclasses import replace

    whole, broken = (replace(a, **b) for a, b in map(config, (tmp_path / "a", tmp_path / "b")))
    train(whole)
    with pytest.raises(RuntimeError, match="crash"):
        train(broken, callbacks=[Crash(3)])
    train(TrainConfig(resume=tmp_path / "b"))
    digests = [
        checkpoint.digest(checkpoint.load(Run(tmp_path / name).checkpoints, 6)[0])
        for name in ("a", "b")
    ]
    assert digests[0] == digests[1]


# The benchmark's data


def test_pedestrians_are_made_rare_in_training_alone():
    data, pedestrian = imbalance.RareScenes(), imbalance.PEDESTRIAN
    some = [k for k in range(12) if (data.sample("train", k)[1] == pedestrian).any()]
    assert some == [0]
    assert np.mean([(data.sample("val", k)[1] == pedestrian).any() for k in range(10)]) > 0.5
