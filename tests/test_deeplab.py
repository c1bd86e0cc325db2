"""DeepLab v1 and v2, Attention to Scale and Zoom-Out: what makes each of them what it is."""

import keras
import numpy as np
import pytest
import zoo
from keras import ops

from kseg.models import build, trainable_parameters
from kseg.models.attention_to_scale import WeightedSum

NARROW = {"fc_channels": 8}


def seeded(name, size, options):
    """Weights depend on the layers' names alone, so equal nets of any size have equal ones."""
    model = build(name, (*size, 3), 5, options)
    zoo.seed_weights(model)
    return model


def maps(model, image, *names):
    """Return what the layers give the first time they are called."""
    outputs = {name: model.get_layer(name).output for name in names}
    values = keras.Model(model.input, outputs)(image, training=False)
    return [np.asarray(values[name]) for name in names]


def noise(*size):
    return np.random.RandomState(0).uniform(0, 255, (1, *size, 3)).astype("float32")


def resized(x, size):
    return np.asarray(ops.image.resize(x, size, interpolation="bilinear"))


def close(values, expected):
    """Float32 sums in another order differ by some 1e-7 a layer, and there are twenty."""
    np.testing.assert_allclose(values, expected, atol=1e-4 * np.abs(expected).max())


# architectures.md 4, the paper's table of fields of view: 4096 channels, built narrow.
@pytest.mark.parametrize(
    ("head", "kernel", "rate", "count"),
    [
        ("7x7_rate4", 7, 4, 134_346_581),
        ("4x4_rate4", 4, 4, 65_140_565),
        ("4x4_rate8", 4, 8, 65_140_565),
    ],
)
def test_heads_of_the_first_paper(head, kernel, rate, count):
    model = build("deeplabv1", (64, 96, 3), 21, {"head": head} | NARROW)
    fc6 = model.get_layer("fc6")
    assert (fc6.kernel_size, fc6.dilation_rate) == ((kernel, kernel), (rate, rate))
    assert trainable_parameters(model) - fc(8, kernel) + fc(4096, kernel) == count


def fc(channels, kernel):
    """Weights of fc6, fc7 and a classifier of 21 classes."""
    return (512 * kernel**2 + 1) * channels + (channels + 1) * channels + (channels + 1) * 21


def test_only_conv5_and_fc6_are_dilated():
    model = build("deeplabv1", (64, 96, 3), 5, NARROW)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    rates = [layer.dilation_rate[0] for layer in convolutions]
    assert rates == [1] * 10 + [2] * 3 + [12, 1, 1]
    pools = [layer for layer in model.layers if isinstance(layer, keras.layers.MaxPooling2D)]
    assert [pool.strides for pool in pools] == [(2, 2)] * 3 + [(1, 1)] * 2
    assert model.get_layer("fc7").output.shape == (None, 8, 12, 8)


@pytest.mark.parametrize(("before", "pool", "stride"), [("1_conv2", 1, 2), ("5_conv3", 5, 1)])
def test_pools_are_3x3_and_centred(before, pool, stride):
    model = seeded("deeplabv1", (64, 64), NARROW)
    x, pooled = maps(model, noise(64, 64), f"block{before}_relu", f"block{pool}_pool")
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    side = x.shape[1]
    windows = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    np.testing.assert_array_equal(pooled, np.max(windows, axis=0)[:, ::stride, ::stride])


def test_multi_scale_branches_meet_at_stride_8():
    model = build("deeplabv1", (64, 96, 3), 5, {"msc": True} | NARROW)
    sources = ("image", "pool1", "pool2", "pool3", "pool4")
    first = [model.get_layer(f"msc_{source}_conv1") for source in sources]
    assert [layer.kernel.shape for layer in first] == [
        (3, 3, channels, 128) for channels in (3, 64, 128, 256, 512)
    ]
    assert model.get_layer("msc_concat").output.shape == (None, 8, 12, 8 + 5 * 128)


def test_multi_scale_branches_see_the_normalised_image():
    # The mean colour of ImageNet becomes zero, so the branch gives what its biases make of it.
    model = seeded("deeplabv1", (64, 64), {"msc": True} | NARROW)
    image = np.broadcast_to(np.float32((123.68, 116.779, 103.939)), (1, 64, 64, 3))
    (branch,) = maps(model, image, "msc_image_conv1")
    bias = np.asarray(model.get_layer("msc_image_conv1").bias)
    # 27 products of weights below 1 with what float32 leaves of 123.68 - 123.68.
    np.testing.assert_allclose(
        branch, np.broadcast_to(np.maximum(bias, 0), branch.shape), atol=1e-4
    )


# architectures.md 4 and 7, with the residual network's strides in its 3x3 convolutions. The sizes
# there are 8n + 1, where every map has a row and a column more.
@pytest.mark.parametrize(
    ("name", "options", "side", "giga"),
    [
        ("deeplabv1", {}, 512, 128.6),
        ("deeplabv1", {}, 320, 50.9),
        ("deeplabv2", {"form": "torch"}, 512, 189.3),
    ],
)
def test_multiply_accumulates(name, options, side, giga):
    model = build(name, (side, side, 3), 21, options)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    total = sum(
        np.prod(layer.kernel.shape) * (layer.output.shape[1] + 1) ** 2 for layer in convolutions
    )
    assert total / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize(
    ("name", "options", "branch"),
    [
        ("deeplabv2", {"backbone": zoo.LIGHTEST_BACKBONE}, "aspp_rate{}_conv"),
        ("deeplabv2_vgg", NARROW, "fc8_rate{}"),
    ],
)
def test_scores_of_the_rates_are_summed(name, options, branch):
    rates = (2, 4, 8, 12)
    model = seeded(name, (64, 64), {"rates": rates} | options)
    names = [branch.format(rate) for rate in rates]
    *scores, total = maps(model, noise(64, 64), *names, "aspp")
    assert total.shape == (1, 8, 8, 5)
    close(total, sum(scores))


