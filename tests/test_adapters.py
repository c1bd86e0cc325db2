"""Data sets on drawn trees, in the TensorFlow Datasets format, and the real CamVid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from kseg.data import doctor, pipeline
from kseg.data.adapters.folder import Folder
from kseg.data.dataset import UNKNOWN_ID, open_dataset, voc_palette
from kseg.errors import UserError
from kseg.registry import DATASETS


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def camvid_tree(tmp_path: Path) -> Path:
    """SegNet's layout with a .png, a .jpg and a .jpeg image in each of two splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, suffix in enumerate((".png", ".jpg", ".jpeg")):
            image = rng.integers(0, 256, (36, 48, 3), np.uint8)
            save(tmp_path / split / f"{number}{suffix}", image)
            mask = rng.integers(0, 12, (36, 48), np.uint8)
            save(tmp_path / f"{split}annot" / f"{number}.png", mask)
    return tmp_path


def test_every_data_set_says_what_it_is():
    assert {"camvid", "folder", "tfds"} <= set(DATASETS)
    for name in DATASETS:
        assert DATASETS[name].__doc__.strip(), name


def test_unknown_data_set_answers_with_the_nearest():
    with pytest.raises(UserError, match="did you mean camvid"):
        open_dataset("camvidd:/x")


# ----------------------------------------------------------------------------- camvid


def test_camvid_pairs_and_remap(camvid_tree: Path):
    dataset = open_dataset(f"camvid:{camvid_tree}")
    assert dataset.classes[3] == "road" and dataset.palette[3] == (128, 64, 128)
    assert len(dataset.classes) == len(dataset.palette) == 11
    assert dataset.splits == ("train", "val")
    assert [p.image.name for p in dataset.pairs("train")] == ["0.png", "1.jpg", "2.jpeg"]
    assert [p.mask.name for p in dataset.pairs("train")] == ["0.png", "1.png", "2.png"]
    table = dataset.lookup()
    assert list(table[:12]) == [*range(11), 255] and (table[12:] == UNKNOWN_ID).all()
    doctor.check_dataset(dataset, dataset.splits)
    _, mask = next(pipeline.evaluation_samples(dataset, "val").as_numpy_iterator())
    assert set(np.unique(mask)) == {*range(11), 255}


def test_camvid_test_split_is_there_if_its_folder_is(camvid_tree: Path):
    save(camvid_tree / "test" / "a.png", np.zeros((36, 48, 3), np.uint8))
    save(camvid_tree / "testannot" / "a.png", np.zeros((36, 48), np.uint8))
    dataset = open_dataset(f"camvid:{camvid_tree}")
    assert dataset.splits == ("train", "val", "test") and dataset.length("test") == 1
    with pytest.raises(UserError, match="no split 'tset'; did you mean test"):
        dataset.length("tset")


@pytest.mark.parametrize("spec", ["camvid", "camvid:/nowhere", "folder", "folder:/nowhere"])
def test_missing_folder_shows_the_expected_tree(spec: str):
    with pytest.raises(UserError, match="PATH/\n") as caught:
        open_dataset(spec)
    assert "train" in str(caught.value) and "8-bit grey PNG" in str(caught.value)


def test_two_images_of_one_name_are_refused(camvid_tree: Path):
    save(camvid_tree / "train" / "1.png", np.zeros((36, 48, 3), np.uint8))
    with pytest.raises(UserError, match=r"more than once \(1.jpg, 1.png\)"):
        open_dataset(f"camvid:{camvid_tree}").pairs("train")


def test_files_of_the_system_are_passed_over(camvid_tree: Path):
    (camvid_tree / "train" / "._0.png").write_bytes(b"x")
    (camvid_tree / "train" / "Thumbs.db").write_bytes(b"x")
    assert open_dataset(f"camvid:{camvid_tree}").length("train") == 3


# Decoding 468 pairs and building the pipeline: a few seconds.
def test_real_camvid(camvid: Path):
    dataset = open_dataset(f"camvid:{camvid}")
    assert (dataset.length("train"), dataset.length("val")) == (367, 101)
    doctor.check_dataset(dataset, ["train", "val"])
    assert doctor.most_frequent_size(dataset, "train") == (360, 480)
    batches = pipeline.training_batches(
        dataset, size=(96, 128), batch_size=4, seed=0, steps=2, cache=False
    )
    for image, mask in batches.as_numpy_iterator():
        assert image.shape == (4, 96, 128, 3)
        assert set(np.unique(mask)) <= {*range(11), 255}


