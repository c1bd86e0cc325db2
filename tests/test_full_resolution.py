"""Ways back to full resolution: unpooling, a stream that never left it, cropped deconvolutions."""

import keras
import numpy as np
import pytest
import zoo
from test_backbones import randomise, write_legacy

from kseg.card import ModelCard
from kseg.errors import UserError
from kseg.inference import Predictor
from kseg.models import build, macs, segnet, trainable_parameters
from kseg.models.deconvnet import fuse_proposals
from kseg.models.fcn import _upsample
from kseg.upsampling import bilinear_kernel

UNPOOLING = ("segnet", "segnet_basic", "deconvnet")


def probe(model, tensors):
    """Return the values of tensors inside a model for the zoo's image, by the same keys."""
    values = keras.Model(model.input, tensors)(zoo.image(), training=False)
    return {key: np.asarray(value) for key, value in values.items()}


@pytest.mark.parametrize("name", UNPOOLING)
def test_each_value_goes_where_its_own_stage_had_the_maximum(name):
    assert misplaced(zoo.seeded_model(name)) == []


def test_indices_of_another_stage_are_noticed(monkeypatch):
    coarsest = []

    def by_the_coarsest(x, indices, *, name):
        coarsest.append(indices)
        factor = x.shape[1] // coarsest[0].shape[1]
        enlarged = keras.layers.UpSampling2D(factor, name=f"{name}_wrong")(coarsest[0])
        return unpool(x, enlarged, name=name)

    unpool = segnet.unpool
    monkeypatch.setattr(segnet, "unpool", by_the_coarsest)
    # All stages are equally wide here, so that nothing but the places is wrong.
    model = zoo.seeded_model("segnet_basic")
    assert misplaced(model) == ["block3_unpool", "block2_unpool", "block1_unpool"]


def misplaced(model):
    """Return the unpoolings that differ from NumPy's: argmax of the encoder's windows, zeros."""
    unpoolings = [layer for layer in model.layers if layer.name.endswith("_unpool")]
    assert unpoolings
    wrong = []
    for layer in unpoolings:
        pool = model.get_layer(layer.name.replace("unpool", "pool"))
        maps = {"encoder": pool.input, "x": layer.input[0], "y": layer.output}
        maps = probe(model, maps)
        if not np.array_equal(maps["y"], unpooled(maps["x"], first_maxima(maps["encoder"]))):
            wrong.append(layer.name)
    return wrong


def first_maxima(x):
    """Return (B, h, w, C, 4): 1 at the first maximum of each window of 2 x 2, row by row."""
    batch, height, width, channels = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    windows = windows.transpose(0, 1, 3, 5, 2, 4).reshape(*windows.shape[:2], width // 2, -1, 4)
    return np.eye(4)[windows.argmax(-1)]


def unpooled(x, places):
    batch, height, width, channels = x.shape
    windows = (x[..., None] * places).reshape(batch, height, width, channels, 2, 2)
    return windows.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels)


def test_encoders_start_from_vgg16(tmp_path):
    original = keras.applications.VGG16(weights=None, include_top=False, input_shape=(64, 64, 3))
    randomise(original)
    path = tmp_path / "vgg16_notop.h5"
    write_legacy(original, path)
    options = {"backbone_weights": path}
    model = build("segnet", (64, 64, 3), 2, options)
    # keras.applications reads BGR.
    kernel, bias = original.get_layer("block1_conv1").get_weights()
    ours = model.get_layer("block1_conv1").get_weights()
    np.testing.assert_array_equal(ours[0], kernel[:, :, ::-1])
    np.testing.assert_array_equal(ours[1], bias)
    last = model.get_layer("block5_conv3").get_weights()
    np.testing.assert_array_equal(last[0], original.get_layer("block5_conv3").get_weights()[0])
    with pytest.raises(UserError, match="base_channels=8"):
        build("segnet", (64, 64, 3), 2, options | {"base_channels": 8})


