"""Deep Layer Cascade: easy pixels are settled by early stages, and only hard ones go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import layers, ops

from kseg.backbones.features import Form
from kseg.blocks import check_input, classifier, conv_bn_relu, enlarged
from kseg.errors import UserError
from kseg.registry import BACKBONES, MODELS

_STAGES = (1, 2, 3)


@MODELS.register("layer_cascade", aux={"stage1": (None, 1.0), "stage2": (None, 1.0)})
def LayerCascade(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | None = None,
    form: Form = "keras",
    output_stride: Literal[8, 16, 32] = 8,
    head_channels: int = 256,
    threshold: float = 0.985,
    dropout: float = 0.1,
    aux: bool = True,
) -> keras.Model:
    """Build a layer cascade over the last three stages of a backbone.

    A pixel leaves at the first stage whose largest probability is above the threshold, and its
    logits are those of that stage. What this model computes is dense, and the select costs a
    little; time is saved by `infer_by_stage`, by which `kseg evaluate` and `kseg predict` run a
    .keras file, and the first reports the share of pixels that each stage has settled.

    With `aux`, each stage learns from the pixels that reach it. Those it settles are in "logits";
    "stage1" and "stage2" hold the logits of their stage at every pixel, and let gradients pass
    only where it hands the pixel on. The paper trains twice: all stages on all pixels, which is
    `threshold=1`, then, from those weights, with the threshold of the cascade.

    Args:
        input_shape: (height, width, 3) of the RGB image, 0..255; multiples of 32.
        num_classes: number of classes, background among them.
        backbone: registry name of the feature extractor.
        backbone_weights: None, "imagenet" or a file of them.
        form: which framework's conventions the backbone follows.
        output_stride: stride at which the backbone starts to dilate.
        head_channels: channels of each stage's head.
        threshold: probability above which a pixel is settled: from 1 on none is, at 0 all are by
            the first stage; 0.8 is the paper's fast mode.
        dropout: rate in front of each classifier.
        aux: add the training-only outputs of the first two stages, each of weight 1.

    Returns:
        Model from "image" to {"logits": (B, H, W, num_classes) float32}.

    Raises:
        UserError: where the size is not a multiple of 32, or the threshold is negative.

    Source:
        Li, Liu, Luo, Loy, Tang, "Not All Pixels Are Equal: Difficulty-Aware Semantic Segmentation
        via Deep Layer Cascade", CVPR 2017, section 3, arXiv:1704.01344.

    Differs:
        On any backbone rather than Inception-ResNet-v2. Convolutions are dense, so a hard pixel
        sees the features of settled neighbours, where the paper's region convolution has zeros.
        Each loss is divided by all valid pixels, not by those that reached the stage, and its
        value, unlike its gradient, counts pixels that the stage has settled.
    """
    check_input(input_shape, num_classes)
    if threshold < 0:
        raise UserError(f"threshold is {threshold}; it is a probability, so at least 0")
    image = keras.Input(input_shape, name="image")
    features = BACKBONES[backbone](
        image, output_stride=output_stride, weights=backbone_weights, form=form
    )
    # Pixels are settled on the grid of the first stage, the finest of the three.
    grid, size = features.stages[-3].shape[1:3], input_shape[:2]
    first, second, last = (
        _head(x, head_channels, num_classes, grid, dropout, name=f"stage{number}")
        for number, x in zip(_STAGES, features.stages[-3:], strict=True)
    )
    # Float32 all through: float16 cannot tell 0.985 from what is near it.
    hard = Hard(threshold, dtype="float32", name="stage1_hard")(first)
    harder = Hard(threshold, dtype="float32", name="stage2_hard")(second)
    x = Select(dtype="float32", name="select2")([harder, last, second])
    x = Select(dtype="float32", name="select1")([hard, x, first])
    outputs = {"logits": enlarged(x, size)}
    if aux:
        both = layers.Multiply(dtype="float32", name="both_hard")([hard, harder])
        for name, scores, passed in (("stage1", first, hard), ("stage2", second, both)):
            scores = _learning_where(passed, scores, name=name)
            outputs[name] = enlarged(scores, size, name=name)
    return keras.Model(image, outputs, name="layer_cascade")


def is_cascade(model: keras.Model) -> bool:
    """Tell whether a model is a layer cascade, by its layers."""
    return any(isinstance(layer, Hard) for layer in model.layers)


def settled_shares(model: keras.Model, image: keras.KerasTensor) -> tuple[float, ...]:
    """Report where a cascade settles the pixels of a batch.

    Args:
        model: a layer cascade, with or without its training-only outputs.
        image: (B, H, W, 3), 0..255.

    Returns:
        The share of the pixels that each stage settles; together 1.
    """
    masks = [model.get_layer(f"stage{number}_hard").output for number in _STAGES[:-1]]
    hard, harder = keras.Model(model.input, masks)(image, training=False)
    left = (1.0, _mean(hard), _mean(hard * harder), 0.0)
    return tuple(before - after for before, after in zip(left, left[1:], strict=False))


def stage_models(model: keras.Model) -> list[keras.Model]:
    """Cut a cascade into one model a stage, of the same layers and weights.

    Each takes the map that the stage before ended in (the first the image) and gives that map of
    its own, "features", its logits on the common grid, "scores", and, but for the last, "hard":
    (B, h, w, 1) float32, 1 where it hands the pixel on.

    Args:
        model: a layer cascade, with or without its training-only outputs.

    Returns:
        The models of the three stages, which `infer_by_stage` takes; each can be saved and
        exported by itself.

    Raises:
        ValueError: where a stage of the backbone needs more than the last map of the one before.
    """
    ends = [model.get_layer(f"stage{number}_head_conv").input for number in _STAGES]
    stages = []
    for number, start, end in zip(_STAGES, [model.input, *ends], ends, strict=False):
        outputs = {"features": end, "scores": model.get_layer(f"stage{number}_scores").output}
        if number != _STAGES[-1]:
            outputs["hard"] = model.get_layer(f"stage{number}_hard").output
        stages.append(keras.Model(start, outputs, name=f"stage{number}"))
    return stages


def infer_by_stage(
    stages: Sequence[keras.Model], image: keras.KerasTensor, *, limit: float = 0.0
) -> tuple[keras.KerasTensor, tuple[float, ...]]:
    """Run one stage after another, and stop when no pixel is left.

    Args:
        stages: what `stage_models` gives.
        image: (B, H, W, 3), 0..255.
        limit: share of the pixels that is too small to go on for; they keep what they have. At 0
            the logits are those of the whole model.

    Returns:
        Logits (B, H, W, num_classes) float32, and the share of the pixels that each stage has
        settled; 0 for stages that did not run.
    """
    x, scores, hard, left = image, 0.0, 1.0, 1.0
    shares = [0.0] * len(stages)
    for number, stage in enumerate(stages):
        outputs = stage(x, training=False)
        x = outputs["features"]
        scores = ops.where(hard > 0, outputs["scores"], scores)
        hard = hard * outputs.get("hard", 0.0)
        remaining = _mean(hard)
        shares[number] = left - remaining
        left = remaining
        if left <= limit:
            break
    shares[number] += left
    size = tuple(image.shape[1:3])
    logits = ops.image.resize(scores, size, interpolation="bilinear", data_format="channels_last")
    return logits, tuple(shares)


def _mean(mask: keras.KerasTensor | float) -> float:
    return float(np.mean(ops.convert_to_numpy(mask), dtype="float64"))


def _head(
    x: keras.KerasTensor,
    channels: int,
    num_classes: int,
    grid: tuple[int, int],
    dropout: float,
    *,
    name: str,
) -> keras.KerasTensor:
    x = conv_bn_relu(x, channels, name=f"{name}_head")
    x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return classifier(x, num_classes, grid, name=f"{name}_scores")


def _learning_where(
    passed: keras.KerasTensor, scores: keras.KerasTensor, *, name: str
) -> keras.KerasTensor:
    still = StopGradient(dtype="float32", name=f"{name}_still")(scores)
    return Select(dtype="float32", name=f"{name}_learning")([passed, scores, still])


@keras.saving.register_keras_serializable("kseg")
class Hard(layers.Layer):
    """Mark the pixels that a stage is not sure of; no gradient comes back from here."""

    def __init__(self, threshold: float, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the probability to be exceeded; `kwargs` are those of `keras.layers.Layer`."""
        super().__init__(**kwargs)
        self.threshold = threshold

    def call(self, scores: keras.KerasTensor) -> keras.KerasTensor:
        """Return (B, h, w, 1): 0 where the largest probability of logits is above the threshold."""
        confidence = ops.max(ops.softmax(scores), axis=-1, keepdims=True)
        hard = ops.less_equal(confidence, self.threshold)
        return ops.stop_gradient(ops.cast(hard, scores.dtype))

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took."""
        return super().get_config() | {"threshold": self.threshold}


@keras.saving.register_keras_serializable("kseg")
class Select(layers.Layer):
    """Take one of two maps, pixel by pixel; products, which quantise where a select may not."""

    def call(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        """Return the second of (mask, map, map) where the mask is 1, the third where it is 0."""
        mask, one, zero = inputs
        return mask * one + (1.0 - mask) * zero


@keras.saving.register_keras_serializable("kseg")
class StopGradient(layers.Layer):
    """The same values, as a constant."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Return `x`."""
        return ops.stop_gradient(x)
