"""Logit adjustment: frequent classes get a head start in training, and so need less of a margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kseg.losses.parts import Part, parts_of


@keras.saving.register_keras_serializable(package="kseg")
class LogitAdjusted(keras.losses.Loss):
    """A loss that sees z + tau * ln(prior) in place of the logits z.

    With the prior the share of each class among the training pixels, the net learns scores from
    which the prior is taken out: rare classes win where they are likelier than usual, not only
    where they are likelier than all others. What is evaluated and exported are the logits as they
    are, so nothing is to be done there.

    Args:
        loss: any loss from logits.
        prior: share of each class, above 0.
        tau: strength; 1 gives the classifier of least balanced error, 0 changes nothing.
        name: name of the loss in logs.
        reduction: as in Keras; None gives what `loss` gives.

    Source:
        A. K. Menon, S. Jayasumana, A. S. Rawat, H. Jain, A. Veit, S. Kumar, "Long-tail learning via
        logit adjustment", ICLR 2021, section 4.2, equation 10, arXiv:2007.07314.

    Example:
        Both logits 0, priors 3/4 and 1/4: the softmax of (ln 3/4, ln 1/4) is the prior, and cross
        entropy costs a pixel of the rare class |ln 1/4| = 1.386294, of the other 0.287682.

        >>> loss = LogitAdjusted(CrossEntropy(), prior=(0.75, 0.25))
        >>> loss(np.array([[[0, 1]]]), np.zeros((1, 1, 2, 2)))
        [[[0.287682, 1.386294]]]
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        prior: Sequence[float],
        tau: float = 1.0,
        name: str = "logit_adjusted",
        reduction: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype="float32")
        if min(prior) <= 0:
            raise ValueError(f"a share of the prior is {min(prior)}; each must be above 0")
        self.loss = loss
        self.prior = tuple(map(float, prior))
        self.tau = tau

    def call(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Return what the loss answers to the adjusted logits."""
        return self.loss.call(y_true, self._adjusted(y_pred))

    def parts(self, y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> list[Part]:
        """Return the terms of the loss; see `kseg.losses.parts`."""
        return parts_of(self.loss, y_true, self._adjusted(y_pred))

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` took, ready for JSON."""
        loss = keras.saving.serialize_keras_object(self.loss)
        return {**super().get_config(), "loss": loss, "prior": list(self.prior), "tau": self.tau}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LogitAdjusted:
        """Return the loss that `get_config` describes."""
        return cls(**{**config, "loss": keras.saving.deserialize_keras_object(config["loss"])})

    def _adjusted(self, logits: keras.KerasTensor) -> keras.KerasTensor:
        prior = ops.convert_to_tensor(self.prior, "float32")
        return ops.cast(logits, "float32") + self.tau * ops.log(prior)