def deconvnet_bottleneck(channels):
    """Return the weights, biases and normalisations of fc6, fc7 and fc6_deconv."""
    fc6 = 7 * 7 * 512 * channels + 3 * channels
    fc7 = channels * channels + 3 * channels
    return fc6 + fc7 + 7 * 7 * channels * 512 + 3 * 512


@pytest.mark.slow
def test_count_of_deconvnet_at_full_width():
    assert trainable_parameters(build("deconvnet", (64, 96, 3), 21)) == 251_805_653


# The deepest map: 2x3, 7x7 as in the paper, 8x10.
@pytest.mark.parametrize(
    ("size", "fc6", "coarsest"),
    [((64, 96), (2, 3), (2, 3)), ((224, 224), (1, 1), (7, 7)), ((256, 320), (8, 10), (8, 10))],
)
def test_fc6_of_deconvnet_makes_one_vector_of_the_papers_size(size, fc6, coarsest):
    model = build("deconvnet", (*size, 3), 21, {"fc_channels": 8})
    assert model.get_layer("fc6").output.shape[1:3] == fc6
    assert model.get_layer("block5_unpool").input[0].shape[1:3] == coarsest
    # 251,805,653 weights (architectures.md 5) at every size: the difference is worked out.
    outside = trainable_parameters(model) - deconvnet_bottleneck(8)
    assert outside + deconvnet_bottleneck(4096) == 251_805_653


def test_macs_of_unpooling_models():
    # architectures.md 5 and 15: DeconvNet 32.75 G at 224x224; fc6, fc7 and fc6_deconv each have
    # one position there. SegNet 104.1 G at 352x480.
    narrow = macs(build("deconvnet", (224, 224, 3), 21, {"fc_channels": 8}))
    narrow_fc, wide_fc = (2 * 7 * 7 * 512 * channels + channels**2 for channels in (8, 4096))
    assert (narrow - narrow_fc + wide_fc) / 1e9 == pytest.approx(32.75, abs=0.005)
    assert macs(build("segnet", (352, 480, 3), 11)) / 1e9 == pytest.approx(104.1, abs=0.05)


# Table 1 of the paper: units, stride and channels of each stage of the pooled stream.
DOWN = [(3, 2, 96), (4, 4, 192), (2, 8, 384), (2, 16, 384)]
UP = [(2, 8, 192), (2, 4, 192), (2, 2, 96)]


