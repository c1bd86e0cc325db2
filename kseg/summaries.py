"""What a training leaves to look at: preview.jpg, and TensorBoard's curves and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from kseg.data.dataset import Dataset
from kseg.data.pipeline import evaluation_samples
from kseg.files import replacing
from kseg.inference import Predictor
from kseg.overlay import blend, contact_sheet

PICTURES = 3  # validation pictures shown in TensorBoard


def write_preview(path: Path, batches: tf.data.Dataset, dataset: Dataset) -> None:
    """Write the first augmented batch as a picture: images beside their masks' colours.

    Args:
        path: the .jpg to write.
        batches: what the training will see.
        dataset: gives the colours.
    """
    image, mask = next(iter(batches))
    pairs = zip(image.numpy().astype("uint8"), mask.numpy().astype("uint8"), strict=True)
    tiles = [
        Image.fromarray(np.hstack([image, blend(image, mask, dataset.palette)]))
        for image, mask in pairs
    ]
    with replacing(path) as temporary:
        contact_sheet(tiles).save(temporary, quality=90)


def summarise(step: int, values: Mapping[str, float]) -> None:
    """Write scalars to TensorBoard's default writer."""
    for name, value in values.items():
        tf.summary.scalar(name, value, step=step)


def summarise_pictures(step: int, predictor: Predictor, dataset: Dataset) -> None:
    """Write the first validation images under their predicted classes to TensorBoard."""
    for index, (image, _) in enumerate(evaluation_samples(dataset, "val", limit=PICTURES)):
        image = image.numpy()
        picture = blend(image, predictor.predict(image), predictor.palette)
        tf.summary.image(f"val_{index}", np.asarray(picture)[None], step=step)