# ----------------------------------------------------------------------------- folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "classes.csv").write_text("id,name,r,g,b\n0,a,1,2,3\n1,b,4,5,6\n")
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "x.jpg", np.zeros((36, 48, 3), np.uint8))
        save(tmp_path / split / "masks" / "x.png", np.eye(36, 48, dtype=np.uint8))
    return tmp_path


def test_folder_reads_classes(tree: Path):
    dataset = open_dataset(f"folder:{tree}")
    assert dataset.classes == ("a", "b") and dataset.palette == ((1, 2, 3), (4, 5, 6))
    assert dataset.remap == {0: 0, 1: 1} and dataset.splits == ("train", "val")
    doctor.check_dataset(dataset, ["train", "val"])


def test_folder_ids_may_have_gaps_and_an_ignored_one(tree: Path):
    text = "\ufeffid,name,r,g,b\r\n9,b,4,5,6\r\n3,ignore,0,0,0\r\n2,a,1,2,3\r\n\r\n"
    (tree / "classes.csv").write_text(text, encoding="utf-8")
    dataset = open_dataset(f"folder:{tree}")
    assert dataset.classes == ("a", "b") and dataset.remap == {2: 0, 9: 1, 3: 255}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with the line id,name,r,g,b"),
        ("name,id\n", "must begin with the line id,name,r,g,b"),
        ("id,name,r,g,b\n0,a,1,2\n", "line 2: '0,a,1,2' is not id,name,r,g,b"),
        ("id,name,r,g,b\n0,a,1,2,3\n\n1,b,1,2,300\n", "line 4"),
        ("id,name,r,g,b\n0,a,1,2,3\n0,b,1,2,3\n", "the id 0 more than once"),
        ("id,name,r,g,b\n0,a,1,2,3\n1,a,1,2,3\n", "the name a more than once"),
        ("id,name,r,g,b\n0,a,1,2,3\n255,ignore,1,2,3\n", "at least two classes"),
    ],
)
def test_folder_refuses_a_bad_table(tree: Path, text: str, words: str):
    (tree / "classes.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        open_dataset(f"folder:{tree}")
    assert words in str(caught.value) and "classes.csv" in str(caught.value)


def test_folder_without_table_shows_one(tree: Path):
    (tree / "classes.csv").unlink()
    with pytest.raises(UserError, match="0,background,0,0,0"):
        open_dataset(f"folder:{tree}")


def test_folder_help_holds_the_example():
    lines = [line.strip() for line in Folder.__doc__.splitlines()]
    start = lines.index("id,name,r,g,b")
    assert lines[start : start + 3] == ["id,name,r,g,b", "0,background,0,0,0", "1,cat,250,120,40"]


# ----------------------------------------------------------------------------- tfds


class KsegDrawn(tfds.core.GeneratorBasedBuilder):
    """Twelve samples of ids 1 to 3, in the three splits its configuration names."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="train_only"),
        tfds.core.BuilderConfig(name="named"),
        tfds.core.BuilderConfig(name="all_splits"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        labels = ["sea", "land", "ice", "cloud"] if self.builder_config.name == "named" else None
        mask = (
            tfds.features.LabeledImage(labels=labels, shape=(None, None, 1))
            if labels
            else tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "name": tfds.features.Text(),
                    "segmentation_mask": mask,
                }
            ),
        )

    def _split_generators(self, dl_manager):
        splits = {"train": range(12)}
        if self.builder_config.name == "all_splits":
            splits |= {"validation": range(12, 15), "test": range(15, 17)}
        return {name: self._generate_examples(numbers) for name, numbers in splits.items()}

    def _generate_examples(self, numbers):
        for number in numbers:
            yield (
                number,
                {
                    "image": np.full((20 + number, 30, 3), number, np.uint8),
                    "name": f"number {number}",
                    "segmentation_mask": np.full((20 + number, 30, 1), 1 + number % 3, np.uint8),
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds all three configurations."""
    folder = tmp_path_factory.mktemp("tfds")
    for config in KsegDrawn.BUILDER_CONFIGS:
        KsegDrawn(config=config.name, data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture
def data_dir(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return prepared


def numbers_of(dataset, split: str) -> set[int]:
    return {int(dataset.sample(split, i)[0][0, 0, 0]) for i in range(dataset.length(split))}


def test_tfds_scans_for_classes_and_takes_the_last_tenth(data_dir: Path):
    dataset = open_dataset("tfds:kseg_drawn:train_only")
    assert dataset.splits == ("train", "val")
    assert (dataset.length("train"), dataset.length("val")) == (10, 2)  # a tenth of 12, rounded up
    assert numbers_of(dataset, "train") | numbers_of(dataset, "val") == set(range(12))
    assert dataset.remap == {1: 0, 2: 1, 3: 2, 255: 255}
    assert dataset.classes == ("class 1", "class 2", "class 3")
    doctor.check_dataset(dataset, ["train", "val"])


def test_tfds_samples_are_those_written(data_dir: Path):
    dataset = open_dataset("tfds:kseg_drawn:all_splits")
    assert dataset.splits == ("train", "val", "test")
    assert numbers_of(dataset, "val") == {12, 13, 14} and numbers_of(dataset, "test") == {15, 16}
    for index in (11, 0, 5):
        image, mask = dataset.sample("train", index)
        number = int(image[0, 0, 0])
        assert image.shape == (20 + number, 30, 3) and mask.shape == (20 + number, 30)
        assert (mask == 1 + number % 3).all()


def test_tfds_knows_names(data_dir: Path):
    dataset = open_dataset("tfds:kseg_drawn:named")
    assert dataset.classes == ("sea", "land", "ice", "cloud")
    assert len(dataset.palette) == 4


def test_tfds_goes_through_the_pipeline(data_dir: Path):
    dataset = open_dataset("tfds:kseg_drawn:train_only")
    options = dict(size=(16, 16), batch_size=4, seed=1, steps=4)
    whole = list(pipeline.training_batches(dataset, **options).as_numpy_iterator())
    tail = list(pipeline.training_batches(dataset, start_step=2, **options).as_numpy_iterator())
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(whole[2:], tail, strict=True))
    assert set(np.unique(whole[0][1])) <= {0, 1, 2, 255}


def test_tfds_reads_array_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    KsegDrawn(
        config="train_only", data_dir=tmp_path, file_format="array_record"
    ).download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    dataset = open_dataset("tfds:kseg_drawn:train_only")
    assert numbers_of(dataset, "train") | numbers_of(dataset, "val") == set(range(12))


def mocked_pets(self, split: str, **options) -> list[dict]:
    """As oxford_iiit_pet stores them: ids 1, 2, 3."""
    return [
        {
            "image": np.zeros((10, 12, 3), np.uint8),
            "segmentation_mask": np.full((10, 12, 1), 1 + number % 3, np.uint8),
        }
        for number in range(20)
    ]


def test_tfds_pets_become_0_1_2():
    with tfds.testing.mock_data(as_data_source_fn=mocked_pets):
        dataset = open_dataset("tfds:oxford_iiit_pet")
        assert dataset.classes == ("pet", "background", "border")
        samples = pipeline.evaluation_samples(dataset, "train", limit=3)
        ids = [int(mask[0, 0]) for _, mask in samples.as_numpy_iterator()]
        assert ids == [0, 1, 2]


def test_tfds_mask_of_another_size_is_refused():
    """What mock_data draws by itself: image and mask have sizes of their own."""
    with tfds.testing.mock_data(num_examples=20):
        dataset = open_dataset("tfds:oxford_iiit_pet")
        assert (dataset.length("train"), dataset.length("val")) == (18, 2)
        with pytest.raises(UserError, match="oxford_iiit_pet train #0: the image is .* its mask"):
            doctor.check_dataset(dataset, ["train"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tfds", "tfds:NAME"),
        ("tfds:oxford_iiit_pets", "no set 'oxford_iiit_pets'"),
        ("tfds:mnist", "no segmentation mask|no image"),
        ("tfds:kseg_drawn:nothing", "'kseg_drawn/nothing'"),
    ],
)
def test_tfds_says_what_it_needs(data_dir: Path, spec: str, words: str):
    with pytest.raises(UserError, match=words):
        open_dataset(spec)


def test_tfds_is_imported_late():
    """Listing data sets must not cost the import of TensorFlow Datasets."""
    code = (
        "import sys, json; from kseg.registry import DATASETS; list(DATASETS); "
        "print(json.dumps([m for m in ('tensorflow', 'tensorflow_datasets') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_voc_palette():
    """The first colours of PASCAL VOC's own list."""
    assert voc_palette(5) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert len(set(voc_palette(254))) == 254
