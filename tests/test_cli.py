"""Every command through `main`, as a user types it: what it writes, prints and refuses."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from street import SIZE, train_words, write_street

from kseg import __version__
from kseg import card as cards
from kseg.card import ModelCard
from kseg.cli import main
from kseg.config import TrainConfig
from kseg.initial_weights import other_options
from kseg.metrics.conventions import conventions
from kseg.progress import Display, Pace
from kseg.registry import MODELS

COMMANDS = (
    "train evaluate report compare predict export verify inspect models backbones losses metrics "
    "datasets weights"
).split()


def test_help_of_every_command_loads_neither_tensorflow_nor_keras():
    code = f"""
import sys
from kseg.cli import main
from kseg.progress import Display, Pace
from kseg.registry import MODELS
for command in {COMMANDS}:
    assert main([command, "--help"]) == 0, command
assert main(["--help"]) == 0
heavy = {{"tensorflow", "keras", "jax", "torch"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"kseg {command}" in done.stdout
    # One line is tyro's own, which lists all commands in braces.
    lines = [line for line in done.stdout.splitlines() if "{train,evaluate," not in line]
    assert max(map(len, lines)) <= 80


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kseg {__version__}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "swiftnett"], "did you mean swiftnet"),
        (["--model", "lraspp", "--backbone", "mobilnetv2"], "did you mean mobilenetv2"),
        (["--backbone", "resnet50"], "leave --backbone out"),
        (["--weights", "imagenet"], "no ImageNet weights for swiftnet"),
        (["-o", "width=8,8,8,8"], "did you mean widths"),
        (["-o", "widths"], "expected NAME=VALUE"),
        (["-o", "widths=a,b"], "widths"),
        (["--loss", "cee"], "did you mean ce"),
        (["--loss", "ce+0.5*dise"], "did you mean dice"),
        (["--loss", "ce+tversky:alfa=1"], "did you mean alpha"),
        (["--data", "scene"], "did you mean scenes"),
        (["--data", "folder:/nowhere"], "/nowhere"),
        (["--size", "100", "128"], "multiples of 32"),
        (["--eval-size", "100", "128"], "multiples of 32"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--steps", "5", "--epochs", "2"], "either --steps or --epochs"),
        (["--scale", "2", "1"], "--scale takes MIN MAX"),
        (["--ema", "1"], "--ema"),
        (["--class-weights", "medium"], "did you mean median"),
        (["--recipe", "camvid-egde"], "did you mean camvid-edge"),
        (["--weights", "/no/such.keras"], "/no/such.keras"),
        (["-o", "widths=0,8,8,8"], "swiftnet cannot be built with widths"),
        (["-o", "backbone_weights=imagenet"], "--weights imagenet"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--resume", "/no/run"], "no run folder"),
    ],
)
def test_mistakes_in_training_are_one_message_and_exit_code_2(words, told, tmp_path, capsys):
    run = [] if "--resume" in words else ["--run", str(tmp_path / "run"), "--steps", "1"]
    if "--epochs" in words:
        run = run[:2]
    assert main(["train", *run, *words]) == 2
    said = capsys.readouterr()
    assert told in said.err.replace("\n", " ")
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_unknown_flag_names_the_nearest(capsys):
    assert main(["train", "--batchsize", "4"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_recipe_with_an_unknown_key_names_file_and_nearest(tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('modle = "fcn"\n')
    assert main(["train", "--recipe", str(recipe)]) == 2
    said = capsys.readouterr().err.replace("\n", "")
    assert "mine.toml" in said
    assert "did you mean model" in said


def test_resume_takes_no_other_flag(run_folder, capsys):
    assert main(["train", "--resume", str(run_folder), "--steps", "9"]) == 2
    assert "no other flag" in capsys.readouterr().err


def test_binary_masks_of_0_and_255_are_explained(tmp_path, capsys):
    data = write_street(tmp_path / "data")
    csv = (data / "classes.csv").read_text().replace("255,ignore,0,0,0\n", "")
    (data / "classes.csv").write_text(csv)
    for mask in data.glob("*/masks/*.png"):
        ids = np.asarray(Image.open(mask))
        Image.fromarray((ids == 1).astype(np.uint8) * 255).save(mask)
    assert main(train_words(data, tmp_path / "run")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "0, 255" in said or "0/255" in said
    assert "use 0 and 1" in said


def test_a_bad_mask_that_the_check_up_did_not_sample_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kseg.data.doctor.MASKS_DECODED", 2)
    data = write_street(tmp_path / "data")
    victim = data / "train" / "masks" / "3.png"
    Image.fromarray(np.full(SIZE, 9, np.uint8)).save(victim)
    assert main(train_words(data, tmp_path / "run")) == 2
    assert "masks/3.png" in capsys.readouterr().err.replace("\n", "")


def test_a_run_folder_holds_what_it_should(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert {"config.json", "metrics.csv", "best.keras", "last.keras", "checkpoints"} <= names
    assert {"preview.jpg", "tensorboard"} <= names
    assert [path.name for path in sorted(run_folder.glob("checkpoints/*"))] == ["step-4", "step-6"]
    lines = (run_folder / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,learning_rate,images_per_second,miou")
    assert [line.split(",")[0] for line in lines[1:]] == ["3", "6"]
    steps = list(csv.DictReader((run_folder / "steps.csv").read_text().splitlines()))
    assert [row["step"] for row in steps] == list("123456")
    # The first two steps are compiled while they run.
    assert [row["step"] for row in steps if not row["waiting"]] == ["1", "2"]
    assert all(0 <= float(row["waiting"]) <= 1 for row in steps[2:])
    assert not list(run_folder.rglob(".writing-*"))


def test_pace_by_a_clock_of_our_own(monkeypatch):
    """After two steps: waiting 1 and 3 s, working 2 and 2 s, 8 images in all."""
    clock = itertools.chain([0], [0] * 2, iter([0, 1, 3, 3, 6, 8]))
    monkeypatch.setattr("kseg.progress.time.monotonic", lambda: next(clock))
    pace = Pace(batch_size=4)
    for loss in (9.0, 7.0):
        pace.waits()
        pace.works()
        pace.done(loss)
    assert pace.row() == {"loss": 8.0}
    for loss in (3.0, 1.0):
        pace.waits()
        pace.works()
        pace.done(loss)
    assert pace.row() == {"loss": 2.0, "images_per_second": 1.0, "waiting": 0.5}


def test_a_run_folder_is_not_taken_twice(run_folder, street, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}
    assert main(train_words(street, run_folder)) == 2
    assert f"kseg train --resume {run_folder}" in capsys.readouterr().err.replace("\n", "")
    assert main(["train", "--resume", str(run_folder)]) == 0
    after = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}
    assert before == after


def test_evaluate_gives_the_same_numbers_for_run_keras_and_tflite(run_folder, tmp_path, capsys):
    assert main(["export", str(run_folder), "--tflite", "--saved-model", "--seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "model-float32.tflite" in shown
    results = {}
    export = run_folder / "export"
    files = [export / "model-float32.tflite", export / "saved_model"]
    for model in (run_folder, run_folder / "best.keras", *files):
        out = tmp_path / f"{model.name}.json"
        assert main(["evaluate", str(model), "--split", "val", "--json", str(out)]) == 0
        results[model.name] = json.loads(out.read_text())
        assert capsys.readouterr().out.strip().splitlines()[-2].split()[1] == "mIoU"
    first = results[run_folder.name]
    assert set(first) >= {"miou", "pixel_accuracy", "mean_accuracy", "fwiou", "dice", "classes"}
    assert [c["name"] for c in first["classes"]] == ["ground", "thing"]
    for result in results.values():
        # The data's size is the model's, so even class maps need no resizing: only pixels at a
        # tie of two classes may differ between runtimes.
        assert result["miou"] == pytest.approx(first["miou"], abs=0.002)


def test_predict_keeps_size_stem_and_subfolder(run_folder, tmp_path):
    photos = tmp_path / "photos" / "day"
    photos.mkdir(parents=True)
    Image.new("RGB", (75, 51), (90, 90, 90)).save(photos / "a.jpg")
    out = tmp_path / "out"
    assert main(["predict", str(run_folder), str(tmp_path / "photos"), "--out", str(out)]) == 0
    with Image.open(out / "day" / "a.png") as mask:
        assert (mask.mode, mask.size) == ("P", (75, 51))
        assert mask.getpalette()[:6] == [128, 64, 128, 220, 20, 60]
    assert (out / "day" / "a_overlay.jpg").is_file()


@pytest.mark.slow
def test_the_newest_run_is_the_one_started_last(street, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--tflite"]) == 2
    assert "kseg train" in capsys.readouterr().err
    words = train_words(street, "unused")
    del words[words.index("--run") : words.index("--run") + 2]
    assert main(words) == 0
    folder = next((tmp_path / "runs").iterdir())
    assert folder.name.endswith("-swiftnet")
    assert main(["evaluate"]) == 0


def test_every_mean_iou_of_the_json_is_explained(capsys):
    assert main(["metrics"]) == 0
    assert "kseg metrics conventions" in capsys.readouterr().out
    assert main(["metrics", "conventions"]) == 0
    shown = capsys.readouterr().out
    tallies = np.ones((1, 3, 2), int)  # one image, two classes of a pixel each
    assert set(conventions(tallies)) <= set(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_masks_that_are_ignored_throughout_are_named(run_folder, tmp_path, capsys):
    data = write_street(tmp_path / "data", train=1, val=3)
    for mask in (data / "val" / "masks").iterdir():
        Image.new("L", (128, 96), 255).save(mask)
    out = tmp_path / "found.json"
    words = ["evaluate", str(run_folder), "--data", f"folder:{data}", "--json", str(out)]
    assert main(words) == 2
    said = "".join(capsys.readouterr().err.split())
    mask = data / "val" / "masks" / "0.png"
    assert f"{mask}and2moreoffolderval:everypixelisignored" in said
    assert not out.exists()


def test_the_default_model_is_listed_with_its_signature(capsys):
    assert main(["models"]) == 0
    assert "swiftnet" in capsys.readouterr().out
    assert main(["models", "deeplabv3plus"]) == 0
    shown = capsys.readouterr().out
    assert "output_stride" in shown
    assert "(8, 16, 32)" in " ".join(shown.split())  # what it takes
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["models", "deeplabv3pluss"]) == 2


def test_crf_refines_what_is_measured_and_written(run_folder, street, tmp_path):
    words = ["evaluate", str(run_folder), "--json"]
    assert main([*words, str(tmp_path / "plain.json")]) == 0
    assert main([*words, str(tmp_path / "crf.json"), "--crf"]) == 0
    plain, crf = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "crf"))
    # The drawn boxes are far brighter than the ground: pixels alike in colour get one label.
    assert crf["miou"] > plain["miou"]
    image = street / "val" / "images" / "0.png"
    assert main(["predict", str(run_folder), str(image), "--out", str(tmp_path), "--crf"]) == 0
    with Image.open(tmp_path / "0.png") as mask:
        assert mask.mode == "P"


@pytest.mark.slow
def test_crf_parameters_are_searched_for_and_taken(run_folder, street, tmp_path, capsys):
    words = ["evaluate", str(run_folder), "--limit", "1", "--json", str(tmp_path / "m.json")]
    assert main([*words, "--crf-search", "--crf"]) == 2
    assert "leave --crf and the like out" in capsys.readouterr().err
    assert main([*words, "--crf-search"]) == 0
    found = re.search(r"best: (--crf-parameters \S+ \S+ \S+)", capsys.readouterr().out)[1]
    searched = json.loads((tmp_path / "m.json").read_text())
    assert main([*words, *found.split()]) == 0
    assert json.loads((tmp_path / "m.json").read_text()) == searched
    assert main([*words, "--crf-parameters", "4", "-1", "5"]) == 2
    assert "sigma_alpha is -1" in capsys.readouterr().err


def test_superpixels_are_labelled_as_wholes(run_folder, street, tmp_path):
    pytest.importorskip("skimage")
    image = street / "val" / "images" / "0.png"
    words = ["predict", str(run_folder), str(image), "--out", str(tmp_path), "--superpixels", "1"]
    assert main(words) == 0
    with Image.open(tmp_path / "0.png") as mask:
        assert len(np.unique(np.asarray(mask))) == 1


def test_a_backbone_that_refers_to_its_sibling_is_shown_whole(capsys):
    assert main(["backbones", "hrnet_w18"]) == 0
    shown = capsys.readouterr().out
    assert "as `HRNetW48`" not in shown and "High-Resolution Representation" in shown


def test_models_list_the_backbones_that_they_take(capsys):
    assert main(["models", "--json"]) == 0
    listed = {model["name"]: model["backbones"] for model in json.loads(capsys.readouterr().out)}
    assert listed["unet"] == []
    assert "hrnet_w18" in listed["ocrnet"] and "hrnet_w18" not in listed["deeplabv2"]
    assert "resnet50" in listed["deeplabv2"]


def test_models_are_sorted_by_a_number(capsys):
    assert main(["models", "--sort", "parameters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[2:-2]]
    assert names.index("fastscnn") < names.index("swiftnet") < names.index("fcn")
    # Every number that one can sort by is shown, and the whole fits a terminal.
    titles = [" ".join(pair) for pair in zip(lines[0].split(), lines[1].split()[1:], strict=True)]
    assert titles == ["M params", "G MACs", "float ms", "int8 ms", "float MB", "int8 MB"]
    assert max(map(len, lines)) <= 80 and re.match(r"20\d\d-\d\d-\d\d.*, \w", lines[-1])
    assert main(["models", "--sort", "macs", "--json"]) == 2
    assert "leave it out beside --json" in capsys.readouterr().err
    assert main(["models", "--sort", "int8ms"]) == 2
    assert "did you mean int8-ms" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m kseg models --json | head -c 100"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout) == 100 and done.stderr == ""


def test_models_as_json_is_one_list_and_nothing_else(capsys):
    assert main(["models", "--json"]) == 0
    listed = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(MODELS)
    keys = {"name", "options", "backbones", "source", "parameters", "macs", "targets"}
    assert all(model.keys() == keys for model in listed.values())
    fcn = listed["fcn"]
    # architectures.md 2: FCN-8s of VGG16 with 21 classes; 110.8 GMACs at 512 x 512.
    assert fcn["parameters"] == 134_362_751
    assert fcn["macs"] / 1e9 == pytest.approx(110.8, rel=0.01)
    assert fcn["options"]["finest_stride"] == 8 and "resnet50" in fcn["backbones"]
    assert fcn["source"].startswith("Long, Shelhamer, Darrell")
    assert fcn["targets"] == ["tflite-float32", "tflite-int8", "saved_model", "onnx"]
    assert "tflite-int8" not in listed["rgnet"]["targets"]  # as its registration says


def test_export_takes_a_run_and_counts_from_one(run_folder, capsys):
    words = ["export", "--tflite", "--data", "scenes"]
    assert main([*words, str(run_folder / "metrics.csv")]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert main(["export", str(run_folder), "--tflite", "--verify-images", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(run_folder, tmp_path, capsys):
    assert main(["evaluate", str(run_folder), "--json", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said.replace("\n", "")
    assert "Traceback" not in said


def test_datasets_are_shown_with_their_layout(capsys):
    assert main(["datasets", "folder"]) == 0
    assert "classes.csv" in capsys.readouterr().out


def test_weights_of_a_run_start_another_with_a_new_classifier(run_folder, tmp_path, capsys):
    words = ["--data", "scenes", "--weights", str(run_folder), "--steps", "1", "--batch-size", "1"]
    size = [str(side) for side in SIZE]
    # Neither --model nor its options: the file says them.
    more = ["--size", *size, "--eval-size", *size, "--class-weights", "none"]
    assert main(["train", "--run", str(tmp_path / "run"), *words, *more]) == 0
    said = capsys.readouterr().err
    assert "logits_conv" in said and "was built with" not in said
    there, here = (cards.read(folder / "best.keras") for folder in (run_folder, tmp_path / "run"))
    assert (here.model, here.options) == (there.model, there.options)


def test_other_options_than_those_of_the_weights_are_told(tmp_path):
    """At another output stride the same weights fit, and compute something else."""
    card = ModelCard("deeplabv3", {"output_stride": 16, "aux": True}, (), (), (64, 64))
    path = tmp_path / "m.keras"
    cards.embed(path, card)
    config = TrainConfig(model="deeplabv3", options=("output_stride=8", "dropout=0.5"))
    assert other_options(path, config) == {"output_stride": (16, 8)}
    assert other_options(path, replace(config, options=("output_stride=16",))) == {}


@pytest.mark.parametrize("name", ["theirs.pth", "theirs.safetensors"])
def test_weights_of_another_library_are_sent_to_the_import(name, run_folder, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"weights")
    for words in (["train", "--weights"], ["predict"], ["evaluate"]):
        images = [str(tmp_path), "--out", str(tmp_path)] if words == ["predict"] else []
        assert main([*words, str(tmp_path / name), *images]) == 2
        assert "kseg weights import" in " ".join(capsys.readouterr().err.split())


def test_an_unfinished_run_says_how_to_finish(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert main(["evaluate", str(folder)]) == 2
    assert f"--resume {folder}" in capsys.readouterr().err.replace("\n", "")


def test_a_training_says_the_range_of_its_class_weights(capsys):
    config = TrainConfig(steps=1, size=(64, 96), class_weights="sqrt")
    with Display(config, done=0) as display:
        display.started(1_500_000, ("road", "pole", "sky"), (0.5, 3.25, 1.0))
    assert "class weights (sqrt): 0.50 (road) to 3.25 (pole)\n" in capsys.readouterr().out
    with Display(config, done=0) as display:
        display.started(1_500_000, ("road", "pole", "sky"), None)
    assert "class weights" not in capsys.readouterr().out


def test_progress_names_no_speed_before_it_is_known(capsys):
    with Display(TrainConfig(steps=3, size=(64, 96)), done=0) as display:
        display.update(1, loss=0.5, learning_rate=0.1)
        display.validated(1, 0.25, best=True)
        display.update(2, loss=0.5, learning_rate=0.1)
        display.validated(2, 0.25, best=False)  # as good, but best.keras is of step 1
    assert capsys.readouterr().out.splitlines() == [
        "step 1/3 loss 0.500 lr 1.0e-01",
        "step 1: validation mIoU 0.2500 (best)",
        "step 2/3 loss 0.500 lr 1.0e-01 mIoU 0.250",
        "step 2: validation mIoU 0.2500",
    ]
