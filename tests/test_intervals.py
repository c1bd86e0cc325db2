"""Intervals and paired tests keep what they promise, on data whose truth is known."""

import numpy as np
import pytest

from kseg.metrics.bootstrap import drawn_sums, interval, intervals, resampled
from kseg.metrics.iou import class_ious, pixel_accuracies, present_mean
from kseg.metrics.paired import Difference, paired_difference, permutation_p

CLASSES = np.array([3000, 1100, 400, 150])  # usual pixels of an image
PRESENT = np.array([1, 0.9, 0.6, 0.3])  # how often


def evaluations(random, sets, images, *, models=1, better=0.0):
    """Tallies (models, sets, images, 3, C): hard and easy images, rare classes, false pixels.

    Models share the images, how hard each is, and what is true; the last one is `better`.
    """
    shape = (sets, images)
    hard = random.beta(6, 2, (*shape, 1))
    true = np.exp(random.normal(np.log(CLASSES), 1, (*shape, 4))) * (
        random.random((*shape, 4)) < PRESENT
    )
    found = []
    for model in range(models):
        skill = hard + random.normal(0, 0.08, (*shape, 4)) + better * (model == models - 1)
        right = true * np.clip(skill, 0, 1)
        wrong = (true - right).sum(axis=-1, keepdims=True) * random.dirichlet(np.ones(4), shape)
        found.append(np.stack([right, true, right + wrong], axis=-2))
    return np.rint(found).astype(np.int64)


def truth(**options):
    """What the evaluations have on average, of 200,000 images."""
    sums = evaluations(np.random.default_rng(99), 20, 10_000, **options).sum(axis=(1, 2))
    return class_ious(sums), pixel_accuracies(sums)


def share_inside(found, true):
    return np.mean([low <= true <= high for low, high in found])


@pytest.mark.parametrize(("images", "least"), [(20, 0.88), (100, 0.91)])
def test_intervals_cover_as_stated(images, least):
    # 300 sets, so that a true rate of 95 % shows as 92.5 % to 97.5 % in 95 of 100 seeds.
    (ious,), (accuracy,) = truth()
    (sets,) = evaluations(np.random.default_rng(7), 300, images)
    found = [intervals(tallies, draws=400) for tallies in sets]
    assert least <= share_inside([one.miou for one in found], present_mean(ious)) <= 0.98
    assert least <= share_inside([one.pixel_accuracy for one in found], accuracy) <= 0.98
    assert least <= share_inside([one.iou[0] for one in found], ious[0]) <= 0.98


def test_intervals_are_not_wider_than_they_must_be():
    # The half-width of 95 % is 1.96 standard deviations of the mIoU between sets.
    (sets,) = evaluations(np.random.default_rng(3), 300, 100)
    spread = present_mean(class_ious(sets.sum(axis=1))).std()
    widths = [np.ptp(intervals(tallies, draws=400).miou) for tallies in sets[:40]]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_intervals_of_the_mean_are_those_of_the_textbook():
    # Of a mean of normal numbers: mean +- t sigma / sqrt(n). t(0.975, 9 degrees) is 2.262.
    random = np.random.default_rng(0)
    values = random.normal(10, 2, 10)
    drawn = resampled(10, draws=200_000) @ values / 10
    low, high = interval(drawn, images=10)
    half = 2.262 * values.std(ddof=1) / np.sqrt(10)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrow = interval(drawn)  # as if ten images were all there are
    assert high - low > 1.15 * (narrow[1] - narrow[0])


def test_sums_are_those_of_the_draws_however_they_are_cut(monkeypatch):
    counts = np.arange(60).reshape(12, 5)
    expected = resampled(12, draws=50, seed=3) @ counts
    np.testing.assert_array_equal(drawn_sums(counts, draws=50, seed=3), expected)
    monkeypatch.setattr("kseg.metrics.bootstrap._NUMBERS", 40)  # three draws a block
    np.testing.assert_array_equal(drawn_sums(counts, draws=50, seed=3), expected)


def test_one_image_and_rare_classes_have_no_interval():
    (sets,) = evaluations(np.random.default_rng(0), 1, 40)
    tallies = sets[0]
    alone = intervals(tallies[:1])
    assert alone.miou is alone.pixel_accuracy is alone.miou_of_images is None
    assert alone.iou == (None,) * 4
    tallies[..., 3] = 0
    assert intervals(tallies).iou[3] is None  # nowhere
    tallies[0, :, 3] = 5  # in one of 40 images: every draw that has it says 1
    assert intervals(tallies).iou[3] is None
    tallies[1, :, 3] = 5
    assert intervals(tallies).iou[3] == (1, 1)
    ignored = tallies.copy()
    ignored[1:] = 0  # one image is left that tells anything
    assert intervals(ignored).miou is None


def test_images_without_a_valid_pixel_are_left_out_of_their_mean():
    tallies = np.array([[[1], [2], [1]], [[0], [0], [0]]] * 4)
    low, high = intervals(tallies).miou_of_images
    assert low == high == 0.5


