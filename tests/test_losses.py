import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kseg.errors import UserError
from kseg.losses import CrossEntropy, valid_pixels
from kseg.losses.boundary_loss import BoundaryAwareLoss, BoundaryLoss, boundaries
from kseg.losses.class_weights import (
    WEIGHTINGS,
    PixelCounts,
    count_pixels,
    enet_weights,
    median_weights,
    read_weights,
    sqrt_weights,
    weights_for,
)
from kseg.losses.se_loss import SELoss
from kseg.registry import LOSSES

LN2 = 0.693147  # |ln 0.5|


def loss_of(mask, logits, **options):
    return keras.ops.convert_to_numpy(CrossEntropy(**options)(np.array(mask), np.array(logits)))


def drawn(seed=0, shape=(2, 5, 7), num_classes=4):
    random = np.random.default_rng(seed)
    mask = random.integers(0, num_classes, shape)
    return mask, random.normal(size=(*shape, num_classes)).astype("float32")


def mean_loss(mask, logits):
    return keras.ops.sum(CrossEntropy()(mask, logits)) / keras.ops.maximum(1, valid_pixels(mask))


def test_one_valid_pixel_of_four_costs_ln_2():
    mask = np.array([[[1, 255], [255, 255]]])
    loss = loss_of(mask, np.zeros((1, 2, 2, 2)))
    np.testing.assert_allclose(loss, [[[LN2, 0], [0, 0]]], atol=1e-6)
    assert float(mean_loss(mask, np.zeros((1, 2, 2, 2)))) == pytest.approx(LN2, abs=1e-6)


def test_hand_worked_three_classes():
    # Softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8).
    logits = np.log([[[[1.0, 2.0, 5.0]]]])
    for label, probability in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert loss_of([[[label]]], logits)[0, 0, 0] == pytest.approx(-math.log(probability))


def test_weights_multiply_the_pixels_of_their_class():
    loss = loss_of([[[0, 1]]], np.zeros((1, 1, 2, 2)), class_weights=(0.5, 3))
    np.testing.assert_allclose(loss, [[[0.5 * LN2, 3 * LN2]]], atol=1e-6)


def test_map_has_the_shape_of_the_mask_and_is_float32():
    mask, logits = drawn()
    loss = LOSSES["ce"]()(mask, logits.astype("float16"))
    assert tuple(loss.shape) == mask.shape
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"


def test_perfect_logits_cost_nothing():
    mask, _ = drawn()
    assert loss_of(mask, 50.0 * np.eye(4)[mask]).max() < 1e-6


def test_what_stands_in_ignored_pixels_changes_nothing():
    mask, logits = drawn()
    mask[:, :2] = 255
    other = logits.copy()
    other[:, :2] = 1e4
    np.testing.assert_array_equal(loss_of(mask, logits), loss_of(mask, other))


def test_another_ignore_label():
    loss = loss_of([[[1, 0]]], np.zeros((1, 1, 2, 2)), ignore_label=0)
    np.testing.assert_allclose(loss, [[[LN2, 0]]], atol=1e-6)


def test_weight_per_pixel_through_keras():
    mask, logits = drawn()
    weight = np.random.default_rng(1).random(mask.shape).astype("float32")
    loss = CrossEntropy()(mask, logits, sample_weight=weight)
    np.testing.assert_allclose(loss, weight * loss_of(mask, logits), rtol=1e-6)


def test_all_ignored_batch_is_zero_with_zero_gradient():
    logits = tf.Variable(drawn()[1])
    mask = np.full((2, 5, 7), 255)
    with tf.GradientTape() as tape:
        loss = mean_loss(mask, logits)
    assert float(loss) == 0
    assert not np.any(tape.gradient(loss, logits))


def test_float16_gradient_is_finite_at_large_logits():
    mask, logits = drawn()
    mask[0, 0] = 255
    logits = (logits * 4e4).clip(-65504, 65504)  # the edge of float16
    logits = tf.Variable(logits.astype("float16"))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(CrossEntropy()(mask, logits)) / (2 * 5 * 7)
    gradient = tape.gradient(loss, logits)
    assert gradient.dtype == "float16"
    assert np.isfinite(loss) and np.isfinite(gradient).all() and np.any(gradient)


def test_gradient_is_probability_less_truth():
    mask, logits = drawn()
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(CrossEntropy()(mask, variable))
    expected = keras.ops.softmax(logits) - np.eye(4)[mask]
    np.testing.assert_allclose(tape.gradient(loss, variable), expected, atol=1e-6)


def test_wrong_number_of_weights_raises():
    with pytest.raises(ValueError, match="3 factors and the logits 2 classes"):
        loss_of([[[0]]], np.zeros((1, 1, 1, 2)), class_weights=(1, 2, 3))


