"""Layers that are several operators of an int8 file: rounded between them, none in float."""

import keras
import numpy as np
import pytest
from keras import layers
from tiny import SIZE, drawn, samples

from kseg.export import tflite
from kseg.export.interface import Interface
from kseg.export.operators import read_network
from kseg.export.post_training import set_ranges
from kseg.models.pidnet import Similarity
from kseg.quantization import quantization_aware


def model_of(several):
    """A net whose second last layer takes three maps of 8 channels."""
    keras.utils.set_random_seed(0)
    image = keras.Input((*SIZE, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1.0, name="normalise")(image)
    maps = [layers.Conv2D(8, 3, padding="same", name=f"conv{n}")(x) for n in range(3)]
    x = layers.Conv2D(3, 1, name="classifier")(several(maps))
    return keras.Model(image, {"logits": x})


def gated(maps):
    x, y, z = maps
    return layers.Multiply(name="gated")([z, Similarity(name="gate")([x, y])])


def added(maps):
    return layers.Add(name="sum")(maps)


@pytest.mark.parametrize("several", [gated, added])
def test_the_file_has_no_float_tensor(several, tmp_path):
    model = model_of(several)
    aware = quantization_aware(model)
    for image in samples():
        aware(image.astype("float32"), training=True)
    path = tmp_path / "m.tflite"
    tflite.write(aware, path, variant="qat", interface=Interface(), samples=samples)
    assert {one.dtype for one in read_network(path).tensors} == {"int8", "int32", "uint8"}


@pytest.mark.parametrize(
    ("several", "names"), [(gated, ("gate_product", "gate_sum")), (added, ("sum_first2",))]
)
def test_ranges_after_training_are_those_of_the_float_model(several, names):
    """With the ranges of the float maps the copy computes what the model does, but for rounding."""
    model = model_of(several)
    aware = quantization_aware(model)
    set_ranges(aware, model, samples, percentile=100)
    for name in names:
        quantizer = aware.get_layer(f"{name}_quantize")
        assert float(quantizer.low) < 0 < float(quantizer.high)
    image = drawn(*SIZE)[None].astype("float32")
    wanted = model(image)["logits"].numpy()
    # A few steps of 1/255 of the range, as three roundings follow each other.
    assert np.abs(aware(image)["logits"] - wanted).max() < 0.03 * np.ptp(wanted)


def test_a_scalar_product_is_summed_exactly():
    aware = quantization_aware(model_of(gated))
    kernel, bias = aware.get_layer("gate_sum_conv").folded()
    np.testing.assert_array_equal(kernel, np.ones((1, 1, 8, 1)))
    assert bias is None and not aware.get_layer("gate_sum_conv").trainable_variables
