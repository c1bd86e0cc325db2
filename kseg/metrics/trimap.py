"""How mean IoU rises with the distance from the borders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from kseg.metrics.boundary import boundary_band
from kseg.metrics.iou import ConfusionMatrix
from kseg.metrics.metric import fraction, single_images
from kseg.registry import METRICS

WIDTHS = (1, 2, 4, 8, 16, 32)


@METRICS.register("trimap")
class Trimap:
    """Mean IoU and pixel accuracy within bands of several widths around the true borders.

    A pixel is in the band of width w if another class is true within w pixels of it, diagonals
    counted as one. Each band has a confusion matrix of its own over the whole set, so absent
    classes and means are as in `iou`. Ignored pixels count nowhere and make no border, but
    borders are seen across them. A band without a pixel has NaN.

    Args:
        num_classes: how many classes there are.
        ignore_label: id of the true pixels that count nowhere.
        widths: half-widths of the bands in pixels, each at least 1.

    Source:
        P. Kohli, L. Ladicky, P. Torr, "Robust Higher Order Potentials for Enforcing Label
        Consistency", IJCV 2009; P. Kraehenbuehl, V. Koltun, arXiv:1210.5644; L.-C. Chen et al.,
        arXiv:1412.7062 (mean IoU).

    Example:
        A border that lies one pixel off. In the band of width 1 are two pixels, true 01, labelled
        11: IoUs 0 and 1/2. In that of width 2 four, true 0011, labelled 0111: 1/2 and 2/3.

        >>> metric = Trimap(2, widths=(1, 2))
        >>> metric.update(np.array([[0, 0, 0, 1, 1, 1]]), np.array([[0, 0, 1, 1, 1, 1]]))
        >>> found = metric.result()
        >>> found["pixel_accuracy"], found["miou"]
        ([0.5, 0.75], [0.25, 0.5833333333333333])
    """

    needs_probabilities = False

    def __init__(
        self, num_classes: int, ignore_label: int = 255, *, widths: Sequence[int] = WIDTHS
    ) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.bands = {width: ConfusionMatrix(num_classes, ignore_label) for width in widths}
        self.pixels = 0

    def update(self, mask: np.ndarray, prediction: np.ndarray) -> None:
        """Count the pixels of the bands of one image (H, W) or of a batch (B, H, W) of ids."""
        pairs = single_images(
            mask, prediction, num_classes=self.num_classes, ignore_label=self.ignore_label
        )
        for true, guess in pairs:
            self.pixels += np.count_nonzero(true != self.ignore_label)
            for width, confusion in self.bands.items():
                band = boundary_band(true, width, ignore_label=self.ignore_label)
                band &= true != self.ignore_label
                confusion.update(true[band], guess[band])

    def result(self) -> dict[str, list[float]]:
        """Return mIoU, pixel accuracy and share of all pixels of the band of each width."""
        bands = self.bands.values()
        return {
            "widths": list(self.bands),
            "miou": [band.miou for band in bands],
            "pixel_accuracy": [band.pixel_accuracy for band in bands],
            "pixels": [float(band.matrix.sum() / max(1, self.pixels)) for band in bands],
        }

    def table(self, classes: Sequence[str]) -> Table:
        """Return a row for each width."""
        table = Table("pixels from a border", "mIoU", "pixel accuracy", "pixels")
        for column in table.columns:
            column.justify = "right"
        for width, miou, accuracy, share in zip(*self.result().values(), strict=True):
            table.add_row(str(width), fraction(miou), fraction(accuracy), f"{share:.2%}")
        return table
