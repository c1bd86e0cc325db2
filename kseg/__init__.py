"""kseg: semantic segmentation from labelled images to a verified model on a device.

predictor = kseg.load("runs/camvid")
ids = predictor.predict(image)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kseg.version import VERSION as __version__

if TYPE_CHECKING:
    from kseg.inference import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import `load` when it is first asked for: `import kseg` itself costs nothing."""
    if name == "load":
        from kseg.inference import load

        return load
    raise AttributeError(f"module 'kseg' has no attribute {name!r}")
