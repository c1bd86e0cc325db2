import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from rich.console import Console

from kseg.cli import main
from kseg.data.dataset import ArrayDataset
from kseg.errors import UserError
from kseg.evaluate import Evaluation, evaluate
from kseg.machine import free_memory, whole_memory
from kseg.metrics import ConfusionMatrix
from kseg.metrics.per_image import fingerprint
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
    output: str = "logits"
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
        {"id": 0, "name": "road", "iou": 1.0, "interval": [1, 1]},
        {"id": 1, "name": "sky", "iou": 1.0, "interval": [1, 1]},
        {"id": 2, "name": "car", "iou": None, "interval": None},
    ]
    assert read["intervals"] == {
        "level": 0.95,
        "draws": 1000,
        "miou": [1, 1],
        "pixel_accuracy": [1, 1],
        "miou_of_images": [1, 1],
    }
    assert read["conventions"]["miou_absent_as_zero"] == pytest.approx(2 / 3)
    assert read["conventions"]["miou_without_background"] is None
    assert read["metrics"] == {}


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


class Unsure(Copy):
    """Gives the class it answers 0.8, and keeps whether it was asked."""

    asked: int = 0

    def probabilities(self, image, *, size=None):
        self.asked += 1
        return np.eye(3)[self.predict(image)] * 0.7 + 0.1


def test_images_are_kept_one_by_one():
    class Best(Copy):
        def predict(self, image, *, size=None):
            # Wrong in one pixel of the third image, in two of the first.
            labels = super().predict(image, size=size)
            wrong = {12: 2, 14: 1}.get(image.shape[0], 0)
            labels[0, :wrong] = 2
            return labels

    found = evaluate(Best(), Drawn(), split="val")
    names = [one.name for one in found.per_image.images]
    assert names == [f"drawn val #{index}" for index in range(4)]
    np.testing.assert_array_equal(found.per_image.total(), found.confusion.matrix)
    for index in range(4):
        image, mask = Drawn().sample("val", index)
        expected = ConfusionMatrix(3)
        expected.update(mask, Best().predict(image))
        np.testing.assert_array_equal(found.per_image.matrix(index), expected.matrix)
        np.testing.assert_array_equal(found.per_image.tallies()[index], expected.tallies)
        assert found.per_image.mious()[index] == pytest.approx(expected.miou)
    assert found.per_image.ranked()[2:] == [1, 3]  # perfect ones, in their order
    assert set(found.per_image.ranked()[:2]) == {0, 2}
    assert len({one.mask for one in found.per_image.images}) == 4


def test_images_without_a_valid_pixel_have_no_rank():
    class Half(Drawn):
        def sample(self, split, index):
            return super().sample("ignored" if index == 1 else split, index)

    assert evaluate(Copy(), Half(), split="val").per_image.ranked() == [0, 2, 3]


def test_fingerprints_tell_masks_apart():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert fingerprint(mask) == fingerprint(mask.T.copy().T)
    assert fingerprint(mask) != fingerprint(mask.reshape(3, 2))
    assert fingerprint(mask) != fingerprint(mask + np.uint8(1))


def test_further_metrics_are_measured_shown_and_written():
    predictor = Unsure()
    names = ("boundary_f1", "boundary_iou", "calibration", "sizes", "trimap")
    found = evaluate(predictor, Drawn(), split="val", metrics=names)
    assert predictor.asked == 4
    assert len(found.tables()) == 5
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))["metrics"]
    assert tuple(written) == names
    assert written["calibration"]["ece"] == pytest.approx(0.2, abs=1e-6)  # right, and 0.8 sure
    assert written["boundary_iou"]["boundary_iou"] == written["boundary_f1"]["boundary_f1"] == 1
    assert written["trimap"]["miou"][0] == 1
    assert written["sizes"]["recall"][0] == 1


def test_probabilities_are_made_only_where_they_are_needed():
    predictor = Unsure()
    evaluate(predictor, Drawn(), split="val", metrics=("sizes",))
    assert predictor.asked == 0


