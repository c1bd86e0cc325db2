"""What sees how far, and without holes: HDC, DUC, multi-grid, chained pooling, large kernels."""

import re

import keras
import numpy as np
import pytest

from kseg.errors import UserError
from kseg.models import build
from kseg.upsampling import bilinear_kernel

LIGHT = {"backbone": "mobilenetv3_small"}


def unit_rates(model, pattern):
    """Return the dilation rates of the 3x3 convolutions of units, in the network's order."""
    return [
        layer.dilation_rate[0]
        for layer in model.layers
        if re.fullmatch(rf"{pattern}\d+_2_conv", layer.name)
    ]


def holes(rates):
    """Return how many pixels, and of how many, a stack of dilated 3-tap filters never sees."""
    response = np.ones(1, int)
    for rate in rates:
        filter_ = np.zeros(2 * rate + 1, int)
        filter_[::rate] = 1
        response = np.convolve(response, filter_)
    return (response == 0).sum(), len(response)


# architectures.md 25.6.
@pytest.mark.parametrize(
    ("rates", "missed", "width"),
    [
        ((1, 2, 3), 0, 13),
        ((1, 2, 5), 0, 17),
        ((1, 2, 5, 9), 0, 35),
        ((2, 2, 2, 2), 8, 17),
        ((1, 2, 9), 4, 25),
        ((3, 4, 5), 4, 25),
        ((5, 9, 17), 36, 63),
    ],
)
def test_holes_of_known_rates(rates, missed, width):
    assert holes(rates) == (missed, width)


def test_hdc_has_the_released_rates():
    model = build("tusimple", (64, 96, 3), 2)
    stage4, stage5 = unit_rates(model, "conv4_block"), unit_rates(model, "conv5_block")
    assert stage4 == [2, 2, 5, 9] + 4 * [1, 2, 5, 9] + [1, 2, 5]
    assert stage5 == [5, 9, 17]
    assert holes(stage4 + stage5)[0] == 0


def test_simple_hdc():
    model = build("tusimple", (64, 96, 3), 2, {"backbone": "resnet50", "hdc": "simple"})
    stage4, stage5 = unit_rates(model, "conv4_block"), unit_rates(model, "conv5_block")
    assert (stage4, stage5) == ([1, 2, 3, 1, 2, 3], [3, 4, 5])
    assert holes(stage4 + stage5)[0] == 0


def test_all_units_of_pspnet_are_dilated_and_leave_holes():
    model = build("pspnet", (64, 96, 3), 2)
    rates = unit_rates(model, "conv4_block") + unit_rates(model, "conv5_block")
    assert rates == 6 * [2] + 3 * [4]
    # All rates are even: every other pixel of the 2 * (6 * 2 + 3 * 4) + 1 is missed.
    assert holes(rates) == (24, 49)


def test_pspnet_at_output_stride_16_dilates_the_last_stage_alone():
    model = build("pspnet", (64, 96, 3), 2, {"output_stride": 16})
    rates = unit_rates(model, "conv4_block") + unit_rates(model, "conv5_block")
    assert rates == 6 * [1] + 3 * [2]


@pytest.mark.parametrize("cell_width", [1, 2])
def test_dense_upsampling_puts_a_channel_on_its_pixel(cell_width):
    classes, factor = 3, 8 // cell_width
    model = build("tusimple", (64, 96, 3), classes, LIGHT | {"cell_width": cell_width})
    row, column, label = 2, 3, 1
    for rate in (6, 12, 18, 24):
        kernel, bias = model.get_layer(f"duc_rate{rate}_conv").weights
        kernel.assign(np.zeros(kernel.shape))
        bias.assign(np.eye(bias.shape[0])[(row * factor + column) * classes + label])
    scores = keras.Model(model.input, model.get_layer("duc").output)(np.zeros((1, 64, 96, 3)))
    expected = np.zeros((1, 64 // cell_width, 96 // cell_width, classes))
    # Four convolutions of different rates are summed.
    expected[:, row::factor, column::factor, label] = 4
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [2, 4, 8]),
        ({"output_stride": 8}, [4, 8, 16]),
        ({"output_stride": 32}, [1, 2, 4]),
        ({"multi_grid": (1, 2, 1)}, [2, 4, 2]),
        # torchvision leaves the first unit at the rate of what came before.
        ({"multi_grid": (), "form": "torch"}, [1, 2, 2]),
    ],
)
def test_multi_grid_multiplies_the_rate_of_the_stage(options, rates):
    assert unit_rates(build("deeplabv3", (64, 96, 3), 2, options), "conv5_block") == rates


