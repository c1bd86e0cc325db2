"""The layers of the training copy against Keras' own, operation by operation."""

import os
import platform

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kseg.training_copy
from kseg.blocks import AdaptiveAverage
from kseg.quiet import prepare_tensorflow
from kseg.training_copy import (
    FusedBatchNormalization,
    PointwiseConv2D,
    ProductGradientConv2D,
    ReachingDepthwiseConv2D,
    SuccessiveProducts,
    _reach,
    has_fast_convolutions,
    training_copy,
)
from kseg.upsampling import NearestResize


def model():
    image = keras.Input((6, 8, 3), name="image")
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="bn")(x)
    x = layers.Dropout(0.5, name="drop")(x)
    return keras.Model(image, {"logits": layers.Conv2D(2, 1, name="head")(x)})


@pytest.fixture
def pair():
    keras.utils.set_random_seed(3)
    plain = model()
    rng = np.random.default_rng(0)
    bn = plain.get_layer("bn")
    bn.set_weights([rng.uniform(0.5, 2, 4) for _ in range(4)])
    return plain, training_copy(plain)


def test_names_values_and_outputs_are_those_of_the_model(pair):
    plain, fused = pair
    assert isinstance(fused.get_layer("bn"), FusedBatchNormalization)
    assert [v.path for v in fused.weights] == [v.path for v in plain.weights]
    assert list(fused.output) == ["logits"]
    image = np.random.default_rng(1).normal(size=(2, 6, 8, 3)).astype("float32")
    np.testing.assert_array_equal(fused(image)["logits"], plain(image)["logits"])


def test_training_output_gradient_and_statistics_are_those_of_keras(pair):
    layers_ = [m.get_layer("bn") for m in pair]
    x = tf.constant(np.random.default_rng(2).normal(3, 2, (2, 5, 7, 4)).astype("float32"))
    found = []
    for layer in layers_:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
        found.append([y, *gradients, *layer.non_trainable_variables])
    # Sums of 70 float32 values in another order: some last digits differ.
    for ours, theirs in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_frozen_and_unusual_layers_stay_as_they_are():
    image = keras.Input((6, 8, 3))
    x = layers.BatchNormalization(name="frozen", trainable=False)(image)
    x = layers.BatchNormalization(name="no_scale", scale=False)(x)
    x = layers.BatchNormalization(name="first_axis", axis=1)(x)
    fused = training_copy(keras.Model(image, x))
    for name in ("frozen", "no_scale", "first_axis"):
        assert type(fused.get_layer(name)) is layers.BatchNormalization
    assert not fused.get_layer("frozen").trainable


def test_bfloat16_maps_keep_their_type_and_float32_statistics():
    layer = FusedBatchNormalization(dtype="mixed_bfloat16")
    x = tf.cast(tf.random.stateless_normal((2, 4, 4, 3), [1, 2]), tf.bfloat16)
    assert layer(x, training=True).dtype == tf.bfloat16
    assert layer.moving_mean.dtype == "float32"


CONVOLUTIONS = {
    "pointwise": (PointwiseConv2D, {"kernel_size": 1}),
    "pointwise_strided": (PointwiseConv2D, {"kernel_size": 1, "strides": 2}),
    "wide": (ProductGradientConv2D, {"kernel_size": 3, "padding": "same"}),
    "dilated": (
        ProductGradientConv2D,
        {"kernel_size": 3, "padding": "same", "dilation_rate": (3, 2)},
    ),
    "even": (ProductGradientConv2D, {"kernel_size": (2, 4), "padding": "same"}),
}


@pytest.fixture(params=["own_kernels", "turned_kernel"])
def map_gradient(request, monkeypatch):
    # Where the processor has AVX-512, the second is not taken unless it is asked for.
    if request.param == "turned_kernel":
        monkeypatch.setattr(kseg.training_copy, "has_fast_convolutions", lambda dtype: False)


