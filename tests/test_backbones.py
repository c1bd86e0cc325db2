"""Backbones: recorded sizes, exact dilation, and agreement with keras.applications."""

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from kseg.errors import UserError
from kseg.registry import BACKBONES
from kseg.weights import copy_weights, of_backbone

# Trainable parameters and the width of each stage (architectures.md 0.3; the basic ResNets and
# DenseNet-161 are torchvision's counts less their classifiers of 513,000 and 2,209,000; STDC's are
# the authors' 8,443,552 and 12,474,016 less what is behind the last stage, 3,125,248;
# EfficientNetV2 is keras.applications' network, MobileNetV4 timm's without its last 1 x 1
# convolution and classifier, MiT SegFormer's 3,719,027 and 13,682,131 less the decoder).
FACTS = {
    "vgg16": (14_714_688, (64, 128, 256, 512, 512)),
    "resnet18": (11_176_512, (64, 64, 128, 256, 512)),
    "resnet34": (21_284_672, (64, 64, 128, 256, 512)),
    "resnet50": (23_508_032, (64, 256, 512, 1024, 2048)),
    "resnet101": (42_500_160, (64, 256, 512, 1024, 2048)),
    "resnet152": (58_143_808, (64, 256, 512, 1024, 2048)),
    "mobilenetv2": (2_223_872, (16, 24, 32, 96, 1280)),
    "mobilenetv3_large": (2_971_952, (16, 24, 40, 112, 960)),
    "mobilenetv3_large_torchvision": (2_971_952, (16, 24, 40, 80, 960)),
    "mobilenetv3_small": (927_008, (16, 16, 24, 48, 576)),
    "xception41": (24_920_560, (128, 256, 728, 1024, 2048)),
    "xception65": (37_867_312, (128, 256, 728, 1024, 2048)),
    "densenet121": (6_953_856, (64, 256, 512, 1024, 1024)),
    "densenet161": (26_472_000, (96, 384, 768, 2112, 2208)),
    "densenet169": (12_484_480, (64, 256, 512, 1280, 1664)),
    "densenet201": (18_092_928, (64, 256, 512, 1792, 1920)),
    "hrnet_w18_small": (3_860_720, (64, 18, 36, 72, 144)),
    "hrnet_w18": (9_562_260, (64, 18, 36, 72, 144)),
    "hrnet_w32": (29_305_536, (64, 32, 64, 128, 256)),
    "hrnet_w48": (65_325_120, (64, 48, 96, 192, 384)),
    "resnet38": (105_070_912, (128, 256, 512, 1024, 4096)),
    "stdc1": (5_318_304, (32, 64, 256, 512, 1024)),
    "stdc2": (9_348_768, (32, 64, 256, 512, 1024)),
    "efficientnetv2_b0": (5_858_704, (16, 32, 48, 112, 1280)),
    "mobilenetv4_small": (1_261_664, (32, 32, 64, 96, 960)),
    # The decoder: 256 channels of each map, with biases; 1024 x 256, BN; 256 x 19, biases.
    "mit_b0": (3_719_027 - 399_635, (3, 32, 64, 160, 256)),
    "mit_b1": (13_682_131 - 530_707, (3, 64, 128, 320, 512)),
}
# These are other members with more blocks; running them shows nothing new.
DEEPER = {"resnet34", "resnet101", "resnet152", "xception65", "stdc2", "mit_b1"}
DEEPER |= {"densenet161", "densenet169", "densenet201", "hrnet_w18", "hrnet_w32", "hrnet_w48"}
# Dilates as torch does, not exactly; compared with torchvision in test_torch_weights.py.
DILATED_OTHERWISE = {"mobilenetv3_large_torchvision"}
RUN = [name for name in FACTS if name not in DEEPER | DILATED_OTHERWISE]
DILATED = [name for name in RUN if "output_stride" not in BACKBONES.entry(name).limits]
# The deepest of them in one form by default: the padding differs, the depth does not.
ONE_FORM = ("efficientnetv2_b0", "torch")
DILATIONS = [
    pytest.param(name, form, marks=[pytest.mark.slow] * ((name, form) == ONE_FORM))
    for name in DILATED
    for form in ("keras", "torch")
]
UNDILATED = [name for name in BACKBONES if "output_stride" in BACKBONES.entry(name).limits]
# Up to 10 s each; models on the largest of each family are counted in test_context.py.
SLOW = DEEPER - {"resnet34", "resnet101", "resnet152", "stdc2", "mit_b1"} | {"resnet38"}
# Options that make running a wide network cheap, and change nothing else.
NARROW = {"resnet38": {"base_channels": 8}}
ORIGINALS = {
    "vgg16": ("VGG16", "vgg16"),
    "resnet50": ("ResNet50", "resnet"),
    "mobilenetv2": ("MobileNetV2", "mobilenet_v2"),
    "mobilenetv3_large": ("MobileNetV3Large", "mobilenet_v3"),
    "mobilenetv3_small": ("MobileNetV3Small", "mobilenet_v3"),
    "densenet121": ("DenseNet121", "densenet"),
    "efficientnetv2_b0": ("EfficientNetV2B0", "efficientnet_v2"),
}


