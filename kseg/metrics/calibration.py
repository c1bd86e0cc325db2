"""Whether a model is right as often as it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from kseg.metrics.iou import ratio
from kseg.metrics.metric import fraction
from kseg.registry import METRICS

# Confidences are summed in whole steps of float32 near 1, so that sums do not depend on order.
_STEPS = 2**24


@METRICS.register("calibration")
class Calibration:
    """Expected calibration error, and the data of a reliability diagram.

    The confidence of a pixel is the probability of its most probable class. Pixels go into bins
    of equal width by it, bin b holding the confidences of ((b - 1) / B, b / B]. With n_b pixels of
    n in the bin, acc_b the share of them that is right and conf_b their mean confidence:

        ECE = sum of n_b / n |acc_b - conf_b|, the error expected of a pixel
        MCE = greatest |acc_b - conf_b| of a bin that is not empty

    Of equal probabilities the lower class id counts. Every valid pixel of the set counts alike;
    ignored ones do not. Without any, and for empty bins, numbers are NaN. A class map has no
    probabilities, so this needs a file that gives logits or probabilities.

    Args:
        num_classes: how many classes there are.
        ignore_label: id of the true pixels that count nowhere.
        bins: how many bins, B.

    Source:
        M. Naeini, G. Cooper, M. Hauskrecht, "Obtaining Well Calibrated Probabilities Using
        Bayesian Binning", AAAI 2015; C. Guo, G. Pleiss, Y. Sun, K. Weinberger,
        arXiv:1706.04599, section 2 (15 bins).

    Example:
        Four pixels that the model gives class 0 with 0.75; three of them are: well calibrated.
        Were all of them, it would be too modest by 0.25.

        >>> probabilities = np.tile([0.75, 0.25], (1, 4, 1))
        >>> for mask in ([[0, 0, 0, 1]], [[0, 0, 0, 0]]):
        ...     metric = Calibration(2)
        ...     metric.update(np.array(mask), probabilities)
        ...     print(metric.result()["ece"])
        0.0
        0.25
    """

    needs_probabilities = True

    def __init__(self, num_classes: int, ignore_label: int = 255, *, bins: int = 15) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.bins = bins
        # Of each bin: pixels, right ones, and the sum of their confidences in steps.
        self.pixels, self.right, self.steps = np.zeros((3, bins), np.int64)

    def update(self, mask: np.ndarray, prediction: np.ndarray) -> None:
        """Count the pixels of an image or a batch.

        Args:
            mask: true class ids, any shape, any integer type.
            prediction: probabilities, the mask's shape and an axis of `num_classes` behind it.

        Raises:
            ValueError: if the shapes do not fit, or a value is no probability.
        """
        mask, prediction = np.asarray(mask), np.asarray(prediction)
        if prediction.shape != (*mask.shape, self.num_classes):
            raise ValueError(
                f"the mask is {mask.shape} and the prediction {prediction.shape}; probabilities "
                f"of {self.num_classes} classes have the shape {(*mask.shape, self.num_classes)}"
            )
        valid = mask != self.ignore_label
        true, confidence = mask[valid], prediction.max(axis=-1)[valid]
        if not ((confidence > 0) & (confidence <= 1 + 1e-3)).all():  # NaN fails, too
            raise ValueError("the prediction holds values that are no probabilities of 0 to 1")
        right = prediction.argmax(axis=-1)[valid] == true
        bins = np.clip(np.ceil(confidence * self.bins) - 1, 0, self.bins - 1).astype(np.intp)
        steps = np.rint(np.minimum(confidence, 1).astype(np.float64) * _STEPS)
        self.pixels += np.bincount(bins, minlength=self.bins)
        self.right += np.bincount(bins[right], minlength=self.bins)
        self.steps += np.bincount(bins, steps, self.bins).astype(np.int64)

    def result(self) -> dict[str, float | np.ndarray]:
        """Return ECE, MCE, accuracy and confidence of all pixels and of each bin, and its pixels.

        Accuracy above confidence: the model is more often right than it says.
        """
        accuracy, confidence = ratio(self.right, self.pixels), self._confidence()
        gaps = np.abs(accuracy - confidence)
        total = self.pixels.sum()
        return {
            "ece": float(ratio(np.nansum(self.pixels * gaps), total)),
            "mce": float(np.fmax.reduce(gaps)),
            "accuracy": float(ratio(self.right.sum(), total)),
            "confidence": float(ratio(self.steps.sum() / _STEPS, total)),
            "bins": {
                "edges": np.linspace(0, 1, self.bins + 1),
                "pixels": self.pixels,
                "accuracy": accuracy,
                "confidence": confidence,
            },
        }

    def table(self, classes: Sequence[str]) -> Table:
        """Return a row for each bin with pixels: a reliability diagram in figures."""
        found = self.result()
        table = Table("confidence", "mean", "right", "pixels", title="calibration")
        for column in table.columns:
            column.justify = "right"
        edges, total = found["bins"]["edges"], max(1, self.pixels.sum())
        for index in np.flatnonzero(self.pixels):
            table.add_row(
                f"{edges[index]:.2f} to {edges[index + 1]:.2f}",
                fraction(found["bins"]["confidence"][index]),
                fraction(found["bins"]["accuracy"][index]),
                f"{self.pixels[index] / total:.2%}",
            )
        table.add_section()
        table.add_row("all", fraction(found["confidence"]), fraction(found["accuracy"]), "")
        table.add_row("ECE", fraction(found["ece"]), "", "")
        table.add_row("MCE", fraction(found["mce"]), "", "")
        return table

    def _confidence(self) -> np.ndarray:
        return ratio(self.steps / _STEPS, self.pixels)
