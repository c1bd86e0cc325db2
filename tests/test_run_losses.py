"""Every loss that `--loss` takes: its numbers, what it ignores, its gradient, other arithmetic."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import loss_oracles as oracles
import numpy as np
import pytest
import tensorflow as tf
from peers import peer

import kseg.models  # noqa: F401 - Keras lets a class of theirs replace one of ours of its name
from kseg.losses import boundary_loss, se_loss
from kseg.losses.distance_map import distance_map
from kseg.losses.logit_adjustment import LogitAdjusted
from kseg.losses.parts import parts_of, quotient
from kseg.registry import LOSSES

CASES = {name: (mask.astype("int32"), logits) for name, mask, logits in oracles.cases()}
VARIANTS = [
    pytest.param(name, options, id=f"{name}-{number}")
    for name in oracles.LOSSES
    for number, options in enumerate([{}, *oracles.OPTIONS.get(name, [])])
]
PLAIN = [pytest.param(name, {}, id=name) for name in oracles.LOSSES]


def total(loss, mask, logits):
    """Return the loss of a batch as the engine makes it from the parts."""
    parts = parts_of(loss, mask, logits)
    return sum(part.weight * quotient(tf.reduce_sum(part.values), part.divisor) for part in parts)


def gradient(loss, mask, logits):
    logits = tf.Variable(logits)
    with tf.GradientTape() as tape:
        value = total(loss, mask, logits)
    return value.numpy(), tape.gradient(value, logits).numpy()


def test_each_loss_has_an_oracle():
    assert set(LOSSES) == set(oracles.LOSSES)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_equals_the_formula_in_float64(name, options):
    loss = LOSSES[name](**options)
    for case, (mask, logits) in CASES.items():
        expected = oracles.LOSSES[name](mask, logits, **options)
        # Where probabilities lie within 1e-7 of 1, float32 has no digits of what is left.
        assert float(total(loss, mask, logits)) == pytest.approx(expected, rel=2e-5, abs=2e-6), case


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradient_is_that_of_the_formula(name, options):
    mask, logits = CASES["drawn"]
    _, found = gradient(LOSSES[name](**options), mask, logits)
    way = np.random.default_rng(5).normal(size=logits.shape)
    ends = [
        oracles.LOSSES[name](mask, logits.astype("float64") + step * way, **options)
        for step in (1e-6, -1e-6)
    ]
    slope = (ends[0] - ends[1]) / 2e-6
    assert (found * way).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradient_is_finite_and_passes_ignored_pixels_by(name, options):
    loss = LOSSES[name](**options)
    for case, (mask, logits) in CASES.items():
        value, found = gradient(loss, mask, logits)
        assert np.isfinite(value) and np.isfinite(found).all(), case
        assert not found[mask == oracles.IGNORED].any(), case
        if case == "all ignored":
            assert value == 0


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_what_stands_in_ignored_pixels_changes_nothing(name, options):
    mask, logits = CASES["drawn"]
    other = np.where((mask == oracles.IGNORED)[..., None], 1e4, logits).astype("float32")
    loss = LOSSES[name](**options)
    assert float(total(loss, mask, other)) == float(total(loss, mask, logits))


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_another_ignore_label(name, options):
    mask, logits = CASES["drawn"]
    other = np.where(mask == oracles.IGNORED, 9, mask)
    expected = float(total(LOSSES[name](), mask, logits))
    assert float(total(LOSSES[name](ignore_label=9), other, logits)) == expected


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_perfect_logits_cost_nothing(name, options):
    mask, _ = CASES["no pixel ignored"]
    logits = (60.0 * np.eye(4)[mask]).astype("float32")
    value, found = gradient(LOSSES[name](**options), mask, logits)
    # What an even share of the target costs at a logit of 60; and nothing lies outside, while the
    # inside has the distance 0 or less.
    least = {"label_smoothing": 0.1 / 4 * 3 * 60, "boundary_distance": min(0.0, value)}
    assert value == pytest.approx(least.get(name, 0.0), abs=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_float16_logits_at_their_edge_have_a_finite_gradient(name, options):
    mask, logits = CASES["regions"]
    logits = (logits * 4e4).clip(-65504, 65504).astype("float16")
    value, found = gradient(LOSSES[name](**options), mask, logits)
    assert value.dtype == "float32" and found.dtype == "float16"
    assert np.isfinite(value) and np.isfinite(found).all()


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_float16_logits_cost_what_float32_ones_do(name, options):
    mask, logits = CASES["drawn"]
    half = logits.astype("float16")
    loss = LOSSES[name](**options)
    assert float(total(loss, mask, half)) == float(total(loss, mask, half.astype("float32")))


@pytest.mark.slow
def test_xla_gives_the_same():
    # One program of all: compiled alone, each takes a second.
    losses = {name: LOSSES[name]() for name in LOSSES}
    drawn, logits = CASES["drawn"]

    @tf.function(jit_compile=True)
    def compiled(mask, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            values = {name: total(loss, mask, logits) for name, loss in losses.items()}
            together = sum(values.values())
        return values, tape.gradient(together, logits)

    for mask in (drawn, np.full_like(drawn, oracles.IGNORED)):
        values, slope = compiled(tf.constant(mask), tf.constant(logits))
        alone = {name: gradient(loss, mask, logits) for name, loss in losses.items()}
        for name, (value, _) in alone.items():
            assert float(values[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
        slopes = sum(found for _, found in alone.values())
        np.testing.assert_allclose(slope, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_batch_may_be_shared_out_in_any_way(name, options):
    mask, logits = CASES["drawn"]
    mask = mask.copy()
    mask[0, :4] = oracles.IGNORED  # so that a mean of the halves' means would be another number
    loss = LOSSES[name](**options)
    halves = [parts_of(loss, mask[half], logits[half]) for half in (slice(1), slice(1, 2))]
    (one,), (other,) = halves
    together = sum(tf.reduce_sum(part.values) for part in (one, other))
    together /= one.divisor + other.divisor
    assert float(together) == pytest.approx(float(total(loss, mask, logits)), rel=1e-5)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_config_round_trip_through_json(name, options):
    loss = LOSSES[name](**options, ignore_label=7, name="mine")
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
    assert {key: getattr(again, key) for key in options} == options
    assert again.ignore_label == 7 and again.name == "mine"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dice", {"smoothing": -1.0}),
        ("jaccard", {"smoothing": -1.0}),
        ("tversky", {"alpha": -0.1}),
        ("tversky", {"alpha": 0.0, "beta": 0.0}),
        ("focal_tversky", {"gamma": 0.5}),
        ("focal", {"gamma": -1.0}),
        ("label_smoothing", {"epsilon": 1.0}),
        ("ohem", {"threshold": 1.5}),
        ("ohem", {"share": -0.1}),
        ("ohem", {"threshold": 0.0, "share": 0.0}),
        ("boundary_ce", {"sigma": 0.0}),
        ("boundary_ce", {"weight": -1.0}),
        ("boundary_distance", {"radius": 0}),
    ],
)
def test_values_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match="|".join(options)):
        LOSSES[name](**options)


@pytest.mark.parametrize("name", ["weighted_ce", "focal", "label_smoothing", "ohem", "boundary_ce"])
def test_wrong_number_of_weights_raises(name):
    with pytest.raises(ValueError, match="3 factors and the logits 4 classes"):
        total(LOSSES[name](class_weights=(1, 2, 3)), *CASES["drawn"])


def test_distances_are_exact_up_to_the_radius():
    # A knight's move away is sqrt(5), and the distance to one pixel has no preferred direction.
    region = np.zeros((1, 9, 9, 1), bool)
    region[0, 4, 4, 0] = True
    rows, columns = np.mgrid[-4:5, -4:5]
    for radius in (1, 2, 3, 7):
        found = np.array(distance_map(region, radius))[0, ..., 0]
        np.testing.assert_allclose(found, np.minimum(np.hypot(rows, columns), radius), rtol=1e-6)
    assert found[2, 5] == pytest.approx(np.sqrt(5))


def test_distance_to_nothing_is_the_radius():
    np.testing.assert_array_equal(distance_map(np.zeros((1, 3, 2, 1), bool), 5), 5.0)


EXAMPLES = [*(LOSSES[name] for name in oracles.LOSSES), LogitAdjusted, se_loss.SELoss]
EXAMPLES += [boundary_loss.BoundaryLoss, boundary_loss.BoundaryAwareLoss]


@pytest.mark.parametrize("item", EXAMPLES, ids=lambda item: item.__name__)
def test_example_of_the_docstring_is_true(item):
    text = inspect.getdoc(item).partition("Example:")[2]
    known = vars(inspect.getmodule(item)) | {"np": np}
    if item is LogitAdjusted:
        known |= {"CrossEntropy": LOSSES["ce"]}
    shown = 0
    for code, answer in re.findall(r">>> (.*)\n((?: *[^>\s].*\n?)*)", text):
        if not answer.strip():
            exec(code, known)  # noqa: S102
            continue
        found = np.ravel(eval(code.partition("#")[0], known))  # noqa: S307
        numbers = [float(one) for one in re.findall(r"-?\d+\.?\d*", answer)]
        np.testing.assert_allclose(found, numbers, atol=1e-6)
        shown += 1
    assert shown


def test_the_same_on_jax_without_tensorflow():
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    script = Path(__file__).with_name("jax_losses.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == set(LOSSES)
    assert max(errors.values()) < 1e-5


# segmentation-models-pytorch


@pytest.fixture(scope="module")
def smp():
    """The losses of segmentation-models-pytorch."""
    return peer("segmentation_models_pytorch.losses")


def theirs(loss, mask, logits):
    import torch

    logits = torch.from_numpy(np.moveaxis(logits, -1, 1).copy())
    return float(loss(logits, torch.from_numpy(mask.astype("int64"))))


def smp_cases():
    """Random batches of one image; the first holds all classes, the second misses one."""
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 2, (1, 24, 31, 4)).astype("float32")
    mask = rng.integers(0, 4, (1, 24, 31))
    mask[rng.random(mask.shape) < 0.1] = oracles.IGNORED
    return [(mask, logits, 1.0), (np.where(mask == 2, 1, mask), logits, 3 / 4)]


@pytest.mark.parametrize(
    ("name", "options", "peer", "peer_options"),
    [
        ("dice", {"squared": False}, "DiceLoss", {}),
        ("dice", {"squared": False, "smoothing": 2.0}, "DiceLoss", {"smooth": 1.0}),
        ("jaccard", {"smoothing": 3.0}, "JaccardLoss", {"smooth": 3.0}),
        ("tversky", {}, "TverskyLoss", {"alpha": 0.3, "beta": 0.7}),
        ("tversky", {"alpha": 0.8, "beta": 0.1}, "TverskyLoss", {"alpha": 0.8, "beta": 0.1}),
    ],
)
def test_region_losses_equal_those_of_smp(smp, name, options, peer, peer_options):
    # They average over all classes, where an absent one counts 0; over the present ones, here.
    for mask, logits, share in smp_cases():
        loss = getattr(smp, peer)("multiclass", ignore_index=oracles.IGNORED, **peer_options)
        ours = float(total(LOSSES[name](**options), mask, logits))
        assert share * ours == pytest.approx(theirs(loss, mask, logits), abs=1e-5)


def test_focal_tversky_equals_that_of_smp_where_one_class_counts(smp):
    # They raise the mean over the classes, the paper each class.
    rng = np.random.default_rng(12)
    mask, logits = rng.integers(0, 2, (1, 9, 8)), rng.normal(size=(1, 9, 8, 2)).astype("float32")
    loss = smp.TverskyLoss("multiclass", classes=[1], alpha=0.3, beta=0.7, gamma=0.75)
    ours = total(LOSSES["focal_tversky"](background=False), mask, logits)
    assert float(ours) == pytest.approx(theirs(loss, mask, logits), abs=1e-5)


def test_lovasz_equals_that_of_smp(smp):
    for mask, logits, _ in smp_cases():
        loss = smp.LovaszLoss("multiclass", per_image=True, ignore_index=oracles.IGNORED)
        ours = float(total(LOSSES["lovasz"](), mask, logits))
        assert ours == pytest.approx(theirs(loss, mask, logits), abs=1e-5)


def test_focal_equals_that_of_smp(smp):
    import torch
    from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits

    rng = np.random.default_rng(13)
    mask, logits = rng.integers(0, 4, (2, 9, 8)), rng.normal(size=(2, 9, 8, 4)).astype("float32")
    for gamma in (0.5, 2.0):
        ours = float(total(LOSSES["focal"](gamma=gamma), mask, logits))
        peer = theirs(lambda x, y, g=gamma: softmax_focal_loss_with_logits(x, y, g), mask, logits)
        assert ours == pytest.approx(peer, abs=1e-5)
    # Two classes: their sigmoid of one logit is our softmax of (0, logit).
    mask, one = mask % 2, logits[..., :1]
    two = np.concatenate([np.zeros_like(one), one], -1)
    ours = float(total(LOSSES["focal"](class_weights=(0.75, 0.25)), mask, two))
    peer = smp.FocalLoss("binary", alpha=0.25, gamma=2.0)
    found = float(peer(torch.from_numpy(one[..., 0]), torch.from_numpy(mask.astype("float32"))))
    assert ours == pytest.approx(found, abs=1e-5)


def test_weighted_cross_entropy_equals_that_of_torch(smp):
    import torch

    weights = torch.tensor(oracles.WEIGHTS)
    loss = torch.nn.CrossEntropyLoss(weights, ignore_index=oracles.IGNORED)
    for mask, logits, _ in smp_cases():
        ours = total(LOSSES["weighted_ce"](class_weights=oracles.WEIGHTS), mask, logits)
        assert float(ours) == pytest.approx(theirs(loss, mask, logits), abs=1e-5)
