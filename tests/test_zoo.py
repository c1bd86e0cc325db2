"""The full contract of every model, on its lightest backbone; see zoo.py for when it runs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from ai_edge_litert.interpreter import Interpreter
from test_jax import jax_errors

from kseg.config import TrainConfig
from kseg.models import build, inference_model
from kseg.registry import MODELS


@pytest.mark.zoo
@pytest.mark.parametrize("name", list(MODELS))
def test_full_contract(name, tmp_path):
    if zoo.is_current(name):
        pytest.skip("unchanged since its last pass; take its line out of zoo.lock to run it")
    check_contract(name, tmp_path)
    assert jax_errors(name)[name] < 1e-4
    zoo.record(name)


def test_default_model_goes_the_whole_way(tmp_path):
    check_contract(TrainConfig().model, tmp_path)


def check_contract(name, folder):
    model = zoo.seeded_model(name)
    outputs = zoo.outputs(model)
    check_outputs(outputs)
    # Float32 sums in another order, on another processor, differ by a few 1e-6.
    assert zoo.golden_error(name, outputs) < 1e-4
    check_default_mode(model, outputs)
    check_gradients(model)
    check_saving(model, outputs, folder)
    check_tflite(model, outputs["logits"], folder)
    check_other_size(name)


def check_outputs(outputs):
    assert next(iter(outputs)) == "logits"
    for value in outputs.values():
        assert value.shape == (1, *zoo.SIZE, zoo.NUM_CLASSES)
        assert value.dtype == np.float32


def check_default_mode(model, outputs):
    """A call that says nothing of training is inference, for all layers (blocks.BilinearResize)."""
    np.testing.assert_array_equal(model(zoo.image())["logits"], outputs["logits"])


def check_gradients(model):
    with tf.GradientTape() as tape:
        outputs = model(zoo.image(), training=False)
        loss = sum(tf.reduce_mean(value * noise(value.shape)) for value in outputs.values())
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        assert gradient is not None, f"{variable.path} is not reached by any gradient"
        values = tf.convert_to_tensor(gradient).numpy()
        assert np.isfinite(values).all(), variable.path
        assert values.any(), f"the gradient of {variable.path} is zero"


def noise(shape):
    return np.random.RandomState(3).normal(size=shape).astype("float32")


def check_saving(model, outputs, folder):
    path = folder / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in model.layers]
    for key, value in zoo.outputs(loaded).items():
        np.testing.assert_array_equal(value, outputs[key])


def check_tflite(model, logits, folder):
    flatbuffer = to_tflite(inference_model(model), folder / "saved_model")
    interpreter = Interpreter(model_content=flatbuffer, num_threads=1)
    run = interpreter.get_signature_runner()
    converted = run(image=zoo.image())["logits"]
    # Batch normalisation folded into kernels rounds differently, once a layer.
    np.testing.assert_allclose(converted, logits, atol=1e-3 * np.abs(logits).max())


def to_tflite(model, folder):
    """Convert by the route that keeps names and a batch of 1; built-in operators only."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serving_default",
        lambda image: model(image, training=False),
        input_signature=[tf.TensorSpec([1, *zoo.SIZE, 3], tf.float32, name="image")],
    )
    archive.write_out(str(folder), verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter.convert()


def check_other_size(name):
    """Every size of multiples of 32 works, also one that no power of two above 32 divides."""
    model = build(name, (96, 160, 3), 2, zoo.light_options(name))
    assert model(np.zeros((1, 96, 160, 3), "float32"))["logits"].shape == (1, 96, 160, 2)
