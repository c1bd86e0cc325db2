"""The libraries that our numbers are compared with, where they are installed."""

import functools
from types import ModuleType

import pytest


def peer(name: str) -> ModuleType:
    """Return a module of another library; the test is skipped where it is missing."""
    _define_operators()
    return pytest.importorskip(name, reason=f"{name} is missing: pip install 'kseg[peers]'")


@functools.cache
def _define_operators() -> object:
    """Let torchvision be imported without its compiled part, of which nothing is used here.

    Its wheel on PyPI is built for torch with CUDA; beside torch for CPUs it does not load.
    """
    try:
        import torch
    except ImportError:
        return None
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # kept, since the operators go with it