def test_blocks_in_cascade_double_the_rate():
    model = build("deeplabv3_cascade", (64, 96, 3), 2)
    names = ("conv5_block", "block5_unit", "block6_unit", "block7_unit")
    rates = [unit_rates(model, name) for name in names]
    # Figure 3b of the paper: 2, 4, 8, 16 at output stride 16; times (1, 2, 1).
    assert rates == [[2, 4, 2], [4, 8, 4], [8, 16, 8], [16, 32, 16]]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("deeplabv3", {"multi_grid": (1, 2, 1)}, "no dilation rates for single units.*resnet50"),
        ("tusimple", {"hdc": "simple"}, "no dilation rates for single units.*resnet50"),
        ("pspnet", {"deep_stem": True}, "no deep stem.*resnet50"),
    ],
)
def test_a_backbone_that_cannot_says_which_can(name, options, words):
    with pytest.raises(UserError, match=words):
        build(name, (64, 96, 3), 2, LIGHT | options)


# Each of four links reaches 2 pixels by its 5x5 maximum, and 1 by its 3x3 convolution; were they
# not a chain, they would reach 3.
@pytest.mark.parametrize(("light", "reach"), [(False, 4 * 3), (True, 4 * 2)])
def test_refinenet_pools_in_a_chain(light, reach):
    model = build("refinenet", (160, 160, 3), 2, LIGHT | {"light": light, "base_channels": 8})
    for number in range(1, 5):
        kernel = model.get_layer(f"pool4_conv{number}").kernel
        kernel.assign(np.ones(kernel.shape))
    impulse = np.zeros((1, 40, 40, 8), "float32")
    impulse[:, 20, 20] = 1
    assert box(between(model, "pool4_relu", "pool4")(impulse)) == (20, reach)


def test_global_convolution_is_one_large_linear_kernel():
    model = build("gcn", (64, 96, 3), 2, LIGHT | {"kernel": 7})
    for name in ("gcn4_left1", "gcn4_left2", "gcn4_right1", "gcn4_right2"):
        bias = model.get_layer(name).bias
        bias.assign(np.arange(1, 1 + bias.shape[0]))
    convolution = between(model, model.get_layer("gcn4_left1").input, "gcn4")
    a, b = np.random.RandomState(0).normal(size=(2, 1, 16, 24, 16)).astype("float32")
    zero = convolution(np.zeros_like(a))
    # Float32 sums of a few hundred products of size one.
    np.testing.assert_allclose(
        convolution(a + b) - zero, convolution(a) - zero + convolution(b) - zero, atol=1e-4
    )
    impulse = np.zeros_like(a)
    impulse[:, 8, 8] = 1
    for name in ("gcn4_left1", "gcn4_left2", "gcn4_right1", "gcn4_right2"):
        kernel, bias = model.get_layer(name).weights
        kernel.assign(np.ones(kernel.shape))
        bias.assign(np.zeros(bias.shape))
    assert box(convolution(impulse)) == (8, 3)


def test_gcn_learns_its_upsampling_from_the_bilinear_kernel():
    model = build("gcn", (64, 96, 3), 2, LIGHT | {"upsampling": "learned"})
    for stride in (16, 8, 4, 2, 1):
        kernel = model.get_layer(f"up{stride}").kernel
        assert kernel.trainable
        np.testing.assert_array_equal(kernel, bilinear_kernel(2, 2))


def test_an_even_kernel_is_refused():
    with pytest.raises(UserError, match="must be odd"):
        build("gcn", (64, 96, 3), 2, LIGHT | {"kernel": 14})


def between(model, start, end):
    """Return the part of a model from the output of one layer, or a tensor, to that of another."""
    start = model.get_layer(start).output if isinstance(start, str) else start
    part = keras.Model(start, model.get_layer(end).output)
    return lambda x: np.asarray(part(x, training=False))


def box(response):
    """Return centre and reach of a response that fills one square, and is zero outside."""
    seen = response[0].any(axis=-1)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert (rows == columns).all()
    assert seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    centre = (rows[0] + rows[-1]) // 2
    return centre, rows[-1] - centre