@pytest.mark.parametrize(
    ("variant", "stages"), [("A", DOWN + UP), ("B", [*DOWN, (2, 32, 384), (2, 16, 192), *UP])]
)
def test_streams_of_frrn(variant, stages):
    model = build("frrn", (64, 96, 3), 19, {"variant": variant})
    pooled = [layer.output.shape for layer in model.layers if layer.name.endswith("_unit1_2_relu")]
    assert pooled == [
        (None, 64 // stride, 96 // stride, channels) for _, stride, channels in stages
    ]
    sums = residual_sums(model)
    assert len(sums) == sum(units for units, _, _ in stages)
    assert {layer.output.shape for layer in sums} == {(None, 64, 96, 32)}


def residual_sums(model):
    """Return the layers that add to the full-resolution stream, first to last."""
    inside = [layer for layer in model.layers if layer.name.startswith(("down", "up"))]
    return [layer for layer in inside if isinstance(layer, keras.layers.Add)]


def test_residual_stream_of_frrn_grows_by_maps_of_equal_cells():
    model = zoo.seeded_model("frrn")
    stream = model.get_layer("split_bn").output
    for layer in residual_sums(model):
        before, added = layer.input
        assert before is stream
        stride = int(layer.name.split("_")[0].removeprefix("down").removeprefix("up"))
        values = probe(model, {"added": added})["added"]
        assert spread(values, stride) == 0 < spread(values, 2 * stride)
        stream = layer.output
    assert model.get_layer("merge").input[1] is stream


def spread(x, side):
    """Return the largest difference within cells of side x side pixels."""
    _, height, width, channels = x.shape
    cells = x.reshape(height // side, side, width // side, side, channels)
    return np.ptp(cells, axis=(1, 3)).max()


def test_silent_units_leave_the_residual_stream_of_frrn_as_it_is():
    model = zoo.seeded_model("frrn")
    for layer in model.layers:
        if layer.name.endswith("_residual"):
            layer.set_weights([np.zeros_like(value) for value in layer.get_weights()])
    maps = {"first": model.get_layer("split_bn").output, "last": residual_sums(model)[-1].output}
    maps = probe(model, maps)
    np.testing.assert_array_equal(maps["last"], maps["first"])
    assert maps["first"].min() < 0 < maps["first"].max()


def test_fused_proposals_by_hand():
    # Boxes of 3 x 2 and 2 x 3 pixels overlap in one: two classes, a constant score each.
    given = iter([np.full((2, 3, 2), (1, -5), "float32"), np.full((3, 2, 2), (0.5, 2), "float32")])
    image = np.zeros((4, 5, 3), "uint8")
    fused = fuse_proposals(lambda part: next(given), image, [(0, 0, 3, 2), (2, 1, 4, 4)])
    assert fused.dtype == np.float32
    first = [[1, 1, 1, 0, 0], [1, 1, 1, 0.5, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5, 0]]
    second = [[0, 0, 0, 0, 0], [0, 0, 2, 2, 0], [0, 0, 2, 2, 0], [0, 0, 2, 2, 0]]
    np.testing.assert_array_equal(fused[..., 0], first)
    np.testing.assert_array_equal(fused[..., 1], second)


def test_what_lies_outside_of_the_image_is_black_and_cut_off():
    image = np.arange(1, 37, dtype="uint8").reshape(3, 4, 3)
    parts = []

    def scores(part):
        parts.append(part)
        return part.astype("float32")

    fused = fuse_proposals(scores, image, [(-1, -2, 2, 1), (3, 1, 6, 3)])
    expected = np.zeros((3, 4, 3))
    expected[:1, :2], expected[1:, 3:] = image[:1, :2], image[1:, 3:]
    np.testing.assert_array_equal(fused, expected)
    assert [part.shape for part in parts] == [(3, 3, 3), (2, 3, 3)]
    assert not parts[0][:2].any() and not parts[0][:, 0].any() and not parts[1][:, 1:].any()


def test_proposals_of_a_predictor():
    classes = tuple(f"class {number}" for number in range(zoo.NUM_CLASSES))
    card = ModelCard("deconvnet", {}, classes, ((0, 0, 0),) * len(classes), zoo.SIZE)
    predictor = Predictor.from_keras(zoo.seeded_model("deconvnet"), card)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), "uint8")
    fused = fuse_proposals(predictor.logits, image, [(0, 0, 70, 50), (10, 5, 40, 45)])
    expected = np.maximum(predictor.logits(image), 0)
    part = expected[5:45, 10:40]
    np.maximum(part, predictor.logits(image[5:45, 10:40]), out=part)
    np.testing.assert_array_equal(fused, expected)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [([], "no boxes"), ([(5, 0, 9, 3)], "no pixel"), ([(2, 2, 2, 4)], "no pixel")],
)
def test_boxes_without_pixels_are_refused(boxes, words):
    with pytest.raises(UserError, match=words):
        fuse_proposals(lambda part: part, np.zeros((4, 5, 3), "uint8"), boxes)


# architectures.md 2, for an image of 500 pixels: pools round up, fc6 pads nothing, and a
# transposed convolution keeps all that its kernel reaches: (n - 1) * stride + 2 * stride.
@pytest.mark.parametrize(("stride", "enlarged"), [(32, 544), (16, 560), (8, 568)])
def test_sizes_of_fcn_padded_as_in_caffe(stride, enlarged):
    options = {"padding": "caffe", "finest_stride": stride, "fc_channels": 8}
    model = build("fcn", (500, 500, 3), 21, options)
    pools = [model.get_layer(f"block{number}_pool") for number in range(1, 6)]
    assert [sides(layer) for layer in pools] == [{349}, {175}, {88}, {44}, {22}]
    assert sides(model.get_layer("fc6")) == {16}
    assert sides(model.get_layer("up1_trim")) == {enlarged}
    assert model.output["logits"].shape == (None, 500, 500, 21)
    same = build("fcn", (64, 96, 3), 21, options | {"padding": "same"})
    assert trainable_parameters(model) == trainable_parameters(same)


