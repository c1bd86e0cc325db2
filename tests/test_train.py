"""The training itself: exact resume, what a crash leaves, files that go bad in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from street import TINY_MODEL, train_words, write_street

from kseg import card, checkpoint
from kseg.cli import main
from kseg.config import TrainConfig
from kseg.data.dataset import open_dataset
from kseg.resolve import check, resolve
from kseg.runs import Run
from kseg.train import train


def final_digest(folder):
    tensors, _ = checkpoint.load(Run(folder).checkpoints, 6)
    return checkpoint.digest(tensors)


def small(data, folder, **changes):
    config = TrainConfig(
        data=f"folder:{data}", run=folder, steps=6, batch_size=2, eval_every=3, checkpoint_every=2
    )
    return replace(config, options=tuple(TINY_MODEL[1::2]), **changes)


class Crash(keras.callbacks.Callback):
    """Stops a training after a step, as a bug in a user's callback would."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            raise RuntimeError("crash")


@pytest.mark.parametrize(
    "step", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_training_that_crashed_ends_bit_for_bit_as_one_that_did_not(
    step, street, run_folder, tmp_path
):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train(small(street, folder), callbacks=[Crash(step)])
    # Before the first checkpoint at step 2 it starts anew, afterwards it goes on from there.
    assert checkpoint.steps(Run(folder).checkpoints) == [n for n in (2, 4) if n < step]
    assert main(["train", "--resume", str(folder)]) == 0
    assert final_digest(folder) == final_digest(run_folder)
    assert (folder / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "mixed_float16"},
        {"precision": "mixed_bfloat16"},
        {"loss": "dice+0.01..1*boundary_distance"},
    ],
    ids=["float16", "bfloat16", "rising_weight"],
)
def test_other_trainings_resume_exactly_too_and_are_kept_as_float32(changes, street, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(small(street, whole, **changes))
    with pytest.raises(RuntimeError, match="crash"):
        train(small(street, broken, **changes), callbacks=[Crash(3)])
    train(TrainConfig(resume=broken))
    assert final_digest(whole) == final_digest(broken)
    model = keras.saving.load_model(whole / "best.keras")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_a_precision_that_only_costs_time_is_named(fast, street, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kseg.training_copy.has_fast_convolutions", lambda dtype: fast)
    train(small(street, tmp_path / "run", precision="mixed_bfloat16", steps=1, batch_size=1))
    said = "mixed_bfloat16 can be over ten times slower than float32 on this processor: stop here"
    assert (said in capsys.readouterr().out) is not fast


@pytest.mark.parametrize(
    ("asked", "quantize_aware", "fast", "expected"),
    [
        ("auto", False, True, "mixed_bfloat16"),
        ("auto", False, False, "float32"),
        ("auto", True, True, "float32"),
        ("mixed_bfloat16", False, False, "mixed_bfloat16"),
        ("float32", False, True, "float32"),
    ],
)
def test_auto_takes_bfloat16_where_it_costs_no_time(
    asked, quantize_aware, fast, expected, street, tmp_path, monkeypatch
):
    monkeypatch.setattr("kseg.training_copy.has_fast_convolutions", lambda dtype: fast)
    words = {"precision": asked, "quantize_aware": quantize_aware, "weights": "a.keras"}
    config = small(street, tmp_path / "run", **words)
    check(config)
    assert resolve(config, open_dataset(config.data)).precision == expected


def test_kept_files_carry_a_card_and_only_logits(run_folder):
    facts = card.read(run_folder / "best.keras")
    assert facts.classes == ("ground", "thing")
    assert facts.model == "swiftnet"
    assert facts.size == (96, 128)
    model = keras.saving.load_model(run_folder / "best.keras")
    assert list(model.output) == ["logits"]
    assert model.output["logits"].shape == (None, 96, 128, 2)


def test_kept_weights_are_the_averaged_ones(run_folder):
    tensors, _ = checkpoint.load(run_folder / "checkpoints", 6)
    model = keras.saving.load_model(run_folder / "last.keras")
    kernel = model.get_layer("stem1_conv").kernel.numpy()
    np.testing.assert_array_equal(kernel, tensors["ema/stem1_conv/kernel"])
    assert np.abs(kernel - tensors["model/stem1_conv/kernel"]).max() > 0


@pytest.mark.slow
def test_frozen_bn_keeps_the_backbones_normalisation_and_trains_the_heads(street, tmp_path):
    config = TrainConfig(
        data=f"folder:{street}",
        run=tmp_path / "run",
        steps=2,
        batch_size=2,
        model="lraspp",
        backbone="mobilenetv3_small",
        frozen_bn=True,
        head_rate=10.0,
    )
    train(config)
    model = keras.saving.load_model(tmp_path / "run" / "last.keras")
    norms = [one for one in model.layers if isinstance(one, keras.layers.BatchNormalization)]
    moved = [one.name for one in norms if np.asarray(one.moving_mean).any()]
    assert moved == ["head_bn"]
    assert all((np.asarray(one.gamma) == 1).all() for one in norms if one.name not in moved)


def test_frozen_bn_needs_a_backbone(street, tmp_path, capsys):
    assert main([*train_words(street, tmp_path / "run"), "--frozen-bn"]) == 2
    assert "swiftnet has no backbone of its own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_config_json_holds_the_resolved_configuration(run_folder):
    record = json.loads((run_folder / "config.json").read_text())
    config = record["config"]
    assert config["size"] == config["eval_size"] == [96, 128]
    assert Path(config["data"].partition(":")[2]).is_absolute()
    assert {"kseg", "keras", "tensorflow"} <= record["versions"].keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record["commit"] == head.stdout.strip()


def test_a_checkpoint_of_another_architecture_is_refused(street, run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train(small(street, folder), callbacks=[Crash(5)])
    record = json.loads((folder / "config.json").read_text())
    record["config"]["options"] = ["widths=8,8,8,16", *record["config"]["options"][1:]]
    (folder / "config.json").write_text(json.dumps(record))
    assert main(["train", "--resume", str(folder)]) == 2
    assert "another architecture" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_file_that_goes_bad_is_named_and_the_run_goes_on_after_it_is_mended(tmp_path, capsys):
    # More files than the pipeline reads ahead, so that some are read after they went bad.
    data = write_street(tmp_path / "data", train=80)
    folder = tmp_path / "run"
    images = {path: path.read_bytes() for path in (data / "train" / "images").iterdir()}

    class Damage(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            # After the doctor, who looked at the files before the training began.
            for path, whole in images.items():
                path.write_bytes(whole[: len(whole) // 2])

    config = replace(small(data, folder), class_weights="none", steps=40, eval_every=40)
    with pytest.raises(ValueError, match=r"images/\d+\.png is truncated"):
        train(config, callbacks=[Damage()])
    for path, whole in images.items():
        path.write_bytes(whole)
    assert main(["train", "--resume", str(folder)]) == 0


def test_a_full_disk_leaves_the_last_good_files(street, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train(small(street, folder), callbacks=[Crash(5)])
    good = {path: path.read_bytes() for path in folder.rglob("*.keras")}
    real = os.fsync

    def full(descriptor):
        if "last.keras" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(["train", "--resume", str(folder)]) == 2
    assert "the disk is full" in capsys.readouterr().err.replace("\n", " ")
    assert (folder / "last.keras").read_bytes() == good[folder / "last.keras"]
    assert not list(folder.rglob(".writing-*"))


@pytest.mark.slow
def test_resume_from_elsewhere_needs_neither_start_weights_nor_the_same_folder(
    street, run_folder, tmp_path, monkeypatch
):
    weights = tmp_path / "start.keras"
    weights.write_bytes((run_folder / "best.keras").read_bytes())
    (tmp_path / "weights.csv").write_text("ground,1\nthing,2\n")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    config = small(street, folder, weights="start.keras", class_weights="weights.csv")
    with pytest.raises(RuntimeError, match="crash"):
        train(config, callbacks=[Crash(3)])
    weights.unlink()
    monkeypatch.chdir(run_folder)
    assert main(["train", "--resume", str(folder)]) == 0


class Stop(keras.callbacks.Callback):
    """Ends a training after its first validation, and notes what it was told."""

    def on_train_begin(self, logs=None):
        self.told = []

    def on_epoch_begin(self, epoch, logs=None):
        self.told.append(("begin", epoch))

    def on_epoch_end(self, epoch, logs=None):
        self.told.append(("end", epoch))
        self.miou = logs["val_miou"]
        self.model.stop_training = True


def test_keras_callbacks_see_epochs_and_may_end_the_training(street, tmp_path):
    stop = Stop()
    trained = train(small(street, tmp_path / "run"), callbacks=[stop])
    assert stop.told[:2] == [("begin", 0), ("end", 0)]
    assert 0 <= stop.miou == pytest.approx(trained.evaluation.miou)
    assert max(checkpoint.steps(trained.run.checkpoints)) == 3


@pytest.mark.slow
def test_kill_9_at_any_moment_then_resume_gives_the_same_weights(street, run_folder, tmp_path):
    # Kills fall where they fall: at start-up, in a step, in a save. Every one is resumed, and the
    # last is let run to its end.
    folder = tmp_path / "run"
    words = train_words(street, folder)
    met = []
    for delay in (4, 9, 11, 12, 13, 14, 15, 17, 20):
        process = subprocess.Popen([sys.executable, "-m", "kseg", *words])
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        met.append((process.wait(), checkpoint.steps(folder / "checkpoints")))
        if (folder / "config.json").is_file():
            words = ["train", "--resume", str(folder)]
    assert any(code == -signal.SIGKILL for code, _ in met), met
    assert subprocess.run([sys.executable, "-m", "kseg", *words], check=False).returncode == 0
    assert final_digest(folder) == final_digest(run_folder)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(street, run_folder, tmp_path):
    folder = tmp_path / "run"
    words = train_words(street, folder)
    words[words.index("--steps") + 1] = "2000"
    words[words.index("--eval-every") + 1] = "2000"
    words[words.index("--checkpoint-every") + 1] = "2000"
    process = subprocess.Popen(
        [sys.executable, "-m", "kseg", *words], stdout=subprocess.PIPE, text=True
    )
    line = "begin"
    while line and "step 100/" not in line:
        line = process.stdout.readline()
    assert line, "the training ended before its hundredth step"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"kseg train --resume {folder}" in out
    assert checkpoint.steps(folder / "checkpoints")[0] >= 100
