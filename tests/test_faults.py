"""A planted fault is named, in the certificate and on the terminal."""

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from keras import layers, ops
from tiny import CARD, QUICK, SIZE, DrawnData, OwnLabels, drawn, samples, tiny_model

from kseg import card as cards
from kseg.cli import main
from kseg.export import saved_model, show, tflite
from kseg.export.graph import input_spec, write_graphs
from kseg.export.interface import Interface
from kseg.export.layerwise import layer_noise
from kseg.export.writer import verify_model
from kseg.inference import load
from kseg.quiet import quiet
from kseg.upsampling import CornerResize


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "best.keras"
    net().save(path)
    cards.embed(path, CARD)
    return load(path)


def net(seed=0):
    """The tiny net with offsets, without which no scale of the image would change a label."""
    model = tiny_model(seed=seed)
    rng = np.random.default_rng(1)
    for variable in (model.get_layer("stem_bn").beta, model.get_layer("classifier").bias):
        variable.assign(rng.uniform(-0.3, 0.3, variable.shape))
    return model


def written(folder, model, variant="float32"):
    path = folder / f"model-{variant}.tflite"
    tflite.write(model, path, variant=variant, interface=Interface(), samples=samples)
    return path


def verified(path, source, demands=QUICK):
    """Return the artifact, and the sentences of the faults by name as the certificate has them."""
    (one,) = verify_model(load(path), source, DrawnData(), demands=demands)
    found = json.loads((path.parent / f"{path.name}.certificate.json").read_text())
    told = {}
    for fault in found["files"][0]["faults"]:
        told[fault["name"]] = f"{told.get(fault['name'], '')} {fault['sentence']}".strip()
    return one, told


@pytest.mark.parametrize(
    ("variant", "least"),
    [("float32", 99.9), ("float16", 99.5), ("int8", 95), ("int16x8", 95)],
)
def test_a_file_is_held_to_what_export_holds_it_to(variant, least, source, tmp_path):
    """The file is without a card, as another program's: its tensors tell what it is."""
    one, told = verified(written(tmp_path, net(), variant), source)
    assert (one.variant, one.min_agreement) == (variant, least)
    assert one.accepted
    assert not told


def test_a_dynamic_file_is_held_to_what_export_holds_it_to(tmp_path):
    image = keras.Input((*SIZE, 3), name="image")
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="wide")(image)
    model = keras.Model(image, {"logits": layers.Conv2D(3, 1, name="last")(x)}, name="wide_net")
    path = tmp_path / "best.keras"
    model.save(path)
    cards.embed(path, CARD)
    one, _ = verified(written(tmp_path, model, "dynamic"), load(path))
    # The 1728 weights of one kernel are enough for the converter to round them.
    assert (one.variant, one.min_agreement) == ("dynamic", 95)


def behind(model, change):
    """Return a model with something done to its logits."""
    return keras.Model(model.input, {"logits": change(model.output["logits"])})


def with_kernel(name, change):
    model = net()
    kernel = model.get_layer(name).kernel
    kernel.assign(change(kernel.numpy()))
    return model


def normalised(scale, offset):
    """Return the net with another normalisation in front of the same weights."""
    model = net()

    def clone(layer):
        if isinstance(layer, layers.Rescaling):
            return layers.Rescaling(scale, offset, name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


def moved(down, right):
    def change(x):
        return ops.roll(x, (down, right), axis=(1, 2))

    return lambda: behind(net(), change)


PLANTED = {
    "right": (moved(0, 1), "shift", "1 pixel to the right of"),
    "up": (moved(-2, 0), "shift", "2 pixels above"),
    "far": (moved(0, 5), "shift", "5 pixels to the right of"),
    "one below": (
        lambda: behind(net(), lambda x: ops.roll(x, -1, axis=-1)),
        "relabelled",
        "0 is given as 2",
    ),
    "transposed": (
        lambda: behind(net(), layers.Permute((2, 1, 3))),
        "transposed",
        "rows and columns",
    ),
    "mirrored": (
        lambda: behind(net(), lambda x: ops.flip(x, 2)),
        "mirrored",
        "left and right",
    ),
    "off by one": (
        lambda: behind(net(), lambda x: ops.pad(x, [(0, 0)] * 3 + [(1, 0)], constant_values=-2)),
        "relabelled",
        "off by +1",
    ),
    "channels": (
        lambda: with_kernel("stem_conv", lambda kernel: kernel[:, :, ::-1]),
        "channels",
        "red and blue",
    ),
    "x / 255": (lambda: normalised(1 / 255, 0.0), "normalisation", "x / 255"),
    "none": (lambda: normalised(1.0, 0.0), "normalisation", "left out"),
    "ImageNet": (
        lambda: normalised(
            [1 / 255 / s for s in (0.229, 0.224, 0.225)],
            [-m / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)],
        ),
        "normalisation",
        "ImageNet's mean and deviation",
    ),
}


