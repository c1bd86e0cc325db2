"""One predictor for every format: the same bytes in, the same labels out."""

import dataclasses
import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from PIL import Image
from tiny import CARD, SIZE, drawn, samples, tiny_model

import kseg
from kseg import card as cards
from kseg import models, resize
from kseg.config import TrainConfig
from kseg.data.dataset import voc_palette
from kseg.errors import Failure, UserError
from kseg.export import onnx as onnx_target
from kseg.export import tflite as tflite_target
from kseg.export.interface import Interface
from kseg.export.saved_model import write as write_saved_model
from kseg.inference import Predictor, feed, load, read_image
from kseg.quiet import quiet
from kseg.runs import Run
from kseg.runtimes import open_tflite, set_image


def write_channels_first(model, path):
    """Write a `.tflite` file of (1, 3, H, W), as programs that come from torch make it."""
    image = keras.Input((3, *SIZE), batch_size=1, name="image")
    logits = model(keras.layers.Permute((2, 3, 1))(image))["logits"]
    turned = keras.Model(image, keras.layers.Permute((3, 1, 2))(logits))
    with quiet():
        path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(turned).convert())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model in every format."""
    folder, model = tmp_path_factory.mktemp("files"), tiny_model()
    made = {"keras": folder / "m.keras", "saved_model": folder / "served" / "1"}
    model.save(made["keras"])
    write_saved_model(
        model, made["saved_model"], variant="float32", interface=Interface(), samples=samples
    )
    for variant, output in (
        ("float32", "classes"),
        ("float32", "logits"),
        ("int8", "classes"),
        ("int8", "logits"),
    ):
        path, interface = folder / f"{variant}-{output}.tflite", Interface(output=output)
        tflite_target.write(model, path, variant=variant, interface=interface, samples=samples)
        made[path.stem] = path
    for layout in ("nhwc", "nchw"):
        path = folder / f"{layout}.onnx"
        interface = Interface(output="logits", layout=layout)
        onnx_target.write(model, path, variant="float32", interface=interface, samples=samples)
        made[layout] = path
    made["chw"] = write_channels_first(model, folder / "chw.tflite")
    for path in made.values():
        cards.embed(path, CARD)
    return made


@pytest.mark.parametrize("new", [(64, 96), (33, 50), (101, 97), (200, 20), (1, 1)])
def test_bilinear_is_that_of_tensorflow(new):
    image = np.random.default_rng(1).uniform(0, 255, (64, 96, 5)).astype(np.float32)
    expected = tf.image.resize(image, new, method="bilinear", antialias=False).numpy()
    # Float32 rounding of values up to 255; the positions are computed alike.
    np.testing.assert_allclose(resize.bilinear(image, new), expected, atol=1e-4)
    np.testing.assert_array_equal(
        resize.bilinear_argmax(image, new), resize.bilinear(image, new).argmax(-1)
    )


@pytest.mark.parametrize("new", [(64, 96), (32, 48), (130, 77)])
def test_nearest_takes_the_pixel_under_the_centre(new):
    mask = np.random.default_rng(2).integers(0, 9, (64, 96)).astype(np.uint8)
    expected = [
        [mask[int((y + 0.5) * 64 / new[0]), int((x + 0.5) * 96 / new[1])] for x in range(new[1])]
        for y in range(new[0])
    ]
    np.testing.assert_array_equal(resize.nearest(mask, new), expected)


@pytest.mark.parametrize("shape", [SIZE, (50, 70), (130, 200)])
def test_logit_files_label_as_keras_does(files, shape):
    image = drawn(*shape)
    expected = load(files["keras"]).predict(image)
    assert expected.shape == shape
    assert expected.dtype == np.uint8
    assert len(np.unique(expected)) > 1  # else agreement would show nothing
    for name in ("saved_model", "float32-logits", "chw", "nhwc", "nchw"):
        # Different kernels add in a different order: a pixel at a tie may fall the other way.
        assert (load(files[name]).predict(image) == expected).mean() > 0.999, name


@pytest.mark.parametrize("name", ["float32-classes", "float32-logits", "saved_model"])
def test_class_map_is_the_one_of_keras(files, name):
    image = drawn(150, 100)
    expected = load(files["keras"]).class_map(image)
    assert expected.shape == SIZE
    assert (load(files[name]).class_map(image) == expected).mean() > 0.999


def test_int8_logits_are_dequantised(files):
    image = drawn(*SIZE)
    expected = load(files["keras"]).logits(image)
    got = load(files["int8-logits"]).logits(image)
    assert got.dtype == np.float32
    # Some steps of 1/255 of the range.
    assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)


def test_probabilities_stand_for_their_logits(files, tmp_path):
    path, image = tmp_path / "m.tflite", drawn(50, 70)
    interface = Interface(output="probabilities")
    model = tiny_model()
    tflite_target.write(model, path, variant="float32", interface=interface, samples=samples)
    cards.embed(path, dataclasses.replace(CARD, output="probabilities"))
    raw = open_tflite(path).forward(feed(image, SIZE))
    np.testing.assert_allclose(raw.sum(-1), 1, atol=1e-6)
    got, keras_file = load(path), load(files["keras"])
    # The same up to what is added to all classes of a pixel, also after a resize.
    apart = got.logits(image) - keras_file.logits(image)
    assert np.ptp(apart, axis=-1).max() < 1e-4
    assert (got.predict(image) == keras_file.predict(image)).mean() > 0.999


def test_predict_equals_tensorflow_from_end_to_end(files):
    image, predictor = drawn(50, 70), load(files["keras"])
    fed = np.rint(tf.image.resize(image, SIZE).numpy())
    logits = predictor.model(fed[None], training=False)["logits"]
    expected = tf.argmax(tf.image.resize(logits, (50, 70)), -1)[0].numpy()
    assert (predictor.predict(image) == expected).mean() > 0.999
    assert predictor.logits(image).shape == (50, 70, 3)
    assert predictor.predict(image, size=(10, 20)).shape == (10, 20)


def test_the_card_tells_classes_and_palette(files):
    for path in files.values():
        predictor = load(path)
        assert predictor.classes == CARD.classes
        assert predictor.palette == CARD.palette
        assert predictor.size == SIZE
        assert predictor.num_classes == 3
    assert load(files["float32-classes"]).output == "classes"


def test_folder_above_the_version_opens_too(files):
    assert load(files["saved_model"].parent).path == files["saved_model"]


def test_from_keras_follows_the_weights():
    model = tiny_model()
    predictor = Predictor.from_keras(model, CARD)
    bias = model.get_layer("classifier").bias
    for chosen in range(3):
        bias.assign(np.eye(3, dtype=np.float32)[chosen] * 1000)
        assert (predictor.predict(drawn(40, 40)) == chosen).all()


def test_a_class_map_has_no_logits(files):
    with pytest.raises(Failure, match="--output logits"):
        load(files["float32-classes"]).logits(drawn(*SIZE))


def _bare_tflite(path, output_shape_of, *, io=None, image="float32"):
    """Convert without anything of kseg: no card, another image range, quantised edges."""

    model = tiny_model()

    @tf.function(input_signature=[tf.TensorSpec((1, *SIZE, 3), image)])
    def graph(x):
        return output_shape_of(model(tf.cast(x, tf.float32))["logits"])

    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [graph.get_concrete_function()], None
    )
    if io is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([one.astype("float32")] for one in samples())
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = io
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(converter.convert())
    return path


@pytest.mark.parametrize("io", [None, tf.uint8, tf.int8])
def test_foreign_logits_of_any_type(tmp_path, files, io):
    predictor = load(_bare_tflite(tmp_path / "m.tflite", lambda logits: logits, io=io))
    assert predictor.classes == ("class 0", "class 1", "class 2")
    assert predictor.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))  # as PASCAL VOC's
    image = drawn(*SIZE)
    agreement = (predictor.predict(image) == load(files["keras"]).predict(image)).mean()
    assert agreement > (0.999 if io is None else 0.95)


def test_foreign_class_map(tmp_path, files):
    path = _bare_tflite(tmp_path / "m.tflite", lambda x: tf.argmax(x, -1, output_type=tf.int32))
    predictor, image = load(path), drawn(*SIZE)
    assert predictor.output == "classes"
    assert (predictor.predict(image) == load(files["keras"]).predict(image)).mean() > 0.999


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("map_first", [False, True])
def test_image_and_map_have_each_their_own_order(tmp_path, files, image_first, map_first, ids):
    """`--inputs-as-nchw` of tf2onnx turns the image alone."""
    model = tiny_model()
    image = keras.Input((3, *SIZE) if image_first else (*SIZE, 3), batch_size=1)
    last = layers.Permute((2, 3, 1))(image) if image_first else image
    result = model(last)["logits"]
    if ids:
        result = layers.Lambda(lambda x: tf.argmax(x, -1, output_type=tf.int32)[..., None])(result)
    result = layers.Permute((3, 1, 2))(result) if map_first else result
    path, pixels = tmp_path / "m.tflite", drawn(*SIZE)
    with quiet():
        converter = tf.lite.TFLiteConverter.from_keras_model(keras.Model(image, result))
        path.write_bytes(converter.convert())
    predictor = load(path)
    assert predictor.output == ("classes" if ids else "logits")
    assert (predictor.predict(pixels) == load(files["keras"]).predict(pixels)).mean() > 0.999


def test_quantised_input_takes_normalised_images_by_its_own_scale(tmp_path):
    """As a file whose images are less ImageNet's mean, by its deviation: no bytes of its own."""
    path = _bare_tflite(tmp_path / "m.tflite", lambda logits: logits, io=tf.int8)
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()
    scale, zero = image["quantization"]
    set_image(interpreter, np.full((*SIZE, 3), 255, np.uint8), fed_as="imagenet")
    values = (interpreter.get_tensor(image["index"])[0, 0, 0] - np.float64(zero)) * scale
    # 1 less the mean, by the deviation, of each channel; rounded to a step.
    np.testing.assert_allclose(values, [2.249, 2.429, 2.640], atol=scale)


