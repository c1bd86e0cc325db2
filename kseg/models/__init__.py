"""Architectures; every file of this package registers its own."""

import importlib
import pkgutil

from kseg.build import (
    build,
    inference_model,
    macs,
    option_types,
    parse_options,
    trainable_parameters,
)

__all__ = [
    "build",
    "inference_model",
    "macs",
    "option_types",
    "parse_options",
    "trainable_parameters",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
