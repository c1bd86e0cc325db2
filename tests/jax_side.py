"""Runs on the JAX backend where TensorFlow cannot be imported; prints each model's golden error.

python tests/jax_side.py MODEL...
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"


class _NoTensorFlow:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ImportError("kseg's models must not import tensorflow")
        return None


sys.meta_path.insert(0, _NoTensorFlow())

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import zoo  # noqa: E402

import kseg.backbones  # noqa: E402, F401
import kseg.losses  # noqa: E402, F401
import kseg.metrics  # noqa: E402, F401
import kseg.models  # noqa: E402, F401

# The weights are overwritten, and JAX compiles its random numbers once a shape: 10 s for nothing.
keras.initializers.VarianceScaling.__call__ = lambda self, shape, dtype=None: np.zeros(shape, dtype)

for _name in sys.argv[1:]:
    now = zoo.outputs(zoo.seeded_model(_name), jax.jit)
    print(_name, zoo.golden_error(_name, now))
