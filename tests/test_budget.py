"""An int8 file that loses too much is mended by the smallest remedy, or honestly rejected."""

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from tiny import CARD, QUICK, SIZE, DrawnData, OwnLabels, drawn, tiny_model

import kseg.export.budget
import kseg.export.tflite
from kseg.export import show
from kseg.export.budget import Recipe, layer_of, layers_of
from kseg.export.calibrate import calibration_samples
from kseg.export.layerwise import Noise
from kseg.export.operators import float_operators, read_network
from kseg.export.post_training import correct_biases, equalised, set_ranges
from kseg.export.writer import export_model
from kseg.inference import Predictor, load
from kseg.quantization import quantization_aware

PLAN = {"tflite": ("float32", "int8")}
OUTLIER = 500.0


def uneven_model():
    """The tiny net with one channel 500 times as large as it was, and read 1/500 as strongly.

    It computes the same; but one scale for all channels of the map leaves nothing of the others.
    """
    model = tiny_model()
    norm, reader = model.get_layer("stem_bn"), model.get_layer("dilated")
    for variable in (norm.gamma, norm.beta):
        values = variable.numpy()
        values[0] *= OUTLIER
        variable.assign(values)
    kernel = reader.kernel.numpy()
    kernel[:, :, 0] /= OUTLIER
    reader.kernel.assign(kernel)
    return model


def images(count=6):
    return calibration_samples(DrawnData(), SIZE, count=count)


def predictor(model):
    return Predictor.from_keras(model, CARD)


def test_equalised_channels_compute_the_same():
    model = uneven_model()
    even = equalised(model, images())
    image = drawn(*SIZE)[None].astype("float32")
    np.testing.assert_allclose(even(image)["logits"], model(image)["logits"], rtol=1e-3, atol=1e-4)

    def ranges(one):
        probe = keras.Model(one.input, one.get_layer("stem_relu").output)
        largest = np.max(probe(image), axis=(0, 1, 2))
        return largest.max() / largest[largest > 0].min()

    assert ranges(model) > OUTLIER / 10
    assert ranges(even) < 0.1 * ranges(model)


def test_ranges_are_the_extremes_or_percentiles_of_the_float_maps():
    model = tiny_model()
    aware = quantization_aware(model)
    set_ranges(aware, model, images(), percentile=100)
    probe = keras.Model(model.input, model.get_layer("stem_relu").output)
    maps = np.stack([probe(image.astype("float32")) for image in images()()])
    layer = aware.get_layer("stem_relu_quantize")
    assert float(layer.low) == 0
    assert float(layer.high) == pytest.approx(maps.max(), rel=1e-5)
    set_ranges(aware, model, images(), percentile=90)
    tops = [np.percentile(one, 90) for one in maps]
    assert float(layer.high) == pytest.approx(np.mean(tops), rel=1e-3)
    assert [float(v) for v in aware.get_layer("image_quantize").weights[:2]] == [0, 255]


def test_corrected_biases_leave_no_mean_error():
    model = tiny_model()
    kernel = model.get_layer("dilated").kernel
    # One large weight makes the step of its channel as large as the others' weights.
    values = kernel.numpy()
    values[0, 0] = 40
    kernel.assign(values)
    aware = quantization_aware(model)
    set_ranges(aware, model, images(), percentile=100)

    def error():
        before = keras.Model(model.input, model.get_layer("stem_relu").output)
        float_ones, rounded = [], []
        for image in images()():
            x = before(image.astype("float32"))
            float_ones.append(model.get_layer("dilated")(x))
            rounded.append(aware.get_layer("dilated")(x))
        return np.abs(np.mean(np.stack(rounded) - np.stack(float_ones), axis=(0, 1, 2, 3))).max()

    first = error()
    correct_biases(aware, model, images())
    assert error() < 0.01 * first


def test_a_layer_can_stay_in_float(tmp_path):
    model = tiny_model()
    aware = quantization_aware(model, in_float=("dilated",))
    set_ranges(aware, model, images(), percentile=100)
    path = tmp_path / "m.tflite"
    kseg.export.tflite.write(
        aware,
        path,
        variant="qat",
        interface=kseg.export.tflite.Interface(),
        samples=images(),
    )
    network = read_network(path)
    assert [one.name for one in float_operators(network)] == ["NEG", "DEPTHWISE_CONV_2D"]
    kept = float_operators(network)[1]
    assert network.tensors[kept.inputs[1]].dtype == "float32"


