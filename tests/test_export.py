"""Every target: written whole, proved against Keras, recorded; and what fails is set aside."""

import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import replace

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from tiny import CARD, QUICK, SIZE, DrawnData, drawn, tiny_model

import kseg.export.tflite
from kseg import card as cards
from kseg.artifact import artifact_table
from kseg.blocks import pool_to
from kseg.build import build
from kseg.config import ExportConfig, TrainConfig
from kseg.errors import Failure, UserError
from kseg.export import export_run, show
from kseg.export.calibrate import calibration_samples
from kseg.export.comparison import views
from kseg.export.interface import Interface
from kseg.export.operators import read_network
from kseg.export.verify import prove
from kseg.export.writer import digest, export_model
from kseg.export.xnnpack import outside_xnnpack
from kseg.inference import Predictor, load
from kseg.quiet import quiet
from kseg.runs import Run
from kseg.train import save_model

PLAN = {
    "tflite": ("float32", "float16", "dynamic", "int8", "int16x8"),
    "saved_model": ("float32",),
    "onnx": ("float32",),
}
LOGITS = Interface(output="logits")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "best.keras"
    tiny_model().save(path)
    cards.embed(path, CARD)
    return load(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("run") / "export"
    return folder, export_model(source, DrawnData(), folder=folder, plan=PLAN, demands=QUICK)


def interpreter(path):
    with quiet():
        opened = Interpreter(model_path=str(path), num_threads=1)
        opened.allocate_tensors()
    return opened


def test_files_lie_where_they_should(exported):
    folder, artifacts = exported
    names = [f"model-{variant}.tflite" for variant in PLAN["tflite"]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            *names,
            "saved_model",
            "model.onnx",
            "manifest.json",
            "certificate.json",
            "certificate.html",
        ]
    )
    assert [one.name for one in artifacts] == [*names, "saved_model/1", "model.onnx"]


def test_proof_finds_them_equal_to_keras(exported):
    for one in exported[1]:
        # The float files differ in rounding only, the quantised ones by a step of 1/255.
        least = 99.9 if one.variant in ("float32", "float16") else 97
        assert one.accepted
        assert one.agreement >= least, one.name
        assert one.images == 3
        # The class maps are resized by nearest neighbour, Keras's logits bilinearly.
        assert abs(one.miou - one.keras_miou) < 0.03
        assert (one.milliseconds is None) == (one.target == "saved_model")


@pytest.mark.parametrize("variant", PLAN["tflite"])
def test_tflite_interface(exported, variant):
    opened = interpreter(exported[0] / f"model-{variant}.tflite")
    assert opened.get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["class_map"]}
    }
    image, ids = opened.get_input_details()[0], opened.get_output_details()[0]
    assert image["dtype"] == np.uint8
    assert list(image["shape"]) == [1, *SIZE, 3]
    assert ids["dtype"] == np.uint8
    assert list(ids["shape"]) == [1, *SIZE]


def test_int8_takes_bytes_exactly_and_has_no_float(exported):
    opened = interpreter(exported[0] / "model-int8.tflite")
    assert opened.get_input_details()[0]["quantization"] == (1.0, 0)
    names = {tensor["dtype"].__name__ for tensor in opened.get_tensor_details()}
    assert names <= {"int8", "int32", "uint8"}


def test_dilation_and_normalisation_are_fused(exported):
    operators = [op["op_name"] for op in interpreter_operators(exported[0])]
    assert operators.count("DEPTHWISE_CONV_2D") == 1
    assert "SPACE_TO_BATCH_ND" not in operators
    assert "RELU" not in operators


def interpreter_operators(folder):
    return interpreter(folder / "model-float32.tflite")._get_ops_details()


def test_only_the_edges_are_outside_xnnpack(exported):
    outside = {one.variant: one.outside for one in exported[1] if one.target == "tflite"}
    # Without an ADD for the cast of the input, int8 has one operator less.
    assert outside["float32"] == {"CAST": 2, "ARG_MAX": 1}
    assert outside["int8"] == {"QUANTIZE": 1, "ARG_MAX": 1, "CAST": 1}