def test_a_model_behind_metrics_is_told_to_stand_before_them(tmp_path, capsys):
    assert main(["evaluate", "--metrics", "sizes", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is taken for a metric; name the model before --metrics" in said


def test_metrics_that_cannot_be_had_are_refused_before_anything_is_read():
    with pytest.raises(UserError, match="no metric 'boundry_f1'; did you mean boundary_f1"):
        evaluate(Copy(), Drawn(), split="val", metrics=("boundry_f1",))
    predictor = Copy(path="int8.tflite", output="classes")
    with pytest.raises(UserError, match="int8.tflite gives a class map, .*--output logits"):
        evaluate(predictor, Drawn(), split="val", metrics=("trimap", "calibration"))
    assert not predictor.sizes
    assert evaluate(predictor, Drawn(), split="val", metrics=("trimap",)).metrics


def test_the_table_has_intervals_within_80_columns():
    class Noisy(Copy):
        def predict(self, image, *, size=None):
            labels = super().predict(image, size=size)
            labels[:: image.shape[0] % 4 + 2] = 1
            return labels

    result = evaluate(Noisy(), Drawn(), split="val")
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(result.table())
    lines = capture.get().splitlines()
    miou = next(line.replace("│", "").split() for line in lines if "mIoU  " in line[:8])
    low, high = result.intervals.miou
    assert miou == ["mIoU", f"{result.miou:.4f}", f"{low:.4f}", "to", f"{high:.4f}"]
    assert low < result.miou < high
    assert max(map(len, lines)) <= 80
    alone = evaluate(Noisy(), Drawn(), split="val", limit=1)
    with console.capture() as capture:
        console.print(alone.table())
    assert " to " not in capture.get()  # one image has no interval


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (("sky", "road", "car"), "the class 'sky' where drawn has 'road' .id 0."),
        (("road", "sky", "bus"), "the class 'bus' where drawn has 'car' .id 2."),
    ],
)
def test_classes_that_the_model_does_not_have_are_refused(classes, told):
    with pytest.raises(UserError, match=f"copy.keras has {told}"):
        evaluate(Copy(classes=classes), Drawn(), split="val")


@pytest.mark.parametrize("classes", [("Road", "sky_", "CAR"), ("class 0", "sky", "2")])
def test_names_that_mean_the_same_or_nothing_are_taken(classes):
    assert evaluate(Copy(classes=classes), Drawn(), split="val").miou == 1


def test_what_is_read_again_is_what_was_written(tmp_path):
    found = evaluate(Copy(offset=1), Drawn(), split="val")
    found.save_json(tmp_path / "e.json")
    read = Evaluation.load_json(tmp_path / "e.json")
    assert read.to_json() == found.to_json()
    np.testing.assert_array_equal(read.confusion.matrix, found.confusion.matrix)
    # A line for each image, so that the file can be read by a person.
    lines = (tmp_path / "e.json").read_text().splitlines()
    assert sum('"cells"' in line for line in lines) == 4


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


def test_there_is_no_more_memory_free_than_there_is():
    assert 0 < free_memory() <= whole_memory()


def container(root, folder, **files):
    """Write what Linux tells of a machine with 10 MiB available, and of a container on it."""
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text("MemFree: 1024 kB\nMemAvailable:   10240 kB\n")
    (root / folder).mkdir(parents=True)
    for name, text in files.items():
        (root / folder / f"memory.{name}").write_text(f"{text}\n")
    return root


def test_files_that_were_read_count_as_free_in_a_container(tmp_path):
    # Of 6 MB, 5 are taken, 3 of them by files: the programs hold 2, and 4 are free.
    stat = "anon 2000000\nfile 3000000\ninactive_file 2500000\nactive_file 500000"
    root = container(tmp_path, "sys/fs/cgroup", max=6_000_000, current=5_000_000, stat=stat)
    assert free_memory(root) == 4_000_000
    assert whole_memory(root) == 6_000_000


def test_so_they_do_in_control_groups_of_version_1(tmp_path):
    # Those without "total_" are the container's own, without those inside it.
    stat = "inactive_file 7\nactive_file 7\ntotal_inactive_file 1000000\ntotal_active_file 0"
    files = {"limit_in_bytes": 6_000_000, "usage_in_bytes": 5_000_000, "stat": stat}
    root = container(tmp_path, "sys/fs/cgroup/memory", **files)
    assert free_memory(root) == 2_000_000


def test_a_container_without_a_limit_has_what_the_machine_has(tmp_path):
    root = container(tmp_path, "sys/fs/cgroup", max="max", current=5_000_000)
    assert free_memory(root) == 10_240 * 1024


def test_a_limit_above_what_is_available_frees_nothing(tmp_path):
    root = container(tmp_path, "sys/fs/cgroup", max=10**12, current=0)
    assert free_memory(root) == 10_240 * 1024
    assert free_memory(tmp_path / "elsewhere") == 4 << 30  # no Linux
