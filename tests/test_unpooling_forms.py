"""Unpooling by choices between integers, and what int8 files of nets that unpool hold."""

import keras
import numpy as np
import pytest
from keras import layers
from tiny import SIZE, drawn, samples

from kseg.export import tflite
from kseg.export.even_maxima import even_maxima
from kseg.export.interface import Interface
from kseg.export.operators import read_network
from kseg.integer_arithmetic import integer_forward
from kseg.quantization import quantization_aware
from kseg.runtimes import open_tflite
from kseg.unpooling_forms import REACH, Choices, FirstUnpooling, SharedUnpooling
from kseg.upsampling import max_pool_with_indices, unpool

OUTLIER = 100.0


def there_and_back(size=(4, 4, 1)):
    """A net that writes each maximum, plus 1, back to where it was."""
    image = keras.Input(size, name="image")
    pooled, indices = max_pool_with_indices(image, name="pool")
    raised = layers.Rescaling(1.0, 1.0, name="raised")(pooled)
    return keras.Model(image, unpool(raised, indices, name="unpool"))


def chosen(model, kind):
    choices = Choices(kind)

    def clone(layer):
        return choices.clone(layer) or type(layer).from_config(layer.get_config())

    def call(layer, *args, **kwargs):
        ours = layer.name.endswith(("_indices", "unpool"))
        return choices.call(layer, *args) if ours else layer(*args, **kwargs)

    return keras.models.clone_model(model, clone_function=clone, call_function=call)


def uneven_model():
    """A net that unpools twice, with one channel much larger than the others, and read less.

    Random kernels on drawn images, so that most windows have four different values.
    """
    keras.utils.set_random_seed(0)
    image = keras.Input((*SIZE, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1.0, name="normalise")(image)
    x, fine = max_pool_with_indices(_conv_bn_relu(x, "first"), name="first_pool")
    x, coarse = max_pool_with_indices(_conv_bn_relu(x, "second"), name="second_pool")
    x = _conv_bn_relu(unpool(x, coarse, name="second_unpool"), "third")
    x = layers.Conv2D(3, 3, padding="same", name="classifier")(unpool(x, fine, name="first_unpool"))
    model = keras.Model(image, {"logits": layers.Activation("linear", name="logits")(x)})
    for made, read in (("first", "second"), ("second", "third")):
        norm, reader = model.get_layer(f"{made}_bn"), model.get_layer(read)
        factors = np.array([OUTLIER] + [1.0] * 7, "float32")
        norm.gamma.assign(norm.gamma * factors)
        norm.beta.assign(norm.beta * factors)
        reader.kernel.assign(reader.kernel / factors[:, None])
    return model


def _conv_bn_relu(x, name):
    x = layers.Conv2D(8, 3, padding="same", name=name)(x)
    return layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(name=f"{name}_bn")(x))


def with_ties():
    """Maps of few different values, so that most windows hold a maximum twice, or only zeros."""
    return np.random.RandomState(0).randint(0, 3, (2, 8, 12, 5)).astype("float32")


def test_choices_are_the_masks_of_training():
    model, x = there_and_back((8, 12, 5)), with_ties()
    np.testing.assert_array_equal(chosen(model, FirstUnpooling)(x), model(x))


def test_equal_maxima_share_a_value_but_zeros_do_not():
    """Maxima 5, 7, 0 and 3 get 6, 8, 1 and 4: halves a row, then halves of that a pixel."""
    x = np.array([[5, 5, 7, 1], [5, 2, 1, 7], [0, 0, 2, 3], [0, 0, 1, 0]], "float32")
    shared = [[1.5, 1.5, 4, 0], [3, 0, 0, 4], [1, 0, 0, 4], [0, 0, 0, 0]]
    y = chosen(there_and_back(), SharedUnpooling)(x[None, ..., None])
    np.testing.assert_array_equal(y[0, ..., 0], shared)