def test_a_tflite_file_of_any_size_is_refused(tmp_path):
    """LiteRT gives 1 for an axis that may change."""
    graph = tf.function(lambda x: x * 2, input_signature=[tf.TensorSpec((1, None, None, 3))])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph.get_concrete_function()])
    path = tmp_path / "m.tflite"
    with quiet():
        path.write_bytes(converter.convert())
    with pytest.raises(UserError, match="no fixed input size"):
        load(path)


def test_a_file_that_opens_but_does_not_run_is_named(tmp_path, files):
    """onnxruntime looks at a shape that is computed only when it runs."""
    model = onnx.load(files["nhwc"])
    wrong = onnx.numpy_helper.from_array(np.array([1, 7, -1, 3]), "wrong_shape")
    model.graph.initializer.append(wrong)
    (name,) = (one.name for one in model.graph.output)
    node = next(one for one in model.graph.node if name in one.output)
    node.output[:] = ["before" if one == name else one for one in node.output]
    model.graph.node.append(onnx.helper.make_node("Reshape", ["before", "wrong_shape"], [name]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"m.onnx cannot be (run|opened)"):
        load(tmp_path / "m.onnx").predict(drawn(*SIZE))


def test_a_classifier_is_refused(tmp_path):
    path = _bare_tflite(tmp_path / "m.tflite", lambda x: tf.reduce_mean(x, (1, 2)))
    with pytest.raises(UserError, match=r"gives float32 \(1, 3\)"):
        load(path)


@pytest.mark.parametrize("name", ["m.keras", "m.tflite", "m"])
@pytest.mark.parametrize("content", [b"", b"nonsense", "half"])
def test_damaged_files_are_named(tmp_path, files, name, content):
    path = tmp_path / name
    if name == "m":
        path.mkdir()
        good, path = files["saved_model"] / "saved_model.pb", path / "saved_model.pb"
    else:
        good = files["keras" if name == "m.keras" else "float32-classes"]
    whole = good.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UserError, match=f"{tmp_path}/{name}.* cannot be opened"):
        load(tmp_path / name)


