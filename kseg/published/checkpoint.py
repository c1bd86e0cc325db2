"""Tensors out of a `.pth` or `.safetensors` file, as NumPy arrays; nothing in a file is run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kseg.errors import UserError

if TYPE_CHECKING:
    import torch

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
# Where training scripts put the weights among other things, and what wrappers put before names.
_NESTS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "model.", "_orig_mod.")


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Return the weights in a file by name.

    Args:
        path: a `.safetensors` file, or one that `torch.save` wrote of a state dict, which may be
            nested under "state_dict", "model" or "module" and whose names may begin with "module.".

    Returns:
        The tensors; those of floating point as float32. Counters of batches are left out.

    Raises:
        UserError: if the file cannot be read, holds more than weights, or a package is missing.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        found = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        found = _read_torch(path)
    else:
        raise UserError(f"{path} is neither a .pth nor a .safetensors file")
    tensors = {
        name: value.astype("float32") if _is_float(value.dtype) else value
        for name, value in found.items()
        if not name.endswith("num_batches_tracked")
    }
    if not tensors:
        raise UserError(f"{path} holds no weights")
    return _without_prefix(tensors)


def refuse_checkpoint(path: Path) -> None:
    """Refuse a file of another library where a model of kseg is wanted.

    Raises:
        UserError: if its name is that of one.
    """
    if path.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        raise UserError(
            f"{path} holds weights of another library; make a .keras file of them by "
            f"`kseg weights import {path} --as NETWORK --out FILE.keras`"
        )


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401 (tells NumPy what bfloat16 is; TensorFlow brings it)

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} {_DAMAGED} ({error})") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading {path.suffix} needs `pip install 'kseg[torch]'`; a .safetensors file "
            "of the same weights needs less"
        ) from error
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle's protocols
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises almost anything on a damaged file
            raise UserError(f"{path} {_reason(path, error)}") from error
    return {name: _array(path, name, value) for name, value in _state_dict(path, content).items()}


_DAMAGED = "cannot be read as weights: it is damaged, cut short or something else; fetch it again"


def _reason(path: Path, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    with path.open("rb") as file:
        start = file.read(2)
    # torch writes pickles of protocol 2 alone, and its reader knows no other.
    foreign = start[:1] == b"\x80" and start[1:] > b"\x02"
    if code is None and not foreign:
        return _DAMAGED
    return (
        f"holds Python objects{f' ({code[1]})' if code else ''} that would run code on loading; "
        "kseg reads weights alone. Where you trust the file, load it by torch and save the state "
        "dict in it alone"
    )


def _state_dict(path: Path, content: object) -> Mapping[str, torch.Tensor]:
    import torch

    while isinstance(content, Mapping) and not _all_tensors(content):
        nest = next((n for n in _NESTS if isinstance(content.get(n), Mapping)), None)
        if nest is None:
            keys = ", ".join(str(key) for key in list(content)[:8])
            raise UserError(f"{path} holds no state dict under {', '.join(_NESTS)}; it has: {keys}")
        content = content[nest]
    if not isinstance(content, Mapping):
        kind = "a tensor" if isinstance(content, torch.Tensor) else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {kind}, not a state dict")
    return content


def _all_tensors(content: Mapping[Any, Any]) -> bool:
    import torch

    return all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


def _array(path: Path, name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    except (TypeError, RuntimeError) as error:  # quantised, sparse
        kind = f"{tensor.dtype} {tensor.layout}"
        raise UserError(f"{path}: {name} is {kind}; kseg reads dense numbers alone") from error


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take off what wrappers put before every name."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            stripped = {name.removeprefix(prefix): value for name, value in tensors.items()}
            return _without_prefix(stripped)
    return tensors
