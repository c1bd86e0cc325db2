"""`kseg compare`: two models on the same images, or nothing is said."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from street import SIZE, write_street
from test_evaluate import Copy, Drawn
from tiny import tiny_model

from kseg import card as cards
from kseg.card import ModelCard
from kseg.cli import main
from kseg.compare import compare
from kseg.errors import UserError
from kseg.evaluate import Evaluation, evaluate
from kseg.metrics.paired import paired_difference
from kseg.train import save_model


class Many(Drawn):
    """Forty images, each of its own size."""

    def length(self, split):
        return 40

    def sample(self, split, index):
        mask = np.random.default_rng(index).integers(0, 2, (12 + index, 20)).astype(np.uint8)
        mask[index % 12] = 255
        return np.repeat(mask[..., None], 3, axis=-1), mask


class Wrong(Copy):
    """Takes a share of the pixels, other ones of each image, for the next class."""

    share: float = 0.1

    def predict(self, image, *, size=None):
        labels = super().predict(image, size=size)
        wrong = np.random.default_rng(labels.size).random(labels.shape) < self.share
        return np.where(wrong, (labels + 1) % 2, labels).astype(np.uint8)


def of(share, path="m.keras", data=None, **options):
    predictor = Wrong(path=path)
    predictor.share = share
    return evaluate(predictor, data or Many(), split="val", **options)


def printed(table, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_better_one_is_better_and_the_other_way_round_worse():
    good, bad = of(0.05, "good.keras"), of(0.15, "bad.keras")
    found = compare(bad, good)
    assert found.difference.verdict == "better"
    assert found.difference.miou == pytest.approx(good.miou - bad.miou)
    assert re.match(
        r"B is better than A: mIoU of B less that of A is \+0\.1\d+, 95% interval "
        r"\+0\.1\d+ to \+0\.\d+; p = 0\.0001: if A and B were equally good, 0\.01% of such",
        found.sentence(),
    )
    assert (
        compare(good, bad).sentence().startswith("B is worse than A: mIoU of B less that of A is -")
    )


def test_of_two_alike_nothing_is_shown():
    found = compare(of(0.1), of(0.1))
    assert found.difference.verdict == "not shown"
    assert found.sentence() == (
        "not shown that either is better: mIoU of B less that of A is +0.0000, 95% interval "
        "+0.0000 to +0.0000; p = 1: if A and B were equally good, 100% of such tests would set "
        "them apart as much"
    )


def test_one_image_says_nothing():
    found = compare(of(0.05, limit=1), of(0.5, limit=1))
    assert found.difference.verdict == "not shown"
    assert "interval" not in found.sentence()


def test_the_table_has_both_and_their_difference():
    shown = printed(compare(of(0.05), of(0.15)).table())
    rows = [re.sub(r"[│┃]", "", line).split() for line in shown.splitlines()]
    road, miou = (next(row for row in rows if row[:1] == [name]) for name in ("road", "mIoU"))
    for _, a, b, difference, low, _, high in (road, miou):
        assert float(b) - float(a) == pytest.approx(float(difference), abs=2e-4)
        assert float(low) < float(difference) < float(high) < 0
    assert not any(row[:1] == ["car"] for row in rows)  # nowhere
    assert max(map(len, shown.splitlines())) <= 80


def test_json_holds_every_number(tmp_path):
    first, second = of(0.05, "a.keras"), of(0.15, "b.keras")
    compare(first, second).save_json(tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text())
    expected = paired_difference(first.per_image.tallies(), second.per_image.tallies())
    assert read["a"] == {"file": "a.keras", "refinements": [], "miou": first.miou}
    assert (read["verdict"], read["p"], read["images"]) == ("worse", expected.p, 40)
    assert read["interval"] == list(expected.interval)
    assert read["classes"][1] == {
        "id": 1,
        "name": "sky",
        "a": first.confusion.iou[1],
        "b": second.confusion.iou[1],
        "difference": expected.classes[1],
        "interval": list(expected.class_intervals[1]),
    }
    assert read["classes"][2]["difference"] is None


def test_what_was_saved_compares_as_what_was_measured(tmp_path):
    pair = of(0.05, "a.keras"), of(0.15, "b.keras")
    for name, one in zip("ab", pair, strict=True):
        one.save_json(tmp_path / f"{name}.json")
    read = [Evaluation.load_json(tmp_path / f"{name}.json") for name in "ab"]
    assert compare(*read).to_json() == compare(*pair).to_json()


class Moved(Many):
    """The same names with one other mask."""

    def sample(self, split, index):
        image, mask = super().sample(split, index)
        return image, np.where(mask == 0, 1, mask).astype(np.uint8) if index == 3 else mask


class Named(Many):
    """The same masks under another name."""

    name = "other"


def test_other_images_are_refused_by_count_name_and_mask():
    ours = of(0.1, "a.keras")
    with pytest.raises(UserError, match="a.keras was evaluated on 40 images and b.keras on 7"):
        compare(ours, of(0.1, "b.keras", limit=7))
    with pytest.raises(UserError, match=r"different images: the masks of drawn val #3 differ"):
        compare(ours, of(0.1, "b.keras", Moved()))
    with pytest.raises(UserError, match=r"image 1 is drawn val #0 and other val #0"):
        compare(ours, of(0.1, "b.keras", Named()))
    with pytest.raises(UserError, match="on the classes road, sky, car and b.keras on road, sky"):
        compare(ours, replace(ours, file="b.keras", classes=("road", "sky", "bus")))


def test_the_same_images_in_another_folder_are_the_same():
    ours = of(0.1)
    images = [replace(one, name=f"/mnt/{one.name}") for one in ours.per_image.images]
    moved = replace(ours, per_image=replace(ours.per_image, images=tuple(images)))
    assert compare(ours, moved).difference.miou == 0


# The command.


def told(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def nets(street, tmp_path_factory):
    """Two tiny nets for the drawn street, as files that say so."""
    folder = tmp_path_factory.mktemp("nets")
    facts = ModelCard(
        "tiny", {}, ("ground", "thing"), ((128, 64, 128), (220, 20, 60)), SIZE, f"folder:{street}"
    )
    for seed, name in enumerate("ab"):
        save_model(folder / f"{name}.keras", tiny_model(SIZE, 2, seed), facts)
    return [str(folder / f"{name}.keras") for name in "ab"]


def test_model_files_and_results_of_evaluate_are_compared_alike(nets, tmp_path, capsys):
    out = tmp_path / "c.json"
    assert main(["compare", *nets, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"A: {nets[0]}\nB: {nets[1]}\n" in shown
    assert max(map(len, shown[: shown.index("A: ")].splitlines())) <= 80
    assert json.loads(out.read_text())["images"] == 2
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    for file, model in zip(files, nets, strict=True):
        words = ["evaluate", model, "--metrics", "calibration", "sizes", "--json", file]
        assert main(words) == 0
        said = capsys.readouterr().out
        assert said.index("ECE") < said.index("share of the objects") < said.index("mIoU")
        assert set(json.loads(Path(file).read_text())["metrics"]) == {"calibration", "sizes"}
    assert main(["compare", *files]) == 0
    # The last line is the verdict; those before it name the files.
    assert capsys.readouterr().out.splitlines()[-1] == shown.splitlines()[-1]
    assert main(["compare", files[0], nets[1]]) == 0  # one of each kind
    assert capsys.readouterr().out.splitlines()[-1] == shown.splitlines()[-1]
    assert main(["compare", files[0], nets[0], "--flip"]) == 0  # a model with itself, looking twice
    assert f"A: {files[0]} ({nets[0]})\nB: {nets[0]}, flip\n" in capsys.readouterr().out
    assert main(["compare", *files, "--flip"]) == 2
    assert "leave --flip out" in told(capsys)


def test_files_that_cannot_be_compared_are_named(tmp_path, capsys):
    files = {name: str(tmp_path / f"{name}.json") for name in ("whole", "one", "old", "text")}
    of(0.1).save_json(Path(files["whole"]))
    of(0.1, limit=1).save_json(Path(files["one"]))
    assert main(["compare", files["whole"], files["one"]]) == 2
    said = told(capsys)
    assert f"{files['whole']} (m.keras) was evaluated on 40 images and" in said
    assert f"{files['one']} (m.keras) on 1;" in said
    assert main(["compare", files["whole"], files["one"], "--limit", "1"]) == 2
    assert "leave --limit out" in told(capsys)
    assert main(["compare", files["whole"], files["one"], "--split", "train"]) == 2
    assert "were not evaluated on 'train'; leave --split out" in told(capsys)
    record = json.loads(Path(files["whole"]).read_text())
    del record["per_image"]
    Path(files["old"]).write_text(json.dumps(record))
    assert main(["compare", files["old"], files["one"]]) == 2
    assert f"{files['old']} has no counts of single images" in told(capsys)
    Path(files["text"]).write_text("# no")
    assert main(["compare", files["one"], files["text"]]) == 2
    assert f"{files['text']} is no JSON" in told(capsys)
    assert main(["compare", files["one"], str(tmp_path / "none.json")]) == 2
    assert "none.json" in told(capsys)


@pytest.mark.parametrize("pixels", ["-5", "1.5", "1" + "0" * 30])
def test_counts_that_cannot_be_are_damage(pixels, tmp_path, capsys):
    path = tmp_path / "a.json"
    of(0.1).save_json(path)
    text = path.read_text()
    start = text.index('"cells": [[') + len('"cells": [[')
    first = text[start : text.index("]", start)]
    spoilt = ", ".join([*first.split(", ")[:2], pixels])
    path.write_text(text.replace(first, spoilt, 1))
    assert main(["compare", str(path), str(path)]) == 2
    assert "a.json is damaged" in told(capsys)


def test_models_that_cannot_be_compared_are_named(nets, street, tmp_path, capsys):
    assert main(["compare", nets[0], str(tmp_path / "none")]) == 2
    assert f"there is no {tmp_path / 'none'}" in told(capsys)
    other = write_street(tmp_path / "other", val=3)
    table = (other / "classes.csv").read_text()
    (other / "classes.csv").write_text(table.replace("thing", "animal"))
    assert main(["compare", *nets, "--data", f"folder:{other}"]) == 2
    said = told(capsys)
    assert f"{nets[0]} has the class 'thing' where folder has 'animal' (id 1)" in said
    facts = replace(cards.read(Path(nets[0])), dataset=f"folder:{other}")
    save_model(tmp_path / "c.keras", tiny_model(SIZE, 2, 0), facts)
    assert main(["compare", nets[0], str(tmp_path / "c.keras")]) == 2
    said = told(capsys)
    assert f"was trained on folder:{street} and {tmp_path / 'c.keras'} on folder:{other}" in said
    assert "--data" in said
    assert main(["evaluate", nets[0], "--metrics", "calibraton"]) == 2
    assert "did you mean calibration?" in told(capsys)


def test_damaged_results_are_refused(tmp_path, capsys):
    of(0.1).save_json(tmp_path / "good.json")
    record = json.loads((tmp_path / "good.json").read_text())
    record["per_image"][0]["cells"][0][0] = 77  # no such class
    (tmp_path / "bad.json").write_text(json.dumps(record))
    assert main(["compare", str(tmp_path / "good.json"), str(tmp_path / "bad.json")]) == 2
    assert "bad.json is damaged: ids from 0 to 77, but 3 classes" in told(capsys)
    record["per_image"] = [{"name": "a"}]
    (tmp_path / "bad.json").write_text(json.dumps(record))
    assert main(["compare", str(tmp_path / "bad.json"), str(tmp_path / "good.json")]) == 2
    assert "bad.json is damaged" in told(capsys)


def test_masks_larger_than_memory_are_refused_by_their_header(nets, tmp_path, capsys, monkeypatch):
    data = write_street(tmp_path / "data")
    monkeypatch.setattr("kseg.evaluate.whole_memory", lambda: 24 * 96 * 128)
    assert main(["evaluate", nets[0], "--data", f"folder:{data}"]) == 0  # just fits
    monkeypatch.setattr("kseg.evaluate.whole_memory", lambda: 24 * 96 * 128 - 1)
    assert main(["evaluate", nets[0], "--data", f"folder:{data}"]) == 2
    said = told(capsys)
    assert f"{data}/val/masks/0.png is 128 x 96 pixels, which take" in said
    # The header alone is read: of this file there is no more.
    mask = data / "val" / "masks" / "0.png"
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(mask)
    raw = mask.read_bytes()
    mask.write_bytes(
        raw[:33].replace((128).to_bytes(4, "big"), (60_000).to_bytes(4, "big")) + raw[-12:]
    )
    monkeypatch.setattr("kseg.evaluate.whole_memory", lambda: 1 << 20)
    assert main(["evaluate", nets[0], "--data", f"folder:{data}"]) == 2
    assert "is 60000 x 96 pixels" in told(capsys)