@pytest.mark.parametrize(
    ("planted", "variant"), [*((name, "int8") for name in PLANTED), ("right", "float32")]
)
def test_a_planted_fault_is_named(planted, variant, source, tmp_path, capsys):
    make, name, words = PLANTED[planted]
    path = written(tmp_path, make(), variant)
    one, faults = verified(path, source)
    assert not one.accepted
    assert set(faults) == {name}
    assert words in faults[name]
    assert show([one]) == 1
    assert words in " ".join(capsys.readouterr().out.split())


def exchanged(x):
    return ops.roll(x, -1, axis=-1)


MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def taking(form, path):
    """Write a file for images that clients normalise, as most programs' own are."""
    image = keras.Input((*SIZE, 3), batch_size=1)
    undone = (image + 1) * 127.5 if form == "signed" else (image * STD + MEAN) * 255
    converter = tf.lite.TFLiteConverter.from_keras_model(
        keras.Model(image, net()(undone)["logits"])
    )
    with quiet():
        path.write_bytes(converter.convert())
    return path


@pytest.mark.parametrize("form", ["signed", "imagenet"])
def test_images_that_clients_normalise_are_fed_as_they_do(form, source, tmp_path):
    path = taking(form, tmp_path / "m.tflite")
    data = DrawnData()
    (one,) = verify_model(load(path, fed_as=form), source, data, demands=QUICK, fed_as=form)
    assert one.accepted, one.reasons
    facts = json.loads((tmp_path / "m.tflite.certificate.json").read_text())
    assert facts["files"][0]["fed_as"] == form
    one, faults = verified(path, source)
    assert not one.accepted
    assert f"--feed {form}" in faults["normalisation"]
    assert one.reasons[0] == faults["normalisation"]  # what is wrong comes first


def test_a_file_of_unset_variables_is_named(source, tmp_path):
    """The converter leaves them so where a concrete function comes with its Keras model."""
    model = net()
    graph = tf.function(lambda x: model(x)["logits"])
    concrete = graph.get_concrete_function(tf.TensorSpec((1, *SIZE, 3)))
    path = tmp_path / "m.tflite"
    with quiet():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], model)
        path.write_bytes(converter.convert())
    one, faults = verified(path, source)
    assert not one.accepted
    assert faults


TWO = {
    "channels and shift": (
        lambda: behind(
            with_kernel("stem_conv", lambda kernel: kernel[:, :, ::-1]), lambda x: ops.roll(x, 2, 2)
        ),
        {"channels": "red and blue", "shift": "2 pixels to the right of"},
    ),
    "normalisation and ids": (
        lambda: behind(normalised(1 / 255, 0.0), exchanged),
        {"normalisation": "x / 255", "relabelled": "0 is given as 2"},
    ),
    "shift and ids": (
        lambda: behind(net(), lambda x: exchanged(ops.roll(x, 3, 1))),
        {"shift": "3 pixels below", "relabelled": "0 is given as 2"},
    ),
    "mirrored ids": (
        lambda: behind(net(), lambda x: exchanged(ops.flip(x, 2))),
        {"mirrored": "left and right", "relabelled": "0 is given as 2"},
    ),
}


@pytest.mark.parametrize("planted", TWO)
def test_two_faults_at_once_are_both_named(planted, source, tmp_path):
    make, words = TWO[planted]
    one, faults = verified(written(tmp_path, make(), "int8"), source)
    assert not one.accepted
    assert faults.keys() == words.keys()
    for name, expected in words.items():
        assert expected in faults[name]


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_a_sound_file_has_no_fault(variant, source, tmp_path):
    one, faults = verified(written(tmp_path, net(), variant), source)
    assert one.accepted, one.reasons
    assert faults == {}
    assert path_names(tmp_path) == {
        f"model-{variant}.tflite",
        f"model-{variant}.tflite.certificate.json",
        f"model-{variant}.tflite.certificate.html",
    }


def path_names(folder):
    return {path.name for path in folder.iterdir()}


def edited(path, change):
    """Write a `.tflite` file again after a change of its flatbuffer."""
    model = flatbuffer_utils.read_model(path)
    change(model, model.subgraphs[0])
    flatbuffer_utils.write_model(model, path)
    return path


def operators(model, graph, kind):
    names = [flatbuffer_utils.opcode_to_name(model, op.opcodeIndex) for op in graph.operators]
    return [op for op, name in zip(graph.operators, names, strict=True) if name == kind]


