"""How the kernels of a `.tflite` file differ from those of a float file of the same model.

Channels of a map may be larger or smaller than the model's where the kernels that read them make
it good, as in files with even channels: M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", arXiv:1906.04721, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .layerwise import interpreter_of_all
from .operators import Network, Operator, Tensor, read_network

WRONG_SCALE = 0.1  # logarithm of a factor, which rounding a kernel to 8 bits stays far below
SILENCED = 0.1  # of a channel, below which it counts as gone
_TINY = 1e-30  # stands for the factors of channels that are gone
_ROUNDS = 8  # of the fit of factors to both axes of a kernel
# Share of rounding in a channel's weights, from which they tell no factor: it is as the others.
_UNSEEN = 0.2
# Operators that move pixels among channels: each pixel of a cell has all channels of the other map.
_REPEATING = ("SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "SPLIT")
# Where an operator has its map and its kernel.
_PLACES = {
    "CONV_2D": (0, 1),
    "DEPTHWISE_CONV_2D": (0, 1),
    "FULLY_CONNECTED": (0, 1),
    "TRANSPOSE_CONV": (2, 1),
}


@dataclass(frozen=True)
class Difference:
    """How a kernel of a file differs from the float file's, in the channel it differs most in.

    Attributes:
        factor: the held values as a multiple of the wanted ones, by least squares; 1 where other
            kernels make it good.
        error: what that leaves, root mean square, as a share of the wanted values' size.
    """

    factor: float
    error: float


@dataclass(frozen=True)
class _Kernel:
    """A kernel that both files hold.

    Attributes:
        tensor: the file's.
        held, wanted: values in the file and in the float one, float64 (given, ..., read), of
            depthwise ones (1, rows, columns, given).
    """

    tensor: Tensor
    held: np.ndarray
    wanted: np.ndarray

    @property
    def step(self) -> np.ndarray:
        """The file's steps, to be multiplied with its whole numbers."""
        shape = [1] * len(self.tensor.shape)
        if len(self.tensor.scales) > 1:
            shape[self.tensor.axis] = -1
        return np.reshape(self.tensor.scales or (0.0,), shape)


@dataclass(frozen=True)
class _Channels:
    """The channels (C,) of a map as multiples of the model's.

    Attributes:
        factors: the multiples; NaN where they are not known.
        makers: names of the kernels that made each of them so.
        places: which channel of that kernel it was.
    """

    factors: np.ndarray
    makers: np.ndarray
    places: np.ndarray

    @staticmethod
    def of(function: Callable[..., np.ndarray], *parts: _Channels) -> _Channels:
        """Return what a function makes of the arrays of some channels, one kind after the other."""
        arrays = zip(*(vars(part).values() for part in parts), strict=True)
        return _Channels(*(function(*one) for one in arrays))

    @property
    def unknown(self) -> np.ndarray:
        """Of which of them nothing is known."""
        return np.isnan(self.factors)

    @property
    def far(self) -> np.ndarray:
        """Which of them differ by more than rounding."""
        return _far(self.factors)


def kernel_differences(path: Path, float_path: Path) -> dict[str, Difference]:
    """Return how the kernels of a file differ from the float file's, by their names.

    Kernels whose names or shapes the files do not share are left out.
    """
    network = read_network(path)
    kernels = _shared_kernels(network, path, float_path)
    account = _Account(network, kernels)
    return {name: _difference(account.explained(name), one) for name, one in kernels.items()}


def _shared_kernels(network: Network, path: Path, float_path: Path) -> dict[str, _Kernel]:
    ours, theirs = interpreter_of_all(path), interpreter_of_all(float_path)
    float_ones = {t["name"]: t for t in theirs.get_tensor_details() if t["dtype"] == np.float32}
    found = {}
    for tensor in network.tensors:
        other = float_ones.get(tensor.name)
        is_kernel = tensor.constant and len(tensor.shape) > 1 and other
        if not is_kernel or tuple(other["shape"]) != tensor.shape:
            continue
        if tensor.scales or tensor.dtype == "float32":
            values = (ours.get_tensor(tensor.index), theirs.get_tensor(other["index"]))
            held, wanted = (one.astype("float64") for one in values)
            one = _Kernel(tensor, held, wanted)
            found[tensor.name] = replace(one, held=held * one.step) if tensor.scales else one
    return found