def test_saved_model_signatures(exported, source):
    loaded = tf.saved_model.load(str(exported[0] / "saved_model" / "1"))
    assert set(loaded.signatures) == {"serving_default", "logits"}
    images = np.stack([drawn(*SIZE, seed=seed) for seed in range(2)])
    ids = loaded.signatures["serving_default"](image=images)["class_map"]
    logits = loaded.signatures["logits"](image=images)["logits"]
    assert (ids.dtype, ids.shape) == (tf.uint8, (2, *SIZE))
    assert (logits.dtype, logits.shape) == (tf.float32, (2, *SIZE, 3))
    assert (ids.numpy()[1] == source.class_map(images[1])).mean() > 0.999


def test_weights_are_written_once(exported, source):
    file = exported[0] / "saved_model" / "1" / "variables" / "variables"
    written = [shape for name, shape in tf.train.list_variables(str(file)) if shape]
    assert len(written) == len(source.model.weights)


def test_cards_ride_along(exported):
    for one in exported[1]:
        card = cards.read(one.path)
        assert card.classes == CARD.classes
        assert card.output == "classes"
        assert load(one.path).palette == CARD.palette


def test_manifest_holds_everything(exported):
    folder, artifacts = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in (
        "kseg",
        "tensorflow",
        "keras",
        "ai-edge-litert",
        "tf2onnx",
        "onnxruntime",
        "python",
    ):
        assert re.match(r"\d+\.\d+", manifest["versions"][name])
    assert [entry["path"] for entry in manifest["files"]] == [one.name for one in artifacts]
    for entry in manifest["files"]:
        assert digest(folder / entry["path"]) == entry["sha256"]
        assert entry["accepted"] is True
        assert entry["inputs"]["image"].startswith("uint8 (")
        assert next(iter(entry["outputs"])) == "class_map"
        assert entry["bytes"] > 1000