def build(name, *, size=(64, 96), **options):
    image = keras.Input((*size, 3), name="image")
    features = BACKBONES[name](image, **options)
    return keras.Model(image, list(features.stages)), features


def randomise(model, seed=0):
    """Give every variable a value that matters and keeps the maps near unit size."""
    random = np.random.default_rng(seed)
    for layer in model.layers:
        for variable in layer.weights:
            shape = tuple(variable.shape)
            if variable.name in ("gamma", "moving_variance"):
                value = random.uniform(0.5, 1.5, shape)
            elif "kernel" in variable.name:
                depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
                fan_in = np.prod(shape[:2]) if depthwise else np.prod(shape[:-1])
                value = random.normal(0, (2 / fan_in) ** 0.5, shape)
            else:
                value = random.normal(0, 0.2, shape)
            variable.assign(value.astype("float32"))


def images(size=(64, 96), seed=1):
    return np.random.default_rng(seed).integers(0, 256, (2, *size, 3)).astype("float32")


def run(model, image):
    outputs = model(image, training=False)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [keras.ops.convert_to_numpy(output) for output in outputs]


def relative_error(got, expected):
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FACTS]
)
def test_counts_and_strides(name):
    parameters, widths = FACTS[name]
    model, features = build(name)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters
    assert list(features) == [2, 4, 8, 16, 32]
    assert tuple(stage.shape[-1] for stage in features.stages) == widths
    for stride, feature in features.items():
        assert feature.shape[1:3] == (64 // stride, 96 // stride)
    assert all(layer.name and not isinstance(layer, keras.Model) for layer in model.layers)
    assert all(of_backbone(layer) for layer in model.layers)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet50", 23_631_808), ("resnet101", 42_623_936), ("resnet152", 58_267_584)],
)
def test_count_with_a_deep_stem(name, parameters):
    # architectures.md 0.3: stem of 64, 64, 128 channels.
    model, features = build(name, deep_stem=True)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters
    assert features.stages[0].shape[-1] == 128


def test_rates_of_units_replace_those_of_the_output_stride():
    rates = {16: (2, 5), 32: (1, 2, 4)}
    model, features = build("resnet50", output_stride=8, form="torch", rates=rates)
    found = [layer.dilation_rate[0] for layer in model.layers if layer.name.endswith("_2_conv")]
    assert found == [1] * 7 + [2, 5, 2, 5, 2, 5] + [1, 2, 4]
    assert list(features) == [2, 4, 8]


def test_a_unit_that_strides_takes_no_rate():
    with pytest.raises(UserError, match="first unit at stride 32 strides"):
        build("resnet50", rates={32: (2,)})


def test_every_backbone_is_tested():
    assert sorted(FACTS) == list(BACKBONES)


def test_vgg_features_are_convolutions_and_its_stages_pools():
    _, features = build("vgg16")
    assert [feature.shape[-1] for feature in features.values()] == [128, 256, 512, 512, 512]
    assert features.stages[2].shape[1:] == (8, 12, 256)


@pytest.mark.parametrize(("name", "form"), DILATIONS)
def test_dilation_is_exact(name, form):
    """A dilated map holds the strided one at every 2nd (4th) pixel, borders included."""
    narrow = NARROW.get(name, {})
    plain, _ = build(name, form=form, **narrow)
    randomise(plain)
    if name.startswith(("mobilenetv3", "efficientnetv2")):
        # The mean of a gate runs over more pixels when dilated: only equal gates can agree.
        close_gates(plain)
    expected = run(plain, images())
    for output_stride in (16, 8):
        dilated, features = build(name, form=form, output_stride=output_stride, **narrow)
        copy_weights(plain, dilated)
        assert max(features) == output_stride
        for got, wanted in zip(run(dilated, images()), expected, strict=True):
            every = got.shape[1] // wanted.shape[1]
            assert relative_error(got[:, ::every, ::every], wanted) < 1e-4


