"""Deep Layer Cascade: where pixels are settled, what each stage learns from, what is skipped."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

from kseg.data.dataset import ArrayDataset
from kseg.errors import UserError
from kseg.evaluate import evaluate
from kseg.inference import load
from kseg.models import build, inference_model
from kseg.models.layer_cascade import infer_by_stage, settled_shares, stage_models

CLASSES = 4
OPTIONS = {"backbone": "mobilenetv3_small", "head_channels": 16}
# Some pixels are this sure in either early stage, of drawn logits as of the seeded model.
THRESHOLD = 0.55


class Noise(ArrayDataset):
    """Two images of noise, with masks of noise."""

    name = "noise"
    classes = tuple("abcd")
    palette = tuple((i, i, i) for i in range(CLASSES))
    splits = ("val",)

    def length(self, split):
        return 2

    def sample(self, split, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        return image, rng.integers(0, CLASSES, (64, 96), dtype=np.uint8)


def cascade(threshold, **options):
    given = OPTIONS | {"threshold": threshold} | options
    model = build("layer_cascade", (64, 96, 3), CLASSES, given)
    zoo.seed_weights(model)
    return model


@pytest.fixture(scope="module")
def model():
    return cascade(THRESHOLD)


def tail(model):
    """Return what comes behind the logits of the three stages: no weights, so any logits fit."""
    scores = [model.get_layer(f"stage{number}_scores").output for number in (1, 2, 3)]
    return keras.Model(scores, model.output)


def drawn_scores():
    return [2 * np.random.RandomState(n).normal(size=(2, 8, 12, CLASSES)) for n in range(3)]


def confidence(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).max(-1, keepdims=True)


def masks(scores, threshold=THRESHOLD):
    """Return where the first stage settles, and the second of what is left."""
    first = confidence(scores[0]) > threshold
    return first, ~first & (confidence(scores[1]) > threshold)


def enlarged(scores):
    layer = keras.layers.UpSampling2D(8, interpolation="bilinear")
    return layer(np.asarray(scores, "float32"))


def run(model, scores):
    return model([np.asarray(x, "float32") for x in scores], training=False)


@pytest.mark.parametrize(("threshold", "stage"), [(0.0, 0), (1.0, 2), (1.5, 2)])
def test_threshold_at_either_end_is_one_stage(threshold, stage):
    scores = drawn_scores()
    # The surest probability there is, 1 in float32, does not exceed 1.
    scores[0][0, 0, 0] = scores[1][0, 0, 0] = (200, 0, 0, 0)
    logits = run(tail(cascade(threshold)), scores)["logits"]
    np.testing.assert_array_equal(logits, enlarged(scores[stage]))


def test_each_pixel_has_the_logits_of_the_stage_it_left_at(model):
    scores = drawn_scores()
    first, second = masks(scores)
    assert first.any() and second.any() and not (first | second).all()
    expected = np.where(first, scores[0], np.where(second, scores[1], scores[2]))
    np.testing.assert_allclose(run(tail(model), scores)["logits"], enlarged(expected), atol=1e-6)


def test_training_outputs_hold_every_pixel(model):
    scores = drawn_scores()
    outputs = run(tail(model), scores)
    np.testing.assert_array_equal(outputs["stage1"], enlarged(scores[0]))
    np.testing.assert_array_equal(outputs["stage2"], enlarged(scores[1]))


def gradients(model, scores, name):
    """Return the gradients by all stages' logits of a sum over one output, drawn weights on it."""
    tensors = [tf.constant(x, tf.float32) for x in scores]
    weights = np.random.RandomState(9).uniform(1, 2, (2, 64, 96, CLASSES))
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        total = tf.reduce_sum(model(tensors, training=False)[name] * weights)
    found = tape.gradient(total, tensors)
    # What one stage alone would get; an output is linear in the logits but for the threshold.
    with tf.GradientTape() as tape:
        tape.watch(tensors[0])
        alone = tf.reduce_sum(enlarged_symbolically(tensors[0]) * weights)
    return found, tape.gradient(alone, tensors[0]).numpy()


def enlarged_symbolically(x):
    return keras.layers.UpSampling2D(8, interpolation="bilinear")(x)


def test_no_gradient_comes_through_the_threshold(model):
    scores = drawn_scores()
    first, second = masks(scores)
    found, alone = gradients(tail(model), scores, "logits")
    # Each logit gets what it passes on where its stage is chosen, and nothing for being sure.
    for gradient, chosen in zip(found, (first, second, ~(first | second)), strict=True):
        np.testing.assert_allclose(gradient, np.where(chosen, alone, 0), atol=1e-4)