def test_config_round_trip_through_json():
    loss = CrossEntropy(class_weights=np.array([0.5, 1.5]), ignore_label=7, name="main")
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert again.get_config() == loss.get_config()
    assert again.class_weights == (0.5, 1.5)


def test_valid_pixels():
    assert float(valid_pixels(np.array([[[0, 255], [1, 255]]]))) == 2
    assert float(valid_pixels(np.array([[[0, 255], [1, 255]]]), ignore_label=0)) == 3


# SE-loss: one value an image, from the classes that its mask holds.
def presence_loss(mask, logits, **options):
    logits = np.array(logits, "float32")[:, None, None]
    return keras.ops.convert_to_numpy(SELoss(**options)(np.array(mask), logits))


def test_presence_by_hand():
    # A logit of ln 3 is a probability of 3/4. Class 0 is absent, class 1 present.
    loss = presence_loss([[[1, 1], [1, 1]]], [[math.log(3), math.log(3)]])
    np.testing.assert_allclose(loss, [(math.log(4) + math.log(4 / 3)) / 2], rtol=1e-6)


def test_presence_does_not_count_pixels():
    one, many = [[0, 0], [0, 2]], [[0, 2], [2, 2]]
    logits = [[1.0, -2.0, 0.5]] * 2
    loss = presence_loss([one, many], logits)
    assert loss.shape == (2,) and loss.dtype == "float32"
    assert loss[0] == loss[1]


def test_presence_predicted_rightly_costs_nothing():
    assert presence_loss([[[0, 2]], [[1, 1]]], [[50, -50, 50], [-50, 50, -50]]).max() < 1e-6


def test_ignored_pixels_make_no_class_present():
    logits = [[3.0, -3.0]]
    expected = presence_loss([[[0, 0]]], logits)
    np.testing.assert_array_equal(presence_loss([[[0, 255]]], logits), expected)
    np.testing.assert_array_equal(presence_loss([[[0, 1]]], logits, ignore_label=1), expected)
    assert presence_loss([[[0, 1]]], logits)[0] > expected[0] + 1


def test_presence_in_an_ignored_image_costs_nothing():
    logits = tf.Variable([[[[3.0, -3.0]]]] * 2)
    mask = np.array([[[255, 255]], [[0, 255]]])
    with tf.GradientTape() as tape:
        loss = SELoss()(mask, logits)
    gradient = tape.gradient(loss, logits).numpy()
    assert loss[0] == 0 and loss[1] > 0
    assert not gradient[0].any() and gradient[1].all()


def test_presence_has_a_finite_float16_gradient():
    logits = tf.Variable(np.array([[[[65504, -65504, 0]]]], "float16"))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(SELoss()(np.array([[[1]]]), logits))
    gradient = tape.gradient(loss, logits)
    assert gradient.dtype == "float16"
    assert np.isfinite(loss) and np.isfinite(gradient).all() and np.any(gradient)


def test_presence_config_round_trip_through_json():
    loss = SELoss(ignore_label=7, name="scene")
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert isinstance(again, SELoss) and again.get_config() == loss.get_config()
    assert again.ignore_label == 7


def test_presence_is_no_loss_of_a_run():
    assert "se" not in LOSSES


# Boundary losses. A row of ten pixels whose class changes in the middle: 4 of them are boundary.
ROW = [0] * 5 + [1] * 5
ON_ROW = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 0])


def boundary_loss(mask, logits, **options):
    logits = np.array(logits, "float32")[..., None]
    return keras.ops.convert_to_numpy(BoundaryLoss(**options)(np.array(mask), logits))


def aware_loss(mask, values, **options):
    loss = BoundaryAwareLoss(**options)(np.array(mask), np.array(values, "float32"))
    return keras.ops.convert_to_numpy(loss)


def test_boundary_is_two_pixels_on_either_side():
    row = np.array([[ROW]])
    np.testing.assert_array_equal(boundaries(row)[0, 0], ON_ROW)
    np.testing.assert_array_equal(boundaries(row.transpose(0, 2, 1))[0, :, 0], ON_ROW)
    np.testing.assert_array_equal(boundaries(row, width=2)[0, 0], [0] * 4 + [1] * 2 + [0] * 4)
    # Ids are names: how far apart they are means nothing.
    np.testing.assert_array_equal(boundaries(200 * row)[0, 0], ON_ROW)


def test_no_boundary_begins_behind_an_ignored_pixel():
    assert not np.any(boundaries(np.array([[[0, 0, 255, 1, 1]]])))
    assert not np.any(boundaries(np.array([[[0, 0, 9, 1, 1]]]), ignore_label=9))


