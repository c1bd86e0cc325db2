"""Backbones: recorded sizes, exact dilation, and agreement with keras.applications."""

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from kseg.errors import UserError
from kseg.registry import BACKBONES
from kseg.weights import copy_weights

# Trainable parameters and the width of each stage (architectures.md 0.3; the basic ResNets are
# torchvision's counts less their 513,000 classifier parameters).
FACTS = {
    "vgg16": (14_714_688, (64, 128, 256, 512, 512)),
    "resnet18": (11_176_512, (64, 64, 128, 256, 512)),
    "resnet34": (21_284_672, (64, 64, 128, 256, 512)),
    "resnet50": (23_508_032, (64, 256, 512, 1024, 2048)),
    "resnet101": (42_500_160, (64, 256, 512, 1024, 2048)),
    "mobilenetv2": (2_223_872, (16, 24, 32, 96, 1280)),
    "mobilenetv3_large": (2_971_952, (16, 24, 40, 112, 960)),
    "mobilenetv3_small": (927_008, (16, 16, 24, 48, 576)),
}
# ResNet-101 and -34 are ResNet-50 and -18 with more blocks; running those shows nothing new.
RUN = [name for name in FACTS if name not in ("resnet101", "resnet34")]
ORIGINALS = {
    "vgg16": ("VGG16", "vgg16"),
    "resnet50": ("ResNet50", "resnet"),
    "mobilenetv2": ("MobileNetV2", "mobilenet_v2"),
    "mobilenetv3_large": ("MobileNetV3Large", "mobilenet_v3"),
    "mobilenetv3_small": ("MobileNetV3Small", "mobilenet_v3"),
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


@pytest.mark.parametrize("name", FACTS)
def test_counts_and_strides(name):
    parameters, widths = FACTS[name]
    model, features = build(name)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters
    assert list(features) == [2, 4, 8, 16, 32]
    assert tuple(stage.shape[-1] for stage in features.stages) == widths
    for stride, feature in features.items():
        assert feature.shape[1:3] == (64 // stride, 96 // stride)
    assert all(layer.name and not isinstance(layer, keras.Model) for layer in model.layers)


def test_every_backbone_is_tested():
    assert sorted(FACTS) == list(BACKBONES)


def test_vgg_features_are_convolutions_and_its_stages_pools():
    _, features = build("vgg16")
    assert [feature.shape[-1] for feature in features.values()] == [128, 256, 512, 512, 512]
    assert features.stages[2].shape[1:] == (8, 12, 256)


@pytest.mark.parametrize("form", ["keras", "torch"])
@pytest.mark.parametrize("name", RUN)
def test_dilation_is_exact(name, form):
    """A dilated map holds the strided one at every 2nd (4th) pixel, borders included."""
    plain, _ = build(name, form=form)
    randomise(plain)
    if name.startswith("mobilenetv3"):
        # The mean of a gate runs over more pixels when dilated: only equal gates can agree.
        close_gates(plain)
    expected = run(plain, images())
    for output_stride in (16, 8):
        dilated, features = build(name, form=form, output_stride=output_stride)
        copy_weights(plain, dilated)
        assert max(features) == output_stride
        for got, wanted in zip(run(dilated, images()), expected, strict=True):
            every = got.shape[1] // wanted.shape[1]
            assert relative_error(got[:, ::every, ::every], wanted) < 1e-4


def close_gates(model):
    """Make squeeze-and-excite gates independent of their input (their bias stays random)."""
    for layer in model.layers:
        if layer.name.endswith("squeeze_excite_conv_1"):
            layer.kernel.assign(np.zeros(layer.kernel.shape, "float32"))


@pytest.mark.parametrize("name", RUN)
def test_forms_share_weights_and_differ(name):
    """Both forms take the same variables by name; the image is normalised differently."""
    ours, _ = build(name, form="keras")
    theirs, _ = build(name, form="torch")
    copy_weights(ours, theirs)
    rescale = ours.get_layer("rescale"), theirs.get_layer("rescale")
    assert rescale[0].get_config()["offset"] != rescale[1].get_config()["offset"]


def write_legacy(model, path):
    """Write a file as keras.applications publishes: HDF5 with attributes in layer order."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
        assert "layer_names" in file.attrs


@pytest.mark.parametrize("name", ORIGINALS)
def test_published_weights_compute_the_same(name, tmp_path):
    """Kernels, biases folded into means, BGR: our maps equal those of keras.applications."""
    network, module = ORIGINALS[name]
    original = getattr(keras.applications, network)(
        weights=None, include_top=False, input_shape=(64, 96, 3)
    )
    randomise(original)
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