class _Account:
    """By how much each kernel's channels are larger than the model's, and what makes it good.

    Attributes:
        maps: what is known of the channels of maps, by the index of their tensor.
        negated: indices of maps with the other sign, which the kernels that read them have, too.
        given: of each kernel, the factors of the channels that it gives.
        read: the factors, by those that give them, of the channels that it reads and makes good.
        left: what the kernels behind leave of each given factor; NaN where none reads it.
    """

    def __init__(self, network: Network, kernels: dict[str, _Kernel]) -> None:
        self.network = network
        self.kernels = kernels
        self.maps: dict[int, _Channels] = {}
        self.negated: set[int] = set()
        self.given: dict[str, np.ndarray] = {}
        self.read: dict[str, np.ndarray] = {}
        self.left: dict[str, np.ndarray] = {}
        for operator in network.operators:
            self._follow(operator)

    def explained(self, name: str) -> np.ndarray:
        """Return what a file holds as a kernel, without the factors that are made good."""
        held = self.kernels[name].held
        if name not in self.given:
            return held
        factors = _quotient(self.given[name], self.left[name])
        shape = [1] * held.ndim
        shape[-1 if len(held) == 1 else 0] = -1
        return held * self.read[name] / factors.reshape(shape)

    def _follow(self, operator: Operator) -> None:
        channels = self._result(operator)
        if operator.name == "NEG":
            self.negated.update(operator.outputs)
        for index in operator.outputs:
            result = self.network.tensors[index]
            known = channels is not None and result.shape[-1:] == channels.factors.shape
            if known and result.dtype != "bool":  # of a comparison, which no factor changes
                self.maps[index] = channels

    def _result(self, operator: Operator) -> _Channels | None:
        """Return the channels of an operator's result; None where they are the model's."""
        if operator.name not in _PLACES:
            return self._passed(operator)
        image, kernel = (operator.inputs[place] for place in _PLACES[operator.name])
        name, before = self.network.tensors[kernel].name, self.maps.get(image)
        if name not in self.kernels:
            return self._unseen(operator, before)
        if image in self.negated:
            self.kernels[name] = replace(self.kernels[name], held=-self.kernels[name].held)
        if operator.name == "DEPTHWISE_CONV_2D":
            channels = self._scaled(name, before)
        else:
            channels = self._mixed(name, before)
        return channels if channels.far.any() or channels.unknown.any() else None

    def _unseen(self, operator: Operator, before: _Channels | None) -> _Channels:
        """Return channels behind a kernel that the model's file has under no such name.

        It may make good what is before it, and its own channels may be of any size.
        """
        if before is not None:
            self._note(before, np.ones(len(before.factors)), before.far)
        width = self.network.tensors[operator.outputs[0]].shape[-1]
        return _own("", np.full(width, np.nan))

    def _passed(self, operator: Operator) -> _Channels | None:
        """Return the channels of what an operator reads, which are taken to be those it gives."""
        fed = [self.maps.get(index) for index in operator.inputs]
        known = [one for one in fed if one is not None]
        if not known:
            return None
        if operator.name in _REPEATING:
            width = self.network.tensors[operator.outputs[0]].shape[-1]
            return _Channels.of(lambda values: np.resize(values, width), known[0])
        if operator.name != "CONCATENATION":
            return known[0]
        widths = [self.network.tensors[index].shape[-1] for index in operator.inputs]
        parts = [one or _own("", np.ones(width)) for one, width in zip(fed, widths, strict=True)]
        return _Channels.of(lambda *values: np.concatenate(values), *parts)

    def _mixed(self, name: str, before: _Channels | None) -> _Channels:
        """Return the channels behind a kernel that reads all channels for each one it gives."""
        one = self.kernels[name]
        factors = np.ones(one.held.shape[-1])
        if before is not None and before.factors.shape == factors.shape:
            factors = _undone(one, before)
            self._note(before, before.factors / factors, before.far)
        elif before is not None:  # in groups, or flattened: what it makes good is not told
            self._note(before, np.ones(len(before.factors)), before.far)
        given = _factors(_rows(one.held * factors), _rows(one.wanted))
        self._enter(name, factors, given)
        return _own(name, given)

    def _scaled(self, name: str, before: _Channels | None) -> _Channels:
        """Return the channels behind a depthwise kernel: those before it times its own factors."""
        one = self.kernels[name]
        own = _factors(*(_rows(np.moveaxis(v, -1, 0)) for v in (one.held, one.wanted)))
        if before is None or len(own) % len(before.factors):
            before = _own("", np.ones(len(own)))
        each = len(own) // len(before.factors)
        before = _Channels.of(lambda values: np.repeat(values, each), before)
        if before.unknown.any():
            self._enter(name, _quotient(np.ones(len(own)), own), np.ones(len(own)))
            return _own("", np.full(len(own), np.nan))
        changes = _far(own)
        self._note(before, np.ones(len(own)), before.far & changes)
        factors = np.where(changes, before.factors, 1.0)
        self._enter(name, factors, own * factors)
        given = _own(name, own * before.factors)
        return _Channels.of(lambda new, old: np.where(changes, new, old), given, before)

    def _enter(self, name: str, read: np.ndarray, given: np.ndarray) -> None:
        if name in self.given:
            return  # a layer that is used again
        self.read[name], self.given[name] = read, given
        self.left[name] = np.full(len(given), np.nan)

    def _note(self, channels: _Channels, left: np.ndarray, which: np.ndarray) -> None:
        """Note for the kernels that made channels what a kernel behind leaves of their factors."""
        for index in np.flatnonzero(which):
            notes, place = self.left[channels.makers[index]], channels.places[index]
            known = 0.0 if np.isnan(notes[place]) else _log(notes[place])
            if np.abs(_log(left[index])) >= np.abs(known):
                notes[place] = left[index]


