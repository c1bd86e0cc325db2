"""What makes DDRNet and PIDNet what they are: branches that stay apart, and how they meet."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kseg.export.xnnpack import outside_xnnpack
from kseg.models import build, macs, trainable_parameters
from kseg.models.ddrnet import WINDOWS, PaddedAverage, basic_layer, conv_bn, dappm
from kseg.models.pidnet import Similarity, _bag, _light_bag
from kseg.registry import MODELS

DDRNET_23 = {"base_channels": 64, "head_channels": 128}
PIDNET_M = {"base_channels": 64}
PIDNET_L = PIDNET_M | {
    "blocks": 3,
    "deep_blocks": 4,
    "light": False,
    "pyramid_channels": 112,
    "head_channels": 256,
}


# training.md 8: parameters and, in thousand millions, multiply-accumulates at 1024x2048. DDRNet's
# to the unit are those of the authors' layers; their paper has 5.7 and 20.1 million. Its head in
# training is 64 or 128 channels, normalised twice, and 19 classes.
@pytest.mark.parametrize(
    ("name", "options", "parameters", "in_training", "gigamacs"),
    [
        ("ddrnet", {}, 5_695_987, 5_695_987 + 38_355, 36.3),
        ("ddrnet", DDRNET_23, 20_148_947, 20_148_947 + 150_419, 143.1),
        ("pidnet", {}, 7_625_715, 7_720_935, 47.2),
        ("pidnet", PIDNET_M, 28_538_515, 28_763_111, 177.3),
        ("pidnet", PIDNET_L, 36_939_571, 37_314_311, 274.9),
    ],
)
def test_counts_and_macs(name, options, parameters, in_training, gigamacs):
    model = build(name, (1024, 2048, 3), 19, options)
    assert trainable_parameters(model) == parameters
    assert sum(np.prod(weight.shape) for weight in model.trainable_variables) == in_training
    # The sheet gives one decimal.
    assert macs(model) / 1e9 == pytest.approx(gigamacs, abs=0.05)


def built(function, *shapes):
    """Return a model of maps of these shapes, all weights drawn."""
    inputs = [keras.Input(shape) for shape in shapes]
    model = keras.Model(inputs, function(*inputs))
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(random.uniform(0.5, 1.5, weight.shape))
    return model


def run(model, *maps):
    return np.asarray(model([np.asarray(map_, "float32") for map_ in maps], training=False))


def above(model, name):
    """Return the names of the layers that the named one depends on."""
    return {layer.name for layer in keras.Model(model.input, model.get_layer(name).output).layers}


# 16x32 is the map of 1024x2048; 1x2 that of 64x96, smaller than every window.
@pytest.mark.parametrize("size", [(16, 32), (13, 21), (2, 3), (1, 2)])
def test_windows_count_the_zeros_around_the_map(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    for window, stride in WINDOWS:
        around = window // 2
        padded = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), (1, 2))
        expected = windows[:, ::stride, ::stride].mean((-2, -1))
        np.testing.assert_allclose(PaddedAverage(window, stride)(x), expected, atol=1e-6)


def test_window_on_two_pixels_by_hand():
    # torch's AvgPool2d(5, stride=2, padding=2), which divides by 25 whatever lies outside.
    row = np.array([10.0, 40.0], "float32").reshape(1, 1, 2, 1)
    assert np.asarray(PaddedAverage(5, 2)(row)).ravel() == pytest.approx([2.0])


# The converter warns of how it calibrates, whatever the model.
@pytest.mark.filterwarnings("ignore::UserWarning:tensorflow")
def test_window_stays_on_xnnpack_in_int8(tmp_path):
    random = np.random.default_rng(0)
    samples = [random.normal(size=(1, 16, 32, 8)).astype("float32") for _ in range(4)]
    layer = PaddedAverage(17, 8)
    graph = tf.function(lambda x: {"y": layer(x)}, [tf.TensorSpec((1, 16, 32, 8), name="x")])
    tf.saved_model.save(tf.Module(), str(tmp_path), {"serving_default": graph})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ({"x": sample} for sample in samples)
    path = tmp_path / "pool.tflite"
    path.write_bytes(converter.convert())
    assert outside_xnnpack(path) == []


@pytest.mark.parametrize("parallel", [False, True])
def test_scales_of_the_pyramid_build_on_each_other_unless_parallel(parallel):
    x = keras.Input((4, 6, 8))
    model = keras.Model(x, dappm(x, 4, 8, parallel=parallel))
    seen = above(model, "dappm4_process_conv")
    assert "dappm0_conv" in seen
    smaller = {f"dappm{number}_process_conv" for number in (1, 2, 3)}
    assert seen & smaller == (set() if parallel else smaller)


def test_strided_convolution_sees_zeros_on_every_side():
    # Sums of the ones below a 3x3 kernel around pixels 0 and 2 of 4 x 4 ones; Keras's "same",
    # around 1 and 3, would have 9 first.
    model = built(lambda x: conv_bn(x, 1, strides=2, name="c"), (4, 4, 1))
    model.get_layer("c_conv").set_weights([np.ones((3, 3, 1, 1))])
    sums = keras.Model(model.input, model.get_layer("c_conv").output)
    assert run(sums, np.ones((1, 4, 4, 1)))[0, :, :, 0].tolist() == [[4, 6], [6, 9]]


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_shortcut_takes_every_other_pixel(channels, size):
    # Below 16 channels the map is cropped first.
    model = built(lambda x: basic_layer(x, 4, blocks=1, strides=2, name="b"), (*size, channels))
    conv = model.get_layer("b_block1_shortcut_conv")
    x = np.random.default_rng(0).normal(size=(1, *size, channels))
    expected = x[:, ::2, ::2] @ np.asarray(conv.kernel)[0, 0]
    np.testing.assert_allclose(run(keras.Model(model.input, conv.output), x), expected, rtol=1e-5)


def test_branches_of_ddrnet_hear_of_each_other_twice():
    model = build("ddrnet", (64, 96, 3), 5, {"base_channels": 8})
    for stage in (4, 5):
        low, high = f"stage{stage}_low_sum", f"stage{stage}_high_sum"
        assert f"stage{stage}_high_block2_add" in above(model, low)
        assert f"stage{stage}_low_block2_add" in above(model, high)
        # What they hear is of the stage itself, not what was heard in it.
        assert high not in above(model, low) and low not in above(model, high)
        assert model.get_layer(high).output.shape[1:3] == (8, 12)
    # Stride 64, rounded up.
    assert model.get_layer("stage6_low_add").output.shape[1:3] == (1, 2)
    # The head in training stands where they have met once.
    assert "stage4_high_sum" in above(model, "aux") and "stage5_high_sum" not in above(model, "aux")


@pytest.fixture(scope="module")
def pidnet():
    return build("pidnet", (64, 96, 3), 5, {"base_channels": 8})


def test_context_hears_nothing_of_detail_and_boundary_in_pidnet(pidnet):
    of_context = above(pidnet, "dappm_add")
    assert not [name for name in of_context if name.startswith(("p3", "p4", "d3", "d4"))]
    assert not [name for name in above(pidnet, "d5_add") if name.startswith(("p3", "p4"))]
    assert not [name for name in above(pidnet, "p5_add") if name.startswith(("d3", "d4"))]
    for name in ("p5_add", "d5_add"):
        assert {"i3_relu", "i4_relu"} < above(pidnet, name)
        assert pidnet.get_layer(name).output.shape[1:3] == (8, 12)


def test_outputs_of_pidnet_in_training(pidnet):
    image = np.random.default_rng(0).uniform(0, 255, (1, 64, 96, 3)).astype("float32")
    outputs = pidnet(image, training=False)
    assert outputs["boundary"].shape == (1, 64, 96, 1)
    joined = np.concatenate([outputs["logits"], outputs["boundary"]], axis=-1)
    np.testing.assert_array_equal(outputs["boundary_aware"], joined)
    # Those of the authors' code: 0.4, 20 and 1.
    assert [weight for _, weight in MODELS.entry("pidnet").aux.values()] == [0.4, 20.0, 1.0]


def test_similarity_is_a_sigmoid_of_the_scalar_product():
    one = np.array([[1.0, 2.0], [1.0, -1.0]], "float32").reshape(1, 1, 2, 2)
    other = np.array([[1.0, -1.0], [1.0, 1.0]], "float32").reshape(1, 1, 2, 2)
    # 1 - 2 and 1 - 1.
    expected = [1 / (1 + np.e), 0.5]
    np.testing.assert_allclose(np.ravel(Similarity()([one, other])), expected, rtol=1e-6)


def branches():
    """Return two maps of detail, and two of context, that differ."""
    return np.random.default_rng(1).uniform(1, 2, (4, 1, 3, 3, 2))


def test_bag_takes_detail_on_boundaries_and_context_elsewhere():
    model = built(_bag, *3 * [(3, 3, 2)])
    p, other_p, i, other_i = branches()
    # The sigmoid of 100 is 1 in float32, that of -100 4e-44.
    yes, no = np.full_like(p, 100), np.full_like(p, -100)
    # x + (y - x) is y but for rounding.
    np.testing.assert_allclose(run(model, p, i, yes), run(model, p, other_i, yes), rtol=1e-5)
    np.testing.assert_allclose(run(model, p, i, no), run(model, other_p, i, no), rtol=1e-5)
    assert np.abs(run(model, p, i, yes) - run(model, p, i, no)).max() > 0.1


def test_light_bag_convolves_each_branch_with_what_the_other_adds():
    model = built(_light_bag, *3 * [(3, 3, 2)])
    p, other_p, i, other_i = branches()
    yes, no = np.full_like(p, 100), np.full_like(p, -100)
    kernel = model.get_layer("bag_i_conv").kernel
    kernel.assign(0 * kernel)
    # The detail's own convolution: p on a boundary, p + i elsewhere.
    np.testing.assert_allclose(run(model, p, i, yes), run(model, p, other_i, yes), rtol=1e-5)
    np.testing.assert_allclose(run(model, p, i, no), run(model, i, p, no), rtol=1e-5)
    assert np.abs(run(model, p, i, no) - run(model, p, other_i, no)).max() > 0.1
    kernel.assign(np.ones(kernel.shape))
    kernel = model.get_layer("bag_p_conv").kernel
    kernel.assign(0 * kernel)
    # The context's: i + p on a boundary, i elsewhere.
    np.testing.assert_allclose(run(model, p, i, no), run(model, other_p, i, no), rtol=1e-5)
    np.testing.assert_allclose(run(model, p, i, yes), run(model, i, p, yes), rtol=1e-5)
    assert np.abs(run(model, p, i, yes) - run(model, other_p, i, yes)).max() > 0.1
