import doctest
import importlib
import json
import math
import pkgutil
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from peers import peer
from rich.console import Console
from scipy import ndimage

from kseg import metrics
from kseg.evaluate import plain
from kseg.metrics import ConfusionMatrix
from kseg.metrics.conventions import conventions
from kseg.metrics.iou import count_pairs
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


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_counts_do_not_depend_on_the_blocks_they_are_made_in(block, monkeypatch):
    mask, prediction = drawn(4, 200, shape=(9, 11))
    monkeypatch.setattr("kseg.metrics.iou._BLOCK", block)
    expected = np.zeros((256, 256), int)
    for pair in zip(mask.ravel(), prediction.ravel(), strict=True):
        expected[pair] += 1
    np.testing.assert_array_equal(count_pairs(mask, prediction), expected)


def test_totals_are_int64():
    confusion = counted(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), 2)
    assert confusion.matrix.dtype == np.int64


# Metrics that look at one image after another.


def blobs(seed, num_classes=4, shape=(20, 28), ignored=0.1):
    """Regions of 4 x 4 pixels, of which some are moved by a pixel in the prediction."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, num_classes, (shape[0] // 4, shape[1] // 4))
    mask = np.kron(coarse, np.ones((4, 4), int)).astype(np.uint8)
    prediction = np.where(random.random(shape) < 0.8, np.roll(mask, 1, axis=seed % 2), 0)
    mask[np.kron(random.random(coarse.shape) < ignored, np.ones((4, 4), int)).astype(bool)] = 255
    return mask, prediction.astype(np.uint8)


def neighbours(shape, row, column, reach):
    """Every other pixel within `reach`, diagonals counted as one."""
    rows = range(max(0, row - reach), min(shape[0], row + reach + 1))
    columns = range(max(0, column - reach), min(shape[1], column + reach + 1))
    return [(r, c) for r in rows for c in columns if (r, c) != (row, column)]


def near_another(labels, reach, *, frame=False):
    """Pixels that have another class, or the frame, within `reach`: pixel by pixel."""
    found = np.zeros(labels.shape, bool)
    for (row, column), own in np.ndenumerate(labels):
        others = {labels[place] for place in neighbours(labels.shape, row, column, reach)}
        inside = (
            reach <= row < labels.shape[0] - reach and reach <= column < labels.shape[1] - reach
        )
        found[row, column] = own != 255 and bool(others - {own, 255} or (frame and not inside))
    return found


def both_ignored(mask, prediction):
    return np.where(mask == 255, 255, prediction)


def borders(labels, class_id):
    """Places of the class that have another one above, below, left or right."""
    found = []
    for row, column in zip(*np.nonzero(labels == class_id), strict=True):
        beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = [
            (r, c) for r, c in beside if r in range(len(labels)) and c in range(len(labels[0]))
        ]
        if any(labels[place] not in (class_id, 255) for place in inside):
            found.append((row, column))
    return np.array(found).reshape(-1, 2)


def boundary_f1_oracle(mask, prediction, num_classes, theta):
    """F1 of each class by the distances of all border pixels from all others."""
    scores, limit = [], theta * math.hypot(*mask.shape)
    for class_id in range(num_classes):
        true, guess = borders(mask, class_id), borders(both_ignored(mask, prediction), class_id)
        if not len(true) or not len(guess):
            scores.append(0.0 if len(true) or len(guess) else math.nan)
            continue
        far = np.linalg.norm(true[:, None] - guess[None], axis=-1)
        recall, precision = (np.mean(far.min(axis) <= limit) for axis in (1, 0))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    return scores


@pytest.mark.parametrize("theta", [0.0075, 0.03, 0.06])
def test_boundary_f1_agrees_with_all_distances(theta):
    images = [blobs(seed) for seed in range(4)]
    metric = METRICS["boundary_f1"](5, theta=theta)  # class 4 is absent
    for image in images:
        metric.update(*image)
    scores = [boundary_f1_oracle(*image, 5, theta) for image in images]
    found = metric.result()
    assert found["boundary_f1"] == pytest.approx(np.mean([np.nanmean(one) for one in scores]))
    np.testing.assert_allclose(found["classes"][:4], np.nanmean(np.array(scores)[:, :4], axis=0))
    assert math.isnan(found["classes"][4])
    assert 0.1 < found["boundary_f1"] < 0.95


def test_theta_itself_is_near_enough():
    mask, prediction = (np.repeat(np.arange(30)[:, None] > row, 40, axis=1) for row in (10, 15))
    metric = METRICS["boundary_f1"](2, theta=0.1)  # of the diagonal of 50: 5 pixels
    metric.update(mask.astype(int), prediction.astype(int))
    assert metric.result()["boundary_f1"] == 1


def test_a_border_on_one_side_only_scores_zero_and_none_at_all_is_left_out():
    empty, square = np.zeros((8, 8), int), np.zeros((8, 8), int)
    square[2:6, 2:6] = 1
    metric = METRICS["boundary_f1"](3)
    metric.update(square, empty)
    metric.update(empty, empty)
    np.testing.assert_array_equal(metric.result()["classes"], [0, 0, np.nan])
    assert metric.result()["boundary_f1"] == 0
    metric.update(square, square)
    assert metric.result()["boundary_f1"] == 0.5


def boundary_iou_oracle(images, num_classes, reach):
    inside, union = np.zeros(num_classes), np.zeros(num_classes)
    for mask, prediction in images:
        guess = both_ignored(mask, prediction)
        near_true, near_guess = (
            near_another(mask, reach, frame=True),
            near_another(guess, reach, frame=True),
        )
        for class_id in range(num_classes):
            true, found = near_true & (mask == class_id), near_guess & (guess == class_id)
            inside[class_id] += np.sum(true & found)
            union[class_id] += np.sum(true | found)
    return inside / union


@pytest.mark.parametrize(("width", "reach"), [(0.02, 1), (0.06, 2), (0.1, 3)])
def test_boundary_iou_agrees_pixel_by_pixel(width, reach):
    # The diagonal is 34.4 pixels.
    images = [blobs(seed) for seed in range(3)]
    metric = METRICS["boundary_iou"](4, width=width)
    for image in images:
        metric.update(*image)
    expected = boundary_iou_oracle(images, 4, reach)
    np.testing.assert_allclose(metric.result()["classes"], expected)
    assert metric.result()["boundary_iou"] == pytest.approx(expected.mean())


def test_boundary_iou_is_that_of_the_authors_code():
    """Which erodes the mask of a class by 3 x 3 as often as d, after a frame of zeros."""
    mask, prediction = blobs(1, ignored=0)

    def near(labels, class_id):
        own = np.pad(labels == class_id, 1)
        eroded = ndimage.binary_erosion(own, np.ones((3, 3)), iterations=2)
        return (own & ~eroded)[1:-1, 1:-1]

    metric = METRICS["boundary_iou"](4, width=0.06)  # 2 pixels
    metric.update(mask, prediction)
    for class_id, iou in enumerate(metric.result()["classes"]):
        true, guess = near(mask, class_id), near(prediction, class_id)
        assert iou == np.sum(true & guess) / np.sum(true | guess)


def test_trimap_agrees_with_the_oracle_within_each_band():
    images, widths = [blobs(seed) for seed in range(3)], (1, 2, 3)
    metric = METRICS["trimap"](4, widths=widths)
    for image in images:
        metric.update(*image)
    found = metric.result()
    assert found["widths"] == [1, 2, 3]
    for index, width in enumerate(widths):
        bands = [near_another(mask, width) for mask, _ in images]
        masks = [mask[band] for (mask, _), band in zip(images, bands, strict=True)]
        guesses = [guess[band] for (_, guess), band in zip(images, bands, strict=True)]
        expected = oracle(masks, guesses, 4)
        assert found["miou"][index] == pytest.approx(expected["miou"])
        assert found["pixel_accuracy"][index] == pytest.approx(expected["pixel_accuracy"])
        valid = sum(np.sum(mask != 255) for mask, _ in images)
        assert found["pixels"][index] == np.sum(bands) / valid


def test_borders_are_seen_across_ignored_pixels():
    # As PASCAL VOC draws them: five ignored pixels between two classes.
    mask = np.array([[0] * 8 + [255] * 5 + [1] * 8] * 2, np.uint8)
    metric = METRICS["trimap"](2, widths=(5, 6, 7))
    metric.update(mask, np.zeros_like(mask))
    assert metric.result()["pixels"] == [0, 2 * 2 / 32, 2 * 4 / 32]
    assert metric.result()["pixel_accuracy"][1:] == [0.5, 0.5]
    assert math.isnan(metric.result()["miou"][0])


def objects(mask):
    """Connected pixels of one class, by walking from neighbour to neighbour."""
    seen, found = mask == 255, []
    for start in np.ndindex(mask.shape):
        if seen[start]:
            continue
        seen[start], part, todo = True, [], [start]
        while todo:
            place = todo.pop()
            part.append(place)
            for other in neighbours(mask.shape, *place, 1):
                if mask[other] == mask[start] and not seen[other]:
                    seen[other] = True
                    todo.append(other)
        found.append((mask[start], part))
    return found


def test_sizes_agree_with_a_walk_over_the_pixels():
    metric, edges = METRICS["sizes"](4, edges=(20, 60)), (20, 60)
    counts = np.zeros((4, 4, 3), int)  # objects, found, pixels, right
    for seed in range(4):
        mask, prediction = blobs(seed, shape=(24, 40))
        metric.update(mask, prediction)
        for class_id, part in objects(mask):
            size, right = sum(len(part) >= edge for edge in edges), 0
            right = sum(prediction[place] == class_id for place in part)
            counts[:, class_id, size] += (1, right >= len(part) / 2, len(part), right)
    assert (counts[0].sum(axis=0) > 0).all()  # there are some of every size
    found = metric.result()
    np.testing.assert_array_equal(found["objects"], counts[0].sum(axis=0))
    np.testing.assert_array_equal(metric.found, counts[1])
    np.testing.assert_allclose(found["recall"], counts[1].sum(axis=0) / counts[0].sum(axis=0))
    np.testing.assert_allclose(found["pixel_recall"], counts[3].sum(axis=0) / counts[2].sum(axis=0))
    np.testing.assert_array_equal(found["classes"]["objects"], counts[0])


def test_half_of_an_object_is_found_and_32_x_32_pixels_are_medium():
    mask = np.zeros((40, 70), np.uint8)
    mask[:32, :32], mask[:31, 36:68] = 1, 1
    prediction = mask.copy()
    prediction[16:], prediction[15:, 36:] = 0, 0  # 16 of 32 rows remain, and 15 of 31
    metric = METRICS["sizes"](2)
    metric.update(mask, prediction)
    assert metric.objects[1].tolist() == [1, 1, 0]
    assert metric.found[1].tolist() == [0, 1, 0]


def probable(seed, num_classes=4, shape=(2, 12, 10)):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(num_classes) * 0.4, shape).astype(np.float32)
    mask = random.integers(0, num_classes, shape)
    mask = np.where(random.random(shape) < 0.5, probabilities.argmax(-1), mask).astype(np.uint8)
    mask[random.random(shape) < 0.1] = 255
    return mask, probabilities


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_agrees_pixel_by_pixel(bins):
    mask, probabilities = probable(0)
    metric = METRICS["calibration"](4, bins=bins)
    metric.update(mask, probabilities)
    rows = [
        (float(one.max()), int(one.argmax()) == true)
        for true, one in zip(mask.ravel(), probabilities.reshape(-1, 4), strict=True)
        if true != 255
    ]
    ece, gaps = 0, []
    for index in range(bins):
        inside = [row for row in rows if index / bins < row[0] <= (index + 1) / bins]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            ece += len(inside) / len(rows) * abs(right - confidence)
            gaps.append(abs(right - confidence))
    found = metric.result()
    assert found["ece"] == pytest.approx(ece, abs=1e-7)  # confidences are kept in steps of 6e-8
    assert found["mce"] == pytest.approx(max(gaps), abs=1e-7)
    assert found["bins"]["pixels"].sum() == len(rows)
    assert found["accuracy"] == np.mean([right for _, right in rows])


def test_a_tie_counts_for_the_lower_class_and_certainty_is_in_the_last_bin():
    metric = METRICS["calibration"](2, bins=2)
    metric.update(np.array([0, 1, 1]), np.array([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]))
    found = metric.result()
    assert found["bins"]["pixels"].tolist() == [2, 1]
    assert found["bins"]["accuracy"].tolist() == [0.5, 1]
    assert found["ece"] == 0


def test_what_is_no_probability_is_refused():
    metric = METRICS["calibration"](2)
    with pytest.raises(ValueError, match=r"have the shape \(2, 2\)"):
        metric.update(np.array([0, 1]), np.zeros((2, 3)))
    for wrong in ([5.0, -3.0], [math.nan, 0.5], [0.0, 0.0]):
        with pytest.raises(ValueError, match="no probabilities"):
            metric.update(np.array([0]), np.array([wrong]))
    assert not metric.pixels.any()


def shown(name, images, num_classes=4):
    """What a metric says of images that it was shown in this order."""
    metric = METRICS[name](num_classes)
    for mask, prediction in images:
        if metric.needs_probabilities:
            prediction = np.eye(num_classes)[prediction] * 0.7 + 0.3 / num_classes
        metric.update(mask, prediction)
    return plain(metric.result())


@pytest.mark.parametrize("name", list(METRICS))
def test_results_depend_neither_on_batches_nor_on_order(name):
    images = [blobs(seed, shape=(40, 40)) for seed in range(7)]
    batch = [tuple(map(np.stack, zip(*images, strict=True)))]
    expected = shown(name, images)
    assert shown(name, batch) == shown(name, images[::-1]) == expected
    assert json.dumps(expected, allow_nan=False)


@pytest.mark.parametrize("name", list(METRICS))
def test_without_a_valid_pixel_nothing_is_claimed(name):
    ignored = np.full((5, 6), 255, np.uint8), np.zeros((5, 6), np.uint8)
    assert shown(name, [ignored]) == shown(name, [])
    found = shown(name, [*[blobs(2)], ignored])
    assert found == shown(name, [blobs(2)])


@pytest.mark.parametrize("name", list(METRICS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1)])
def test_images_of_a_pixel_or_a_line(name, shape):
    found = shown(name, [(np.ones(shape, np.uint8), np.ones(shape, np.uint8))])
    json.dumps(found, allow_nan=False)
    perfect = {"iou": "miou", "boundary_iou": "boundary_iou", "calibration": "accuracy"}
    if name in perfect:
        assert found[perfect[name]] == 1


@pytest.mark.parametrize("name", list(METRICS))
def test_tables_fit_80_columns(name):
    metric, classes = METRICS[name](4), ("sky", "[b]road[/b]", "pedestrian", "never seen")
    mask, prediction = blobs(3, num_classes=3, shape=(120, 120))
    given = np.eye(4)[prediction] if metric.needs_probabilities else prediction
    metric.update(mask, given)
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(metric.table(classes))
    assert max(map(len, capture.get().splitlines())) <= 80
    assert "…" not in capture.get()


@pytest.mark.parametrize("name", ["boundary_f1", "boundary_iou", "sizes", "trimap"])
def test_ids_that_are_no_class_are_refused(name):
    with pytest.raises(ValueError, match="prediction holds the ids 9"):
        METRICS[name](3).update(np.zeros((2, 2), int), np.full((2, 2), 9))
    with pytest.raises(ValueError, match=r"expected \(H, W\) or \(B, H, W\)"):
        METRICS[name](3).update(np.zeros(4, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="ignore_label 0 is one of the 3 classes"):
        METRICS[name](3, 0).update(np.zeros((2, 2), int), np.zeros((2, 2), int))


@pytest.mark.parametrize("module", [one.name for one in pkgutil.iter_modules(metrics.__path__)])
def test_examples_of_the_docstrings_hold(module):
    found = doctest.testmod(
        importlib.import_module(f"kseg.metrics.{module}"), extraglobs={"np": np}
    )
    assert not found.failed


# Conventions.


def of_images(masks, predictions, num_classes):
    """IoU of each class in each image, pixel by pixel; NaN where it is neither true nor found."""
    pairs = zip(masks, predictions, strict=True)
    return np.array([oracle([m], [p], num_classes)["iou"] for m, p in pairs])


def test_every_convention_by_its_own_formula():
    masks, predictions = zip(
        *(blobs(seed, num_classes=3, ignored=0.2) for seed in range(4)), strict=True
    )
    masks = [np.where(mask == seed % 3, 255, mask) for seed, mask in enumerate(masks)]
    tallies = np.array([counted(*pair, 5).tallies for pair in zip(masks, predictions, strict=True)])
    found = conventions(tallies, background=1)
    whole, single = oracle(masks, predictions, 5), of_images(masks, predictions, 5)
    true = np.array([[(mask == id_).any() for id_ in range(5)] for mask in masks])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means of classes that are nowhere
        expected = {
            "miou": np.nanmean(whole["iou"]),
            "miou_true_classes": np.nanmean([whole["iou"][id_] for id_ in range(3)]),
            "miou_absent_as_zero": np.nansum(whole["iou"]) / 5,
            "miou_absent_as_one": (np.nansum(whole["iou"]) + 2) / 5,
            "miou_without_background": np.nanmean(np.delete(whole["iou"], 1)),
            "worst_class_iou": np.nanmin(whole["iou"]),
            "miou_of_images": np.mean(np.nanmean(single, axis=1)),
            "miou_of_images_true_classes": np.mean(
                [np.mean(row[there]) for row, there in zip(single, true, strict=True)]
            ),
            "miou_of_class_means": np.nanmean(np.nanmean(single, axis=0)),
            "pixel_accuracy": whole["pixel_accuracy"],
            "pixel_accuracy_of_images": np.mean(
                [
                    oracle([m], [p], 5)["pixel_accuracy"]
                    for m, p in zip(masks, predictions, strict=True)
                ]
            ),
        }
    assert found == pytest.approx(expected, rel=1e-12)
    # They are different numbers indeed.
    assert len({round(value, 6) for value in expected.values()}) >= 9


def test_lecture_example_by_every_convention():
    found = conventions(np.array([[[0, 95], [5, 95], [0, 100]]]))
    assert (found["pixel_accuracy"], found["miou"], found["worst_class_iou"]) == (0.95, 0.475, 0)
    assert found["miou_without_background"] is None
    assert conventions(np.array([[[0, 95], [5, 95], [0, 100]]]), background=0)[
        "miou_without_background"
    ] == pytest.approx(0.95)


def test_conventions_without_a_valid_pixel_are_nan():
    found = conventions(np.zeros((2, 3, 4), int), background=0)
    assert found.pop("miou_absent_as_zero") == 0
    assert found.pop("miou_absent_as_one") == 1
    assert all(map(math.isnan, found.values()))


# Peers, on random input.


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed):
    sklearn = peer("sklearn.metrics")
    mask, prediction = drawn(seed, 6)
    found = counted(mask, prediction, 6)
    true, guess = mask[mask != 255], prediction[mask != 255]
    np.testing.assert_array_equal(found.matrix, sklearn.confusion_matrix(true, guess))
    np.testing.assert_allclose(found.iou, sklearn.jaccard_score(true, guess, average=None))
    assert found.miou == pytest.approx(sklearn.jaccard_score(true, guess, average="macro"))
    assert found.fwiou == pytest.approx(sklearn.jaccard_score(true, guess, average="weighted"))
    assert found.pixel_accuracy == pytest.approx(sklearn.accuracy_score(true, guess))
    assert found.mean_accuracy == pytest.approx(sklearn.balanced_accuracy_score(true, guess))
    assert found.dice == pytest.approx(sklearn.f1_score(true, guess, average="macro"))


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchmetrics(seed):
    torchmetrics, torch = peer("torchmetrics.classification"), pytest.importorskip("torch")
    mask, prediction = drawn(seed, 6)
    found = counted(mask, prediction, 6)
    pair = torch.tensor(prediction.astype(int)), torch.tensor(mask.astype(int))

    def theirs(kind, **options):
        return getattr(torchmetrics, kind)(6, ignore_index=255, **options)(*pair).numpy()

    np.testing.assert_array_equal(found.matrix, theirs("MulticlassConfusionMatrix"))
    np.testing.assert_allclose(found.iou, theirs("MulticlassJaccardIndex", average=None), rtol=1e-6)
    assert found.miou == pytest.approx(theirs("MulticlassJaccardIndex").item(), rel=1e-6)
    assert found.dice == pytest.approx(theirs("MulticlassF1Score").item(), rel=1e-6)
    assert found.pixel_accuracy == pytest.approx(
        theirs("MulticlassAccuracy", average="micro").item(), rel=1e-6
    )
    assert found.mean_accuracy == pytest.approx(theirs("MulticlassAccuracy").item(), rel=1e-6)


@pytest.mark.parametrize("norm", ["l1", "max"])
def test_calibration_equals_torchmetrics(norm):
    torchmetrics, torch = peer("torchmetrics.classification"), pytest.importorskip("torch")
    mask, probabilities = probable(5, shape=(3, 40, 50))
    metric = METRICS["calibration"](4)
    metric.update(mask, probabilities)
    theirs = torchmetrics.MulticlassCalibrationError(4, n_bins=15, norm=norm, ignore_index=255)
    expected = theirs(torch.tensor(probabilities).movedim(-1, 1), torch.tensor(mask.astype(int)))
    name = {"l1": "ece", "max": "mce"}[norm]
    assert metric.result()[name] == pytest.approx(expected.item(), abs=1e-5)