def test_even_maxima_compute_the_same():
    model = uneven_model()
    even = even_maxima(model, samples)
    image = drawn(*SIZE)[None].astype("float32")
    before = model(image)["logits"]
    assert np.abs(even(image)["logits"] - before).max() < 1e-5 * np.abs(before).max()
    for pool in ("first_pool", "second_pool"):
        probe = keras.Model(even.input, even.get_layer(pool).output)
        maps = [probe(image.astype("float32")) for image in samples()]
        np.testing.assert_allclose(np.max(maps, axis=(0, 1, 2, 3)), REACH, rtol=1e-5)


def test_a_net_that_never_unpools_is_left_alone():
    image = keras.Input((*SIZE, 3))
    model = keras.Model(image, layers.Conv2D(3, 1)(image))
    assert even_maxima(model, samples) is model


def test_an_int8_file_unpools_by_integers_and_close_to_the_float_net(tmp_path, monkeypatch):
    """One step for channels of such different sizes makes most maxima of the small ones equal.

    Seen: 9.8 dB; with even channels alone 8.3; with neither -0.3, more noise than signal. More
    cannot be had: the drawn images are flat but for noise, and their maxima nearly equal.
    """
    model = uneven_model()
    path = tmp_path / "model.tflite"
    assert decibels(model, write(model, path, "int8")) > 9
    assert inner_types(path) == {"bool", "int8", "int32", "uint8"}
    monkeypatch.setattr(tflite, "with_int8_forms", lambda model, samples: model)
    assert decibels(model, write(model, path, "int8")) < 1
    assert "float32" in inner_types(path)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_a_quantisation_aware_file_unpools_by_integers_where_its_model_does(size, tmp_path):
    """Also where maps are so small that LiteRT would take neighbouring values for equal."""
    plain = even_maxima(uneven_model(), samples)
    for made, read in (("first", "second"), ("second", "third")):
        norm, reader = plain.get_layer(f"{made}_bn"), plain.get_layer(read)
        norm.gamma.assign(norm.gamma * size)
        norm.beta.assign(norm.beta * size)
        reader.kernel.assign(reader.kernel / size)
    model = quantization_aware(plain)
    for image in samples():
        model(image.astype("float32"), training=True)
    path = write(model, tmp_path / "model.tflite", "qat")
    assert inner_types(path) == {"bool", "int8", "int32", "uint8"}
    forward, runtime = integer_forward(model), open_tflite(path)
    for image in samples():
        wanted = np.asarray(forward(image.astype("float32"))["logits"])[0]
        # Equal whole numbers; the last bit of their product with a step is TensorFlow's choice.
        np.testing.assert_allclose(runtime.forward(image[0]), wanted, rtol=1e-6)
    # What is unpooled keeps the range of its values.
    assert isinstance(model.get_layer("second_unpool"), FirstUnpooling)
    behind = model.get_layer("third").input._keras_history.operation
    assert behind is model.get_layer("second_relu_quantize")


def write(model, path, variant):
    interface = Interface(output="logits")
    tflite.write(model, path, variant=variant, interface=interface, samples=samples)
    return path


def inner_types(path):
    """Return the types of a file's tensors, without its logits, which are given in float."""
    network = read_network(path)
    return {tensor.dtype for tensor in network.tensors if tensor.index not in network.outputs}


def decibels(model, path):
    """Return the signal to noise ratio of a file's logits, beside those of its Keras model."""
    runtime = open_tflite(path)
    power = noise = 0.0
    for image in samples():
        wanted = np.asarray(model(image.astype("float32"))["logits"])[0]
        power += np.sum(wanted**2)
        noise += np.sum((runtime.forward(image[0]) - wanted) ** 2)
    return 10 * np.log10(power / noise)


@pytest.mark.parametrize("kind", [FirstUnpooling, SharedUnpooling])
def test_a_saved_model_unpools_the_same(kind, tmp_path):
    model, x = chosen(there_and_back((8, 12, 5)), kind), with_ties()
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again(x), model(x))
