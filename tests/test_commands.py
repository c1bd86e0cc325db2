"""The README's way, command by command, as a user types it; and a short one on real streets."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from kseg.data.dataset import open_dataset
from kseg.runs import Run

pytestmark = pytest.mark.slow


def kseg(*words, cwd):
    """Run a command in a process of its own and return what it printed."""
    command = [sys.executable, "-m", "kseg", *map(str, words)]
    # A user's shell does not hold the variables that tests set for themselves.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_readmes_first_command_then_export(tmp_path):
    done = kseg("train", cwd=tmp_path)
    assert "\x1b" not in done.stdout, "output to a pipe is plain text"
    assert done.stderr == "", "TensorFlow's chatter does not reach the user"
    miou = float(re.findall(r"mIoU\W+([\d.]+)", done.stdout)[-1])
    assert miou >= 0.75
    run = next((tmp_path / "runs").iterdir())
    assert f"kseg export {run.relative_to(tmp_path)} --tflite" in done.stdout

    # With no run named, the newest.
    kseg("export", "--tflite", "--seconds", 0, cwd=tmp_path)
    assert (run / "export" / "model-float32.tflite").is_file()
    words = ("--tflite", "--quantize", "float16", "int8", "--saved-model", "--seconds", 1)
    shown = kseg("export", run, *words, cwd=tmp_path).stdout
    files = json.loads((run / "export" / "manifest.json").read_text())["files"]
    names = {"model-float32.tflite", "model-float16.tflite", "model-int8.tflite", "saved_model/1"}
    assert {one["path"] for one in files} == names
    for one in files:
        path = run / "export" / one["path"]
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == one["sha256"]
        assert one["agreement"] >= one["min_agreement"]
        assert path.name in shown
    assert (run / "export" / "saved_model" / "1" / "saved_model.pb").is_file()


def test_real_streets_from_training_to_predictions(camvid, tmp_path):
    data = f"camvid:{camvid}"
    short = ("--steps", 200, "--size", 192, 256, "--eval-size", 192, 256)
    words = ("--recipe", "camvid-edge", "--data", data, *short)
    kseg("train", *words, "--run", "run", cwd=tmp_path)
    few = ("--verify-images", 20, "--seconds", 0)
    kseg("export", "run", "--tflite", "--quantize", "int8", *few, cwd=tmp_path)
    results = []
    for file in ("run", "run/export/model-int8.tflite"):
        kseg("evaluate", file, "--data", data, "--split", "val", "--json", "o.json", cwd=tmp_path)
        results.append(json.loads((tmp_path / "o.json").read_text()))
    # 200 steps learn sky, road, building and tree: four of eleven classes at about 0.7.
    assert results[0]["miou"] > 0.25
    assert abs(results[0]["miou"] - results[1]["miou"]) < 0.02

    picture = open_dataset(data).pairs("val")[0].image
    kseg("predict", "run", picture, "--out", "out", cwd=tmp_path)
    with Image.open(tmp_path / "out" / f"{picture.stem}.png") as ids:
        assert (ids.mode, ids.size) == ("P", (480, 360))
        assert np.asarray(ids).max() < 11
    assert Run(tmp_path / "run").config().data == f"camvid:{camvid.resolve()}"
