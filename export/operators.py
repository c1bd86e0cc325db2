"""What a `.tflite` file is made of: tensors, operators, multiply-accumulates."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from kseg.errors import UserError

IDENTIFIER = b"TFL3"
FEW = 16  # elements of a constant that are read: axes, paddings, permutations; no weights
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
ACTIVATIONS = {
    value: name
    for name, value in vars(schema.ActivationFunctionType).items()
    if not name.startswith("_")
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a network.

    Attributes:
        index: place in the file.
        name: as the converter wrote it; "" where names were stripped.
        shape: sizes of the axes; () for a scalar. An axis that may change is 1.
        dtype: as "int8" or "float32".
        scales: one a tensor, or one an index of `axis`; () if it is not quantised.
        zero_points: as many as scales.
        axis: which axis the scales belong to; None if there is at most one.
        constant: whether the file holds its values.
        dynamic: the axes that may change from call to call.
        bytes: size in memory.
        values: elements of a constant of few integers, as axes or a permutation; else ().
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int | None
    constant: bool
    dynamic: tuple[int, ...]
    bytes: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator of a network.

    Attributes:
        index: place in the order of execution.
        name: as "CONV_2D"; of a custom operator, its own name.
        version: of the operator, as its kernels are registered.
        inputs: indices of tensors; -1 where an optional one is left out.
        outputs: indices of tensors.
        options: the fields of its options table in the schema, as `{"strideH": 2}`.
    """

    index: int
    name: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def activation(self) -> str:
        """The activation that is part of the operator, as "RELU6"; "NONE" if there is none."""
        return ACTIVATIONS[self.options.get("fusedActivationFunction", 0)]


@dataclass(frozen=True)
class Network:
    """The only subgraph of a file.

    Attributes:
        tensors: all of them, by their index.
        operators: in the order of execution.
        inputs: indices of the tensors that a client writes.
        outputs: indices of the tensors that a client reads.
    """

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sources(self, operator: Operator) -> list[Tensor]:
        """Return the input tensors that are there, constants too."""
        return [self.tensors[index] for index in operator.inputs if index >= 0]

    def fed(self, operator: Operator) -> list[Tensor]:
        """Return the inputs that are not constant."""
        return [tensor for tensor in self.sources(operator) if not tensor.constant]

    def results(self, operator: Operator) -> list[Tensor]:
        """Return the output tensors."""
        return [self.tensors[index] for index in operator.outputs]


def read_network(path: Path) -> Network:
    """Read the operators and tensors of a `.tflite` file; weights are left on the disk.

    Raises:
        OSError: if there is no such file.
        UserError: if the file is no `.tflite`, is damaged, or has several subgraphs.
    """
    model = _read_model(path)
    if len(model.subgraphs) != 1:
        raise UserError(
            f"{path} has {len(model.subgraphs)} subgraphs; only files with one can be inspected"
        )
    graph = model.subgraphs[0]
    try:
        tensors = [_tensor(model, index, tensor) for index, tensor in enumerate(graph.tensors)]
        operators = [_operator(model, index, one) for index, one in enumerate(graph.operators)]
        network = Network(
            tuple(tensors), tuple(operators), _numbers(graph.inputs), _numbers(graph.outputs)
        )
        for operator in operators:
            network.sources(operator), network.results(operator)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error
    return network


def macs(network: Network) -> int:
    """Return the multiply-accumulates of one call: convolutions and products of matrices."""
    return sum(operator_macs(network, operator) for operator in network.operators)


def operator_macs(network: Network, operator: Operator) -> int:
    """Return the multiply-accumulates of one operator; 0 if it is no product.

    As `kseg.build.macs` counts the layers of a model, and besides it the products of two
    activations, as in attention.
    """
    sources, results = network.sources(operator), network.results(operator)
    if operator.name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        return math.prod(sources[1].shape) * math.prod(results[0].shape[:3])
    if operator.name == "FULLY_CONNECTED":
        return math.prod(results[0].shape) * sources[1].shape[-1]
    if operator.name == "TRANSPOSE_CONV":
        return math.prod(sources[1].shape) * math.prod(sources[2].shape[:3])
    if operator.name == "BATCH_MATMUL":
        inner = sources[0].shape[-2 if operator.options.get("adjX") else -1]
        return math.prod(results[0].shape) * inner
    return 0


def is_quantised(network: Network) -> bool:
    """Tell whether activations are integers, not only weights."""
    return any(
        tensor.scales and tensor.dtype in INTEGERS
        for operator in network.operators
        for tensor in network.results(operator)
    )


def number_format(network: Network) -> str:
    """Return what a file computes with, as `--quantize` calls it, or "float32"."""
    results = [tensor for operator in network.operators for tensor in network.results(operator)]
    if any(tensor.scales and tensor.dtype == "int16" for tensor in results):
        return "int16x8"
    if is_quantised(network):
        return "int8"
    weights = {one.dtype for one in network.tensors if one.constant and len(one.shape) > 1}
    if weights & {"int8", "uint8"}:
        return "dynamic"
    return "float16" if "float16" in weights else "float32"