def test_unsafe_files_are_refused(tmp_path):
    image = keras.Input((*SIZE, 3))
    model = keras.Model(image, layers.Lambda(lambda x: x * 2)(image))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "m.keras")
    with pytest.raises(UserError, match="Lambda"):
        load(tmp_path / "m.keras")


def test_eval_size_rebuilds_with_the_same_weights(tmp_path):
    options = {"bins": (1, 2), "expansion": 2}
    model = models.inference_model(models.build("fastscnn", (*SIZE, 3), 3, options))
    path = tmp_path / "m.keras"
    model.save(path)
    cards.embed(path, dataclasses.replace(CARD, model="fastscnn", options=options))
    larger = load(path, eval_size=(96, 128))
    assert larger.size == larger.card.size == (96, 128)
    for layer in model.layers:
        for ours, theirs in zip(
            layer.get_weights(), larger.model.get_layer(layer.name).get_weights(), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert larger.logits(drawn(50, 50)).shape == (50, 50, 3)
    with pytest.raises(UserError, match="multiple|32"):
        load(path, eval_size=(97, 128))


def test_without_a_card_there_is_one_size(tmp_path):
    tiny_model().save(tmp_path / "m.keras")
    assert load(tmp_path / "m.keras", eval_size=SIZE).classes[2] == "class 2"
    with pytest.raises(UserError, match="64 x 96"):
        load(tmp_path / "m.keras", eval_size=(96, 128))


def test_a_run_opens_its_best_or_last(tmp_path):
    run = Run(tmp_path / "run")
    run.create(TrainConfig())
    for seed, file in enumerate((run.best, run.last)):
        tiny_model(seed=seed).save(file)
        cards.embed(file, CARD)
    image = drawn(*SIZE)
    for last, file in ((False, run.best), (True, run.last)):
        opened = load(run.folder, last=last)
        assert opened.path == file
        np.testing.assert_array_equal(opened.predict(image), load(file).predict(image))


def test_what_is_no_model(tmp_path, files):
    (tmp_path / "m.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"m\.h5 .*\.keras file, a \.tflite file, an \.onnx"):
        load(tmp_path / "m.h5")
    with pytest.raises(UserError, match="there is no .*gone"):
        load(tmp_path / "gone.tflite")
    with pytest.raises(UserError, match="no model that kseg can open"):
        load(tmp_path)
    with pytest.raises(UserError, match="64 x 96 only.*--size 96 128"):
        load(files["float32-classes"], eval_size=(96, 128))


def test_a_card_of_another_model_is_refused(tmp_path):
    path = tmp_path / "m.keras"
    tiny_model(num_classes=5).save(path)
    cards.embed(path, CARD)
    with pytest.raises(UserError, match="5 classes but names 3"):
        load(path)


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32)])
def test_images_of_another_kind_are_refused(files, image):
    with pytest.raises(UserError, match="uint8"):
        load(files["keras"]).predict(image)


