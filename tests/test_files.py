"""Writing that never destroys: files, folders, checkpoints, run folders."""

import errno
import os

import numpy as np
import pytest
from safetensors import SafetensorError

from kseg import checkpoint
from kseg.arguments import recipe_arguments, recipe_names, with_recipe
from kseg.config import TrainConfig
from kseg.errors import UserError
from kseg.files import clear_leftovers, replacing, write_text
from kseg.runs import MetricsFile, Run


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.bin"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path):
    path = tmp_path / "model.bin"
    write_text(path, "old")
    with pytest.raises(UserError, match="disk is full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "saved_model"
    for content in ("one", "two"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    write_text(tmp_path / "metrics.csv", "step\n")
    (tmp_path / "checkpoints" / ".writing-7-step-4").mkdir(parents=True)
    (tmp_path / ".writing-7-best.keras").write_text("half")
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"metrics.csv", "checkpoints"}


def tensors(value):
    return {"a/kernel": np.full((2, 3), value, "float32"), "seed": np.array([1, 2], "uint32")}


def test_checkpoints_come_back_and_only_the_newest_two_stay(tmp_path):
    for step in (2, 4, 10):
        checkpoint.save(tmp_path, step=step, tensors=tensors(step), facts={"best": 0.5})
    assert checkpoint.steps(tmp_path) == [4, 10]
    read, facts = checkpoint.load(tmp_path, 10)
    assert facts == {"best": 0.5}
    assert checkpoint.digest(read) == checkpoint.digest(tensors(10))
    assert checkpoint.digest(read) != checkpoint.digest(tensors(4))


def test_an_unfinished_checkpoint_is_not_found(tmp_path):
    (tmp_path / "step-8").mkdir()
    (tmp_path / ".writing-1-step-6").mkdir()
    assert checkpoint.steps(tmp_path) == []


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = checkpoint.save(tmp_path, step=2, tensors=tensors(1), facts={})
    state = folder / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:40])
    with pytest.raises(UserError, match="step-2"):
        checkpoint.load(tmp_path, 2)


def test_a_disk_too_small_for_a_training_is_told_before_it_begins(tmp_path):
    checkpoint.check_space(tmp_path, {"kernel": (3, 3)})
    with pytest.raises(UserError, match="MB are free"):
        checkpoint.check_space(tmp_path, {"kernel": (10**9, 10**6)})


def test_metrics_of_steps_that_will_come_again_are_forgotten(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path, until=0)
    for step in (5, 10, 15):
        table.add({"step": step, "loss": 1 / step})
    table = MetricsFile(path, until=10)
    table.add({"step": 15, "loss": 0.5})
    assert path.read_text().splitlines()[1:] == ["5,0.2,,,,", "10,0.1,,,,", "15,0.5,,,,"]


def test_a_configuration_survives_its_run_folder(tmp_path):
    config = TrainConfig(data="scenes", size=(96, 128), run=tmp_path / "run", options=("a=1",))
    Run(config.run).create(config)
    assert Run(config.run).config() == config


def test_a_configuration_of_a_newer_kseg_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"novelty": 1}}')
    with pytest.raises(UserError, match="novelty") as error:
        Run(tmp_path).config()
    assert "damaged" not in str(error.value)


def test_the_text_of_a_full_disk_from_safetensors_is_understood(tmp_path, monkeypatch):
    # As safetensors 0.8 words it, seen on a full tmpfs.
    def full(*_, **__):
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        checkpoint.save(tmp_path, step=2, tensors=tensors(1), facts={})
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_stands_before_what_is_typed(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "fcn"\nscale = [0.5, 1]\njit = true\n[options]\nwidths = [8, 16]\n')
    words = with_recipe(["--recipe", str(recipe), "--model", "unet"])
    assert words[:8] == ["--model", "fcn", "--scale", "0.5", "1", "--jit", "-o", "widths=8,16"]
    assert words[8:] == ["--recipe", str(recipe), "--model", "unet"]


def test_a_typed_length_replaces_the_recipes(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("steps = 100\nema = 0.9\n")
    words = with_recipe(["--recipe", str(recipe), "--epochs", "2"])
    assert words == ["--ema", "0.9", "--recipe", str(recipe), "--epochs", "2"]


def test_recipes_that_come_with_kseg_are_well_formed():
    assert "camvid-edge" in recipe_names()
    for name in recipe_names():
        assert recipe_arguments(name)