def test_boundary_by_hand():
    # Boundaries at a probability of 3/4, weighed by the 6/10 that are none; the rest at 1/2,
    # weighed by 4/10.
    loss = boundary_loss([[ROW]], [[np.log(3) * ON_ROW]])
    expected = np.where(ON_ROW, 0.6 * math.log(4 / 3), 0.4 * math.log(2))
    np.testing.assert_allclose(loss, [[expected]], rtol=1e-6)


def test_boundary_balances_each_image_by_itself():
    mask, logits = drawn(num_classes=2)
    mask[0, :, 1:] = 0
    logits = logits[..., 0]
    both = boundary_loss(mask, logits)
    assert both.shape == mask.shape and both.dtype == "float32"
    for index in (0, 1):
        alone = boundary_loss(mask[index : index + 1], logits[index : index + 1])
        np.testing.assert_allclose(both[index], alone[0], rtol=1e-5)


def test_boundary_predicted_rightly_costs_nothing():
    assert boundary_loss([[ROW]], [[100 * ON_ROW - 50]]).max() < 1e-6


def test_ignored_pixels_neither_cost_nor_weigh_in_a_boundary():
    logits = np.linspace(-2, 2, 10)
    short = boundary_loss([[ROW[:8]]], [[logits[:8]]])
    long = boundary_loss([[ROW[:8] + [255, 255]]], [[logits]])
    np.testing.assert_allclose(long[..., :8], short, rtol=1e-6)
    assert not long[..., 8:].any()
    np.testing.assert_array_equal(
        boundary_loss([[ROW[:8] + [9, 9]]], [[logits]], ignore_label=9), long
    )


def test_image_without_boundary_or_without_class_costs_nothing():
    logits = tf.Variable(drawn()[1][..., :1])
    mask = np.stack([np.ones((5, 7)), np.full((5, 7), 255)])
    with tf.GradientTape() as tape:
        loss = BoundaryLoss()(mask, logits)
    assert not np.any(loss) and not np.any(tape.gradient(loss, logits))


def test_boundary_aware_by_hand():
    # Softmax of (ln 1, ln 3) is (1/4, 3/4). Only the first two are boundary by more than 0.8,
    # which is a logit of ln 4.
    values = np.log([[[[1, 3, 4.1], [1, 3, 4.1], [1, 1, 3.9], [1, 1, 1]]]])
    loss = aware_loss([[[0, 1, 0, 1]]], values)
    np.testing.assert_allclose(loss, [(math.log(4) + math.log(4 / 3)) / 2], rtol=1e-6)
    loss = aware_loss([[[0, 1, 0, 1]]], values, threshold=0.75)
    np.testing.assert_allclose(loss, [(math.log(16 / 3) + math.log(2)) / 3], rtol=1e-6)


def test_boundary_aware_leaves_out_ignored_pixels_and_images_without_boundary():
    values = np.log([[[[1, 3, 5], [7, 3, 5]]], [[[1, 3, 1], [1, 3, 1]]]])
    loss = aware_loss([[[0, 255]], [[0, 1]]], values)
    np.testing.assert_allclose(loss, [math.log(4), 0], rtol=1e-6)
    np.testing.assert_array_equal(aware_loss([[[0, 9]], [[0, 1]]], values, ignore_label=9), loss)