def test_image_files(tmp_path, files):
    predictor, image = load(files["keras"]), drawn(40, 60)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(predictor.predict(tmp_path / "a.png"), predictor.predict(image))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    for name, reason in (("b.png", "cannot be read"), ("c.png", "no file")):
        with pytest.raises(UserError, match=f"{reason}.*{name}|{name}.*{reason}"):
            predictor.predict(tmp_path / name)


def test_a_turned_photograph_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (60, 40, 3)


def test_feed_rounds():
    image = np.array([[[0] * 3, [3] * 3]], np.uint8)
    # Between 0 and 3 at a quarter each: 0, 0.75, 2.25, 3.
    np.testing.assert_array_equal(feed(image, (1, 4))[0, :, 0], [0, 1, 2, 3])


def test_a_16_bit_picture_is_read_by_its_high_bytes(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    read = read_image(tmp_path / "deep.png")
    np.testing.assert_array_equal(read[..., 0], np.arange(256).reshape(16, 16))


def test_a_picture_too_large_to_be_meant_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="big.png"):
        read_image(tmp_path / "big.png")


def test_palette_for_files_without_one_has_no_colour_twice():
    assert len(set(voc_palette(255))) == 255


def test_tflite_needs_no_tensorflow(files, tmp_path):
    """Opening a .tflite must not wait for TensorFlow, and must not print LiteRT's chatter."""
    Image.fromarray(drawn(40, 60)).save(tmp_path / "a.png")
    code = (
        "import sys, json, kseg\n"
        f"p = kseg.load({str(files['int8-classes'])!r})\n"
        f"ids = p.predict({str(tmp_path / 'a.png')!r})\n"
        "print(json.dumps([list(ids.shape), 'tensorflow' in sys.modules, 'keras' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[40, 60], False, False]
    assert done.stderr == ""


def test_public_name():
    assert kseg.load is load
