"""A run that export goes on with, quantisation-aware, and what `kseg verify` makes of its file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from street import train_words, write_street

from kseg import card as cards
from kseg.cli import main
from kseg.export import tflite
from kseg.export.interface import Interface
from kseg.inference import load
from kseg.runs import Run

FILE = "model-qat.tflite"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The drawn streets, with blue turned round: boxes are yellow, the ground is blue."""
    root = write_street(tmp_path_factory.mktemp("coloured") / "data")
    for path in root.glob("*/images/*.png"):
        with Image.open(path) as image:
            pixels = np.array(image)
        pixels[..., 2] = 255 - pixels[..., 2]
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with a qat file: 6 steps, and 6 quantisation-aware ones that change many labels."""
    folder = tmp_path_factory.mktemp("runs") / "street"
    assert main(train_words(data, folder)) == 0
    aware = ["--quantize-aware", "--weights", str(folder), "--learning-rate", "0.002"]
    assert main(train_words(data, folder / "qat", *aware)) == 0
    words = ["export", str(folder), "--tflite", "--quantize", "qat", "--seconds", "0"]
    assert main(words) == 0
    return folder


def verified(file, against, folder):
    """Return the exit code of `kseg verify`, and what its certificate says of the file."""
    words = ["--against", str(against), "--seconds", "0", "--out", str(folder)]
    code = main(["verify", str(file), *words])
    (facts,) = json.loads((folder / f"{file.name}.certificate.json").read_text())["files"]
    return code, facts


def exported(run):
    files = json.loads((run / "export" / "manifest.json").read_text())["files"]
    return next(one for one in files if one["variant"] == "qat")


@pytest.mark.parametrize("against", [".", "qat", "qat/best.keras"])
def test_a_file_is_compared_with_its_own_model(run, against, tmp_path):
    code, facts = verified(run / "export" / FILE, run / against, tmp_path)
    assert code == 0
    assert facts["variant"] == "qat"
    assert facts["agreement"] == exported(run)["agreement"] >= facts["min_agreement"] == 99.5
    if against == ".":
        assert facts["reference_miou"] == exported(run)["keras_miou"]


def test_without_its_training_a_file_says_what_is_missing(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("qat"))
    assert main(["verify", str(other / "export" / FILE), "--against", str(other)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "was written from a quantisation-aware training" in told
    assert "name the run of that training with --against" in told


def test_its_labels_are_not_those_of_the_float_model(run):
    """Else the tests above would pass whatever the file is compared with."""
    file, plain = load(run / "export" / FILE), load(run)
    pictures = sorted(Path(Run(run).config().data.removeprefix("folder:")).glob("val/images/*"))
    equal = [np.mean(file.predict(one) == plain.predict(one)) for one in pictures]
    assert np.mean(equal) < 0.95


def test_a_float_file_is_compared_with_the_float_model(run, tmp_path):
    _, facts = verified(run / "export" / "model-float32.tflite", run, tmp_path)
    assert facts["variant"] == "float32"
    assert facts["accepted"]


def test_another_programs_file_is_one_of_the_model_named(run, tmp_path):
    path = tmp_path / "theirs.tflite"
    write_aware(load(run / "qat"), path)
    code, facts = verified(path, run / "qat", tmp_path)
    assert (code, facts["variant"]) == (0, "qat")


def test_a_planted_fault_is_named(run, tmp_path, capsys):
    """The first kernel reads blue where the model reads red."""
    path, aware = tmp_path / "swapped.tflite", load(run / "qat")
    first = next(one for one in aware.model.layers if one.name.endswith("conv"))
    first.kernel.assign(first.kernel.numpy()[:, :, ::-1])
    write_aware(aware, path)
    cards.embed(path, aware.card)
    code, facts = verified(path, run, tmp_path)
    assert code == 1
    assert [fault["name"] for fault in facts["faults"]] == ["channels"]
    assert "red and blue are exchanged" in " ".join(capsys.readouterr().out.split())


def write_aware(aware, path):
    samples = lambda: iter(())  # noqa: E731  (the model holds its ranges)
    tflite.write(aware.model, path, variant="qat", interface=Interface(), samples=samples)
