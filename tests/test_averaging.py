"""Flips and scales: means of probabilities, by hand, by NumPy and by TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from nets import colours, keras_net, numpy_net
from tiny import SIZE, drawn

from kseg.averaging import FlippedPredictor, ScaledPredictor
from kseg.crf import DenseCRF
from kseg.errors import UserError
from kseg.probabilities import softmax
from kseg.refinement import MOST_VALUES, RefinedPredictor
from kseg.tiling import TiledPredictor
from kseg.weights import copy_weights
from kseg.wrapped import WrappedPredictor


def sloping(image):
    """Logits of two classes that depend on the colour and on the place from left to right."""
    across = np.arange(image.shape[1]) / 10 - 1
    return np.stack([image[..., 0] / 99, image[..., 0] * 0 + across], axis=-1)


def test_flip_is_the_mean_of_probabilities_by_numpy():
    image = drawn(*SIZE)
    predictor = FlippedPredictor.of(numpy_net(sloping, SIZE, num_classes=2))
    one, other = (
        np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for logits in (sloping(image.astype(float)), sloping(image[:, ::-1].astype(float)))
    )
    expected = (one + other[:, ::-1]) / 2
    np.testing.assert_allclose(predictor.probabilities(image), expected, atol=1e-6)
    assert np.abs(one - expected).max() > 0.1  # the mirror image does count
    np.testing.assert_array_equal(predictor.predict(image), expected.argmax(-1))


def test_it_is_not_the_mean_of_logits():
    # One pixel of two: probabilities 0.9 and 0.2 of class 1. Their mean is 0.55; that of the
    # logits ln 9 and -ln 4 is 0.405, which stands for 0.6.
    def two(image):
        one = np.array([[0.0, np.log(9)], [0.0, -np.log(4)]])
        return one[None]

    predictor = FlippedPredictor.of(numpy_net(two, (1, 2), num_classes=2))
    found = predictor.probabilities(np.zeros((1, 2, 3), np.uint8))[0, :, 1]
    np.testing.assert_allclose(found, [0.55, 0.55], atol=1e-6)


# An image that is resized is rounded to whole levels, and halves are rounded to even ones from
# either side: one level is 1/40 of a logit, and changes a probability by a quarter of that.
@pytest.mark.parametrize(("size", "atol"), [(SIZE, 1e-6), ((50, 71), 0.25 / 40)])
def test_a_net_that_mirrors_with_its_image_gains_nothing(size, atol):
    image, net = drawn(*size), numpy_net(colours, SIZE)
    flipped = FlippedPredictor.of(net)
    np.testing.assert_allclose(flipped.probabilities(image), net.probabilities(image), atol=atol)
    assert flipped.predict(image, size=(20, 33)).shape == (20, 33)


@pytest.fixture(scope="module")
def unet():
    return keras_net("unet", SIZE, base_channels=2)


def test_scales_are_those_of_models_rebuilt_by_tensorflow(unet):
    image, expected = drawn(100, 130), 0
    # 1.5 times 64 and 96, the latter to a multiple of 32: 144 lies halfway, and 128 is even.
    large = keras_net("unet", (96, 128), base_channels=2)
    copy_weights(unet.model, large.model)
    for predictor in (unet, large):
        fed = np.rint(tf.image.resize(image, predictor.size).numpy())
        logits = predictor.model(fed[None], training=False)["logits"]
        expected = expected + tf.nn.softmax(tf.image.resize(logits, (100, 130)))[0].numpy() / 2
    averaged = ScaledPredictor.of(unet, [1.0, 1.5])
    np.testing.assert_allclose(averaged.probabilities(image), expected, atol=1e-5)
    assert np.abs(unet.probabilities(image) - expected).max() > 1e-3


def test_scales_of_tiles_by_numpy():
    image = drawn(100, 130)
    predictor = ScaledPredictor.of(TiledPredictor.of(numpy_net(colours, SIZE)), [1, 0.5])
    half = softmax(colours(np.rint(tf.image.resize(image, (50, 65)).numpy())))
    half = tf.image.resize(half, (100, 130)).numpy()
    expected = (softmax(colours(image.astype(np.float32))) + half) / 2
    np.testing.assert_allclose(predictor.probabilities(image), expected, atol=1e-5)


def test_all_of_it_and_a_crf_behind():
    image = drawn(100, 130)
    net = FlippedPredictor.of(numpy_net(colours, SIZE))
    scaled = ScaledPredictor.of(TiledPredictor.of(net), [0.75, 1.25])
    refined = RefinedPredictor.of(scaled, [DenseCRF(iterations=2)])
    expected = DenseCRF(iterations=2).refine(scaled.probabilities(image), image)
    np.testing.assert_allclose(refined.probabilities(image), expected, atol=1e-6)
    np.testing.assert_array_equal(refined.predict(image), expected.argmax(-1))
    told = tuple(map(str, refined.refinements))
    assert told[:3] == ("flip", "tiles of 64 x 96, overlap 16", "scales 0.75 1.25")
    assert told[3].startswith("DenseCRF(")


def test_logits_are_logarithms_of_the_mean():
    flipped, image = FlippedPredictor.of(numpy_net(sloping, SIZE, num_classes=2)), drawn(40, 50)
    np.testing.assert_allclose(
        softmax(flipped.logits(image)), flipped.probabilities(image), atol=1e-6
    )


def test_another_size_is_that_of_what_is_inside(unet):
    larger = ScaledPredictor.of(FlippedPredictor.of(unet), [1.0, 2.0]).at_size((96, 128))
    assert larger.size == larger.card.size == (96, 128)
    assert [member.size for member in larger.members] == [(96, 128), (192, 256)]
    assert isinstance(larger.inner, FlippedPredictor)
    assert isinstance(larger, WrappedPredictor)


def test_class_maps_have_no_mean():
    predictor = numpy_net(colours, SIZE, output="classes")
    for of in (FlippedPredictor.of, lambda inner: ScaledPredictor.of(inner, [1.0])):
        with pytest.raises(UserError, match=r"net\.tflite gives a class map.*--output logits"):
            of(predictor)


@pytest.mark.parametrize("scales", [[0.2], [1, 5], [float("nan")], []])
def test_scales_that_do_not_do(scales):
    with pytest.raises(UserError, match="scales are 0.25 to 4"):
        ScaledPredictor.of(numpy_net(colours, SIZE), scales)


def test_scales_of_a_file_of_one_size_need_tiles():
    net = numpy_net(colours, SIZE)
    with pytest.raises(
        UserError, match=r"net\.tflite takes 64 x 96 only; other scales need --tile"
    ):
        ScaledPredictor.of(net, [1, 0.5])
    image = drawn(70, 80)
    same = ScaledPredictor.of(net, [1.0])
    np.testing.assert_allclose(same.probabilities(image), net.probabilities(image), atol=1e-7)


def test_too_much_to_refine_at_once():
    # One row less than a square of 2**28 / 3 pixels is too few to refuse.
    refined = RefinedPredictor.of(numpy_net(colours, SIZE), [DenseCRF()])
    side = int((MOST_VALUES / 3) ** 0.5) + 1
    with pytest.raises(UserError, match=rf"{side} x {side} pixels are too many.*--crf"):
        refined.predict(drawn(8, 8), size=(side, side))