def _own(name: str, factors: np.ndarray) -> _Channels:
    count = len(factors)
    return _Channels(factors, np.full(count, name, object), np.arange(count))


def _undone(one: _Kernel, before: _Channels) -> np.ndarray:
    """Return by what the channels that a kernel reads may be multiplied without any change.

    What its rows and its columns share is taken from the rows if all are alike, else from the
    middle column. The kernel undoes nothing if that explains it as well, as where all factors of
    the channels are one.
    """
    held, wanted = (
        values.reshape(len(values), -1, values.shape[-1]) for values in (one.held, one.wanted)
    )
    products, powers = (held * wanted).sum(1), (wanted**2).sum(1)
    unknown = before.unknown
    before = replace(before, factors=np.where(unknown, 1.0, before.factors))
    columns = 1 / np.maximum(before.factors, _TINY)
    for _ in range(_ROUNDS):
        rows = _quotient(products @ columns, powers @ columns**2)
        columns = _quotient(rows @ products, rows**2 @ powers)
    undone, untouched = _log(columns * before.factors), _log(columns)
    alike = _spread(_log(rows)) < WRONG_SCALE
    shared = -np.median(_log(rows)) if alike else np.median(undone)
    rounding = np.sum(np.broadcast_to(one.step**2 / 12, one.held.shape).reshape(held.shape), (0, 1))
    seen = rounding < _UNSEEN**2 * np.sum(held**2, (0, 1))
    explained = np.where(seen, np.exp(shared - _log(columns)), before.factors)
    plain = _spread(untouched[seen])
    if unknown.any():
        return explained if plain > WRONG_SCALE else np.ones(len(seen))
    return explained if _spread(undone[seen]) < plain / 2 else np.ones(len(seen))


def _spread(values: np.ndarray) -> float:
    """Return how far values lie from the middle one, on average."""
    return float(np.mean(np.abs(values - np.median(values)))) if len(values) else 0.0


def _difference(held: np.ndarray, one: _Kernel) -> Difference:
    tensor = one.tensor
    rows = (len(tensor.scales), -1) if len(tensor.scales) > 1 else (1, -1)
    held, wanted = (
        np.moveaxis(values, tensor.axis or 0, 0).reshape(rows) for values in (held, one.wanted)
    )
    power = np.sum(wanted**2, axis=1)
    held, wanted, power = (values[power > 0] for values in (held, wanted, power))
    if not len(power):
        return Difference(1.0, 0.0)
    factors = _factors(held, wanted)
    errors = np.sqrt(np.sum((held - factors[:, None] * wanted) ** 2, axis=1) / power)
    # A channel that is all zeros in the file is another kernel, not one of another scale.
    errors = np.maximum(errors, factors < SILENCED)
    return Difference(float(factors[np.argmax(np.abs(_log(factors)))]), float(errors.max()))


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _factors(held: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return by least squares what multiple of the wanted values each row holds; 1 of no values."""
    return _quotient(np.sum(held * wanted, axis=1), np.sum(wanted**2, axis=1))


def _quotient(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(value, by, out=np.ones_like(value), where=by > 0)


def _log(factors: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(factors, _TINY))


def _far(factors: np.ndarray) -> np.ndarray:
    return np.abs(_log(factors)) > WRONG_SCALE