def test_equal_seeds_give_equal_intervals():
    (sets,) = evaluations(np.random.default_rng(1), 1, 30)
    assert intervals(sets[0]) == intervals(sets[0])
    assert intervals(sets[0]) != intervals(sets[0], seed=1)


# Pairs.


def verdicts(models):
    return [paired_difference(*pair, draws=400, swaps=499) for pair in zip(*models, strict=True)]


def test_equally_good_models_are_seldom_set_apart():
    # At 5 % of 200 sets, 10 and at most 18 in 99 of 100 seeds.
    found = verdicts(evaluations(np.random.default_rng(5), 200, 40, models=2))
    shown = [one.verdict != "not shown" for one in found]
    assert np.mean(shown) <= 0.09
    assert 0.02 <= np.mean([one.p <= 0.1 for one in found]) <= 0.17  # p is not idle either


def test_a_better_model_is_found_and_its_lead_is_covered():
    options = {"models": 2, "better": 0.07}
    ious, _ = truth(**options)
    lead = np.diff(present_mean(ious))[0]
    found = verdicts(evaluations(np.random.default_rng(6), 150, 60, **options))
    assert np.mean([one.verdict == "better" for one in found]) > 0.9
    assert 0.88 <= share_inside([one.interval for one in found], lead) <= 0.99
    back = paired_difference(*evaluations(np.random.default_rng(6), 1, 60, **options)[::-1, 0])
    assert back.verdict == "worse"


def test_pairing_counts():
    """What makes an image hard for both does not widen the interval of the difference."""
    first, second = evaluations(np.random.default_rng(2), 1, 60, models=2, better=0.03)[:, 0]
    alone = np.ptp(intervals(first).miou)
    assert np.ptp(paired_difference(first, second).interval) < 0.7 * alone


def test_the_same_model_twice_is_not_shown_to_be_better():
    first = evaluations(np.random.default_rng(4), 1, 30)[0, 0]
    found = paired_difference(first, first)
    assert (found.miou, found.interval, found.p, found.p_bootstrap) == (0, (0, 0), 1, 1)
    assert found.verdict == "not shown"
    assert not found.classes.any()


def test_three_images_are_too_few_although_all_are_better():
    first = np.array([[[8], [9], [9]]] * 3)
    found = paired_difference(first, first + [[1], [0], [0]])
    assert found.interval == (pytest.approx(0.2), pytest.approx(0.2))
    assert found.p == 0.25  # 2 of 8 ways
    assert found.verdict == "not shown"


def test_one_image_has_no_interval():
    first = np.array([[[8], [9], [9]]])
    found = paired_difference(first, first + [[1], [0], [0]])
    assert (found.interval, found.p, found.verdict) == (None, 1, "not shown")


def test_all_swaps_by_hand_and_swaps_by_chance_agree():
    first, second = evaluations(np.random.default_rng(8), 1, 8, models=2, better=0.02)[:, 0]

    def miou(tallies):
        return np.nanmean(class_ious(tallies.sum(axis=0)))

    seen, differences = miou(second) - miou(first), []
    for way in range(2**8):
        swap = np.array([way >> image & 1 for image in range(8)], bool)[:, None, None]
        differences.append(
            miou(np.where(swap, first, second)) - miou(np.where(swap, second, first))
        )
    expected = np.mean(np.abs(differences) >= abs(seen) - 1e-12)
    assert permutation_p(first, second) == expected
    assert permutation_p(first, second, swaps=255) == pytest.approx(expected, abs=0.12)


def test_chance_is_the_same_however_it_is_cut(monkeypatch):
    first, second = evaluations(np.random.default_rng(9), 1, 20, models=2)[:, 0]
    expected = permutation_p(first, second)
    monkeypatch.setattr("kseg.metrics.paired._NUMBERS", 20 * 64)
    assert permutation_p(first, second) == pytest.approx(expected, abs=0.02)
    assert 0 < permutation_p(first, first + second[:, :] * 0) <= 1


def test_a_class_that_one_of_them_lacks_has_no_difference():
    first = np.array([[[4, 0], [5, 0], [5, 0]]] * 10)
    second = np.array([[[4, 0], [5, 0], [5, 1]]] * 10)
    found = paired_difference(first, second)
    assert np.isnan(found.classes[1])
    assert found.class_intervals[1] is None


def test_other_images_are_refused():
    first = np.array([[[4], [5], [5]]] * 3)
    for second in (first[:2], first + [[0], [1], [0]]):
        with pytest.raises(ValueError, match="not counted on the same images"):
            paired_difference(first, second)


def test_a_verdict_needs_both_tests():
    def verdict(interval, p):
        return Difference(0.0, interval, p, 0.01, np.zeros(1), (None,)).verdict

    assert verdict((0.01, 0.02), 0.04) == "better"
    assert verdict((-0.02, -0.01), 0.04) == "worse"
    assert verdict((0.01, 0.02), 0.06) == verdict((-0.01, 0.02), 0.01) == "not shown"