def test_digest_is_that_of_sha256sum(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    assert digest(tmp_path / "a") == one
    lines = f"{one}  a\n{two}  b/c\n"
    assert digest(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_logits_on_demand(tmp_path, source):
    plan = {"tflite": ("float32", "int8")}
    artifacts = export_model(
        source, DrawnData(), folder=tmp_path, plan=plan, interface=LOGITS, demands=QUICK
    )
    for one in artifacts:
        details = interpreter(one.path).get_output_details()[0]
        assert details["dtype"] == np.float32
        assert list(details["shape"]) == [1, *SIZE, 3]
        assert one.accepted
        assert load(one.path).output == "logits"
    # Same resizing on both sides, so the float file scores as Keras does.
    assert artifacts[0].miou == pytest.approx(artifacts[0].keras_miou, abs=1e-3)


def _spoil(monkeypatch, variant):
    """Make the writer of one variant write a net with other weights."""
    right = kseg.export.tflite.write

    def write(model, path, **options):
        spoiled = tiny_model(seed=7) if options["variant"] == variant else model
        right(spoiled, path, **options)

    monkeypatch.setattr(kseg.export.tflite, "write", write)


def test_a_wrong_file_is_rejected_and_comes_back_when_right(tmp_path, source, monkeypatch, capsys):
    plan = {"tflite": ("float32", "float16")}
    with monkeypatch.context() as patch:
        _spoil(patch, "float16")
        good, bad = export_model(source, DrawnData(), folder=tmp_path, plan=plan, demands=QUICK)
    assert good.accepted
    assert not bad.accepted
    assert bad.path == tmp_path / "model-float16.tflite.rejected"
    assert bad.path.is_file()
    assert not (tmp_path / "model-float16.tflite").exists()
    entries = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert [entry["accepted"] for entry in entries] == [True, False]
    assert entries[1]["agreement"] < 99
    assert show([good, bad]) == 1
    assert "model-float16.tflite.rejected" in capsys.readouterr().out.replace("\n", "")

    artifacts = export_model(source, DrawnData(), folder=tmp_path, plan=plan, demands=QUICK)
    assert show(artifacts) == 0
    assert not bad.path.exists()


def test_a_rejected_folder_leaves_the_served_ones(tmp_path, source):
    plan = {"saved_model": ("float32",)}
    (one,) = export_model(
        source, DrawnData(), folder=tmp_path, plan=plan, demands=replace(QUICK, min_agreement=100.1)
    )
    assert one.path == tmp_path / "saved_model" / "1.rejected"
    assert (one.path / "saved_model.pb").is_file()
    assert not (tmp_path / "saved_model" / "1").exists()


def test_manifest_keeps_what_still_stands(tmp_path, source):
    def exports(**plan):
        export_model(
            source, DrawnData(), folder=tmp_path, plan=plan, demands=replace(QUICK, verify_images=1)
        )
        return [
            entry["path"] for entry in json.loads((tmp_path / "manifest.json").read_text())["files"]
        ]

    assert exports(tflite=("float32",)) == ["model-float32.tflite"]
    assert exports(saved_model=("float32",)) == ["model-float32.tflite", "saved_model/1"]
    assert exports(tflite=("float32",)) == ["saved_model/1", "model-float32.tflite"]
    (tmp_path / "model-float32.tflite").write_bytes(b"changed by hand")
    assert exports(saved_model=("float32",)) == ["saved_model/1"]


def test_nothing_is_lost_when_a_model_does_not_convert(tmp_path, source, capfd):
    plan = {"tflite": ("float32",)}
    export_model(
        source, DrawnData(), folder=tmp_path, plan=plan, demands=replace(QUICK, verify_images=1)
    )
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Conv2D(3, 3, strides=2, padding="same")(image)
    x = keras.layers.Resizing(*SIZE, interpolation="bicubic")(x)  # no built-in operator
    hostile = Predictor.from_keras(keras.Model(image, {"logits": x}), CARD)
    with pytest.raises(Failure, match="no built-in operator for ResizeBicubic$"):
        export_model(
            hostile,
            DrawnData(),
            folder=tmp_path,
            plan=plan,
            demands=replace(QUICK, verify_images=1),
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "ResizeBicubic" in capfd.readouterr().err  # what was held back is shown now


def test_the_converter_is_silent(tmp_path, source, capfd):
    export_model(source, DrawnData(), folder=tmp_path, plan={"tflite": ("int8",)}, demands=QUICK)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_calibration_images_are_what_the_model_is_fed():
    data = DrawnData()
    given = list(calibration_samples(data, SIZE, count=4)())
    assert [one.shape for one in given] == [(1, *SIZE, 3)] * 4
    assert {one.dtype for one in given} == {np.dtype(np.uint8)}
    assert (given[0].min(), given[0].max()) == (0, 255)
    # Evenly over the six: 0, 1, 3, 5.
    predictor_sees = tf.image.resize(data.sample("train", 3)[0], SIZE).numpy()
    assert np.abs(given[2][0] - predictor_sees).max() <= 0.5 + 1e-4
    assert len(list(calibration_samples(data, SIZE, count=100)())) == 6


def test_one_image_that_starts_the_split_does_not_stand_for_all():
    asked = []

    class Counting(DrawnData):
        def length(self, split):
            return 100

        def sample(self, split, index):
            asked.append(index)
            return super().sample(split, index)

    list(calibration_samples(Counting(), SIZE, count=3)())
    assert asked == [0, 49, 99]


def test_other_data_is_refused(tmp_path, source, exported):
    class Other(DrawnData):
        classes = ("a", "b")

    with pytest.raises(UserError, match="drawn has 2 classes.*--data"):
        export_model(source, Other(), folder=tmp_path, plan=PLAN, demands=QUICK)
    tflite = load(exported[0] / "model-int8.tflite")
    with pytest.raises(UserError, match="exported already"):
        export_model(tflite, DrawnData(), folder=tmp_path, plan=PLAN, demands=QUICK)


def test_operators_without_xnnpack_are_found(tmp_path):
    """A nearest resize in the middle splits the graph in two; both halves are taken."""
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Conv2D(4, 3, padding="same")(image)
    x = keras.layers.Resizing(32, 48, interpolation="nearest")(x)
    x = keras.layers.Conv2D(3, 3, padding="same")(x)
    path = tmp_path / "m.tflite"
    model = keras.Model(image, {"logits": x})
    kseg.export.tflite.write(model, path, variant="float32", interface=LOGITS, samples=iter)
    operators = read_network(path).operators
    names = [operators[index].name for index in outside_xnnpack(path)]
    assert names == ["CAST", "RESIZE_NEAREST_NEIGHBOR"]


def test_adaptive_poolings_of_one_map_convert_to_int8(tmp_path, capfd):
    """As in a pyramid of 2 and 3 cells on a 3 x 4 map; Keras' own layers would fail here."""
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Conv2D(8, 3, strides=24, padding="same", activation="relu")(image)
    pooled = [pool_to(x, cells, name=f"pool{cells}") for cells in (2, 3)]
    grown = [keras.layers.Resizing(*SIZE, interpolation="bilinear")(p) for p in (x, *pooled)]
    logits = keras.layers.Conv2D(3, 1)(keras.layers.Concatenate()(grown))
    path = tmp_path / "m.tflite"
    samples = calibration_samples(DrawnData(), SIZE, count=4)
    model = keras.Model(image, {"logits": logits})
    kseg.export.tflite.write(model, path, variant="int8", interface=Interface(), samples=samples)
    reference = Predictor.from_keras(model, CARD)
    cards.embed(path, CARD)
    pixels = drawn(*SIZE)
    assert (load(path).class_map(pixels) == reference.class_map(pixels)).mean() > 0.95
    assert capfd.readouterr().err == ""


def test_float_operators_of_an_int8_file_are_told(tmp_path):
    """LiteRT has no int8 SIN: it stays in float, and the person is told which layer does."""
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Conv2D(3, 3, padding="same")(keras.layers.Rescaling(1 / 255)(image))
    x = keras.layers.Activation(keras.ops.sin, name="waves")(x)
    model = Predictor.from_keras(keras.Model(image, {"logits": x}), CARD)
    (one,) = export_model(
        model,
        DrawnData(),
        folder=tmp_path,
        plan={"tflite": ("int8",)},
        demands=replace(QUICK, min_agreement=0),
    )
    assert one.notes == ("in float, for want of an int8 kernel: 1 SIN (of waves)",)


def test_table_fits_a_plain_page(exported):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(artifact_table(exported[1]))
    text = console.export_text()
    for word in ("model-float32.tflite", "saved_model/1", "2 CAST, ARG_MAX", "Keras"):
        assert word in text


def test_command_checks_its_flags_before_any_work(tmp_path):
    with pytest.raises(UserError, match="--tflite, --saved-model, --onnx"):
        export_run(ExportConfig(run=tmp_path))
    with pytest.raises(UserError, match="needs --tflite"):
        export_run(ExportConfig(run=tmp_path, quantize=("int8",), saved_model=True))
    with pytest.raises(UserError, match="--layout nchw.* needs --onnx"):
        export_run(ExportConfig(run=tmp_path, layout="nchw", tflite=True))
    with pytest.raises(UserError, match="no run folder"):
        export_run(ExportConfig(run=tmp_path, tflite=True))


def test_export_run(tmp_path, source, monkeypatch):
    monkeypatch.setattr("kseg.data.dataset.open_dataset", lambda spec: DrawnData())
    run = Run(tmp_path / "run")
    run.create(TrainConfig(data="drawn"))
    run.best.write_bytes(source.path.read_bytes())
    config = ExportConfig(run=run.folder, seconds=0, tflite=True, quantize=("int8", "float32"))
    artifacts = export_run(config)
    assert [one.path for one in artifacts] == [
        run.export / "model-float32.tflite",
        run.export / "model-int8.tflite",
    ]


def test_each_size_has_files_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("kseg.data.dataset.open_dataset", lambda spec: DrawnData())
    run = Run(tmp_path / "run")
    run.create(TrainConfig(data="drawn"))
    options = {"base_channels": 4}
    model = build("unet", (64, 96, 3), 3, options)
    save_model(run.best, model, replace(CARD, model="unet", options=options))
    sizes = ((64, 96), (96, 64), (64, 96))
    artifacts = export_run(
        ExportConfig(run=run.folder, seconds=0, tflite=True, onnx=True, size=sizes, min_agreement=0)
    )
    suffixes = ("-64x96", "-96x64")
    assert [one.name for one in artifacts] == [
        name for s in suffixes for name in (f"model-float32{s}.tflite", f"model{s}.onnx")
    ]
    assert [load(one.path).size for one in artifacts] == [(64, 96)] * 2 + [(96, 64)] * 2
    files = json.loads((run.export / "manifest.json").read_text())["files"]
    assert [file["path"] for file in files] == [one.name for one in artifacts]


@pytest.mark.parametrize("variant", ["float32", "int8", "int16x8"])
def test_float_images_on_demand(tmp_path, source, variant):
    interface = Interface(input="float")
    (one,) = export_model(
        source,
        DrawnData(),
        folder=tmp_path,
        plan={"tflite": (variant,)},
        interface=interface,
        demands=QUICK,
    )
    assert interpreter(one.path).get_input_details()[0]["dtype"] == np.float32
    assert one.accepted


def test_int16x8_keeps_int16_between_layers_and_few_images_prove_it(exported, source, monkeypatch):
    opened = interpreter(exported[0] / "model-int16x8.tflite")
    assert "int16" in {tensor["dtype"].__name__ for tensor in opened.get_tensor_details()}
    monkeypatch.setattr("kseg.export.verify.SLOW_IMAGES", 2)
    artifacts = [one for one in exported[1] if one.variant in ("int8", "int16x8")]
    fast, slow = prove(source, artifacts, views(source, DrawnData(), limit=None), seconds=0)
    assert (fast.artifact.images, slow.artifact.images) == (3, 2)


def test_onnx_takes_any_batch_by_its_name(exported, source):
    session = onnxruntime.InferenceSession(exported[0] / "model.onnx")
    (image,), (ids,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape) == ("image", ["batch", *SIZE, 3])
    assert (ids.name, ids.shape) == ("class_map", ["batch", *SIZE])
    images = np.stack([drawn(*SIZE, seed=seed) for seed in range(2)])
    (given,) = session.run(None, {"image": images})
    assert (given[1] == source.class_map(images[1])).mean() > 0.999


def test_onnx_with_channels_first_has_no_transposition(tmp_path, source):
    interface = Interface(input="float", output="logits", layout="nchw")
    (one,) = export_model(
        source,
        DrawnData(),
        folder=tmp_path,
        plan={"onnx": ("float32",)},
        interface=interface,
        demands=QUICK,
    )
    assert one.inputs == {"image": f"float32 (None, 3, {SIZE[0]}, {SIZE[1]})"}
    assert one.outputs == {"logits": f"float32 (None, 3, {SIZE[0]}, {SIZE[1]})"}
    operators = [node.op_type for node in onnx.load(one.path).graph.node]
    assert "Transpose" not in operators
    assert one.accepted


def test_hard_swish_is_fast_in_int8_and_itself_in_float(tmp_path):
    """LiteRT runs int8 HARD_SWISH outside XNNPACK; as two products and a sum it does not."""
    keras.utils.set_random_seed(0)
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1.0)(image)
    x = keras.layers.Conv2D(8, 3, padding="same", name="conv")(x)
    x = keras.layers.Activation("hard_swish", name="swish")(x)
    x = keras.layers.Conv2D(3, 1, name="classifier")(x)
    one = Predictor.from_keras(keras.Model(image, {"logits": x}), CARD)
    float_one, int8 = export_model(
        one,
        DrawnData(),
        folder=tmp_path,
        plan={"tflite": ("float32", "int8")},
        demands=QUICK,
    )
    names = [
        Counter(operator.name for operator in read_network(a.path).operators)
        for a in (float_one, int8)
    ]
    assert [count["HARD_SWISH"] for count in names] == [1, 0]
    assert dict(int8.outside) == {"QUANTIZE": 1, "ARG_MAX": 1, "CAST": 1}
    assert int8.accepted
    assert int8.notes == ()


def test_a_keras_file_is_exported_beside_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("kseg.data.dataset.open_dataset", lambda spec: DrawnData())
    path = tmp_path / "street.keras"
    tiny_model().save(path)
    cards.embed(path, CARD)
    with pytest.raises(UserError, match="does not name its data; name a data set with --data"):
        export_run(ExportConfig(run=path, tflite=True))
    with pytest.raises(UserError, match="--quantize qat goes on with a run's own training"):
        export_run(ExportConfig(run=path, tflite=True, quantize=("qat",)))
    (one,) = export_run(ExportConfig(run=path, tflite=True, data="drawn", seconds=0))
    assert one.path == tmp_path / "street-export" / "model-float32.tflite"
    assert one.certificate == str(tmp_path / "street-export" / "certificate.html")


def test_data_without_validation_images_is_refused_at_once(tmp_path, source):
    class Empty(DrawnData):
        def length(self, split):
            return 0 if split == "val" else 6

    with pytest.raises(UserError, match="drawn has no image in its split val"):
        export_model(source, Empty(), folder=tmp_path, plan=PLAN, demands=QUICK)
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range_are_refused(tmp_path):
    for words in (
        {"max_drop": -0.5},
        {"seconds": float("nan")},
        {"qat_steps": 0},
        {"min_agreement": 101},
    ):
        (name,) = words
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is"):
            export_run(ExportConfig(run=tmp_path, tflite=True, **words))
