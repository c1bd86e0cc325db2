"""Kernels of a file beside the model's: what differs, and what others make good."""

import re

import keras
import numpy as np
import pytest
import zoo
from keras import layers
from tiny import SIZE, DrawnData, samples, tiny_model

from kseg.export import tflite
from kseg.export.calibrate import calibration_samples
from kseg.export.faults import kernel_fault
from kseg.export.interface import Interface
from kseg.export.kernels import kernel_differences
from kseg.export.post_training import equalised, set_ranges
from kseg.models import inference_model
from kseg.quantization import quantization_aware

FACTORS = np.array([0.3, 0.4, 1.0, 1.2, 4.0, 5.0, 0.5, 2.0])


def net():
    """Every way between two kernels: alone, by depthwise ones, by a sum and by a concatenation."""
    keras.utils.set_random_seed(0)
    image = keras.Input((*SIZE, 3), name="image")
    same = {"padding": "same", "activation": "relu"}
    x = layers.Conv2D(8, 3, **same, name="first")(image)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Conv2D(8, 3, **same, name="second")(x)
    x = layers.DepthwiseConv2D(3, **same, name="depthwise")(x)
    side = layers.Conv2D(8, 1, **same, name="third")(x)
    x = layers.Concatenate(name="join")([x, side])
    x = layers.Conv2D(8, 3, **same, name="fourth")(x)
    x = layers.UpSampling2D(2, interpolation="bilinear", name="up")(x)
    return keras.Model(image, {"logits": layers.Conv2D(3, 1, name="last")(x)}, name="net")


def scaled(model, name, factors, readers=()):
    """Multiply channels that a kernel gives, and divide those of the kernels that read them."""
    layer = model.get_layer(name)
    depthwise = isinstance(layer, layers.DepthwiseConv2D)
    layer.kernel.assign(layer.kernel * (factors[:, None] if depthwise else factors))
    layer.bias.assign(layer.bias * factors)
    for reader in readers:
        kernel = model.get_layer(reader).kernel
        values = kernel.numpy()
        values[:, :, : len(factors)] /= factors[:, None]
        kernel.assign(values)


def even_net():
    """The net with other sizes of channels; it computes the same."""
    model = net()
    scaled(model, "first", FACTORS, ["second"])
    scaled(model, "second", FACTORS[::-1], ["depthwise"])
    scaled(model, "depthwise", FACTORS, ["third", "fourth"])
    scaled(model, "fourth", FACTORS[::-1], ["last"])
    return model


def written(folder, model, variant="float32"):
    path = folder / f"{variant}.tflite"
    tflite.write(model, path, variant=variant, interface=Interface(), samples=samples)
    return path


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return written(tmp_path_factory.mktemp("twin"), net())


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_what_other_kernels_make_good_is_no_fault(variant, twin, tmp_path):
    found = kernel_differences(written(tmp_path, even_net(), variant), twin)
    assert len(found) == 6
    # In 8 bits a row is rounded by its largest weight, to which others are 40 times smaller.
    error = 1e-6 if variant == "float32" else 0.1
    for one in found.values():
        assert one.factor == pytest.approx(1, abs=error)
        assert one.error < error
    assert kernel_fault(written(tmp_path, even_net(), variant), twin) is None


NAMES = ("first", "second", "depthwise", "third", "fourth", "last")


@pytest.mark.parametrize("name", ["first", "depthwise", "last"])
@pytest.mark.parametrize("which", [1, slice(None)], ids=["one_channel", "all_channels"])
def test_a_wrong_scale_is_named(name, which, twin, tmp_path):
    assert named(wrong(net(), name, which), twin, tmp_path) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_scale_is_named_in_even_files_too(name, twin, tmp_path):
    found = named(wrong(even_net(), name, 1), twin, tmp_path)
    # Whether a channel was too large or what one kernel makes of it again, nothing tells.
    assert found == {"second": "depthwise"}.get(name, name)


@pytest.mark.parametrize("name", ["second", "fourth"])
def test_a_whole_kernel_of_wrong_scale_is_noticed_in_even_files_too(name, twin, tmp_path):
    found = named(wrong(even_net(), name, slice(None)), twin, tmp_path)
    # A kernel in front of it may be the one, or one that makes that good but for this.
    assert abs(NAMES.index(found) - NAMES.index(name)) <= 2


def wrong(model, name, which):
    """Make channels 1.6 times as large, which nothing makes good."""
    factors = np.ones(model.get_layer(name).bias.shape[0])
    factors[which] = 1.6
    scaled(model, name, factors)
    return model


def named(model, twin, folder):
    fault = kernel_fault(written(folder, model, "int8"), twin)
    assert fault.name == "scale"
    return re.search(r"/(\w+)_\d/", fault.sentence)[1]


def test_a_file_with_even_maxima_has_the_models_kernels(tmp_path):
    """Unpooling puts masks, selections and depth to space between two kernels."""
    model = inference_model(zoo.seeded_model("segnet"))
    float_file, int8 = (written(tmp_path, model, variant) for variant in ("float32", "int8"))
    found = kernel_differences(int8, float_file)
    assert len(found) == 26
    assert kernel_fault(int8, float_file) is None


def with_layer_in_float(name, *, even):
    """The tiny net as a budget's remedy writes it: its float kernels have the other sign."""
    model = tiny_model()
    model = equalised(model, images()) if even else model
    aware = quantization_aware(model, in_float=(name,))
    set_ranges(aware, model, images(), percentile=100)
    return aware


def images():
    return calibration_samples(DrawnData(), SIZE, count=4)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", ["stem_conv", "dilated", "classifier"])
def test_a_layer_in_float_has_the_models_kernel(name, even, tmp_path):
    """Other kernels of such a file have other names, and cannot be compared."""
    float_file = written(tmp_path, tiny_model())
    aware = with_layer_in_float(name, even=even)
    int8 = written(tmp_path, aware, "qat")
    assert [key.split("/")[1] for key in kernel_differences(int8, float_file)] == [f"{name}_1"]
    assert kernel_fault(int8, float_file) is None
    kernel = aware.get_layer(name).kernel
    kernel.assign(np.random.default_rng(0).normal(size=kernel.shape))
    assert kernel_fault(written(tmp_path, aware, "qat"), float_file).name == "weights"