def test_a_stage_learns_from_the_pixels_it_hands_on(model):
    scores = drawn_scores()
    first, second = masks(scores)
    found, alone = gradients(tail(model), scores, "stage1")
    np.testing.assert_allclose(found[0], np.where(first, 0, alone), atol=1e-4)
    assert found[1] is None and found[2] is None
    found, alone = gradients(tail(model), scores, "stage2")
    np.testing.assert_allclose(found[1], np.where(first | second, 0, alone), atol=1e-4)
    assert found[2] is None
    # With "logits" together: the second stage learns from all that reach it, the first from all.
    both = gradients(tail(model), scores, "logits")[0][1] + found[1]
    np.testing.assert_allclose(both, np.where(first, 0, alone), atol=1e-4)


def test_shares_are_those_of_the_masks(model):
    heads = [model.get_layer(f"stage{number}_scores").output for number in (1, 2)]
    first, second = masks([np.asarray(x) for x in keras.Model(model.input, heads)(zoo.image())])
    shares = settled_shares(inference_model(model), zoo.image())
    assert shares == pytest.approx((first.mean(), second.mean(), 1 - (first | second).mean()))
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert min(shares) > 0


def test_inference_by_stage_equals_the_model(model):
    logits, shares = infer_by_stage(stage_models(inference_model(model)), zoo.image())
    # The same operations, compiled or not: a few 1e-6 of logits below 10.
    np.testing.assert_allclose(logits, model(zoo.image())["logits"], atol=1e-4)
    assert shares == pytest.approx(settled_shares(model, zoo.image()))


def forbidden(*arguments, **options):
    raise AssertionError("this stage has nothing to do")


def test_later_stages_do_not_run_for_nothing():
    model = cascade(0.0)
    logits, shares = infer_by_stage([stage_models(model)[0], forbidden, forbidden], zoo.image())
    assert shares == (1.0, 0.0, 0.0)
    np.testing.assert_allclose(logits, model(zoo.image())["logits"], atol=1e-4)


def test_a_small_rest_may_stay_where_it_is(model):
    shares = settled_shares(model, zoo.image())
    stages = stage_models(model)
    rest = shares[1] + shares[2]
    logits, cut = infer_by_stage([stages[0], forbidden, forbidden], zoo.image(), limit=rest + 1e-3)
    assert cut == (pytest.approx(1), 0.0, 0.0)
    first = keras.Model(model.input, model.get_layer("stage1_scores").output)(zoo.image())
    np.testing.assert_allclose(logits, enlarged(first), atol=1e-4)
    _, shares_below = infer_by_stage(stages, zoo.image(), limit=shares[2] / 2)
    assert shares_below == pytest.approx(shares)


def test_a_file_is_run_by_stage_and_reports_where_pixels_are_settled(model, tmp_path):
    inference_model(model).save(tmp_path / "cascade.keras")
    predictor = load(tmp_path / "cascade.keras")
    images = [Noise().sample("val", index)[0] for index in range(2)]
    result = evaluate(predictor, Noise(), split="val")
    each = [settled_shares(model, image[None].astype("float32")) for image in images]
    assert result.settled == pytest.approx(np.mean(each, axis=0))
    assert result.to_json()["settled"] == list(result.settled)
    # Another evaluation by the same predictor counts its own images alone.
    first = evaluate(predictor, Noise(), split="val", limit=1)
    assert first.settled == pytest.approx(each[0])
    expected = model(images[0][None].astype("float32"))["logits"][0]
    np.testing.assert_allclose(predictor.logits(images[0]), expected, atol=1e-4)


def test_stages_share_weights_and_can_be_saved(model, tmp_path):
    stages = stage_models(model)
    second = stages[1]
    assert second.input.shape[1:] == stages[0].output["features"].shape[1:]
    assert second.get_layer("stage2_head_conv") is model.get_layer("stage2_head_conv")
    # Every weight of the model is in exactly one stage.
    paths = [weight.path for stage in stages for weight in stage.weights]
    assert sorted(paths) == sorted(weight.path for weight in model.weights)
    second.save(tmp_path / "second.keras")
    x = np.random.RandomState(0).normal(size=(1, *second.input.shape[1:])).astype("float32")
    loaded = keras.models.load_model(tmp_path / "second.keras")
    np.testing.assert_array_equal(loaded(x)["scores"], second(x)["scores"])


def test_stages_of_a_plain_backbone_meet_on_the_finest_grid():
    model = cascade(THRESHOLD, output_stride=32)
    maps = [model.get_layer(f"stage{number}_head_conv").input.shape for number in (1, 2, 3)]
    assert [shape[1:3] for shape in maps] == [(8, 12), (4, 6), (2, 3)]
    scores = [model.get_layer(f"stage{number}_scores").output.shape for number in (1, 2, 3)]
    assert {shape[1:3] for shape in scores} == {(8, 12)}


def test_negative_threshold_is_refused():
    with pytest.raises(UserError, match="threshold is -0.5"):
        cascade(-0.5)