def test_boundary_aware_teaches_the_classifier_alone():
    values = tf.Variable(np.log([[[[1, 3, 5.0], [1, 3, 1]]]]))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(BoundaryAwareLoss()(np.array([[[0, 0]]]), values))
    gradient = tape.gradient(loss, values)
    np.testing.assert_allclose(gradient[0, 0], [[-0.75, 0.75, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("loss", [BoundaryLoss(), BoundaryAwareLoss()], ids=lambda loss: loss.name)
def test_boundary_losses_have_a_finite_float16_gradient(loss):
    shape = (1, 1, 10, 1 if loss.name == "boundary" else 3)
    logits = tf.Variable(np.resize(np.array([65504, -65504], "float16"), shape))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(loss(np.array([[ROW]]), logits)) / 100
    gradient = tape.gradient(total, logits)
    assert gradient.dtype == "float16"
    assert np.isfinite(total) and np.isfinite(gradient).all() and np.any(gradient)


@pytest.mark.parametrize(
    "loss",
    [
        BoundaryLoss(width=6, ignore_label=7, name="edge"),
        BoundaryAwareLoss(threshold=0.5, ignore_label=7, name="edge"),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_boundary_config_round_trip_through_json(loss):
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
    assert vars(again)["ignore_label"] == 7


def test_boundaries_are_no_loss_of_a_run():
    assert not {"boundary", "boundary_aware"} & set(LOSSES)


# Class weights. Two images of four pixels: class 0 has 4 + 1, class 1 has 2, class 2 none, and
# one pixel is ignored. Class 1 is only in the second image, which has 3 valid pixels.
MASKS = [np.array([[0, 0], [0, 0]]), np.array([[0, 1], [1, 255]])]


def test_count_pixels():
    counts = count_pixels(MASKS, 3)
    np.testing.assert_array_equal(counts.pixels, [5, 2, 0])
    np.testing.assert_array_equal(counts.image_pixels, [7, 3, 0])


def test_count_pixels_names_wrong_ids():
    with pytest.raises(UserError, match=r"mask 1 holds the ids 0, 1.*1 classes, 0 to 0"):
        count_pixels(MASKS, 1)


def test_median_weights_by_hand():
    # f = 5/7 and 2/3, their median is 29/42.
    np.testing.assert_allclose(
        median_weights(count_pixels(MASKS, 3)), [29 / 42 * 7 / 5, 29 / 42 * 3 / 2, 1]
    )


def test_sqrt_and_enet_weights_by_hand():
    counts = PixelCounts(np.array([[75, 25]]))
    np.testing.assert_allclose(sqrt_weights(counts), [math.sqrt(4 / 3), 2])
    np.testing.assert_allclose(enet_weights(counts), [1 / math.log(1.77), 1 / math.log(1.27)])


def test_enet_weights_are_bounded():
    counts = PixelCounts(np.array([[10**9, 0]]))
    np.testing.assert_allclose(enet_weights(counts), [1 / math.log(2.02), 50.4983], rtol=1e-5)


@pytest.mark.parametrize("choice", WEIGHTINGS)
def test_mean_weight_of_a_pixel_is_one(choice):
    weights = np.array(weights_for(choice, ["a", "b", "c"], lambda: count_pixels(MASKS, 3)))
    assert (weights * [5, 2, 0]).sum() / 7 == pytest.approx(1)
    assert weights[1] > weights[0]
    assert weights[2] == 1


@pytest.mark.parametrize("choice", WEIGHTINGS)
def test_all_ignored_masks_give_ones(choice):
    ignored = count_pixels([np.full((2, 2), 255)], 2)
    assert weights_for(choice, ["a", "b"], lambda: ignored) == (1, 1)


def test_none_reads_no_mask():
    assert weights_for("none", ["a"], lambda: pytest.fail("read")) is None


def test_unknown_choice_names_the_nearest():
    with pytest.raises(UserError, match="'medain'; did you mean median"):
        weights_for("medain", ["a"], lambda: count_pixels(MASKS, 2))


def test_median_weights_of_camvid_are_near_those_that_segnet_ships(camvid):
    # The published numbers fit best with the unlabelled pixels counted as a class; the labels
    # were mended since, above all those of signs, which are left out here. A denominator of all
    # images, the usual mistake, would halve the weight of fences and bicyclists.
    masks = (np.asarray(Image.open(f)) for f in sorted((camvid / "trainannot").iterdir()))
    weights = np.delete(median_weights(count_pixels(masks, 12)), [6, 11])
    published = [0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 1.8418, 0.6823, 6.2478, 7.3614]
    np.testing.assert_allclose(weights, published, rtol=0.12)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.csv", "name,weight\nroad, 0.5\nsky,2\n"),
        ("w.csv", "sky,2\nroad,0.5\n\n"),
        ("w.csv", "\ufeffname,weight\r\nsky,2\r\nroad,0.5\r\n"),
        ("w.json", '{"sky": 2, "road": 0.5}'),
    ],
)
def test_weights_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert weights_for(str(tmp_path / name), ["road", "sky"], lambda: []) == (0.5, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.csv", "rood,1\nsky,1\n", "no class 'rood'; did you mean road"),
        ("w.csv", "road,1\n", "no weight for sky"),
        ("w.csv", "road,1\nsky,1\nsky,2\n", "'sky' has two weights"),
        ("w.json", '{"road": 1, "sky": 1, "sky": 2}', "'sky' has two weights"),
        ("w.csv", "road,1\nsky,much\n", "'sky' is 'much'"),
        ("w.csv", "road,1\nsky,-1\n", "'sky' is '-1'"),
        ("w.csv", "road,1\nsky,nan\n", "'sky' is 'nan'"),
        ("w.json", '{"road": 1, "sky": true}', "'sky' is True"),
        ("w.json", '{"road": 1, "sky": null}', "'sky' is None"),
        ("w.csv", "road;1\nsky;1\n", "expected lines of `name,weight`"),
        ("w.csv", "road,0\nsky,0\n", "every weight is 0"),
        ("w.json", "[1, 2]", "expected one object"),
        ("w.json", "{", "not JSON"),
        ("w.csv", None, "cannot read class weights"),
    ],
)
def test_bad_file_is_named_with_what_is_wrong(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_weights(path, ["road", "sky"])
    assert str(path) in str(caught.value)
