"""LiteRT (.tflite) files: static batch of one, built-in operators only."""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path

import keras
import tensorflow as tf

from kseg.errors import Failure
from kseg.quiet import quiet

from .calibrate import Samples
from .graph import inference_graph, input_spec, write_graphs
from .int8_forms import with_int8_forms
from .interface import Interface


def file_name(variant: str, *, suffix: str = "") -> str:
    """Return the name of the file that holds a variant."""
    return f"model-{variant}{suffix}.tflite"


def write(
    model: keras.Model, path: Path, *, variant: str, interface: Interface, samples: Samples
) -> None:
    """Convert a model.

    The batch is a static 1: only then are dilated convolutions single operators, and batch
    normalisation and ReLU part of them.

    Args:
        model: takes images 0..255, gives logits.
        path: the file to write.
        variant: "float32", "float16", "dynamic" (int8 weights, ranges found while running),
            "int8" (weights and activations), "int16x8" (int8 weights, int16 activations) or "qat"
            (int8 with the ranges that a quantisation-aware model holds).
        interface: what the file takes and gives; its layout is not used.
        samples: representative images, for int8 and int16x8.

    Raises:
        Failure: if the model has an operation without a built-in operator.
    """
    # An int8 file takes bytes by its input's quantisation alone, without a CAST through float.
    quantised_input = variant in ("int8", "qat") and interface.input == "uint8"
    kind = "float" if quantised_input else interface.input
    image = input_spec(model, kind, batch=1)
    if variant == "int8":
        model = with_int8_forms(model, _typed(samples, tf.float32))
    with tempfile.TemporaryDirectory() as folder:
        graph = inference_graph(model, output=interface.output)
        write_graphs(model, Path(folder), {"serving_default": graph}, image=image)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if quantised_input:
            converter.inference_input_type = tf.uint8
        _VARIANTS[variant](converter, _typed(samples, image.dtype))
        path.write_bytes(_convert(converter, path.name))


def _typed(samples: Samples, dtype: tf.DType) -> Samples:
    return lambda: (one.astype(dtype.as_numpy_dtype) for one in samples())


def _float32(converter: tf.lite.TFLiteConverter, samples: Samples) -> None:
    pass


def _float16(converter: tf.lite.TFLiteConverter, samples: Samples) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]


def _dynamic(converter: tf.lite.TFLiteConverter, samples: Samples) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def _int8(converter: tf.lite.TFLiteConverter, samples: Samples) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([one] for one in samples())
    # The second set lets an operator without int8 kernel stay in float instead of failing.
    ops = tf.lite.OpsSet
    converter.target_spec.supported_ops = [ops.TFLITE_BUILTINS_INT8, ops.TFLITE_BUILTINS]


def _qat(converter: tf.lite.TFLiteConverter, samples: Samples) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def _int16x8(converter: tf.lite.TFLiteConverter, samples: Samples) -> None:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([one] for one in samples())
    ops = tf.lite.OpsSet
    wide = ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    converter.target_spec.supported_ops = [wide, ops.TFLITE_BUILTINS]


_VARIANTS = {
    "float32": _float32,
    "float16": _float16,
    "dynamic": _dynamic,
    "int8": _int8,
    "int16x8": _int16x8,
    "qat": _qat,
}


def _convert(converter: tf.lite.TFLiteConverter, name: str) -> bytes:
    try:
        with quiet(), warnings.catch_warnings():
            # "Statistics for quantized inputs were expected": they come from the samples.
            warnings.filterwarnings("ignore", category=UserWarning, module="tensorflow")
            return converter.convert()
    except Exception as error:  # the converter raises several private types
        raise Failure(f"{name} could not be converted: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the line of the converter's page-long message that tells what is wrong."""
    missing = re.search(r"(?:Select|Custom) ops: (.+)", str(error))
    if missing:
        return f"there is no built-in operator for {missing[1].strip()}"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
