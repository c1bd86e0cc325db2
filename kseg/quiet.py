"""Load TensorFlow with its fast kernels, and keep its start-up chatter from the user."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*descriptors: int) -> Iterator[None]:
    """Hold back what C code writes to these descriptors; print it only if the body raises.

    Environment variables leave several lines of TensorFlow's start untouched, because they are
    written before its logging is set up.

    Args:
        descriptors: 1 for standard output, 2 for standard error; both if none is named.
    """
    _flush()
    with contextlib.ExitStack() as stack:
        holds = [stack.enter_context(_held(number)) for number in descriptors or (1, 2)]
        try:
            yield
        except BaseException:
            for hold in holds:
                hold.replay = True
            raise


class _Hold:
    replay = False


@contextlib.contextmanager
def _held(number: int) -> Iterator[_Hold]:
    hold = _Hold()
    saved = os.dup(number)
    with tempfile.TemporaryFile() as store:
        os.dup2(store.fileno(), number)
        try:
            yield hold
        finally:
            _flush()
            os.dup2(saved, number)
            os.close(saved)
            if hold.replay:
                store.seek(0)
                os.write(number, store.read())


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def prepare_tensorflow() -> None:
    """Set what TensorFlow reads once, as it is imported; what the user has set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Of its own it takes oneDNN's kernels on processors with AVX-512 VNNI or newer sets alone.
    # With AVX2 they are 1.2 to 2.7 times as fast as its others, too.
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def load_tensorflow() -> None:
    """Import TensorFlow and Keras in silence, with GPU memory growing as it is needed."""
    prepare_tensorflow()
    # Training and export are TensorFlow's, whatever backend the user's other programs run on.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with quiet(2):
        import keras  # noqa: F401
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.constant(0) + 1  # the first operation logs once more
