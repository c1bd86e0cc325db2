"""What makes STDC, PP-LiteSeg and BiSeNet V2 what they are."""

import keras
import numpy as np
import pytest
import zoo

from kseg.models import build, macs, trainable_parameters
from kseg.models.ppliteseg import ChannelStatistics
from kseg.registry import BACKBONES

SIZE = (64, 96, 3)
LIGHT = {"backbone": "mobilenetv3_small"}


@pytest.fixture(scope="module")
def ppliteseg():
    model = build("ppliteseg", SIZE, 5, LIGHT)
    zoo.seed_weights(model)
    return model


@pytest.fixture(scope="module")
def bisenet():
    return build("bisenetv2", SIZE, 5)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def run_between(model, values, outputs):
    """Return what the layers of `outputs` give where others give `values`, by name."""
    inputs = [model.get_layer(name).output for name in values]
    part = keras.Model(inputs, {name: model.get_layer(name).output for name in outputs})
    return {name: np.asarray(value) for name, value in part(list(values.values())).items()}


def stdc1(form):
    image = keras.Input(SIZE, name="image")
    return keras.Model(image, BACKBONES["stdc1"](image, form=form).stages[-1])


def test_a_block_of_stdc_joins_four_depths():
    model = stdc1("keras")
    for stage, filters in ((3, 256), (4, 512), (5, 1024)):
        widths = [x.shape[-1] for x in model.get_layer(f"stage{stage}_block2_concat").input]
        assert widths == [filters // part for part in (2, 4, 8, 8)]
        # Each reads the one before it, so the joined maps see 1, 3, 5 and 7 pixels a side.
        for number in (2, 3, 4):
            read = model.get_layer(f"stage{stage}_block2_{number}_conv").input
            assert read is model.get_layer(f"stage{stage}_block2_{number - 1}_relu").output


def test_a_block_that_strides_convolves_one_part_and_averages_the_other():
    model = stdc1("keras")
    down = model.get_layer("stage4_block1_down_conv")
    assert isinstance(down, keras.layers.DepthwiseConv2D) and down.strides == (2, 2)
    # No ReLU behind it.
    assert model.get_layer("stage4_block1_2_conv").input is (
        model.get_layer("stage4_block1_down_bn").output
    )
    assert model.get_layer("stage4_block1_concat").input[0] is (
        model.get_layer("stage4_block1_pool").output
    )


@pytest.mark.parametrize(("form", "corner", "edge"), [("keras", 1, 1), ("torch", 4 / 9, 6 / 9)])
def test_border_of_an_average(form, corner, edge):
    # torch's zeros count: 5 of a corner's 9 pixels, 3 of an edge's.
    values = {"stage5_block1_1_relu": np.ones((1, 4, 6, 512), "float32")}
    averages = run_between(stdc1(form), values, ["stage5_block1_pool"])["stage5_block1_pool"]
    expected = [[corner, edge, edge], [edge, 1, 1]]
    np.testing.assert_allclose(averages[0, :, :, 0], expected, atol=1e-6)


def test_decoder_narrows_towards_the_image(ppliteseg):
    # PaddleSeg's configs, T and B.
    assert widths(ppliteseg) == ([32, 64, 128], [32, 64, 64])
    assert widths(build("ppliteseg", SIZE, 5, {"backbone": "stdc2"})) == (
        [64, 96, 128],
        [64, 64, 64],
    )
    assert ppliteseg.get_layer("logits_head_conv").input.shape[1:] == (8, 12, 32)


def widths(model):
    """Return the channels of the decoder at strides 8, 16, 32, and those of the heads on it."""
    decoder = [model.get_layer(f"fusion{stride}_out_conv").filters for stride in (8, 16, 32)]
    heads = [model.get_layer(f"{name}_head_conv").filters for name in ("logits", "aux16", "aux32")]
    return decoder, heads


def test_pyramid_is_summed(ppliteseg):
    model = ppliteseg
    pooled = [model.get_layer(f"pyramid{cells}_pool").output.shape[1:3] for cells in (1, 2, 4)]
    assert pooled == [(1, 1), (2, 2), (4, 4)]
    branches = model.get_layer("pyramid_add").input
    assert [x.shape[1:] for x in branches] == [(2, 3, 128)] * 3


def test_statistics_of_channels():
    x = np.array([1, 2, 6], "float32").reshape(1, 1, 1, 3)
    assert np.ravel(ChannelStatistics()(x)).tolist() == [3, 6]


def test_maps_are_joined_by_a_share_of_each_pixel(ppliteseg):
    share = share_of_fusion(ppliteseg)
    assert share.shape == (1, 8, 12, 1)
    assert np.ptp(share) > 0.1


def test_maps_are_joined_by_a_share_of_each_channel():
    options = {"attention": "channel", "bins": (1,), "decoder_channels": (8, 16, 24)}
    model = build("ppliteseg", SIZE, 5, LIGHT | options)
    zoo.seed_weights(model)
    share = share_of_fusion(model)
    assert share.shape == (1, 1, 1, 16)
    assert np.ptp(share) > 0.1
    # A pyramid of one bin is not summed.
    assert model.get_layer("pyramid_out_conv").input is model.get_layer("pyramid1_resize").output
    assert model.get_layer("logits_head_conv").filters == 8


def share_of_fusion(model):
    """Return the share of the backbone's map at stride 8, having checked what it does."""
    names = ("low_relu", "resize", "attention2_sigmoid", "add")
    outputs = [model.get_layer(f"fusion8_{name}").output for name in names]
    low, high, share, joined = map(np.asarray, keras.Model(model.input, outputs)(image()))
    np.testing.assert_allclose(joined, share * low + (1 - share) * high, atol=1e-4)
    return share


def image():
    return np.random.default_rng(1).uniform(0, 255, (1, *SIZE)).astype("float32")


def test_count_and_macs_of_bisenet():
    # training.md 8: 2,157,456 weights before the head, 24.6 G at 512x1024 (one decimal).
    model = build("bisenetv2", (512, 1024, 3), 19)
    body = keras.Model(model.input, {"logits": model.get_layer("aggregation_relu").output})
    assert trainable_parameters(body) == 2_157_456
    assert macs(model) / 1e9 == pytest.approx(24.6, abs=0.05)


def test_branches_keep_detail_and_meaning_apart(bisenet):
    assert bisenet.get_layer("detail3_3_relu").output.shape[1:] == (8, 12, 128)
    assert bisenet.get_layer("semantic5_4_add_relu").output.shape[1:] == (2, 3, 128)
    # Eight dense convolutions, and nothing of the other branch.
    detail = keras.Model(bisenet.input, bisenet.get_layer("detail3_3_relu").output)
    convs = [layer.name for layer in detail.layers if layer.name.endswith("_conv")]
    assert len(convs) == 8 and all(name.startswith("detail") for name in convs)


def test_gather_and_expansion_widens_six_times(bisenet):
    narrow = bisenet.get_layer("semantic4_1_expand_conv")
    assert (narrow.depth_multiplier, narrow.strides) == (6, (2, 2))
    assert narrow.input.shape[1:] == (8, 12, 32)
    assert narrow.output.shape[1:] == (4, 6, 192)
    assert bisenet.get_layer("semantic4_1_project_conv").filters == 64


def test_context_is_one_vector_for_the_whole_map(bisenet):
    x = random(2, 2, 3, 128)
    values = {"semantic5_4_add_relu": x}
    added = run_between(bisenet, values, ["context_add"])["context_add"] - x
    np.testing.assert_allclose(added, added[:, :1, :1] + 0 * added, atol=1e-5)
    assert added.max() > 0.1


def test_the_semantic_branch_speaks_through_gates(bisenet):
    """Without detail nothing passes; without meaning, all gates are half open."""
    detail, semantic = random(1, 8, 12, 128), random(1, 2, 3, 128, seed=1)
    names = ("aggregation_add", "fine_pointwise_conv", "coarse_pool")

    def aggregated(detail, semantic):
        values = {"detail3_3_relu": detail, "context_out_relu": semantic}
        return run_between(bisenet, values, names).values()

    nothing, *_ = aggregated(0 * detail, semantic)
    np.testing.assert_array_equal(nothing, 0)
    joined, fine, coarse = aggregated(detail, 0 * semantic)
    coarse = keras.ops.image.resize(coarse, (8, 12), interpolation="bilinear")
    np.testing.assert_allclose(joined, (fine + coarse) / 2, atol=1e-5)
    gated, *_ = aggregated(detail, semantic)
    assert np.abs(gated - joined).max() > 0.1


def test_boosters_train_the_semantic_branch_alone(bisenet):
    assert list(bisenet.output) == ["logits", "booster4", "booster8", "booster16", "booster32"]
    for stride in (4, 8, 16, 32):
        booster = bisenet.output[f"booster{stride}"]
        layers = keras.Model(bisenet.input, booster).layers
        assert not [layer.name for layer in layers if layer.name.startswith("detail")]
        assert bisenet.get_layer(f"booster{stride}_head_conv").input.shape[1] == 64 // stride
    without = build("bisenetv2", SIZE, 5, {"aux": False})
    assert list(without.output) == ["logits"]
