"""SavedModel folders, as TensorFlow and TF Serving read them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import keras
import tensorflow as tf

from .calibrate import Samples
from .graph import inference_graph, write_graphs


def file_name(variant: str) -> str:
    """Return the folder's name: TF Serving looks for a number below the model's own folder."""
    return "saved_model/1"


def write(
    model: keras.Model,
    path: Path,
    *,
    variant: str,
    output: Literal["classes", "logits"],
    samples: Samples,
) -> None:
    """Write a model with the signatures `serving_default` (`output`) and `logits`, any batch.

    Args:
        model: takes images 0..255, gives logits.
        path: the folder to write.
        variant: "float32".
        output: what `serving_default` gives.
        samples: not used.
    """
    image = tf.TensorSpec((None, *model.input_shape[1:3], 3), tf.uint8, name="image")
    graphs = {
        "serving_default": inference_graph(model, output=output),
        "logits": inference_graph(model, output="logits"),
    }
    write_graphs(model, path, graphs, image=image)
