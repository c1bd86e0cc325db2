import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from rich.console import Console

from kseg.data.dataset import ArrayDataset
from kseg.errors import UserError
from kseg.evaluate import evaluate
from kseg.metrics import ConfusionMatrix
from kseg.predict import predict_files

CLASSES = ("road", "sky", "car")
PALETTE = ((128, 64, 128), (70, 130, 180), (0, 0, 142))


class Drawn(ArrayDataset):
    """Four images, each of its own size, whose mask stands in the red channel."""

    name = "drawn"
    classes = CLASSES
    palette = PALETTE
    splits = ("val", "ignored")

    def length(self, split):
        return 4

    def sample(self, split, index):
        shape = (12 + index, 20 - index)
        mask = np.random.default_rng(index).integers(0, 2, shape).astype(np.uint8)
        mask[index] = 255
        if split == "ignored":
            mask[:] = 255
        return np.repeat(mask[..., None], 3, axis=-1), mask


@dataclass
class Copy:
    """Answers what stands in the red channel, 0 where it is ignored, and keeps what was asked."""

    classes: tuple = CLASSES
    palette: tuple = PALETTE
    path: str = "copy.keras"
    offset: int = 0
    classes_known: bool = True
    settled: tuple = ()
    refinements: tuple = ()
    sizes: list = field(default_factory=list)

    @property
    def num_classes(self):
        return len(self.classes)

    def predict(self, image, *, size=None):
        self.sizes.append(size)
        ids = image[..., 0]
        return np.where(ids == 255, 0, (ids + self.offset) % self.num_classes).astype(np.uint8)


def test_perfect_predictor():
    predictor, calls = Copy(), []
    result = evaluate(
        predictor, Drawn(), split="val", on_image=lambda done, total: calls.append((done, total))
    )
    assert result.miou == result.pixel_accuracy == 1
    assert result.images == 4
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert predictor.sizes == [(12, 20), (13, 19), (14, 18), (15, 17)]
    assert result.confusion.matrix.sum() == sum((11 + i) * (20 - i) for i in range(4))


def test_totals_over_the_set_not_a_mean_over_images():
    dataset, expected = Drawn(), ConfusionMatrix(3)
    for index in range(4):
        image, mask = dataset.sample("val", index)
        expected.update(mask, Copy(offset=1).predict(image))
    result = evaluate(Copy(offset=1), dataset, split="val")
    np.testing.assert_array_equal(result.confusion.matrix, expected.matrix)
    assert result.miou == 0


def test_limit():
    result = evaluate(Copy(), Drawn(), split="val", limit=2)
    assert result.images == 2
    assert result.confusion.matrix.sum() == 11 * 20 + 12 * 19


def test_limit_beyond_the_split_is_the_split():
    assert evaluate(Copy(), Drawn(), split="val", limit=99).images == 4


def test_limit_of_zero_is_refused():
    with pytest.raises(UserError, match="limit is 0"):
        evaluate(Copy(), Drawn(), split="val", limit=0)


def test_json_holds_fractions_and_null_for_an_absent_class(tmp_path):
    result = evaluate(Copy(), Drawn(), split="val")
    result.save_json(tmp_path / "new" / "out.json")
    read = json.loads((tmp_path / "new" / "out.json").read_text())
    assert read == result.to_json()
    assert {key: read[key] for key in ("dataset", "split", "images", "file")} == {
        "dataset": "drawn",
        "split": "val",
        "images": 4,
        "file": "copy.keras",
    }
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "dice"):
        assert read[name] == 1
    assert read["classes"] == [
        {"id": 0, "name": "road", "iou": 1.0},
        {"id": 1, "name": "sky", "iou": 1.0},
        {"id": 2, "name": "car", "iou": None},
    ]


def test_table_ends_with_miou():
    result = evaluate(Copy(), Drawn(), split="val")
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(result.table())
    lines = [line for line in capture.get().splitlines() if any(map(str.isalnum, line))]
    assert "drawn val, 4 images" in lines[0]
    assert "road" in lines[2] and "1.0000" in lines[2]
    assert "car" in lines[4] and "absent" in lines[4]
    assert "mIoU" in lines[-1] and "1.0000" in lines[-1]


def test_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match=r"2 classes \(a, b\) and drawn has 3 \(road, sky, car\)"):
        evaluate(Copy(classes=("a", "b")), Drawn(), split="val")


def test_split_without_a_valid_pixel_is_refused():
    with pytest.raises(UserError, match="drawn ignored: every pixel of its 4 images is ignored"):
        evaluate(Copy(), Drawn(), split="ignored")


def test_evaluation_and_prediction_agree(tmp_path):
    # The same picture through both ways: a class map on disk holds what was evaluated.
    from PIL import Image

    image, mask = Drawn().sample("val", 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    (written,) = predict_files(Copy(), [tmp_path / "a.png"], tmp_path / "out")
    with Image.open(written) as ids:
        confusion = ConfusionMatrix(3)
        confusion.update(mask, np.asarray(ids))
    assert confusion.miou == 1
    assert math.isnan(confusion.iou[2])
