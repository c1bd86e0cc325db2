"""A quantisation-aware model in whole numbers is its int8 file, map by map and bit by bit."""

import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from tiny import SIZE, drawn, tiny_model

from kseg.fake_quantization import FakeQuantize
from kseg.integer_arithmetic import Range, Whole, integer_forward, is_rounded
from kseg.integer_arithmetic import _mean as mean
from kseg.integer_arithmetic import _pooled as pooled
from kseg.integer_arithmetic import _requantised as requantised
from kseg.integer_arithmetic import _resized as resized
from kseg.integer_arithmetic import _scaled as scaled
from kseg.integer_arithmetic import _sum_of as total
from kseg.models.ppliteseg import ChannelStatistics
from kseg.quantization import quantization_aware
from kseg.quiet import quiet
from kseg.upsampling import BilinearResize


def steps_of(step, zero=0.0):
    """A range of such steps."""
    return Range(tf.constant(step, tf.float64), tf.constant(zero))


UNIT = steps_of(1.0)
IMAGES = [drawn(*SIZE, seed) for seed in range(4)]


def whole(values, within=UNIT):
    """A map of one row and one channel."""
    return Whole(tf.reshape(tf.constant(values, tf.float32), (1, 1, -1, 1)), within)


def numbers(result):
    """The numbers of a map, in their order."""
    found = result.numbers if isinstance(result, Whole) else result
    return np.asarray(found).ravel().tolist()


def test_sums_are_rounded_to_the_even_number_where_they_tie():
    # 1, 3, -1, 5 times 0.5: every one is a tie.
    round_to = scaled(tf.constant([1, 3, -1, 5]), tf.constant(0.5), tf.constant(1.0))
    assert numbers(round_to(UNIT)) == [0, 2, 0, 2]


def test_two_maps_are_added_in_steps_of_21_binary_places():
    """Of 0.3 and 1 the larger has the exponent 0: both are whole numbers of 2 ** -20."""
    added = total(whole([1, 2, -1, 5]), whole([1, 1, -1, 5], steps_of(0.3))).rounded(UNIT)
    assert numbers(added) == [1, 2, -1, 7]  # 1.3, 2.3, -1.3, 6.5
    # Half-way goes up; 0.3 is 314573 / 2 ** 20 there, which is more than it, so that 6.5 does.
    halves = total(whole([1, -1]), whole([1, -1], steps_of(0.5))).rounded(UNIT)
    assert numbers(halves) == [2, -1]
    less = total(whole([1, -1]), whole([1, -1], steps_of(0.5)), sign=-1.0).rounded(UNIT)
    assert numbers(less) == [1, 0]


@pytest.mark.parametrize(("zero", "expected"), [(0.0, [1, -1, 3]), (-128.0, [0, -1, 2])])
def test_means_that_tie_go_away_from_the_number_zero(zero, expected):
    """0.5, -0.5 and 2.5; with -128 for the value 0 they are -127.5, -128.5 and -125.5."""
    pool = layers.AveragePooling2D((1, 2))
    given = whole([0, 1, 0, -1, 2, 3], steps_of(1.0, zero))
    assert numbers(pooled(pool, given)) == expected


def test_an_enlarged_map_goes_up_where_it_ties():
    # Half-pixel centres: of 0, 2 they are 0, 0.5, 1.5, 2; of 0, -2 the same below 0.
    double = layers.UpSampling2D((1, 2), interpolation="bilinear")
    assert numbers(resized(double, whole([0, 2]))) == [0, 1, 2, 2]
    assert numbers(resized(double, whole([0, -2]))) == [0, 0, -1, -2]


def test_weights_of_an_enlarged_map_have_eleven_bits():
    """From 2 to 3 the middle is 0.5; from 4 to 7 the second lies at 5/14, 731 of 2048 parts."""
    result = numbers(resized(BilinearResize(1, 7), whole([0, 100, 0, 0])))
    # 100 * 731 / 2048 = 35.69; exactly 5/14 would be 35.71.
    assert result[1] == 36
    # 127 * 731 / 2048 = 45.33; two neighbours of 8 bits need no more.
    assert numbers(resized(BilinearResize(1, 3), whole([-3, 4])))[1] == 1  # 0.5 goes up


def test_another_range_is_reached_by_256ths():
    # 0.7 is 179 / 256 there: 100 becomes (17900 + 128) / 256 = 70.4, and 5 becomes 3.996.
    after = steps_of(1 / 0.7)
    assert numbers(requantised(whole([100, 5, -5]), after)) == [70, 3, -3]
    # 127 of steps of 2 are beyond the 127 of steps of 1.
    double = steps_of(2.0)
    assert numbers(requantised(whole([127, -3], double), UNIT)) == [127, -6]