def test_a_file_beyond_the_budget_is_mended(tmp_path, capsys):
    one = predictor(uneven_model())
    float_one, int8 = export_model(
        one,
        OwnLabels(one),
        folder=tmp_path,
        plan=PLAN,
        demands=replace(QUICK, max_drop=3.0, min_agreement=90),
    )
    assert float_one.keras_miou == 1
    assert int8.accepted
    assert 100 * (int8.keras_miou - int8.miou) <= 3.0
    assert int8.path == tmp_path / "model-int8.tflite"
    facts = json.loads((tmp_path / "certificate.json").read_text())["files"][1]
    changes = [attempt["miou_change"] for attempt in facts["tried"]]
    assert changes[0] < -3.0
    assert changes[-1] >= -3.0
    assert all(change < -3.0 for change in changes[:-1])
    said = capsys.readouterr().out
    assert all(attempt["sentence"] in said for attempt in facts["tried"])
    assert not list(tmp_path.glob(".writing*"))


def test_a_budget_that_cannot_be_met_is_a_failure(tmp_path, monkeypatch, capsys):
    """Whatever is tried, the int8 file is that of another net."""
    right = kseg.export.tflite.write

    def write(model, path, **options):
        spoiled = options["variant"] == "int8" or options["variant"] == "qat"
        right(tiny_model(seed=7) if spoiled else model, path, **options | {"variant": "float32"})

    one = predictor(tiny_model())
    with monkeypatch.context() as patch:
        patch.setattr(kseg.export.tflite, "write", write)
        artifacts = export_model(
            one,
            OwnLabels(one),
            folder=tmp_path,
            plan=PLAN,
            demands=replace(QUICK, max_drop=0.5, min_agreement=0),
        )
    assert [a.accepted for a in artifacts] == [True, False]
    assert artifacts[1].path == tmp_path / "model-int8.tflite.rejected"
    assert "--max-drop allows 0.5" in artifacts[1].reasons[-1]
    assert show(artifacts) == 1
    assert "--max-drop allows 0.5" in " ".join(capsys.readouterr().out.split())


def test_a_trained_file_is_proved_by_its_own_labels(tmp_path, monkeypatch):
    """As far as training may have moved it: another net, which knows the labels."""
    plain, trained = predictor(uneven_model()), tiny_model(seed=7)
    aware = quantization_aware(trained)
    set_ranges(aware, trained, images(), percentile=100)
    aware = predictor(aware)
    proved = kseg.export.budget._proved
    # Of the recipes, only one that brings nothing.
    monkeypatch.setattr(
        kseg.export.budget, "_proved", lambda recipe, remedies: proved(Recipe(99.99), remedies)
    )
    _, one = export_model(
        plain,
        OwnLabels(aware),
        folder=tmp_path,
        plan=PLAN,
        quantisation_aware=lambda: aware,
        demands=replace(QUICK, max_drop=0.0),
    )
    assert (one.path, one.variant) == (tmp_path / "model-int8.tflite", "qat")
    assert one.accepted
    assert one.agreement == 100
    assert one.miou == 1
    assert np.mean(aware.class_map(drawn(*SIZE)) == plain.class_map(drawn(*SIZE))) < 0.95
    assert load(one.path).quantize_aware  # so that `kseg verify` compares it alike


def test_noise_is_told_by_layer():
    noises = [
        Noise(0, "CONV_2D", "net_1/a_conv_1/convolution", 30.0, 40.0, 0.0),
        Noise(1, "CONV_2D", "net_1/b_conv_1/convolution;net_1/b_bn_1/add", 10.0, 30.0, 0.0),
        Noise(2, "ADD", "net_1/c_add_1/add", 9.9, 10.0, 0.0),
    ]
    # Of the signal's power: 1/1000 - 1/10000, 1/10 - 1/1000, 0.1023 - 0.1.
    assert [round(one.lost, 4) for one in noises] == [0.0009, 0.099, 0.0023]
    assert layers_of(noises, {"a_conv", "b_conv", "c_add"}) == ["b_conv", "c_add", "a_conv"]
    assert layer_of("StatefulPartitionedCall:0", {"a_conv"}) is None
