"""What the accelerators of others take of a network, by rules that they have published.

`kseg inspect` runs none of them: each table is what one source says, read on 23 November 2026, of
the operators that networks for images are made of. An operator that a source does not name is
taken to be refused. Drivers and devices refuse more than rules tell.

The table of Ethos-U gave the verdict of Vela 5.2.0 itself on every operator of 13 int8 files of
kseg, that of TFLite-Micro what the PyPI package tflite-micro of 23 October 2026 did with each of
their kinds of operators; the others could not be compared with the accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import delegate_rules as r
from .delegate_rules import BYTES, FLOAT, Rule
from .operators import Network, Operator

NOT_LISTED = "not supported"


@dataclass(frozen=True)
class Delegate:
    """One accelerator and its rules.

    Attributes:
        name: as it is called.
        source: where the rules stand.
        version: of the source.
        note: what else a person should know.
        rules: operator to what it must keep; an operator that is missing is refused.
        always: what every operator must keep.
        unsure: operators of which it refuses some sizes, by a rule that is not published.
        stops: whether all operators behind the first refused one are left to the processor.
        whole: whether there is no processor to leave one to: a refused operator stops the file.
    """

    name: str
    source: str
    version: str
    note: str
    rules: Mapping[str, tuple[Rule, ...]]
    always: tuple[Rule, ...] = ()
    unsure: tuple[str, ...] = ()
    stops: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Refusal:
    """An operator that a delegate cannot take.

    Attributes:
        index: of the operator.
        name: of the operator.
        reason: in few words.
    """

    index: int
    name: str
    reason: str


def refusals(delegate: Delegate, network: Network) -> list[Refusal]:
    """Return the operators that a delegate cannot take by its rules, with the first reason."""
    found = []
    for operator in network.operators:
        reason = _refused(delegate, network, operator)
        if reason:
            found.append(Refusal(operator.index, operator.name, reason))
    return found


def _refused(delegate: Delegate, network: Network, operator: Operator) -> str:
    if operator.name not in delegate.rules:
        return NOT_LISTED
    rules = (*delegate.always, *delegate.rules[operator.name])
    return next(filter(None, (rule(network, operator) for rule in rules)), "")


def _table(*rows: tuple[str | Rule, ...]) -> dict[str, tuple[Rule, ...]]:
    """Return operator to rules from rows of names, parted by spaces, and their rules."""
    return {name: rules for names, *rules in rows for name in names.split()}


_RELU = r.activation("RELU", "RELU6", "RELU_N1_TO_1")
_ANY_BUT_SIGN = r.activation("RELU", "RELU6", "RELU_N1_TO_1", "TANH")
_LITERT = "https://github.com/google-ai-edge/LiteRT/blob"
_MICRO = "https://github.com/tensorflow/tflite-micro/blob"

_NUMBERS = r.every(*FLOAT, *BYTES)
_ELEMENTWISE = (_NUMBERS, r.runtime_inputs(1, 2))
_REDUCTION = (_NUMBERS, r.runtime_inputs(1), r.constant(1))

GPU = Delegate(
    name="GPU",
    source=f"{_LITERT}/d6d8577/tflite/tools/versioning/gpu_compatibility.cc",
    version="LiteRT d6d8577; types from delegates/gpu/common/model_builder.cc, 34ec5ba",
    note="computes in float16 or float32, int8 files too",
    always=(r.rank(4),),
    rules=_table(
        ("ADD MUL", _NUMBERS, r.inputs(2), r.broadcast),
        ("AVERAGE_POOL_2D MAX_POOL_2D", _NUMBERS, _ANY_BUT_SIGN),
        ("BATCH_MATMUL", _NUMBERS, r.inputs(2)),
        ("CAST", r.every("float32", "int32", "bool")),
        ("CONCATENATION PACK SPLIT SPLIT_V UNPACK PRELU", _NUMBERS),
        ("RELU RELU6 RELU_N1_TO_1 LEAKY_RELU", _NUMBERS),
        ("CONV_2D TRANSPOSE_CONV", _NUMBERS, r.runtime_inputs(1, 2), _ANY_BUT_SIGN),
        ("DEPTHWISE_CONV_2D", _NUMBERS, r.runtime_inputs(1, 2), _ANY_BUT_SIGN, r.one_depth),
        ("DEQUANTIZE QUANTIZE HARD_SWISH RESHAPE TRANSPOSE TILE", _NUMBERS),
        ("DEPTH_TO_SPACE SPACE_TO_DEPTH", _NUMBERS, r.runtime_inputs(1)),
        ("FULLY_CONNECTED", _NUMBERS, r.runtime_inputs(1, 2)),
        ("MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD", *_REDUCTION),
        ("PAD PADV2 MIRROR_PAD", _NUMBERS, r.runtime_inputs(1)),
        ("RESIZE_BILINEAR", _NUMBERS, r.runtime_inputs(1), r.not_both_resizings),
        ("RESIZE_NEAREST_NEIGHBOR", _NUMBERS, r.runtime_inputs(1)),
        ("SLICE STRIDED_SLICE", _NUMBERS),
        ("SOFTMAX", _NUMBERS, r.option("beta", 1.0, why="beta other than 1")),
        ("ABS CEIL COS ELU EXP FLOOR GELU LOG LOGISTIC NEG ROUND RSQRT", *_ELEMENTWISE),
        ("SIGN SIN SQRT SQUARE TANH", *_ELEMENTWISE),
        ("DIV MAXIMUM MINIMUM POW SQUARED_DIFFERENCE SUB", *_ELEMENTWISE),
    ),
)

_FLOAT_OR_BYTES = r.fed("float32", *BYTES)
_ANY_NUMBER = r.fed("float32", "int32", *BYTES)
_NNAPI_FLOAT = (r.version(1), r.fed("float32"))

NNAPI = Delegate(
    name="NNAPI",
    source=f"{_LITERT}/5c8a6d4/tflite/delegates/nnapi/nnapi_delegate.cc",
    version="LiteRT 5c8a6d4, the newest NNAPI; deprecated since Android 15",
    note="the driver of the device decides; older Androids take less",
    rules=_table(
        ("ADD", r.version(2), _ANY_NUMBER, r.rank(4)),
        ("MUL", r.version(2), _ANY_NUMBER, r.rank(4)),
        ("SUB", r.version(3), _ANY_NUMBER, r.rank(4)),
        ("DIV", *_NNAPI_FLOAT, r.rank(4)),
        ("ARG_MAX ARG_MIN", r.version(2), r.fed(*FLOAT, "int32", *BYTES), r.given("int32")),
        ("AVERAGE_POOL_2D", r.version(2), _FLOAT_OR_BYTES, r.window(256)),
        ("MAX_POOL_2D RELU RELU_N1_TO_1 RELU6 LOGISTIC TANH", r.version(2), _FLOAT_OR_BYTES),
        (
            "BATCH_MATMUL",
            r.version(2),
            r.fed("float32", "int32", "int8"),
            r.rank(4),
            r.equal_batches,
        ),
        ("CAST", r.version(1), r.every("float32", "int32", *BYTES)),
        ("CONCATENATION", r.version(2), r.activation(), r.rank(4), r.fed(*FLOAT, *BYTES)),
        ("CONV_2D", r.version(5), _FLOAT_OR_BYTES, r.inputs(3)),
        ("DEPTHWISE_CONV_2D", r.version(3), _FLOAT_OR_BYTES),
        ("FULLY_CONNECTED", r.version(5), r.given("float32", *BYTES)),
        ("DEQUANTIZE", r.version(2), r.fed(*BYTES)),
        ("QUANTIZE", r.version(2), _FLOAT_OR_BYTES, r.given(*BYTES)),
        ("HARD_SWISH", _FLOAT_OR_BYTES),
        ("MEAN", r.version(2), _FLOAT_OR_BYTES, r.rank(4)),
        ("MAXIMUM MINIMUM", r.version(3), _ANY_NUMBER),
        ("PAD PADV2 STRIDED_SLICE SPACE_TO_DEPTH", r.version(2), _FLOAT_OR_BYTES),
        ("REDUCE_MAX REDUCE_MIN", r.version(2), _FLOAT_OR_BYTES),
        ("DEPTH_TO_SPACE", _FLOAT_OR_BYTES),
        ("RESHAPE", r.version(1), _ANY_NUMBER, r.rank(4), r.constant(1)),
        ("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR", r.version(3), _FLOAT_OR_BYTES, r.constant(1)),
        ("RSQRT", r.version(2), _FLOAT_OR_BYTES),
        ("SOFTMAX", r.version(2), _FLOAT_OR_BYTES, r.rank(4)),
        ("LEAKY_RELU PRELU", r.version(1), _FLOAT_OR_BYTES),
        ("SLICE", r.version(2), _ANY_NUMBER),
        ("SPLIT", r.version(3), _ANY_NUMBER, r.constant(0)),
        ("SQUARED_DIFFERENCE", r.version(2), _ANY_NUMBER, r.rank(4)),
        ("SQUEEZE EXPAND_DIMS", r.version(1)),
        ("TILE", r.version(1), _ANY_NUMBER),
        ("TRANSPOSE", r.version(2), r.constant(1)),
        ("TRANSPOSE_CONV", r.version(4), r.constant(0, 1)),
        ("ABS EXP LOG POW COS SIN SQRT SUM REDUCE_PROD ELU LOG_SOFTMAX", *_NNAPI_FLOAT),
        ("NEG", r.version(2), r.fed("float32", "int32")),
    ),
)

_IN_BYTES = r.fed(*BYTES)

HEXAGON = Delegate(
    name="Hexagon",
    source="https://github.com/tensorflow/tensorflow/blob/1fa9397/tensorflow/lite/delegates/hexagon/utils.cc",
    version="TensorFlow 1fa9397; README.md beside it, 0406598",
    note="Qualcomm's DSP, by the delegate of TensorFlow Lite; 8-bit files only",
    always=(r.rank(4),),
    rules=_table(
        ("ADD SUB MUL", r.version(2), _IN_BYTES, _RELU),
        ("ARG_MAX ARG_MIN", r.version(2), _IN_BYTES),
        ("AVERAGE_POOL_2D MAX_POOL_2D", r.version(2), _IN_BYTES, r.activation()),
        ("CONCATENATION PACK SOFTMAX MAXIMUM MINIMUM", r.version(2), _IN_BYTES),
        ("CONV_2D", r.version(3), _IN_BYTES, _RELU, r.stride(3), r.undilated),
        (
            *("DEPTHWISE_CONV_2D", r.version(3), _IN_BYTES, _RELU, r.stride(3)),
            *(r.dilation_without_stride, r.one_depth),
        ),
        (
            *("FULLY_CONNECTED", r.version(4), _IN_BYTES, _RELU, r.constant(2)),
            r.option("keepNumDims", False, why="keeps its axes"),
        ),
        ("HARD_SWISH NEG RESHAPE DEPTH_TO_SPACE", r.version(1), _IN_BYTES),
        ("LOGISTIC TANH RELU RELU6 SPACE_TO_DEPTH QUANTIZE", r.version(2), _IN_BYTES),
        ("MEAN MIRROR_PAD RESIZE_NEAREST_NEIGHBOR", r.version(2), _IN_BYTES, r.constant(1)),
        ("PAD", r.version(2), _IN_BYTES, r.inputs(2), r.constant(1)),
        ("RESIZE_BILINEAR", r.version(2), _IN_BYTES, r.constant(1), r.side_at_most(65)),
        ("SLICE", r.version(2), _IN_BYTES, r.constant(1, 2)),
        ("SPLIT", r.version(2), _IN_BYTES, r.constant(0)),
        ("STRIDED_SLICE", r.version(2), _IN_BYTES, r.constant(1, 2, 3)),
        ("TRANSPOSE", r.version(2), _IN_BYTES),
        ("TRANSPOSE_CONV", r.version(2), _IN_BYTES, r.inputs(3), r.stride(3)),
    ),
)

EDGE_TPU = Delegate(
    name="Edge TPU",
    source="https://coral.ai/docs/edgetpu/models-intro",
    version=(
        "tables as copied by developer.axis.com (ARTPEC-7, supported operators) and, from "
        "ResizeNearestNeighbor on, by dgist-datalab/Datalab_Intern, 6b78cf3; Transpose and "
        "TransposeConv from google-coral/edgetpu issues 193 and 684"
    ),
    note="8-bit files only, compiled by edgetpu_compiler",
    always=(r.static(), r.every(*BYTES), r.three_axes),
    stops=True,
    unsure=("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RESHAPE"),
    rules=_table(
        ("ADD SUB MUL MAXIMUM MINIMUM LOGISTIC TANH RELU RELU6 RELU_N1_TO_1",),
        ("AVERAGE_POOL_2D MAX_POOL_2D CONCATENATION", r.activation()),
        ("CONV_2D DEPTHWISE_CONV_2D", r.constant(1, 2), r.equal_dilation),
        ("FULLY_CONNECTED", r.constant(1, 2), r.vector(1 << 31)),
        ("TRANSPOSE_CONV", r.constant(1)),
        ("EXPAND_DIMS L2_NORMALIZATION PACK PRELU QUANTIZE RESHAPE SLICE SPACE_TO_DEPTH SPLIT",),
        ("MEAN PAD REDUCE_MAX REDUCE_MIN", r.constant(1), r.not_over_batch),
        ("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR SQUEEZE STRIDED_SLICE TRANSPOSE", r.constant(1)),
        ("SOFTMAX", r.vector(16000)),
        ("UNIDIRECTIONAL_SEQUENCE_LSTM",),
    ),
)

_NPU = (r.every("int8", "uint8", "int16"), r.quantised)

ETHOS_U = Delegate(
    name="Ethos-U55, U65",
    source="https://pypi.org/project/ethos-u-vela/5.2.0",
    version="Vela 5.2.0, `vela --supported-ops-report`",
    note="integer files only, compiled by Vela; an Ethos-U85 takes more",
    always=(r.static(0),),
    rules=_table(
        ("ADD SUB MUL NEG SUM", r.every("int8", "uint8", "int16", "int32"), r.quantised),
        ("ARG_MAX", r.fed("int8", "uint8", "int16"), r.last_axis(127)),
        ("AVERAGE_POOL_2D MAX_POOL_2D", *_NPU, r.ethos_pool, r.long_stride_needs_valid),
        ("BATCH_MATMUL", *_NPU, r.fed("int8")),
        ("CONCATENATION PACK UNPACK SPLIT SPLIT_V SQUARED_DIFFERENCE TILE", *_NPU),
        ("HARD_SWISH LEAKY_RELU LOGISTIC PRELU RELU RELU6 RELU_N1_TO_1 TANH EXP ABS", *_NPU),
        ("RELU_0_TO_1", *_NPU),
        ("CONV_2D", *_NPU, r.weights_in_bytes, r.constant(2), r.long_stride_needs_valid),
        ("DEPTHWISE_CONV_2D", *_NPU, r.weights_in_bytes, r.constant(2), r.stride(3)),
        ("FULLY_CONNECTED", *_NPU, r.weights_in_bytes, r.constant(2)),
        ("TRANSPOSE_CONV", *_NPU, r.weights_in_bytes, r.transposed_stride),
        ("EXPAND_DIMS SQUEEZE RESHAPE", r.every("int8", "uint8", "int16", "int32"), r.quantised),
        ("ELU", *_NPU, r.every("int8")),
        ("GELU", *_NPU, r.every(*BYTES)),
        ("LOG RSQRT", *_NPU, r.every("int8", "int16")),
        ("MAXIMUM MINIMUM", *_NPU, r.equal_scales),
        ("MEAN", *_NPU, r.constant(1), r.one_image, r.ethos_mean),
        ("PAD PADV2 MIRROR_PAD SLICE STRIDED_SLICE", *_NPU, r.constant(1, 2, 3)),
        ("QUANTIZE REDUCE_MAX REDUCE_MIN", *_NPU),
        ("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR", *_NPU, r.ethos_resize),
        ("SOFTMAX", *_NPU, r.area(65535)),
        ("TRANSPOSE", r.every("int8", "uint8", "int16"), r.constant(1)),
    ),
)

_KERNEL_TYPES = r.every("float32", "int8", "int16")

MICRO = Delegate(
    name="TFLite-Micro",
    source=f"{_MICRO}/85e19dd/python/tflite_micro/python_ops_resolver.cc",
    version=(
        "tflite-micro 85e19dd; types from kernels/cast.cc 2af7179, quantize_common.cc 0c32bc8, "
        "resize_bilinear.cc 46f3213, conv_common.cc de35bf0"
    ),
    note="one operator without a kernel keeps the whole file from running",
    whole=True,
    rules=_table(
        ("ABS ADD ADD_N ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND CEIL",),
        ("CAST", r.every("float32", "int8", "int16", "int32", "uint32", "bool")),
        ("CONCATENATION COS CUMSUM DEPTH_TO_SPACE DEQUANTIZE DIV ELU EQUAL EXP EXPAND_DIMS",),
        ("CONV_2D DEPTHWISE_CONV_2D", _KERNEL_TYPES, r.filter_in_type),
        ("FILL FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND GREATER",),
        ("GREATER_EQUAL HARD_SWISH L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL LOG",),
        ("LOG_SOFTMAX LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC MAX_POOL_2D MAXIMUM MEAN",),
        ("MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL PACK PRELU REDUCE_MAX RELU RELU6 RESHAPE",),
        ("PAD PADV2 TRANSPOSE", r.constant(1)),
        ("QUANTIZE", r.fed("float32", "int32", "int16", *BYTES)),
        ("RESIZE_BILINEAR", r.every("float32", "int8"), r.constant(1), r.not_both_resizings),
        ("RESIZE_NEAREST_NEIGHBOR", r.constant(1)),
        ("ROUND RSQRT SELECT_V2 SHAPE SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT",),
        ("SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM TANH",),
        ("TRANSPOSE_CONV UNPACK ZEROS_LIKE",),
    ),
)

DELEGATES = (GPU, NNAPI, HEXAGON, EDGE_TPU, ETHOS_U, MICRO)
