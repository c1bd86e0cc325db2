import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from kseg.metrics import ConfusionMatrix
from kseg.registry import METRICS


def oracle(masks, predictions, num_classes, ignore_label=255):
    """The definitions, pixel by pixel and class by class, without a confusion matrix."""
    mask = np.concatenate([np.ravel(m) for m in masks]).astype(int)
    guess = np.concatenate([np.ravel(p) for p in predictions]).astype(int)
    guess, mask = guess[mask != ignore_label], mask[mask != ignore_label]
    iou, dice, accuracy, weighted = [], [], [], 0
    for c in range(num_classes):
        both, either = np.sum((mask == c) & (guess == c)), np.sum((mask == c) | (guess == c))
        iou.append(both / either if either else math.nan)
        dice.append(2 * both / (both + either) if either else math.nan)
        accuracy.append(both / np.sum(mask == c) if (mask == c).any() else math.nan)
        weighted += np.mean(mask == c) * iou[-1] if either else 0
    return {
        "pixel_accuracy": np.mean(mask == guess),
        "mean_accuracy": np.nanmean(accuracy),
        "iou": iou,
        "miou": np.nanmean(iou),
        "fwiou": weighted,
        "dice": np.nanmean(dice),
    }


def drawn(seed, num_classes, shape=(3, 16, 24)):
    random = np.random.default_rng(seed)
    mask = random.integers(0, num_classes, shape).astype(np.uint8)
    prediction = np.where(random.random(shape) < 0.6, mask, random.integers(0, num_classes, shape))
    mask[random.random(shape) < 0.1] = 255
    return mask, prediction.astype(np.uint8)


def counted(mask, prediction, num_classes):
    confusion = ConfusionMatrix(num_classes)
    confusion.update(mask, prediction)
    return confusion


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_classes", [2, 7, 254])
def test_agrees_with_the_oracle(seed, num_classes):
    mask, prediction = drawn(seed, num_classes)
    result = counted(mask, prediction, num_classes).result()
    expected = oracle([mask], [prediction], num_classes)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-12, err_msg=name)


def test_lecture_example():
    confusion = counted(np.array([0] * 5 + [1] * 95), np.ones(100, int), 2)
    np.testing.assert_array_equal(confusion.matrix, [[0, 5], [0, 95]])
    assert confusion.pixel_accuracy == 0.95
    assert confusion.miou == 0.475


def test_rows_are_truth_and_columns_prediction():
    np.testing.assert_array_equal(
        counted(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]), 2).matrix, [[1, 2], [0, 1]]
    )


def test_absent_class_is_nan_and_left_out_of_the_means():
    confusion = counted(np.array([0, 1]), np.array([0, 1]), 3)
    np.testing.assert_array_equal(confusion.iou, [1, 1, np.nan])
    assert confusion.miou == confusion.dice == confusion.mean_accuracy == confusion.fwiou == 1


def test_predicted_class_without_a_true_pixel_counts_as_zero():
    confusion = counted(np.array([0, 0]), np.array([0, 1]), 2)
    np.testing.assert_array_equal(confusion.iou, [0.5, 0])
    assert confusion.miou == 0.25
    assert confusion.mean_accuracy == 0.5  # over class 0 alone


def test_ignored_pixels_change_nothing():
    mask, prediction = drawn(3, 5)
    other = np.where(mask == 255, 4 - prediction, prediction)
    np.testing.assert_array_equal(
        counted(mask, prediction, 5).matrix, counted(mask, other, 5).matrix
    )


def test_ignore_label_among_the_classes():
    confusion = ConfusionMatrix(3, ignore_label=0)
    confusion.update(np.array([0, 1, 2]), np.array([1, 1, 0]))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [0, 1, 0], [1, 0, 0]])


def test_independent_of_batch_size_and_order():
    mask, prediction = drawn(1, 6, shape=(8, 12, 10))
    parts = ConfusionMatrix(6)
    for i in reversed(range(8)):
        parts.update(mask[i], prediction[i])
    np.testing.assert_array_equal(parts.matrix, counted(mask, prediction, 6).matrix)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
@pytest.mark.parametrize("tensor", [np.array, tf.constant, keras.ops.convert_to_tensor])
def test_takes_numpy_and_tensors_of_any_integer_type(dtype, tensor):
    mask, prediction = drawn(2, 6)
    confusion = counted(tensor(mask.astype(dtype)), tensor(prediction.astype(dtype)), 6)
    np.testing.assert_array_equal(confusion.matrix, counted(mask, prediction, 6).matrix)


def test_takes_jax_arrays():
    jax = pytest.importorskip("jax.numpy")
    mask, prediction = drawn(2, 6)
    confusion = counted(jax.array(mask), jax.array(prediction), 6)
    np.testing.assert_array_equal(confusion.matrix, counted(mask, prediction, 6).matrix)


def test_without_a_valid_pixel_all_is_nan():
    result = counted(np.full((2, 2), 255), np.zeros((2, 2), int), 3).result()
    assert all(np.isnan(value).all() for value in result.values())


def test_empty_update():
    assert not counted(np.zeros((0, 4), int), np.zeros((0, 4), int), 3).matrix.any()


@pytest.mark.parametrize(
    ("mask", "prediction", "message"),
    [
        ([0, 1], [0, 3], "prediction holds the ids 3; there are 3 classes, 0 to 2"),
        ([0, 255], [0, 3], "prediction holds the ids 3"),
        ([0, 1], [0, 255], "prediction holds the ids 255"),
        ([0, 1], [0, -1], "prediction holds ids from -1 to 0"),
        ([0, 1], [0, 256], "prediction holds ids from 0 to 256"),
        ([0, 5], [0, 1], "mask holds the ids 5; .*, and 255 for ignored pixels"),
        ([0, -1], [0, 1], "mask holds ids from -1 to 0"),
        ([0, 1], [0, 1, 2], "shapes must agree"),
        ([0, 1], [0.0, 1.0], "float64; class ids are integers"),
    ],
)
def test_wrong_ids_raise_and_count_nothing(mask, prediction, message):
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        confusion.update(np.array(mask), np.array(prediction))
    assert not confusion.matrix.any()


def test_too_many_classes():
    with pytest.raises(ValueError, match="1 to 255 classes"):
        METRICS["iou"](256)


def test_totals_are_int64():
    confusion = counted(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), 2)
    assert confusion.matrix.dtype == np.int64
