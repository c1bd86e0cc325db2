"""A quantisation-aware model rounds as its int8 file does."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from tiny import CARD, QUICK, SIZE, DrawnData, drawn, samples, tiny_model

from kseg import card as cards
from kseg.arguments import with_settings
from kseg.build import build
from kseg.config import TrainConfig, quantize_aware_config
from kseg.export import tflite
from kseg.export.calibrate import calibration_samples
from kseg.export.interface import Interface
from kseg.export.operators import read_network
from kseg.export.writer import export_model
from kseg.fake_quantization import (
    FakeQuantize,
    QuantizedConv2D,
    QuantizedConv2DTranspose,
    QuantizedDepthwiseConv2D,
)
from kseg.inference import Predictor
from kseg.quantization import quantization_aware, without_quantization


def with_ranges(model, count=6):
    """Return the aware copy with the ranges of some drawn images."""
    aware = quantization_aware(model)
    for image in calibration_samples(DrawnData(), model.input_shape[1:3], count=count)():
        aware(image.astype("float32"), training=True)
    return aware


def train(model, steps=60):
    """Teach a net the drawn labels; at random weights all its classes are nearly equal."""
    images = np.stack([drawn(*model.input_shape[1:3], seed=100 + seed) for seed in range(6)])
    masks = (images.mean(-1) // 86).astype("int32")  # as `DrawnData`'s
    optimizer = keras.optimizers.Adam(3e-3)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(images.astype("float32"), training=True)["logits"]
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(masks, logits)
            loss = tf.reduce_mean(loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for _ in range(steps):
        step()


def test_no_byte_lies_half_way_between_two_steps():
    """-1..1 in 255 steps of 2 / 255 has its zero at 127.5: every byte would be a tie."""
    image = keras.Input((4, 4, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1.0, name="scaled")(image)
    model = keras.Model(image, {"logits": layers.Conv2D(2, 1)(x)})
    aware = quantization_aware(model)
    quantizer = aware.get_layer("scaled_quantize")
    low, high = float(quantizer.low.numpy()), float(quantizer.high.numpy())
    step = (high - low) / 255
    places = (np.arange(256) / 127.5 - 1) / step + np.rint(-low / step)
    assert low < -1 and high > 1
    # Sums in float32 of numbers up to 255 are exact to 2e-5.
    assert np.abs(places - np.floor(places) - 0.5).min() > 1e-3


def test_a_range_is_the_mean_of_the_extremes_seen_and_includes_zero():
    layer = FakeQuantize()
    for top in (2.0, 4.0):
        layer(tf.constant([1.0, top]), training=True)
    assert [float(layer.low), float(layer.high)] == [0.0, 3.0]
    layer(tf.constant([9.0, -9.0]), training=False)
    layer(tf.constant([9.0, -9.0]), training=True, follow=False)
    assert [float(layer.low), float(layer.high)] == [0.0, 3.0]


def test_values_are_rounded_to_the_255_steps_of_the_range():
    layer = FakeQuantize((0.0, 255.0))
    given = layer(tf.constant([-3.0, 0.4, 0.6, 254.7, 300.0]), training=True)
    assert given.numpy().tolist() == [0.0, 0.0, 1.0, 255.0, 255.0]


@pytest.mark.parametrize(
    ("kind", "shape", "channel_axis"),
    [
        (QuantizedConv2D(filters=4, kernel_size=3), (3, 3, 2, 4), 3),
        (QuantizedDepthwiseConv2D(kernel_size=3), (3, 3, 2, 1), 2),
        (QuantizedConv2DTranspose(filters=4, kernel_size=3), (3, 3, 4, 2), 2),
    ],
)
def test_kernels_have_a_scale_for_each_channel_of_the_result(kind, shape, channel_axis):
    kind.build((None, 8, 8, 2))
    assert kind.kernel.shape == shape
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    kind.kernel.assign(kernel)
    axes = tuple(axis for axis in range(4) if axis != channel_axis)
    scale = np.abs(kernel).max(axes, keepdims=True) / 127
    given, bias = kind.folded()
    np.testing.assert_allclose(given, np.rint(kernel / scale) * scale, atol=1e-6)
    np.testing.assert_array_equal(bias, 0)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_a_transposed_convolution_has_a_plain_form(side, stride, padding):
    settings = {"filters": 4, "kernel_size": (side, side + 1), "strides": stride}
    plain = layers.Conv2DTranspose(**settings, padding=padding)
    rounded = QuantizedConv2DTranspose(**settings, padding=padding)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 6, 3)).astype("float32")
    for layer in (plain, rounded):
        layer.build(x.shape)
    # Whole numbers of which one of each channel is 127: there is nothing to round.
    kernel = random.integers(-127, 128, plain.kernel.shape)
    kernel[0, 0, :, 0] = 127  # (rows, columns, filters, C)
    for layer in (plain, rounded):
        layer.set_weights([kernel, np.arange(4)])
    # Sums of about a hundred products in another order, in float32.
    np.testing.assert_allclose(rounded(x), plain(x), atol=1e-6 * 127 * 100)


def test_a_transposed_convolution_without_a_plain_form_says_so():
    layer = QuantizedConv2DTranspose(filters=4, kernel_size=3, strides=(1, 2))
    with pytest.raises(ValueError, match=r"equal strides .* got strides \(1, 2\)"):
        layer.build((None, 8, 8, 3))


def test_normalisation_is_in_the_kernel():
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv")(image)
    x = layers.BatchNormalization(name="bn", epsilon=0.01)(x)
    model = keras.Model(image, {"logits": layers.ReLU(name="relu")(x)})
    rng = np.random.default_rng(1)
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    aware = quantization_aware(model)
    kernel, bias = aware.get_layer("conv").folded()
    (weights, offset), (gamma, beta, mean, variance) = (
        model.get_layer(name).get_weights() for name in ("conv", "bn")
    )
    gain = gamma / np.sqrt(variance + 0.01)
    np.testing.assert_allclose(bias, beta + (offset - mean) * gain, rtol=1e-5)
    # Half a step of the 127 of each channel.
    step = np.abs(weights * gain).max((0, 1, 2)) / 127
    assert (np.abs(kernel - weights * gain) <= 0.501 * step).all()
    names = [layer.name for layer in aware.layers]
    assert names == ["image", "image_quantize", "conv", "bn", "relu", "relu_quantize"]
    assert isinstance(aware.get_layer("bn"), layers.Identity)


def test_the_file_has_no_float_and_the_labels_of_the_model(tmp_path):
    model = tiny_model()
    plain, rounded = (Predictor.from_keras(m, CARD) for m in (model, with_ranges(model)))
    (one,) = export_model(
        plain,
        DrawnData(),
        folder=tmp_path,
        plan={"tflite": ("qat",)},
        quantisation_aware=lambda: rounded,
        demands=QUICK,
    )
    assert one.agreement == 100
    assert one.notes == ("labels are compared with its own Keras model, mIoU with the float one",)
    opened = Interpreter(model_path=str(one.path))
    opened.allocate_tensors()
    assert {t["dtype"].__name__ for t in opened.get_tensor_details()} == {"int8", "int32", "uint8"}
    assert opened.get_input_details()[0]["quantization"] == (1.0, 0)
    # The rounded model is near the plain one, else agreement with it would mean little.
    image = drawn(*SIZE)
    assert (rounded.class_map(image) == plain.class_map(image)).mean() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swiftnet", "fastscnn", "pidnet"])
def test_nets_of_the_registry_convert_without_float(name, tmp_path):
    keras.utils.set_random_seed(0)
    options = {"widths": (8, 8, 8, 8), "blocks": (1, 1, 1, 1)} if name == "swiftnet" else {}
    model = build(name, (64, 96, 3), 3, options)
    inference = keras.Model(model.input, {"logits": model.output["logits"]})
    train(inference)
    rounded = Predictor.from_keras(with_ranges(inference), CARD)
    (one,) = export_model(
        Predictor.from_keras(inference, CARD),
        DrawnData(),
        folder=tmp_path,
        plan={"tflite": ("qat",)},
        quantisation_aware=lambda: rounded,
        demands=QUICK,
    )
    assert one.agreement == 100  # of all labels: the maps are the same whole numbers
    assert one.notes == ("labels are compared with its own Keras model, mIoU with the float one",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bisenetv2", {}),
        ("ddrnet", {}),
        ("deeplabv3plus", {"backbone": "mobilenetv2"}),
        ("fastscnn", {}),
        ("lraspp", {}),
        ("pidnet", {}),
        ("ppliteseg", {}),
        ("swiftnet", {}),
        # Not edge nets: with transposed convolutions, with unpooling, with both.
        ("unet", {"base_channels": 8}),
        ("segnet", {"base_channels": 8}),
        ("deconvnet", {"fc_channels": 64}),
    ],
)
def test_files_hold_no_float_tensor(name, options, tmp_path):
    model = build(name, (*SIZE, 3), 3, options)
    path = tmp_path / "m.tflite"
    aware = with_ranges(keras.Model(model.input, {"logits": model.output["logits"]}), count=1)
    tflite.write(aware, path, variant="qat", interface=Interface(), samples=samples)
    types = {tensor.dtype for tensor in read_network(path).tensors}
    assert types <= {"int8", "int32", "uint8", "bool"}  # bool: where maxima are


def test_the_plain_model_comes_back(tmp_path):
    model = tiny_model()
    aware, other = quantization_aware(model), tiny_model(seed=5)
    without_quantization(aware, other)
    for ours, theirs in zip(other.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_saved_copy_computes_the_same(tmp_path):
    aware = with_ranges(tiny_model())
    aware.save(tmp_path / "m.keras")
    from kseg.weights import read_model

    again, image = read_model(tmp_path / "m.keras"), drawn(*SIZE)[None].astype("float32")
    np.testing.assert_array_equal(again(image)["logits"], aware(image)["logits"])


@pytest.mark.parametrize("name", ["swiftnet", "segnet"])  # segnet's copy has layers of unpooling
def test_another_process_opens_a_saved_copy(name, tmp_path):
    path = tmp_path / "aware.keras"
    quantization_aware(build(name, (64, 64, 3), 4)).save(path)
    program = (
        "import sys; from pathlib import Path; from kseg.quiet import load_tensorflow;"
        "load_tensorflow(); from kseg.weights import read_model;"
        "print(read_model(Path(sys.argv[1])).name)"
    )
    command = [sys.executable, "-c", program, str(path)]
    opened = subprocess.run(command, capture_output=True, text=True)
    assert opened.stdout.strip() == name, opened.stderr


def test_the_settings_of_a_run_go_on_gently():
    config = TrainConfig(
        data="camvid:x",
        model="fastscnn",
        steps=101,
        precision="mixed_bfloat16",
        options=("bins=1,2",),
    )
    aware = quantize_aware_config(config)
    assert (aware.steps, aware.precision, aware.quantize_aware) == (21, "float32", True)
    assert aware.learning_rate == pytest.approx(config.learning_rate / 30)
    words = with_settings(["--epochs", "3"], aware)
    assert words[-4:] == ["-o", "bins=1,2", "--epochs", "3"]
    assert "--steps" not in words and "--quantize-aware" in words
    assert words[words.index("--model") + 1] == "fastscnn"
    assert cards.ModelCard("m", {}, (), (), SIZE).arguments() == ["--model", "m"]


@pytest.mark.parametrize("name", ["fastscnn", pytest.param("ddrnet", marks=pytest.mark.slow)])
def test_the_weights_are_the_same_at_every_size(name):
    """Where a map is averaged into cells, the matrices belong to a size, not to the weights."""

    def weights(size):
        model = build(name, (*size, 3), 3)
        inference = keras.Model(model.input, {"logits": model.output["logits"]})
        return {w.path: tuple(w.shape) for w in quantization_aware(inference).weights}

    assert weights((64, 96)) == weights((96, 128)) == weights((128, 128))
