"""The picture of the edge models: what is drawn, and that no run of other settings gets into it."""

import pytest
import tyro
from PIL import Image

from kseg.catalogue import rows
from kseg.config import TrainConfig
from kseg.data.dataset import open_dataset
from kseg.errors import UserError
from kseg.resolve import resolve
from kseg.runs import Run
from tools import pareto

RESULTS = [
    {
        "name": name,
        **{f"int8_{key}": value for key, value in zip(("ms", "miou", "mb"), int8, strict=True)},
        **{f"float32_{key}": value for key, value in zip(("ms", "miou", "mb"), wide, strict=True)},
    }
    for name, int8, wide in (
        ("lraspp activation=relu6", (5.0, 0.5, 1.0), (9.0, 0.5, 4.0)),
        ("fastscnn", (4.0, 0.4, 1.0), (7.0, 0.45, 4.0)),
        ("pidnet", (6.0, 0.5, 1.0), (20.0, 0.48, 4.0)),
        ("swiftnet", (8.0, 0.6, 1.0), (40.0, 0.6, 4.0)),
    )
]


def names(results):
    return [one["name"] for one in results]


def test_the_front_leaves_out_what_is_neither_faster_nor_better():
    # PIDNet is as good as LR-ASPP in int8, and slower; in float it is slower and worse.
    front = ["fastscnn", "lraspp activation=relu6", "swiftnet"]
    assert names(pareto.front(RESULTS, "int8")) == front
    assert names(pareto.front(RESULTS, "float32")) == front


def test_edge_models_are_those_of_few_operations():
    chosen = names(vars(row) | {"name": row.name} for row in pareto.chosen(pareto.Pareto("scenes")))
    assert {"fastscnn", "lraspp activation=relu6", "ddrnet", "segformer", "swiftnet"} < set(chosen)
    assert not {"fcn", "pspnet", "unet"} & set(chosen)  # 111 GMACs and more, 20 are the limit
    only = pareto.Pareto("scenes", only=("fcn", "lraspp activation=relu6"))
    assert [row.name for row in pareto.chosen(only)] == list(only.only)
    assert pareto.chosen(only)[1] in rows()
    with pytest.raises(UserError, match="no row 'lraspp relu6'"):
        pareto.chosen(pareto.Pareto("scenes", only=("lraspp relu6",)))


def test_a_run_of_other_settings_is_not_drawn_with_the_others(street, tmp_path, monkeypatch):
    monkeypatch.chdir(street.parent)
    # As a recipe may say it: more steps between validations than there are.
    words = ["--data", f"folder:{street.name}", "--model", "fastscnn", "--steps", "6"]
    words += ["--eval-every", "9"]
    run = Run(tmp_path / "fastscnn")
    config = tyro.cli(TrainConfig, args=[*words, "--run", str(run.folder)])
    run.create(resolve(config, open_dataset(config.data)))
    pareto.check_settings(run, words)
    with pytest.raises(UserError, match="trained with steps 6, not 500; remove it"):
        pareto.check_settings(run, [*words, "--steps", "500"])
    with pytest.raises(UserError, match="trained with learning_rate 0.003, not 0.1"):
        pareto.check_settings(run, [*words, "--learning-rate", "0.1"])
    with pytest.raises(UserError, match="trained with data folder:.*, not scenes"):
        pareto.check_settings(run, [*words, "--data", "scenes"])


def test_the_picture_is_drawn_and_the_table_is_best_first(tmp_path):
    pytest.importorskip("matplotlib")
    pareto.draw(RESULTS, tmp_path / "new" / "p.png", title="drawn")
    with Image.open(tmp_path / "new" / "p.png") as picture:
        assert picture.size == (1080, 720)
    shown = pareto.as_table(RESULTS)
    assert list(shown.columns[0].cells)[0] == "swiftnet"