@pytest.mark.parametrize("place", [0, 1])
def test_a_corrupted_scale_is_named(place, source, tmp_path):
    """Of the first convolution's input (0) or kernel (1), twice what it was."""

    def double(model, graph):
        conv = operators(model, graph, "CONV_2D")[-1]
        quantization = graph.tensors[conv.inputs[place]].quantization
        quantization.scale = np.asarray(quantization.scale) * 2

    path = edited(written(tmp_path, net(), "int8"), double)
    one, faults = verified(path, source)
    assert not one.accepted
    assert "scale" in faults
    assert "contradict" in faults["scale"]


def test_another_scale_at_the_edge_is_named(source, tmp_path):
    """A QUANTIZE from bytes to signed bytes; what it changes, no result beside it tells."""

    def halve(model, graph):
        quantise = operators(model, graph, "QUANTIZE")[0]
        quantization = graph.tensors[quantise.outputs[0]].quantization
        quantization.scale = np.asarray(quantization.scale) / 2

    _, faults = verified(edited(written(tmp_path, net(), "int8"), halve), source)
    assert "QUANTIZE" in faults["scale"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_scale_that_litert_refuses_is_named(place, source, tmp_path, monkeypatch, capsys):
    """It does not join maps of several scales; the message names no scale."""
    monkeypatch.setattr("kseg.data.dataset.open_dataset", lambda spec: DrawnData())
    image = keras.Input((*SIZE, 3))
    whole = net()
    sides = [layers.Conv2D(2, 3, padding="same", activation="relu")(image) for _ in range(2)]
    joined = keras.Model(
        image, layers.Conv2D(3, 1)(layers.Concatenate()([*sides, whole(image)["logits"]]))
    )

    def double(model, graph):
        (join,) = operators(model, graph, "CONCATENATION")
        quantization = graph.tensors[join.inputs[place]].quantization
        quantization.scale = np.asarray(quantization.scale) * 2

    path = edited(written(tmp_path, joined, "int8"), double)
    words = ["--against", str(source.path), "--data", "drawn", "--seconds", "0"]
    assert main(["verify", str(path), *words]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "CONCATENATION" in told
    assert "its scale goes from" in told


def test_of_several_outputs_the_logits_are_read_and_the_others_told(source, tmp_path):
    """Others come first by their names, and by their order in the file."""
    model, path = net(), tmp_path / "m.tflite"
    graph = {"serving_default": lambda image: {"aux": -model(image)["logits"], **model(image)}}
    write_graphs(model, tmp_path / "saved", graph, image=input_spec(model, "float", batch=1))
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    with quiet():
        path.write_bytes(converter.convert())
    one, faults = verified(path, source)
    assert one.accepted and not faults
    assert one.notes == ("of its outputs, logits is read, and not aux",)
    whole = verified(tmp_path / "saved", source)[0]
    assert whole.accepted and whole.notes == one.notes


def test_values_that_are_no_numbers_are_named(source, tmp_path):
    _, faults = verified(written_logits(tmp_path, lambda x: x * np.float32("nan")), source)
    assert "NaN" in faults["result"]


def written_logits(folder, change):
    path, model = folder / "m.tflite", behind(net(), change)
    interface = Interface(output="logits")
    tflite.write(model, path, variant="float32", interface=interface, samples=samples)
    return path


def test_another_kernel_is_named(source, tmp_path):
    """Too little to show in the labels, but the file is not the model."""

    def spoil(model, graph):
        conv = operators(model, graph, "CONV_2D")[1]  # behind the normalisation
        buffer = model.buffers[graph.tensors[conv.inputs[1]].buffer]
        values = np.frombuffer(bytes(buffer.data), np.int8).copy()
        values[: len(values) // 8] = 0
        buffer.data = values.view(np.uint8)

    path = edited(written(tmp_path, net(), "int8"), spoil)
    one, faults = verified(path, source, replace(QUICK, min_agreement=0))
    assert not one.accepted
    assert "stem_conv" in faults["weights"]


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_noise_is_measured_behind_bytes_of_either_sign(dtype, tmp_path):
    """An int8 input takes the image less 128; bytes fed as they are would be another image."""
    paths = [tmp_path / "float.tflite", tmp_path / "int8.tflite"]
    for path, quantised in zip(paths, (False, True), strict=True):
        converter = tf.lite.TFLiteConverter.from_keras_model(net())
        if quantised:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                [one.astype("float32")] for one in samples()
            )
            converter.inference_input_type = tf.dtypes.as_dtype(dtype)
        with quiet():
            path.write_bytes(converter.convert())
    noises = layer_noise(paths[1], paths[0], [drawn(*SIZE, seed=3)])
    assert len(noises) > 3
    # 8 bits of a map that fills its range have 40 dB and more; another image leaves nearly none.
    assert min(one.decibels for one in noises) > 20


def test_a_lost_class_rejects_whatever_the_agreement(source, tmp_path):
    # A second class as large as the others, given as class 0.
    shown = np.bincount(source.predict(OwnLabels(source).sample("val", 0)[0]).ravel(), minlength=3)
    lost = int(np.argsort(shown)[-2])

    def change(x):
        return ops.where(np.arange(3) == lost, -10.0, x)

    path = written(tmp_path, behind(net(), change))
    demands = replace(QUICK, min_agreement=0)
    (one,) = verify_model(load(path), source, OwnLabels(source), demands=demands)
    assert any(f"class {CARD.classes[lost]} is lost" in reason for reason in one.reasons)


def test_align_corners_is_named_by_the_file_itself(source, tmp_path):
    def align(model, graph):
        (resize,) = operators(model, graph, "RESIZE_BILINEAR")
        resize.builtinOptions.alignCorners = True
        resize.builtinOptions.halfPixelCenters = False

    one, faults = verified(edited(written(tmp_path, net()), align), source)
    assert not one.accepted
    assert "align_corners" in faults["resize"]


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_nearest_in_place_of_bilinear_is_named(variant, source, tmp_path):
    def nearest(model, graph):
        (resize,) = operators(model, graph, "RESIZE_BILINEAR")
        code, options = schema.OperatorCodeT(), schema.ResizeNearestNeighborOptionsT()
        code.builtinCode = schema.BuiltinOperator.RESIZE_NEAREST_NEIGHBOR
        code.deprecatedBuiltinCode, code.version = code.builtinCode, 3
        options.halfPixelCenters = True
        resize.opcodeIndex, resize.builtinOptions = len(model.operatorCodes), options
        resize.builtinOptionsType = schema.BuiltinOptions.ResizeNearestNeighborOptions
        model.operatorCodes.append(code)

    path = edited(written(tmp_path, net(), variant), nearest)
    one, faults = verified(path, source, replace(QUICK, min_agreement=0))
    assert not one.accepted
    assert "takes the nearest pixel" in faults["resize"]


def aligned():
    """Return the net with torch's align_corners in place of half-pixel centres."""
    model = net()

    def clone(layer):
        if isinstance(layer, layers.UpSampling2D):
            return CornerResize(*SIZE, name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


def test_align_corners_is_named_by_what_a_file_does(source, tmp_path):
    """A SavedModel does not tell how it resizes."""
    path = tmp_path / "served"
    saved_model.write(aligned(), path, variant="float32", interface=Interface(), samples=samples)
    _, faults = verified(path, source)
    assert "align_corners" in faults["resize"]


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_align_corners_by_products_is_named_too(variant, source, tmp_path):
    """No RESIZE_BILINEAR tells of it, and in int8 rounding changes as many labels."""
    path = written(tmp_path, aligned(), variant)
    one, faults = verified(path, source)
    assert not one.accepted
    assert "align_corners" in faults["resize"]


def test_another_net_has_no_fault_of_a_name(source, tmp_path):
    one, faults = verified(written(tmp_path, net(seed=7)), source)
    assert not one.accepted
    assert set(faults) <= {"result", "scale", "weights"}


def test_a_drop_beyond_the_budget_rejects(source, tmp_path):
    demands = replace(QUICK, min_agreement=0, max_drop=1)
    path = written(tmp_path, net(seed=7))
    (one,) = verify_model(load(path), source, OwnLabels(source), demands=demands)
    assert one.keras_miou == 1
    assert one.miou < 0.9
    assert any("--max-drop allows 1" in reason for reason in one.reasons)


def test_the_command_verifies_and_refuses(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kseg.data.dataset.open_dataset", lambda spec: DrawnData())
    path, against = written(tmp_path, net()), ["--against", str(source.path), "--data", "drawn"]
    out = tmp_path / "found"
    words = ["verify", str(path), *against, "--seconds", "0", "--out", str(out)]
    assert main(words) == 0
    assert (out / "model-float32.tflite.certificate.html").is_file()
    assert "certificate:" in capsys.readouterr().out
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(path.read_bytes()[:2000])
    vector = tmp_path / "vector.tflite"
    model = net()
    pooled = layers.GlobalAveragePooling2D()(model.output["logits"])
    archive = tf.lite.TFLiteConverter.from_keras_model(keras.Model(model.input, pooled))
    with quiet():
        vector.write_bytes(archive.convert())
    for file, words in (
        (cut, "cut.tflite cannot be opened"),
        (tmp_path / "none.tflite", "there is no"),
        (vector, "kseg takes logits (1, h, w, classes) or a map"),
    ):
        assert main(["verify", str(file), *against]) == 2
        assert words in capsys.readouterr().err
    assert main(["verify", str(path), "--against", str(path)]) == 2
    assert "is no Keras model" in capsys.readouterr().err
