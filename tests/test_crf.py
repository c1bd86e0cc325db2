"""The dense CRF against the exact O(N^2) one, against planted cases, and against pydensecrf2."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kseg.card import ModelCard
from kseg.crf import DenseCRF, Predictions, search
from kseg.data.dataset import ArrayDataset
from kseg.errors import UserError
from kseg.evaluate import evaluate
from kseg.inference import Predictor
from kseg.permutohedral import GaussianFilter
from kseg.predict import predict_files
from kseg.probabilities import softmax
from kseg.refinement import RefinedPredictor
from kseg.runtimes import Runtime

COLOURS = np.array([[60, 120, 40], [180, 60, 70], [90, 90, 200]])


def picture(height=24, width=32, seed=0):
    """Return a disc and a box before a ground, with camera noise, and the mask of the three."""
    y, x = np.indices((height, width))
    mask = np.zeros((height, width), np.uint8)
    mask[(x > 0.7 * width) & (y > 0.3 * height)] = 2
    mask[np.hypot(y - 0.4 * height, x - 0.45 * width) < 0.3 * height] = 1
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return (COLOURS[mask] + noise).clip(0, 255).astype(np.uint8), mask


def guess(mask, seed=0, classes=3):
    """Return what a poor net would say of a mask: two pixels off, and noisy."""
    rng = np.random.default_rng(seed)
    logits = 2 * np.eye(classes)[np.roll(mask, 2, (0, 1))]
    return softmax((logits + rng.normal(0, 1, logits.shape)).astype(np.float32))


def exact_kernel(features):
    """Return the Gaussian kernel of points (dimensions, N) that a `GaussianFilter` is to apply."""
    distance = np.square(features[:, :, None] - features[:, None, :]).sum(axis=0)
    kernel = np.exp(-distance / 2)
    scale = 1 / np.sqrt(kernel.sum(axis=0))
    return scale[:, None] * kernel * scale


def exact(crf, probabilities, image):
    """Return the mean field of every pair of pixels, in double precision."""
    y, x = np.indices(image.shape[:2]).reshape(2, -1)
    place, colour = np.stack([x, y]), image.reshape(-1, 3).T
    alike = np.concatenate([place / crf.sigma_alpha, colour / crf.sigma_beta])
    kernel = crf.w1 * exact_kernel(alike) + crf.w2 * exact_kernel(place / crf.sigma_gamma)
    q = probabilities.reshape(-1, probabilities.shape[-1]).astype(np.float64)
    log = np.log(q)
    for _ in range(crf.iterations):
        q = softmax(log + kernel @ q)
    return q.reshape(probabilities.shape)


@pytest.mark.parametrize(("dimensions", "spread"), [(1, 1.5), (2, 1.5), (3, 1.5), (5, 0.7)])
def test_filter_is_gaussian_of_the_right_width(dimensions, spread):
    # The lattice's kernel is a product of short blurs of interpolated values, not a Gaussian: of
    # values of 0.5 on average it is wrong by 0.01. One of another width is worse by far.
    points = np.random.default_rng(0).normal(0, spread, (dimensions, 1500)).astype(np.float32)
    values = ((np.sin(2 * points[0] / spread) + 1) / 2).astype(np.float32)[:, None]
    expected = exact_kernel(points) @ values

    def error(width):
        return np.abs(GaussianFilter.of(points / np.float32(width))(values) - expected).mean()

    assert error(1) < 0.015
    assert error(1) < 0.7 * min(error(1 / 1.2), error(1.2))


@pytest.mark.parametrize("angle", range(0, 180, 15))
def test_filter_reaches_its_neighbourhood_alone(angle):
    # Corners are numbered row by row of the lattice. Where the points are a box that lies along
    # the rows, the end of a row and the start of the next are both there, and far from each other.
    x, y = np.random.default_rng(0).uniform(0, 14, (2, 1000))
    turned = (x + 1j * y * np.exp(2j * np.pi / 3)) * np.exp(1j * np.radians(angle))
    points = np.stack([turned.real, turned.imag]).astype(np.float32)
    kernel = GaussianFilter.of(points)(np.eye(1000, dtype=np.float32))
    far = np.square(points[:, :, None] - points[:, None, :]).sum(axis=0) > 6**2
    assert far.mean() > 0.3
    assert not kernel[far].any()


def test_filter_of_far_points_is_the_identity():
    points = 100 * np.arange(6, dtype=np.float32).reshape(2, 3)
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_allclose(GaussianFilter.of(points)(values), values, rtol=1e-5)


def test_filter_of_equal_points_is_the_mean():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    filtered = GaussianFilter.of(np.full((5, 3), 7.3, np.float32))(values, weight=2.0)
    np.testing.assert_allclose(filtered, np.tile(2 * values.mean(axis=0), (3, 1)), rtol=1e-5)


def test_filter_of_points_without_a_lattice():
    with pytest.raises(UserError, match="too many standard deviations"):
        GaussianFilter.of(np.array([[0, 1e5]] * 5))


@pytest.mark.parametrize(
    "crf",
    [
        DenseCRF(),
        DenseCRF(sigma_alpha=67.0, sigma_beta=3.0, sigma_gamma=1.0),
        DenseCRF(w1=6.0, sigma_alpha=20.0, sigma_beta=13.0, w2=1.0),
        DenseCRF(w1=0.0),
        DenseCRF(w2=0.0),
    ],
)
def test_the_exact_crf(crf):
    # The lattice's error (see above) moves probabilities by 0.002 on average; a few pixels near a
    # draw, of 1408, fall to the other side. The CRF itself changes more than a tenth of them.
    image, mask = picture(32, 44)
    probabilities = guess(mask)
    expected, refined = exact(crf, probabilities, image), crf.refine(probabilities, image)
    assert np.mean(expected.argmax(-1) != probabilities.argmax(-1)) > 0.1
    assert np.mean(refined.argmax(-1) == expected.argmax(-1)) >= 0.99
    assert np.abs(refined - expected).mean() < 0.01


@pytest.mark.parametrize("size", [(64, 96), (61, 83)])
def test_the_labels_of_pydensecrf(size):
    densecrf = pytest.importorskip(
        "pydensecrf.densecrf", reason="the peer needs a compiler: pip install 'kseg[peers]'"
    )
    crf = DenseCRF(sigma_beta=4.0)
    image, mask = picture(*size)
    probabilities = guess(mask)
    peer = densecrf.DenseCRF2D(*size[::-1], 3)
    peer.setUnaryEnergy(-np.log(probabilities).reshape(-1, 3).T.copy())
    peer.addPairwiseGaussian(sxy=crf.sigma_gamma, compat=crf.w2)
    peer.addPairwiseBilateral(sxy=crf.sigma_alpha, srgb=crf.sigma_beta, rgbim=image, compat=crf.w1)
    expected = np.asarray(peer.inference(crf.iterations)).T.reshape(probabilities.shape)
    refined = crf.refine(probabilities, image)
    assert np.mean(refined.argmax(-1) == expected.argmax(-1)) >= 0.99
    # Both use the same lattice, so only rounding differs; at a pixel on a cell's border it can
    # make a corner that the other has not.
    assert np.abs(refined - expected).mean() < 1e-3


def test_a_wrong_pixel_in_a_flat_region_is_put_right():
    image = np.full((20, 20, 3), 100, np.uint8)
    probabilities = np.tile(np.float32([0.9, 0.1]), (20, 20, 1))
    probabilities[10, 7] = 0.2, 0.8
    refined = DenseCRF().refine(probabilities, image)
    assert (refined.argmax(-1) == 0).all()


def test_a_wrong_pixel_of_another_colour_stays():
    # Without the term that is blind to colour, nothing links it to the pixels around it.
    image = np.full((20, 20, 3), 100, np.uint8)
    image[10, 7] = 250, 20, 20
    probabilities = np.tile(np.float32([0.9, 0.1]), (20, 20, 1))
    probabilities[10, 7] = 0.2, 0.8
    refined = DenseCRF(w2=0.0).refine(probabilities, image)
    assert np.argwhere(refined.argmax(-1)).tolist() == [[10, 7]]


def test_labels_snap_to_the_colour_edge():
    # The net's border is a slope of 9 pixels around column 19; the colours change at column 16.
    image = np.zeros((24, 40, 3), np.uint8)
    image[:, 16:] = 140, 120, 90
    right = np.clip((np.arange(40) - 14) / 9, 0.05, 0.95).astype(np.float32)
    probabilities = np.tile(np.stack([1 - right, right], axis=-1), (24, 1, 1))
    assert probabilities.argmax(-1)[0].tolist() == [0] * 19 + [1] * 21
    labels = DenseCRF().refine(probabilities, image).argmax(-1)
    assert (labels == [0] * 16 + [1] * 24).all()


@pytest.mark.parametrize("crf", [DenseCRF(w1=0.0, w2=0.0), DenseCRF(iterations=0)])
def test_nothing_changes_without_weights_or_iterations(crf):
    image, mask = picture()
    probabilities = guess(mask)
    np.testing.assert_allclose(crf.refine(probabilities, image), probabilities, rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 21, 64])
def test_probabilities_sum_to_one(classes):
    image, mask = picture()
    probabilities = guess(mask % classes, classes=classes)
    kept = probabilities.copy()
    refined = DenseCRF().refine(probabilities, image)
    assert refined.shape == probabilities.shape
    assert refined.dtype == np.float32
    assert (refined >= 0).all()
    np.testing.assert_allclose(refined.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities, kept)


@pytest.mark.parametrize("processors", [1, 2, 3, 64])
def test_threads_change_nothing(monkeypatch, processors):
    image, mask = picture()
    probabilities = guess(mask, classes=21)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    expected = DenseCRF().refine(probabilities, image)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    np.testing.assert_allclose(DenseCRF().refine(probabilities, image), expected, atol=1e-6)


def test_certainty_and_the_largest_weights_stay_finite():
    image, mask = picture()
    refined = DenseCRF(w1=30.0, w2=30.0).refine(np.eye(3, dtype=np.float64)[mask], image)
    np.testing.assert_allclose(refined.sum(axis=-1), 1, rtol=1e-5)
    assert (refined.argmax(-1) == mask).mean() > 0.9


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"w1": -1.0}, "w1 is -1.0"),
        ({"w2": 31.0}, "at most 30"),
        ({"sigma_beta": 0.0}, "sigma_beta is 0.0; at least 0.5"),
        ({"sigma_alpha": float("nan")}, "sigma_alpha is nan"),
        ({"iterations": -1}, "iterations is -1"),
    ],
)
def test_parameters_out_of_range(wrong, told):
    with pytest.raises(UserError, match=told):
        DenseCRF(**wrong)


@pytest.mark.parametrize(
    ("probabilities", "image"),
    [
        (np.ones((4, 6, 2), np.float32), np.zeros((4, 5, 3), np.uint8)),
        (np.ones((4, 6, 2), np.float32), np.zeros((4, 6, 3), np.float32)),
        (np.ones((4, 6, 2), np.uint8), np.zeros((4, 6, 3), np.uint8)),
        (np.ones((4, 6), np.float32), np.zeros((4, 6, 3), np.uint8)),
    ],
)
def test_what_does_not_fit_together(probabilities, image):
    with pytest.raises(UserError, match="expected probabilities"):
        DenseCRF().refine(probabilities, image)


PLANTED = DenseCRF(w1=5.0, sigma_alpha=12.0, sigma_beta=20.0)


def planted(count=2):
    """Return samples whose masks are what the planted CRF makes of their probabilities."""
    samples = []
    for seed in range(count):
        image, mask = picture(seed=seed)
        # Noisier colours than `picture`'s, so that each parameter counts.
        noise = np.random.default_rng(seed).integers(-25, 26, image.shape)
        image = (image + noise).clip(0, 255).astype(np.uint8)
        probabilities = guess(mask, seed)
        answer = PLANTED.refine(probabilities, image).argmax(-1).astype(np.uint8)
        answer[0] = 255
        samples.append((probabilities, image, answer))
    return samples


def test_search_finds_planted_parameters_in_the_first_round():
    calls = []
    found = search(
        planted(),
        w1=(5.0, 2.0),
        sigma_alpha=(4.0, 12.0),
        sigma_beta=(5.0, 20.0),
        on_sample=lambda *call: calls.append(call),
    )
    assert found.best == PLANTED
    assert found.trials[PLANTED] == 1
    assert found.without < 1
    assert sum(miou == 1 for miou in found.trials.values()) == 1
    # 8 of the first round; 8 of the second, of which the best is known.
    assert len(found.trials) == 15
    assert calls == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_search_finds_parameters_between_the_grid_in_the_second_round():
    grid = {"w1": (4.0, 6.0), "sigma_alpha": (12.0,), "sigma_beta": (16.0, 24.0)}
    found = search(planted(), **grid)
    assert PLANTED in list(found.trials)[4:]
    assert found.best == PLANTED


def test_search_keeps_the_other_parameters():
    image, mask = picture()
    crf = DenseCRF(w2=1.0, sigma_gamma=2.0, iterations=2)
    one = {"w1": (4.0,), "sigma_alpha": (30.0,), "sigma_beta": (5.0,)}
    found = search([(guess(mask), image, mask)], crf=crf, **one)
    assert list(found.trials) == [DenseCRF(4.0, 30.0, 5.0, 1.0, 2.0, 2)]
    refined = found.best.refine(guess(mask), image)
    assert (refined.argmax(-1) == mask).mean() > (guess(mask).argmax(-1) == mask).mean()


def test_search_shows_every_trial_best_first():
    found = search(planted(1), w1=(5.0, 2.0), sigma_alpha=(12.0,), sigma_beta=(20.0,))
    console = Console(width=80, file=io.StringIO())
    console.print(found.table())
    rows = [re.findall(r"[\w.]+", line) for line in console.file.getvalue().splitlines()]
    assert ["none", f"{found.without:.4f}"] in rows
    trials = [row for row in rows if len(row) == 4 and row[0][0].isdigit()]
    assert trials[0] == ["5", "12", "20", "1.0000"]
    assert len(trials) == len(found.trials)


def test_search_refuses_what_can_be_read_once():
    with pytest.raises(UserError, match="twice"):
        search(iter(planted(1)))


@pytest.mark.parametrize("ids", ["none", "ignored"])
def test_search_without_labels(ids):
    image, mask = picture()
    samples = [(guess(mask), image, np.full_like(mask, 255))] if ids == "ignored" else []
    with pytest.raises(UserError, match="no labelled pixel"):
        search(samples, w1=(4.0,), sigma_alpha=(30.0,), sigma_beta=(5.0,))


class Pictures(ArrayDataset):
    """Three pictures with their masks."""

    name = "pictures"
    classes = ("ground", "disc", "box")
    palette = ((60, 120, 40), (180, 60, 70), (90, 90, 200))
    splits = ("val",)

    def length(self, split):
        return 3

    def sample(self, split, index):
        return picture(25 + index, 34, seed=index)


def net(output="logits"):
    """Return a predictor that finds the nearest colour, moves it by two pixels and adds noise."""

    def forward(pixels):
        distance = np.abs(pixels[:, :, None] - COLOURS.astype(np.float32)).sum(axis=-1)
        logits = np.log(guess(distance.argmin(axis=-1)))
        return logits if output == "logits" else logits.argmax(-1).astype(np.uint8)

    size = (24, 32)
    card = ModelCard("net", {}, Pictures.classes, Pictures.palette, size, output=output)
    return Predictor("net.tflite", card, Runtime(forward, size, output, 3, {}, {}))


def test_refined_predictor_is_more_right():
    before = evaluate(net(), Pictures(), split="val")
    after = evaluate(RefinedPredictor.of(net(), [DenseCRF()]), Pictures(), split="val")
    assert after.images == before.images == 3
    assert after.miou > before.miou + 0.1


def test_refined_predictor_answers_at_any_size(tmp_path):
    refined = RefinedPredictor.of(net(), [DenseCRF()])
    image, _ = picture(48, 64)
    probabilities = softmax(net().logits(image))
    expected = DenseCRF().refine(probabilities, image).argmax(-1)
    np.testing.assert_array_equal(refined.predict(image), expected)
    assert refined.predict(image).dtype == np.uint8
    assert refined.predict(image, size=(30, 50)).shape == (30, 50)
    assert refined.class_map(image).shape == refined.size == (24, 32)


def test_refined_predictor_writes_files(tmp_path):
    image, _ = picture(48, 64)
    Image.fromarray(image).save(tmp_path / "photo.png")
    refined = RefinedPredictor.of(net(), [DenseCRF()])
    (written,) = predict_files(refined, [tmp_path / "photo.png"], tmp_path / "out")
    with Image.open(written) as mask:
        np.testing.assert_array_equal(np.asarray(mask), refined.predict(image))


def test_a_class_map_cannot_be_refined():
    with pytest.raises(UserError, match="--output logits"):
        RefinedPredictor.of(net("classes"), [DenseCRF()])


def test_search_on_a_predictor_and_a_data_set():
    samples = Predictions(net(), Pictures(), limit=2)
    assert [mask.shape for _, _, mask in samples] == [(25, 34), (26, 34)]
    for probabilities, image, mask in samples:
        assert probabilities.shape == (*mask.shape, 3)
        assert image.shape == (*mask.shape, 3)
    found = search(samples, w1=(4.0,), sigma_alpha=(30.0, 50.0), sigma_beta=(5.0,))
    assert found.trials[found.best] > found.without


def test_the_module_loads_without_tensorflow():
    code = "import sys, kseg.crf; assert not {'tensorflow', 'keras', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
