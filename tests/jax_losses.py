"""Runs on the JAX backend where TensorFlow cannot be imported; prints each loss's error as JSON.

python tests/jax_losses.py
"""

import functools
import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"


class _NoTensorFlow:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ImportError("kseg's losses must not import tensorflow")
        return None


sys.meta_path.insert(0, _NoTensorFlow())

import jax  # noqa: E402
import loss_oracles as oracles  # noqa: E402
import numpy as np  # noqa: E402

from kseg.losses.parts import parts_of, quotient  # noqa: E402
from kseg.registry import LOSSES  # noqa: E402

losses = {name: LOSSES[name]() for name in LOSSES}


def total(loss, mask, logits):
    parts = parts_of(loss, mask, logits)
    return sum(one.weight * quotient(one.values.sum(), one.divisor) for one in parts)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def all_at_once(logits, mask):
    """One program: compiled alone, each takes a second."""
    values = {name: total(loss, mask, logits) for name, loss in losses.items()}
    return sum(values.values()), values


_, drawn, logits = oracles.cases()[0]
errors = dict.fromkeys(losses, 0.0)
for mask in (drawn, np.full_like(drawn, oracles.IGNORED)):
    (_, values), slope = all_at_once(logits, mask)
    assert np.isfinite(slope).all()
    for name, value in values.items():
        error = abs(float(value) - oracles.LOSSES[name](mask, logits))
        errors[name] = max(errors[name], error)
print(json.dumps(errors))
