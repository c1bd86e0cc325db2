"""Runs on the JAX backend where TensorFlow cannot be imported; prints each loss's error as JSON.

python tests/jax_losses.py
"""

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

from kseg.losses.parts import parts_of, quotient  # noqa: E402
from kseg.registry import LOSSES  # noqa: E402


def error(name, mask, logits):
    loss = LOSSES[name]()

    def total(logits):
        parts = parts_of(loss, mask, logits)
        return sum(one.weight * quotient(one.values.sum(), one.divisor) for one in parts)

    value, slope = jax.jit(jax.value_and_grad(total))(logits)
    finite = bool(jax.numpy.isfinite(slope).all())
    return abs(float(value) - oracles.LOSSES[name](mask, logits)) if finite else 1e9


wanted = [case[1:] for case in oracles.cases() if case[0] in ("drawn", "all ignored")]
print(json.dumps({name: max(error(name, *case) for case in wanted) for name in LOSSES}))
