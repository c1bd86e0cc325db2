"""Losses; every file of this package registers its own."""

import importlib
import pkgutil

from kseg.losses.cross_entropy import CrossEntropy, valid_pixels

__all__ = ["CrossEntropy", "valid_pixels"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