def outputs_and_gradients(made, options, dtype, size=(5, 7)):
    """Output, and gradients of map and weights, of -1, 0 and 1: no sum exceeds 256, so that
    bfloat16 holds every one exactly."""
    rng = np.random.default_rng(4)
    x = tf.constant(rng.integers(-1, 2, (2, *size, 3)).astype("float32"))
    x = tf.cast(x, dtype.removeprefix("mixed_"))
    layer = made(dtype=dtype, **options)
    layer.build(x.shape)
    layer.set_weights([rng.integers(-1, 2, w.shape) for w in layer.weights])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        upstream = tf.cast(rng.integers(-1, 2, y.shape), y.dtype)
        loss = tf.reduce_sum(y * upstream)
    gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
    return [tf.cast(value, tf.float32).numpy() for value in (y, *gradients)]


def assert_same_as_keras(made, kind, options, dtype, size=(5, 7)):
    found = [outputs_and_gradients(one, options, dtype, size) for one in (made, kind)]
    for theirs, ours in zip(*found, strict=True):
        assert np.any(theirs)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("map_gradient")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients_are_those_of_keras(name, dtype):
    kind, options = CONVOLUTIONS[name]
    assert_same_as_keras(layers.Conv2D, kind, {"filters": 4, **options}, dtype)


# Of a kernel of three on 16 pixels: at 36 the outer places never reach in, at 15 by one pixel.
# Of five on five pixels at 3 the outermost two lie 6 away.
@pytest.mark.parametrize(
    ("axis", "places", "dilation"),
    [((3, 36, 16), (1, 2), 1), ((3, 15, 16), (0, 3), 15), ((5, 3, 5), (1, 4), 3)],
)
def test_places_that_reach_a_map_are_kept(axis, places, dilation):
    assert _reach(*axis) == (slice(*places), dilation)


# Maps are of 5 x 7: all rows but the middle one are beyond, then the columns too, then the outer
# two of five, then none.
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("size", "dilation"), [(3, 6), (3, 7), (5, 3), (5, (3, 1)), (3, 2)])
def test_depthwise_kernels_are_cut_to_what_reaches_the_map(size, dilation, dtype):
    options = {"kernel_size": size, "dilation_rate": dilation, "padding": "same", "use_bias": False}
    options["depth_multiplier"] = 2
    assert_same_as_keras(layers.DepthwiseConv2D, ReachingDepthwiseConv2D, options, dtype)


def test_depthwise_convolutions_are_replaced_where_their_kernels_overreach():
    image = keras.Input((5, 7, 3))
    same = {"use_bias": False, "padding": "same"}
    kinds = {
        "far": (ReachingDepthwiseConv2D, same | {"dilation_rate": 5}),
        "near": (layers.DepthwiseConv2D, same | {"dilation_rate": 4}),
        "biased": (layers.DepthwiseConv2D, {"padding": "same", "dilation_rate": 5}),
        "active": (layers.DepthwiseConv2D, same | {"dilation_rate": 5, "activation": "relu"}),
    }
    maps = [layers.DepthwiseConv2D(3, name=n, **more)(image) for n, (_, more) in kinds.items()]
    copy = training_copy(keras.Model(image, maps))
    for name, (kind, _) in kinds.items():
        assert type(copy.get_layer(name)) is kind