@pytest.mark.parametrize("name", UNDILATED)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_what_cannot_dilate_says_so(name, output_stride):
    with pytest.raises(
        UserError, match=f"does not dilate, and the model asks for stride {output_stride}"
    ):
        build(name, output_stride=output_stride)


def test_a_transition_need_not_average():
    _, features = build("densenet121", output_stride=8, transition_pooling=False)
    model = keras.Model(features.stages[0], features.stages[-1])
    pools = [layer.name for layer in model.layers if layer.name.endswith("pool")]
    assert pools == ["pool2_pool"]


def close_gates(model):
    """Make squeeze-and-excite gates independent of their input (their bias stays random)."""
    for layer in model.layers:
        if layer.name.endswith(("squeeze_excite_conv_1", "se_expand")):
            layer.kernel.assign(np.zeros(layer.kernel.shape, "float32"))


@pytest.mark.parametrize("name", RUN)
def test_forms_share_weights_and_differ(name):
    """Both forms take the same variables by name; torch's image is torchvision's."""
    ours, _ = build(name, form="keras", **NARROW.get(name, {}))
    theirs, _ = build(name, form="torch", **NARROW.get(name, {}))
    copy_weights(ours, theirs)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    offset = theirs.get_layer("rescale").get_config()["offset"]
    np.testing.assert_allclose(offset, -mean / deviation)
    configs = [[layer.get_config() for layer in model.layers] for model in (ours, theirs)]
    assert configs[0] != configs[1]


def write_legacy(model, path):
    """Write a file as keras.applications publishes: HDF5 with attributes in layer order."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
        assert "layer_names" in file.attrs


def quieten(model):
    """Keep maps near unit size where open gates multiply those that residuals have added up.

    In maps of thousands the gates make a last digit of float32 half a per cent.
    """
    for layer in model.layers:
        if layer.name.endswith("project_bn"):
            layer.gamma.assign(0.2 * layer.gamma)


@pytest.mark.parametrize("name", ORIGINALS)
def test_published_weights_compute_the_same(name, tmp_path):
    """Kernels, biases folded into means, BGR: our maps equal those of keras.applications."""
    network, module = ORIGINALS[name]
    original = getattr(keras.applications, network)(
        weights=None, include_top=False, input_shape=(64, 96, 3)
    )
    randomise(original)
    if name.startswith("efficientnetv2"):
        quieten(original)
    path = tmp_path / f"{name}_notop.h5"
    write_legacy(original, path)
    model, _ = build(name, weights=path)
    preprocess = getattr(keras.applications, module).preprocess_input
    (expected,) = run(original, preprocess(images().copy()))
    got = run(model, images())
    assert relative_error(got[-1], expected) < 1e-4
    assert np.abs(expected).std() > 1e-3


def test_options_are_checked():
    with pytest.raises(UserError, match="8, 16 or 32, not 4"):
        build("resnet18", output_stride=4)
    with pytest.raises(UserError, match="keras or torch, not 'caffe'"):
        build("mobilenetv2", form="caffe")


def test_weights_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="form keras, not torch"):
        build("mobilenetv2", form="torch", weights="imagenet")
    with pytest.raises(UserError, match="none for this backbone"):
        build("resnet18", weights="imagenet")
    with pytest.raises(UserError, match=r"no weights file .*gone\.h5; expected a copy of https"):
        build("mobilenetv2", weights=tmp_path / "gone.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(UserError, match="text.h5 does not hold the weights of keras.applications"):
        build("mobilenetv2", weights=tmp_path / "text.h5")


def test_weights_of_another_network(tmp_path):
    small = keras.applications.MobileNetV3Small(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    write_legacy(small, tmp_path / "small.h5")
    with pytest.raises(UserError, match="does not hold the weights .*Layer count mismatch"):
        build("mobilenetv2", weights=tmp_path / "small.h5")


def test_mixed_precision_keeps_float32_weights():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, features = build("mobilenetv2")
    finally:
        keras.config.set_dtype_policy("float32")
    assert all(variable.dtype == "float32" for variable in model.weights)
    assert features[32].dtype == "float16"
