"""Everything but training and export also runs on JAX, with the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

SIDE = Path(__file__).with_name("jax_side.py")


def jax_errors(*names):
    """Return the golden error of each model on the JAX backend, in a process of its own."""
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, SIDE, *names], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: float(error) for name, error in lines}


def test_one_model_without_tensorflow():
    # Both backends compute in float32; sums in another order differ by a few 1e-6.
    assert jax_errors("swiftnet")["swiftnet"] < 1e-4