def every_kind(size=SIZE):
    """A net of every operator that has a form of its own, behind ranges that all differ."""
    keras.utils.set_random_seed(3)
    image = keras.Input((*size, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1.0, name="normalise")(image)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(x)
    stem = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(x))
    x = layers.DepthwiseConv2D(3, padding="same", dilation_rate=2, name="dilated")(stem)
    x = layers.Activation("hard_silu", name="swish")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    gate = layers.Conv2D(8, 1, activation="relu6", name="gate")(gate)
    gate = layers.Activation("sigmoid", name="sigmoid")(layers.Conv2D(8, 1, name="scores")(gate))
    x = layers.Subtract(name="less")([x, stem])
    x = layers.Add(name="add")([layers.Multiply(name="gated")([x, gate]), stem])
    small = layers.AveragePooling2D(2, name="halved")(layers.ReLU(name="add_relu")(x))
    small = layers.Conv2D(12, 3, padding="same", name="deep")(small)
    largest = layers.MaxPooling2D(2, name="largest")(small)
    back = layers.UpSampling2D(4, interpolation="bilinear", name="bilinear")(largest)
    other = layers.Conv2DTranspose(6, 4, strides=2, padding="same", name="transposed")(small)
    both = ChannelStatistics(name="statistics")(stem)
    alone = layers.Conv2D(4, 1, activation="relu", name="alone")(stem)
    swish = layers.Activation("hard_silu", name="swish_alone")(layers.Conv2D(4, 1)(stem))
    x = layers.Concatenate(name="concat")([stem, back, other, both, alone, swish])
    x = layers.Conv2D(5, 1, name="classifier")(x)
    logits = BilinearResize(size[0] + 6, size[1] + 10, name="odd")(x)
    return keras.Model(image, {"logits": logits})


def with_maps(model):
    """Return a copy of a quantisation-aware model that gives every rounded map."""
    rounded = [one for one in model.layers if isinstance(one, FakeQuantize)]
    nodes = [node for one in rounded for node in one._inbound_nodes]
    names = [node.arguments.args[0]._keras_history.operation.name for node in nodes]
    maps = {name: node.outputs[0] for name, node in zip(names, nodes, strict=True)}
    return keras.Model(model.input, maps)


def converted(model):
    """Return the runner of an int8 file of a quantisation-aware model, whatever it gives."""
    spec = tf.TensorSpec((1, *model.input_shape[1:]), tf.float32, name="image")
    with tempfile.TemporaryDirectory() as folder, quiet():
        archive = keras.export.ExportArchive()
        archive.add_endpoint(
            "serving_default", lambda image: model(image, training=False), input_signature=[spec]
        )
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type, converter.inference_output_type = tf.uint8, tf.int8
        file = Interpreter(model_content=converter.convert(), num_threads=1)
    return file.get_signature_runner()


def differing(model, images):
    """Return how many values of each result differ between the file and the whole numbers."""
    run, ours = converted(model), tf.function(integer_forward(model))
    outputs, found = run.get_output_details(), {}
    for image in images:
        theirs = run(image=image[None])
        for name, values in ours(tf.constant(image[None], tf.float32)).items():
            step, zero = outputs[name]["quantization"]
            wrong = np.rint(values / step) != theirs[name].astype(int) - zero
            found[name] = found.get(name, 0) + int(wrong.sum())
    return {name: count for name, count in found.items() if count}


@pytest.fixture(scope="module", params=[tiny_model, every_kind])
def aware(request):
    """A quantisation-aware net with the ranges of drawn images."""
    plain = request.param()
    model = quantization_aware(plain)
    for image in IMAGES:
        model(image[None].astype("float32"), training=True)
    assert is_rounded(model) and not is_rounded(plain)
    return model


def test_every_map_is_that_of_the_file(aware):
    assert differing(with_maps(aware), IMAGES) == {}


def test_the_result_is_that_of_the_file(aware):
    """Where nothing else reads a map, the file rounds it to the range of a concatenation alone."""
    assert differing(aware, IMAGES) == {}


def test_means_of_channels_are_one_sum_and_one_product():
    """(1 + 2 + 4) / 4 is 1.75; in steps twice as large it is 0.875, and 0.5 goes to 0."""
    for values, expected in (([0, 1, 2, 4], 1), ([1, 1, 1, 1], 0)):
        given = Whole(tf.reshape(tf.constant(values, tf.float32), (1, 1, 1, 4)), UNIT)
        assert numbers(mean(given, steps_of(2.0), -1)) == [expected]


def test_the_weights_are_followed():
    """A predictor is compiled once, and the training goes on."""
    aware = quantization_aware(tiny_model())
    image = tf.constant(drawn(*SIZE)[None], tf.float32)
    aware(image, training=True)
    forward = tf.function(integer_forward(aware))
    before = forward(image)["logits"]
    aware.get_layer("classifier").bias.assign_add([1.0, 0.0, 0.0])
    aware.get_layer("classifier_quantize").high.assign_add(1.0)
    after = forward(image)["logits"]
    assert float(tf.reduce_mean(after - before, (0, 1, 2))[0]) == pytest.approx(1.0, abs=0.05)


def test_the_float_model_is_near():
    """Both round to the same steps; only ties and what follows from them differ."""
    aware = quantization_aware(tiny_model())
    image = tf.constant(drawn(*SIZE)[None], tf.float32)
    aware(image, training=True)
    exact, near = integer_forward(aware)(image)["logits"], aware(image)["logits"]
    quantizer = aware.get_layer("classifier_quantize")
    step = float(quantizer.high - quantizer.low) / 255
    assert np.abs(exact - near).max() < 1.5 * step
    assert (np.abs(exact - near) > 0.5 * step).mean() < 0.05
