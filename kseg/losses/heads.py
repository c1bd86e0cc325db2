"""Losses of training-only heads, which models bring: they judge another output than the logits."""

from __future__ import annotations

import keras

from kseg.losses.boundary_loss import BoundaryAwareLoss, BoundaryLoss
from kseg.losses.se_loss import SELoss
from kseg.registry import HEAD_LOSSES, MODELS

HEAD_LOSSES.register("se_loss")(SELoss)
HEAD_LOSSES.register("boundary_head")(BoundaryLoss)
HEAD_LOSSES.register("boundary_aware")(BoundaryAwareLoss)


def brought_by(loss: type[keras.losses.Loss]) -> list[str]:
    """Return the models with a head that this loss judges."""
    return [
        name
        for name in MODELS
        if any(type(used) is loss for used, _ in MODELS.entry(name).aux.values())
    ]
