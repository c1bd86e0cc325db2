"""What an exported file must reach, and on how much it is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Demands:
    """What an exported file must reach, and on how much it is measured.

    Attributes:
        min_agreement: labels equal to Keras's, per cent; None takes 99.9 for float32, 99.5 for
            float16, 99.5 for quantisation-aware files against their own Keras model, else 95.
        max_drop: how much mean IoU a file may lose against the float model, points; None for any.
        calibration_images: how many training images set the int8 ranges.
        verify_images: how many validation images the proof takes; None takes all.
        seconds: how long each file is timed.
    """

    min_agreement: float | None = None
    max_drop: float | None = None
    calibration_images: int = 100
    verify_images: int | None = None
    seconds: float = 20.0