@pytest.mark.parametrize(
    ("name", "options", "layer", "merges"),
    [
        ("deeplabv2", {"backbone": zoo.LIGHTEST_BACKBONE}, "aspp", [({"msc": True}, np.max)]),
        (
            "attention_to_scale",
            NARROW,
            "fc8",
            [({"merge": "max"}, np.max), ({"merge": "average"}, np.mean)],
        ),
    ],
)
def test_scales_share_one_net_and_are_merged(name, options, layer, merges):
    """As if three nets of equal weights had seen three images."""
    image, scores = noise(128, 128), []
    for side in (128, 96, 64):
        model = seeded(name, (side, side), options)
        (score,) = maps(model, resized(image, (side, side)), layer)
        assert score.shape == (1, side // 8, side // 8, 5)
        scores.append(resized(score, (16, 16)))
    for merge, expected in merges:
        (merged,) = maps(seeded(name, (128, 128), options | merge), image, "merge")
        close(merged, expected(scores, axis=0))
    assert np.abs(scores[0] - scores[2]).max() > 0.1 * np.abs(merged).max()


def test_supervision_is_of_each_scale():
    model = seeded("attention_to_scale", (64, 64), {"scales": 2, "aux": True} | NARROW)
    image = noise(64, 64)
    outputs = model(image, training=False)
    assert list(outputs) == ["logits", "scale100", "scale50"]
    (score,) = maps(model, image, "fc8")
    close(outputs["scale100"], resized(score, (64, 64)))
    assert np.abs(outputs["scale100"] - outputs["scale50"]).max() > 0.1


def test_attention_weights_sum_to_one_over_scales():
    model = seeded("attention_to_scale", (64, 96), NARROW)
    (weights,) = maps(model, noise(64, 96), "attention")
    assert weights.shape == (1, 8, 12, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert weights.std() > 0.01


def test_attention_of_equal_inputs_is_the_average():
    attention = seeded("attention_to_scale", (64, 96), NARROW)
    average = seeded("attention_to_scale", (64, 96), {"merge": "average"} | NARROW)
    last = attention.get_layer("attention_conv2")
    last.set_weights([np.zeros(weight.shape) for weight in last.weights])
    image = noise(64, 96)
    (weights,) = maps(attention, image, "attention")
    np.testing.assert_allclose(weights, 1 / 3, atol=1e-6)
    close(attention(image)["logits"], average(image)["logits"])


def test_weighted_sum_by_hand():
    first, second = np.float32([[1, 2], [3, 4]]), np.float32([[10, 20], [30, 40]])
    weights = np.float32([[1, 0], [0.25, 0.5]])
    summed = WeightedSum()([x[None, None] for x in (first, second, weights)])
    # 1 and 2 alone; then 0.25 * 3 + 0.5 * 30 and 0.25 * 4 + 0.5 * 40.
    np.testing.assert_allclose(summed[0, 0], [[1, 2], [15.75, 21]])


def test_zoomout_convolves_before_it_resizes():
    """As if all maps were resized and joined, and one 1x1 convolution saw them."""
    model = seeded("zoomout", (64, 96), NARROW)
    relus = [layer.name for layer in model.layers if layer.name.endswith("_relu")][:13]
    *sources, first = maps(model, noise(64, 96), *relus, "scene", "fc1")
    # The strides of VGG16's five blocks, and the whole image.
    heights = [64] * 2 + [32] * 2 + [16] * 3 + [8] * 3 + [4] * 3 + [1]
    assert [source.shape[1] for source in sources] == heights
    joined = np.concatenate([resized(source, (16, 24)) for source in sources], axis=-1)
    # architectures.md 3: 4,224 channels of thirteen maps, and 512 of conv5_3's mean.
    assert joined.shape[-1] == 4_224 + 512
    slices = [folded(model, f"zoom{number}") for number in range(1, 15)]
    kernel = np.concatenate([kernel for kernel, _ in slices])
    close(first, joined @ kernel + sum(bias for _, bias in slices))


def folded(model, name):
    """Return kernel and bias of a convolution and its batch normalisation in one."""
    kernel = np.asarray(model.get_layer(f"{name}_conv").kernel)[0, 0]
    norm = model.get_layer(f"{name}_bn")
    gamma, beta, mean, variance = (np.asarray(weight) for weight in norm.weights)
    scale = gamma / np.sqrt(variance + norm.epsilon)
    return kernel * scale, beta - mean * scale


def test_zoomout_hears_every_map():
    model = build("zoomout", (64, 96, 3), 5, NARROW)
    slices = {number: model.get_layer(f"zoom{number}_bn").output for number in range(1, 14)}
    images = np.concatenate([noise(64, 96), noise(64, 96)[:, ::-1]])
    for x in keras.Model(model.input, slices)(images, training=True).values():
        # Batch normalisation adds 1e-5 to variances of some tens.
        np.testing.assert_allclose((np.mean(x), np.std(x)), (0, 1), atol=1e-3)


@pytest.mark.parametrize(("fine_tune", "vgg16"), [(False, 0), (True, 14_714_688)])
def test_zoomout_trains_its_classifier_alone_or_all(fine_tune, vgg16):
    # 1,024 hidden channels twice, as in the paper; the fourteen slices of the first layer have a
    # spread and a mean each instead of one bias.
    model = build("zoomout", (64, 96, 3), 21, {"fine_tune": fine_tune})
    classifier = 4_736 * 1024 + 14 * 2 * 1024 + 1025 * 1024 + 1025 * 21
    assert trainable_parameters(model) == vgg16 + classifier
