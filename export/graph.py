"""A trained model as the graph that is written out: bytes in, class map or logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import keras
import tensorflow as tf

from kseg.quiet import quiet
from kseg.runtimes import logits_of

Graph = Callable[[tf.Tensor], dict[str, tf.Tensor]]


def inference_graph(model: keras.Model, *, output: Literal["classes", "logits"]) -> Graph:
    """Return the function that a file computes.

    Args:
        model: takes images 0..255, gives logits at the size of the image.
        output: "classes" puts the choice of the best class into the graph.

    Returns:
        From images (B, H, W, 3), uint8 or float32, to `class_map` uint8 (B, H, W) or to `logits`
        float32 (B, H, W, C).
    """

    def classes(image: tf.Tensor) -> dict[str, tf.Tensor]:
        # keras.ops.argmax does not convert to built-in operators; ARG_MAX gives int32 at least.
        best = tf.argmax(logits(image)["logits"], -1, output_type=tf.int32)
        return {"class_map": tf.cast(best, tf.uint8)}

    def logits(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": logits_of(model(tf.cast(image, tf.float32), training=False))}

    return classes if output == "classes" else logits


def write_graphs(
    model: keras.Model, folder: Path, graphs: Mapping[str, Graph], *, image: tf.TensorSpec
) -> None:
    """Write functions of a model as the signatures of a SavedModel.

    Args:
        model: what the graphs compute with.
        folder: where the SavedModel goes.
        graphs: name of each signature to its function.
        image: shape and type of the only input, which is named `image`.
    """
    # `archive.track(model)` is left out: the endpoints track what they use, and with both, each
    # weight is written twice.
    archive = keras.export.ExportArchive()
    with quiet():
        for name, graph in graphs.items():
            # A named argument, so that the input has this name in the signature.
            archive.add_endpoint(name, _named(graph), input_signature=[image])
        archive.write_out(str(folder), verbose=False)


def _named(graph: Graph) -> Graph:
    return lambda image: graph(image)
