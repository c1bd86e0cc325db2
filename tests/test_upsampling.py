"""Every way to enlarge a map, on the lecture's numbers and against one another."""

import keras
import numpy as np
import pytest

from kseg.upsampling import (
    BilinearResize,
    FixedDeconvolution,
    LearnedDeconvolution,
    depth_to_space,
    max_pool_with_indices,
    nearest,
    resize_to,
    unpool,
)

LECTURE = np.array([[10, 20], [30, 40]], "float32").reshape(1, 2, 2, 1)


def test_bilinear_resize_has_half_pixel_centres():
    model = applied(LECTURE, lambda x: resize_to(x, (4, 4), name="up"))
    np.testing.assert_allclose(model[0, 0, :, 0], [10, 12.5, 17.5, 20])
    np.testing.assert_allclose(model[0, :, 0, 0], [10, 15, 25, 30])


def test_resize_by_a_fraction_agrees_with_resize_by_a_whole_number():
    x = np.random.RandomState(0).normal(size=(1, 3, 4, 2)).astype("float32")
    whole = applied(x, lambda x: resize_to(x, (6, 8), name="up"))
    np.testing.assert_allclose(BilinearResize(6, 8)(x), whole, atol=1e-6)


def test_fixed_deconvolution_by_hand():
    # tent of factor 2 is (1, 3, 3, 1) / 4; zeros beyond the border darken it.
    np.testing.assert_allclose(
        FixedDeconvolution(2)(LECTURE)[0, 0, :, 0], [5.625, 9.375, 13.125, 11.25]
    )
    assert FixedDeconvolution(2).trainable_weights == []


@pytest.mark.parametrize("factor", [2, 8, 32])
def test_fixed_deconvolution_equals_resize_inside(factor):
    x = np.random.RandomState(0).uniform(size=(2, 3, 4, 5)).astype("float32")
    deconvolved = FixedDeconvolution(factor)(x)
    resized = applied(x, lambda x: resize_to(x, (3 * factor, 4 * factor), name="up"))
    inside = np.s_[:, factor // 2 : -factor // 2, factor // 2 : -factor // 2]
    # Both are sums of four float32 products of values below 1.
    np.testing.assert_allclose(deconvolved[inside], resized[inside], atol=1e-6)
    assert np.abs(deconvolved - resized).max() > 0.1
    np.testing.assert_array_equal(LearnedDeconvolution(factor)(x), deconvolved)


def test_learned_deconvolution_keeps_classes_apart():
    layer = LearnedDeconvolution(2)
    x = np.zeros((1, 2, 2, 3), "float32")
    x[..., 1] = 1
    layer.build(x.shape)
    layer.kernel.assign(keras.ops.ones(layer.kernel.shape))
    y = np.asarray(layer(x))
    assert y[..., 1].all()
    assert not y[..., [0, 2]].any()


def test_nearest_repeats_pixels():
    repeated = applied(LECTURE, lambda x: nearest(x, 2, name="up"))
    np.testing.assert_array_equal(
        repeated[0, ..., 0], np.kron([[10, 20], [30, 40]], np.ones((2, 2)))
    )


def test_depth_to_space_puts_each_channel_on_its_pixel():
    # Two classes, cells of 2 x 2: channel 2 * (2 * row + column) + class.
    for channel in range(8):
        cell, class_ = divmod(channel, 2)
        x = np.zeros((1, 1, 1, 8), "float32")
        x[..., channel] = 1
        expected = np.zeros((2, 2, 2))
        expected[cell // 2, cell % 2, class_] = 1
        y = applied(x, lambda x: depth_to_space(x, 2, name="shuffle"))
        np.testing.assert_array_equal(y[0], expected)


def unpooled(x):
    def there_and_back(x):
        pooled, indices = max_pool_with_indices(x, name="pool")
        return unpool(pooled, indices, name="unpool")

    return applied(x, there_and_back)


def test_unpooling_puts_each_maximum_back():
    x = np.random.RandomState(0).permutation(6 * 8 * 3).reshape(1, 6, 8, 3).astype("float32") - 70
    windows = x.reshape(1, 3, 2, 4, 2, 3)
    largest = windows.max(axis=(2, 4), keepdims=True)
    expected = np.where(windows == largest, windows, 0).reshape(x.shape)
    np.testing.assert_array_equal(unpooled(x), expected)


def test_unpooling_writes_ties_once_where_argmax_would():
    rows = [[5, 5, 1, 7], [5, 5, 7, 7], [0, 0, 2, 3], [0, 4, 3, 3]]
    first = [[5, 0, 0, 7], [0, 0, 0, 0], [0, 0, 0, 3], [0, 4, 0, 0]]
    x = np.array(rows, "float32").reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(unpooled(x)[0, ..., 0], first)


def test_unpooling_a_tie_of_zeros_still_writes_the_decoders_value_once():
    def with_ones(x):
        pooled, indices = max_pool_with_indices(x, name="pool")
        return unpool(keras.layers.Rescaling(0.0, 1.0, name="one")(pooled), indices, name="unpool")

    y = applied(np.zeros((1, 4, 4, 2), "float32"), with_ones)
    assert y.sum() == 4 * 2 and (y[:, ::2, ::2] == 1).all()


def applied(x, function):
    tensor = keras.Input(x.shape[1:])
    return np.asarray(keras.Model(tensor, function(tensor))(x))