def float_operators(network: Network) -> list[Operator]:
    """Return the operators of a quantised file that compute in float, for want of a kernel.

    DEQUANTIZE is none of them; of a file whose activations are float, none is returned.
    """
    if not is_quantised(network):
        return []
    return [
        operator
        for operator in network.operators
        if operator.name != "DEQUANTIZE"
        and any(tensor.dtype.startswith("float") for tensor in network.results(operator))
    ]


def layer_of(tensor: str, names: Collection[str]) -> str | None:
    """Return the first layer that the name of a tensor in a `.tflite` file speaks of.

    Example:
        >>> layer_of("swiftnet_1/stem_conv_1/convolution;swiftnet_1/stem_bn_1/add", {"stem_conv"})
        'stem_conv'
    """
    for part in re.split("[/;]", tensor):
        for name in (part, re.sub(r"_\d+$", "", part)):
            if name in names:
                return name
    return None


def single_operator(path: Path, index: int) -> bytes:
    """Return a `.tflite` file of one operator of another, so that it can be run alone.

    What it takes from other operators becomes its inputs, in their order; its constants stay.

    Args:
        path: the file.
        index: of the operator.
    """
    model = _read_model(path)
    graph, operator = model.subgraphs[0], model.subgraphs[0].operators[index]
    kept = [int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0]
    kept = list(dict.fromkeys(kept))
    place = {old: new for new, old in enumerate(kept)} | {-1: -1}
    constant = {i for i in kept if model.buffers[graph.tensors[i].buffer].data is not None}
    # Buffer 0 is the empty one, by the schema's rule.
    buffers = [model.buffers[0]]
    for i in kept:
        if i in constant:
            buffers.append(model.buffers[graph.tensors[i].buffer])
        graph.tensors[i].buffer = len(buffers) - 1 if i in constant else 0
    model.operatorCodes = [model.operatorCodes[operator.opcodeIndex]]
    given = [int(i) for i in operator.inputs if i >= 0 and int(i) not in constant]
    graph.inputs = [place[i] for i in dict.fromkeys(given)]
    graph.outputs = [place[int(i)] for i in operator.outputs]
    operator.opcodeIndex = 0
    operator.inputs = [place[int(i)] for i in operator.inputs]
    operator.outputs = [place[int(i)] for i in operator.outputs]
    graph.tensors, graph.operators = [graph.tensors[i] for i in kept], [operator]
    model.buffers, model.metadata, model.signatureDefs = buffers, None, None
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _read_model(path: Path) -> schema.ModelT:
    with path.open("rb") as file:
        if file.read(8)[4:] != IDENTIFIER:
            raise UserError(f"{path} is no .tflite file; name one that `kseg export` wrote")
    try:
        return flatbuffer_utils.read_model(path)
    except (struct.error, ValueError, IndexError, TypeError, RuntimeError, MemoryError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged or cut off; copy or export it anew")


def _tensor(model: schema.ModelT, index: int, tensor: schema.TensorT) -> Tensor:
    quantization = tensor.quantization
    scales = _list(quantization.scale) if quantization else []
    dtype = flatbuffer_utils.type_to_name(tensor.type).lower()
    data = model.buffers[tensor.buffer].data
    shape = _numbers(tensor.shape)
    few = data is not None and dtype in ("int32", "int64") and math.prod(shape) <= FEW
    return Tensor(
        index=index,
        name=(tensor.name or b"").decode(errors="replace"),
        shape=shape,
        dtype=dtype,
        scales=tuple(float(scale) for scale in scales),
        zero_points=_numbers(quantization.zeroPoint) if scales else (),
        axis=quantization.quantizedDimension if len(scales) > 1 else None,
        constant=data is not None,
        dynamic=tuple(i for i, size in enumerate(_list(tensor.shapeSignature)) if size < 0),
        bytes=_size(dtype, math.prod(shape)),
        values=tuple(np.frombuffer(bytes(data), dtype).tolist()) if few else (),
    )


def _operator(model: schema.ModelT, index: int, operator: schema.OperatorT) -> Operator:
    code = model.operatorCodes[operator.opcodeIndex]
    name = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
    if name == "CUSTOM":
        name = code.customCode.decode(errors="replace")
    options = operator.builtinOptions or operator.builtinOptions2
    return Operator(
        index=index,
        name=name,
        version=code.version,
        inputs=_numbers(operator.inputs),
        outputs=_numbers(operator.outputs),
        options=dict(vars(options)) if options else {},
    )


def _size(dtype: str, elements: int) -> int:
    """Return bytes; 4-bit integers share them, text and handles lie elsewhere."""
    if dtype in ("int4", "uint4"):
        return (elements + 1) // 2
    if dtype in ("string", "resource", "variant"):
        return 0
    return elements * np.dtype(dtype).itemsize


def _list(values: Any) -> list:  # noqa: ANN401  (None, list or array, as the schema has it)
    return [] if values is None else list(values)


def _numbers(values: Any) -> tuple[int, ...]:  # noqa: ANN401
    return tuple(int(value) for value in _list(values))