def convolutions(dtype):
    image = keras.Input((8, 8, 8), dtype="float32")
    x = layers.Conv2D(4, 1, name="pointwise", dtype=dtype)(image)
    x = layers.Conv2D(1024, 1, strides=2, name="strided", dtype=dtype)(x)
    layers_ = [
        layers.Conv2D(4, 3, padding="same", name="many", dtype=dtype),
        layers.Conv2D(4, 3, name="valid", dtype=dtype),
        layers.Conv2D(4, 1, groups=4, name="grouped", dtype=dtype),
    ]
    return keras.Model(image, [layer(x) for layer in layers_])


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("strides", [(2, 2), (3, 2), (1, 4)])
def test_strides_that_divide_the_map_pick_its_pixels(strides, dtype):
    options = {"filters": 4, "kernel_size": 1, "strides": strides}
    assert_same_as_keras(layers.Conv2D, PointwiseConv2D, options, dtype, size=(6, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_products_give_what_einsum_gives(dtype):
    image = keras.Input((5, 7, 3), dtype=dtype)
    model = keras.Model(image, AdaptiveAverage(3, dtype=dtype, name="cells")(image))
    copy = training_copy(model)
    assert type(copy.get_layer("cells")) is SuccessiveProducts
    rng = np.random.default_rng(6)
    x = tf.cast(rng.normal(size=(2, 5, 7, 3)), dtype)
    upstream = tf.cast(rng.normal(size=(2, 3, 3, 3)), dtype)
    found = []
    for one in (model, copy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = one(x, training=True)
        found.append([y, tape.gradient(y, x, output_gradients=upstream)])
    # bfloat16 holds 8 bits; each of the two products rounds to them.
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        theirs, ours = (tf.cast(one, tf.float32) for one in (theirs, ours))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((16, 16, 256), ProductGradientConv2D),
        ((16, 17, 256), layers.Conv2D),
        ((16, 16, 255), layers.Conv2D),
        ((32, 32, 1024), ProductGradientConv2D),
        ((None, None, 512), layers.Conv2D),
    ],
)
def test_gradients_are_products_where_channels_are_many_for_the_map(shape, kind):
    image = keras.Input(shape, dtype="bfloat16")
    x = layers.Conv2D(4, 3, padding="same", name="conv", dtype="mixed_bfloat16")(image)
    assert type(training_copy(keras.Model(image, x)).get_layer("conv")) is kind


@pytest.mark.parametrize(
    ("dtype", "avx512", "expected"),
    [
        ("float32", True, {"strided": PointwiseConv2D}),
        ("float32", False, {"strided": PointwiseConv2D, "many": ProductGradientConv2D}),
        (
            "mixed_bfloat16",
            True,
            {
                "pointwise": PointwiseConv2D,
                "strided": PointwiseConv2D,
                "many": ProductGradientConv2D,
            },
        ),
    ],
)
def test_convolutions_are_replaced_where_that_is_faster_or_safer(
    dtype, avx512, expected, monkeypatch
):
    fast = {tf.float32: True, tf.bfloat16: avx512}
    monkeypatch.setattr(kseg.training_copy, "has_fast_convolutions", fast.get)
    copy = training_copy(convolutions(dtype))
    plain = dict.fromkeys(("pointwise", "strided", "many", "valid", "grouped"), layers.Conv2D)
    assert {name: type(copy.get_layer(name)) for name in plain} == plain | expected


@pytest.mark.parametrize(
    ("machine", "asked_by_user", "expected"),
    [("x86_64", None, "1"), ("AMD64", None, "1"), ("x86_64", "0", "0"), ("arm64", None, None)],
)
def test_onednn_is_asked_for_where_it_is_fast(machine, asked_by_user, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    environment = {} if asked_by_user is None else {"TF_ENABLE_ONEDNN_OPTS": asked_by_user}
    monkeypatch.setattr(os, "environ", environment)
    prepare_tensorflow()
    assert environment.get("TF_ENABLE_ONEDNN_OPTS") == expected


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's is for x86")
def test_onednn_computes_on_this_processor():
    assert has_fast_convolutions(tf.float32)


def test_layers_of_maps_of_any_size_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(kseg.training_copy, "has_fast_convolutions", {tf.float32: True}.get)
    image = keras.Input((None, None, 32))
    x = layers.Conv2D(4, 3, padding="same", name="wide")(image)
    far = layers.DepthwiseConv2D(3, padding="same", dilation_rate=5, use_bias=False, name="far")
    copy = training_copy(keras.Model(image, far(x)))
    assert type(copy.get_layer("wide")) is layers.Conv2D
    assert type(copy.get_layer("far")) is layers.DepthwiseConv2D


def test_xla_compiles_the_gradient_of_a_nearest_resize():
    image = keras.Input((3, 4, 2))
    model = keras.Model(image, NearestResize(6, 12, name="resize")(image))
    x = tf.constant(np.random.default_rng(5).normal(size=(2, 3, 4, 2)).astype("float32"))

    def output_and_gradient(model):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
            loss = tf.reduce_sum(y**2 * tf.reshape(tf.range(144.0), (1, 6, 12, 2)))
        return y, tape.gradient(loss, x)

    plain = output_and_gradient(training_copy(model))
    compiled = tf.function(output_and_gradient, jit_compile=True)(training_copy(model, jit=True))
    np.testing.assert_array_equal(compiled[0], plain[0])
    np.testing.assert_allclose(compiled[1], plain[1], rtol=1e-5)
