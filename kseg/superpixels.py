"""Superpixels: every pixel of a small region of one colour is given one label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kseg.errors import UserError


@dataclass(frozen=True)
class Superpixels:
    """The mean of a net's probabilities over each superpixel of its image.

    Attributes:
        count: about how many superpixels an image has; at least 1. The paper takes 500.
        compactness: how much nearness counts beside colour.

    Source:
        Mostajabi, Yadollahpour, Shakhnarovich, "Feedforward Semantic Segmentation with Zoom-Out
        Features", CVPR 2015, section 3, arXiv:1412.0774; superpixels by Achanta et al., "SLIC
        Superpixels", PAMI 2012, as in scikit-image.
    """

    count: int = 500
    compactness: float = 10.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"superpixels is {self.count}; at least 1 is wanted")

    def refine(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Give every pixel the mean of its superpixel.

        Args:
            probabilities: (H, W, C); logits will do.
            image: uint8 (H, W, 3), RGB, from which the superpixels are made.

        Returns:
            (H, W, C) of the same type.

        Raises:
            UserError: if sizes differ, or scikit-image is not there.
        """
        if probabilities.shape[:2] != image.shape[:2]:
            raise UserError(
                f"probabilities are {probabilities.shape[:2]} pixels, the image {image.shape[:2]}"
            )
        segments = self._segments(image)
        labels = segments.ravel()
        pixels = np.bincount(labels)
        channels = probabilities.reshape(len(labels), -1).T
        sums = np.stack([np.bincount(labels, channel) for channel in channels], axis=-1)
        means = sums / np.maximum(pixels, 1)[:, None]
        return means.astype(probabilities.dtype)[segments]

    def _segments(self, image: np.ndarray) -> np.ndarray:
        """Return the number of the superpixel of each pixel, (H, W)."""
        try:
            from skimage.segmentation import slic
        except ImportError as error:
            raise UserError(
                "superpixels need scikit-image: pip install 'kseg[superpixels]'"
            ) from error
        return slic(image, n_segments=self.count, compactness=self.compactness, start_label=0)
