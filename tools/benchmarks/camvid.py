"""Where CamVid is."""

from __future__ import annotations

import os
from pathlib import Path


def shared_camvid() -> Path:
    """Return camvid/ in the folder that KSEG_SHARED names, or in ../shared."""
    return Path(os.environ.get("KSEG_SHARED", "../shared")) / "camvid"
