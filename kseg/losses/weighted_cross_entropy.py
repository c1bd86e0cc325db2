"""Class-weighted cross entropy as a weighted mean: divided by the weights, not by the pixels."""

from __future__ import annotations

import keras
from keras import ops

from kseg.losses.cross_entropy import CrossEntropy
from kseg.losses.parts import Part
from kseg.losses.pixel_weights import pixel_weights
from kseg.registry import LOSSES


@LOSSES.register("weighted_ce")
@keras.saving.register_keras_serializable(package="kseg")
class WeightedCrossEntropy(CrossEntropy):
    """Cross entropy divided by the class weights of the pixels, not by how many they are.

    `ce` with class weights divides the weighted sum by the valid pixels, so that a batch of rare
    classes costs more and moves the net further. This is the weighted mean,
    `sum(w[y] * ce) / sum(w[y])` over the valid pixels of the global batch, as torch's
    `cross_entropy(weight=w)`: every batch has the same pull. Scaling all weights changes nothing;
    with equal weights both are the same. A class without a pixel adds nothing.

    Args:
        class_weights: one factor a class, or None for 1 everywhere; see
            `kseg.losses.class_weights`.
        ignore_label: id of the pixels that have no class.
        name: name of the loss in logs.
        reduction: as in Keras; None gives the map, not yet divided.

    Source:
        J. Long, E. Shelhamer, T. Darrell, "Fully Convolutional Networks for Semantic
        Segmentation", CVPR 2015, section 4, arXiv:1411.4038; the divisor is that of
        `torch.nn.CrossEntropyLoss`.

    Example:
        Both logits 0, so that each pixel costs |ln 0.5| = 0.693147. With the weights 1 and 3 two
        pixels of class 0 and one of class 1 sum to 5 * 0.693147. Divided by the weights, 5, that
        is 0.693147; `ce` divides by 3 pixels and gives 1.155245.

        >>> loss = WeightedCrossEntropy(class_weights=(1, 3))
        >>> part, = loss.parts(np.array([[[0, 0, 1]]]), np.zeros((1, 1, 3, 2)))
        >>> ops.sum(part.values) / part.divisor
        0.693147
    """

    def __init__(
        self,
        class_weights: tuple[float, ...] | None = None,
        ignore_label: int = 255,
        name: str = "weighted_ce",
        reduction: str | None = None,
    ) -> None:
        super().__init__(class_weights, ignore_label, name, reduction)

    def parts(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> list[Part]:
        """Return the one term of this loss; see `kseg.losses.parts`."""
        weights = pixel_weights(y_true, self.class_weights, y_pred.shape[-1], self.ignore_label)
        return [Part(1.0, self.call(y_true, y_pred), ops.sum(weights))]