def sides(layer):
    return set(layer.output.shape[1:3])


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_fcn_padded_as_in_caffe_answers_where_the_pixel_is(stride):
    """The first and the last pixel of a cell lie as far before its centre as behind it.

    Each score is made to answer a bright pixel in a class of its own: 0 for the coarsest map, 1
    for stride 16, 2 for stride 8. Cells begin at 32 n - 3 pixels: 99 around the image (and one
    that the first convolution adds by itself) are 3 more than three cells.
    """
    options = {"padding": "caffe", "finest_stride": stride, "upsampling": "fixed"}
    options |= {"fc_channels": 8}
    model = build("fcn", (64, 96, 3), 3, options)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            let_through(layer)
    paths = [path for path in (32, 16, 8) if path >= stride]
    pixels = [(29, 61), (60, 92)]
    images = np.zeros((2, 64, 96, 3), "float32")
    for image, pixel in zip(images, pixels, strict=True):
        image[pixel] = 255
    answers = np.asarray(model(images, training=False)["logits"])
    for class_, path in enumerate(paths):
        for answer, pixel, side in zip(answers[..., class_], pixels, (1, -1), strict=True):
            centre = np.argwhere(answer > 0.999 * answer.max()).mean(0)
            np.testing.assert_allclose(centre - pixel, side * (path - 1) / 2)


def let_through(layer):
    """Make a convolution copy the middle of its first channel; scores to their own class."""
    kernel = np.zeros(layer.kernel.shape, "float32")
    class_ = {"score32": 0, "score16": 1, "score8": 2}.get(layer.name, 0)
    kernel[kernel.shape[0] // 2, kernel.shape[1] // 2, 0, class_] = 1
    layer.set_weights([kernel, np.zeros(kernel.shape[-1], "float32")])


@pytest.mark.parametrize("upsampling", ["bilinear", "fixed", "learned"])
def test_enlarging_as_in_caffe_keeps_all_that_the_kernel_reaches(upsampling):
    x = np.random.RandomState(0).normal(size=(1, 3, 4, 2)).astype("float32")
    tensor = keras.Input(x.shape[1:])
    model = keras.Model(tensor, _upsample(tensor, 8, upsampling, "caffe", name="up"))
    kernel = bilinear_kernel(8, 2)[..., None] * np.eye(2, dtype="float32")
    expected = keras.ops.conv_transpose(x, kernel, strides=8, padding="valid")
    assert expected.shape == (1, 4 * 8, 5 * 8, 2)
    # Sums of four float32 products of values below 3.
    np.testing.assert_allclose(model(x), expected, atol=1e-5)


def test_only_vgg16_is_padded_as_in_caffe():
    with pytest.raises(UserError, match="vgg16 alone, not for resnet50"):
        build("fcn", (64, 96, 3), 5, {"padding": "caffe", "backbone": "resnet50"})


def test_skips_at_once_are_the_staged_ones_scaled():
    light = zoo.light_options("fcn")
    staged = build("fcn", (64, 96, 3), 5, light)
    at_once = build("fcn", (64, 96, 3), 5, light | {"at_once": True})
    zoo.seed_weights(staged)
    at_once.set_weights(staged.get_weights())
    for name, scale in (("score16", 0.01), ("score8", 0.0001)):
        kernel, bias = staged.get_layer(name).get_weights()
        at_once.get_layer(name).set_weights([kernel / scale, bias])
    expected = zoo.outputs(staged)["logits"]
    # A product with a scale and its inverse rounds twice.
    np.testing.assert_allclose(
        zoo.outputs(at_once)["logits"], expected, atol=1e-5 * np.abs(expected).max()
    )
