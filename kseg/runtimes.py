"""Model files opened by their own runtimes, each as one function from an image to a result.

No runtime is imported before its format is met, so that a `.tflite` never waits for TensorFlow.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kseg.errors import UserError
from kseg.quiet import load_tensorflow, quiet

if TYPE_CHECKING:
    import keras
    from ai_edge_litert.interpreter import Interpreter

    from kseg.config import Feed

Output = Literal["logits", "classes"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What clients give a file for an image of 0..255.
FED: Mapping[Feed, Callable[[np.ndarray], np.ndarray]] = {
    "bytes": lambda image: image,
    "unit": lambda image: image / 255,
    "signed": lambda image: image / 127.5 - 1,
    "imagenet": lambda image: (image / 255 - IMAGENET_MEAN) / IMAGENET_STD,
}


@dataclass(frozen=True)
class Runtime:
    """A model file, ready to run.

    Attributes:
        forward: from one uint8 image (H, W, 3) to logits (h, w, C) float32 or ids (h, w) uint8.
        size: height and width of the image it takes.
        output: which of the two `forward` gives.
        num_classes: C, or None for a file of ids, which does not tell.
        inputs: name of each input to its type and shape.
        outputs: name of each output to its type and shape.
        model: the Keras model behind it, where there is one.
        settled: of a layer cascade, for each image run so far the share of its pixels that each
            stage has settled.
        unread: names of further outputs, which `forward` does not give.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    size: tuple[int, int]
    output: Output
    num_classes: int | None
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    model: keras.Model | None = None
    settled: Sequence[tuple[float, ...]] = ()
    unread: tuple[str, ...] = ()


def keras_model(path: Path) -> keras.Model:
    """Load a `.keras` file on the TensorFlow backend; raises as `kseg.weights.read_model`."""
    _ready_tensorflow()
    from kseg.weights import read_model

    return read_model(path)


def run_keras(
    model: keras.Model, *, path: Path, function: Callable[[Any], Any] | None = None
) -> Runtime:
    """Return a Keras model as a runtime: one compiled graph of one static size.

    Args:
        model: takes (B, H, W, 3) images 0..255; gives logits, alone or in a dict.
        path: where it came from, for messages.
        function: what computes the model, where that is not the model itself.
    """
    import tensorflow as tf

    compute = function or (lambda image: model(image, training=False))
    size = _image_size(path, model.input_shape)
    if isinstance(model.output, dict) and "logits" not in model.output:
        raise UserError(f"{path} gives {', '.join(model.output)}; kseg takes an output `logits`")

    @tf.function(input_signature=[tf.TensorSpec((1, *size, 3), tf.uint8)])
    def graph(image: tf.Tensor) -> tf.Tensor:
        return logits_of(compute(tf.cast(image, tf.float32)))

    shape = tuple(graph.get_concrete_function().output_shapes.as_list())
    _, num_classes = _kind(path, shape, np.float32)
    return Runtime(
        forward=lambda image: graph(image[None]).numpy()[0],
        size=size,
        output="logits",
        num_classes=num_classes,
        inputs={"image": _typed("float32", model.input_shape)},
        outputs={"logits": _typed("float32", shape)},
        model=model,
    )


def run_cascade(model: keras.Model, *, path: Path) -> Runtime:
    """Return a layer cascade as a runtime that leaves out the stages no pixel is left for.

    Args:
        model: of `kseg.models.layer_cascade`; one whose stages cannot be cut apart runs whole.
        path: where it came from, for messages.
    """
    import tensorflow as tf

    from kseg.models.layer_cascade import infer_by_stage, stage_models

    whole = run_keras(model, path=path)
    try:
        stages = [tf.function(stage) for stage in stage_models(model)]
    except ValueError:
        return whole
    shares: list[tuple[float, ...]] = []

    def forward(image: np.ndarray) -> np.ndarray:
        logits, settled = infer_by_stage(stages, tf.cast(image[None], tf.float32))
        shares.append(settled)
        return logits.numpy()[0]

    return dataclasses.replace(whole, forward=forward, settled=shares)


def logits_of(result: Any) -> Any:  # noqa: ANN401  (a tensor of any backend)
    """Return the logits among what a Keras model gives: the only tensor, or "logits" of a dict."""
    return result["logits"] if isinstance(result, dict) else result


def open_tflite(path: Path, *, threads: int | None = None, fed_as: Feed = "bytes") -> Runtime:
    """Open a `.tflite` file with LiteRT.

    Float inputs are fed 0..255. Inputs of quantised bytes are fed the image's own (less 128 where
    they are signed): an input that was calibrated on normalised images takes them in that form.

    Args:
        path: the file; it need not be written by kseg. Images are (1, H, W, 3) or (1, 3, H, W), and
            logits, too.
        threads: processor threads; None takes up to four.
        fed_as: the form of the images that clients give it.

    Raises:
        UserError: if the file is damaged or is no network from one image to a map.
    """
    interpreter = _interpreter(path, threads or min(4, os.cpu_count() or 1))
    image, *others = interpreter.get_input_details()
    results = _results(interpreter)
    name = _read_of(results)
    result = results[name]
    if others:
        raise UserError(f"{path} takes {1 + len(others)} inputs; kseg takes files with one image")
    # Axes that may change are 1 in "shape", and -1 in the signature.
    signature = image.get("shape_signature", image["shape"])
    free = [None if d < 0 else int(d) for d in signature]
    taken = _channels_last(free, _is_channels_first(image["shape"]))
    first = _gives_channels_first(result["shape"], image["shape"])
    output, num_classes = _kind(path, _channels_last(result["shape"], first), result["dtype"])

    def forward(pixels: np.ndarray) -> np.ndarray:
        set_image(interpreter, pixels, fed_as=fed_as)
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise _damaged(path, error, "run") from error
        raw = interpreter.get_tensor(result["index"])
        if output == "classes":
            return _as_ids(raw, first)
        return _dequantised(_turned_back(raw[0], first), result["quantization"])

    return Runtime(
        forward=forward,
        size=_image_size(path, taken),
        output=output,
        num_classes=num_classes,
        inputs={_image_name(interpreter): _typed(image["dtype"], image["shape"])},
        outputs={name: _typed(result["dtype"], result["shape"])},
        unread=tuple(other for other in results if other != name),
    )


def set_image(interpreter: Interpreter, pixels: np.ndarray, *, fed_as: Feed = "bytes") -> None:
    """Give a LiteRT interpreter an image uint8 (H, W, 3), in the form that its input has."""
    image = interpreter.get_input_details()[0]
    dtype = image["dtype"]
    if fed_as == "bytes" and np.dtype(dtype).itemsize == 1:
        fed = _bytes_as(pixels, dtype)
    else:
        fed = _quantised(FED[fed_as](pixels.astype("float32")), image["quantization"], dtype)
    fed = _turned(fed, _is_channels_first(image["shape"]))
    interpreter.set_tensor(image["index"], fed[None])


def open_onnx(path: Path, *, threads: int | None = None, fed_as: Feed = "bytes") -> Runtime:
    """Open an ONNX file with onnxruntime.

    Args:
        path: the file; images are (B, H, W, 3) or (B, 3, H, W), and results, too.
        threads: processor threads; None takes up to four.
        fed_as: the form of the images that clients give it.

    Raises:
        UserError: if onnxruntime is missing, the file is damaged, or it is no network from one
            image to a map.
    """
    session = _session(path, threads or min(4, os.cpu_count() or 1))
    image, *others = session.get_inputs()
    results = {one.name: one for one in session.get_outputs()}
    result = results[_read_of(results)]
    if others:
        raise UserError(f"{path} takes {1 + len(others)} inputs; kseg takes files with one image")
    taken = _channels_last(image.shape, _is_channels_first(image.shape))
    first = _gives_channels_first(result.shape, image.shape)
    given = _channels_last(result.shape, first)
    dtypes = [np.dtype(_ONNX_TYPES.get(one.type, "object")) for one in (image, result)]
    output, num_classes = _kind(path, given, dtypes[1].type)

    def forward(pixels: np.ndarray) -> np.ndarray:
        fed = _turned(FED[fed_as](pixels), _is_channels_first(image.shape))
        try:
            raw = session.run([result.name], {image.name: fed[None].astype(dtypes[0])})[0]
        except Exception as error:  # a private type for each kind of damage
            raise _damaged(path, error, "run") from error
        if output == "classes":
            return _as_ids(raw, first)
        return _turned_back(raw[0], first).astype("float32")

    return Runtime(
        forward=forward,
        size=_image_size(path, taken),
        output=output,
        num_classes=num_classes,
        inputs={image.name: _typed(dtypes[0], _numbers(image.shape))},
        outputs={result.name: _typed(dtypes[1], _numbers(result.shape))},
        unread=tuple(name for name in results if name != result.name),
    )


def open_saved_model(
    path: Path, *, signature: str | None = None, fed_as: Feed = "bytes"
) -> Runtime:
    """Open a SavedModel folder with TensorFlow.

    Args:
        path: the folder that holds `saved_model.pb`.
        signature: which one to run; by default `logits` where there is one, as kseg writes it,
            else `serving_default`.
        fed_as: the form of the images that clients give it.

    Raises:
        UserError: if the folder is damaged or its signature is not from one image to a map.
    """
    _ready_tensorflow()
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # protobuf, OS and TensorFlow errors alike
        raise _damaged(path, error) from error
    known = loaded.signatures
    name = signature or ("logits" if "logits" in known else "serving_default")
    if name not in known:
        raise UserError(f"{path} has no signature {name!r} (there are: {', '.join(known)})")
    return _run_signature(path, loaded, known[name], fed_as)


def _ready_tensorflow() -> None:
    # Only the first import is noisy; and devices in use may not be set up again.
    if "tensorflow" not in sys.modules:
        load_tensorflow()


def _run_signature(path: Path, loaded: Any, function: Any, fed_as: Feed) -> Runtime:  # noqa: ANN401
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise UserError(f"{path} takes {len(inputs)} inputs; kseg takes files with one image")
    (name, image), results = *inputs.items(), function.structured_outputs
    key = _read_of(results)
    result = results[key]
    shape, dtype = tuple(result.shape), result.dtype.as_numpy_dtype
    taken_first = _is_channels_first(image.shape)
    first = _gives_channels_first(shape, image.shape)
    output, num_classes = _kind(path, _channels_last(shape, first), dtype)

    def forward(pixels: np.ndarray, _alive: object = loaded) -> np.ndarray:
        # The loaded object owns the variables; the signature alone would lose them.
        fed = _turned(FED[fed_as](pixels), taken_first)[None].astype(image.dtype.as_numpy_dtype)
        try:
            raw = function(**{name: fed})[key].numpy()
        except Exception as error:  # an operation's own kind of error
            raise _damaged(path, error, "run") from error
        if output == "classes":
            return _as_ids(raw, first)
        return _turned_back(raw[0], first).astype("float32")

    return Runtime(
        forward=forward,
        size=_image_size(path, _channels_last(image.shape, taken_first)),
        output=output,
        num_classes=num_classes,
        inputs={name: _typed(image.dtype.as_numpy_dtype, image.shape)},
        outputs={key: _typed(dtype, shape)},
        unread=tuple(other for other in results if other != key),
    )


def _interpreter(path: Path, threads: int) -> Interpreter:
    from ai_edge_litert.interpreter import Interpreter

    try:
        with quiet():
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return interpreter


_ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


def _session(path: Path, threads: int) -> Any:  # noqa: ANN401
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path.name}: ONNX files need `pip install 'kseg[onnx]'`") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, too
    try:
        with quiet():
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # a private type for each kind of damage
        raise _damaged(path, error) from error


def _numbers(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    """Return a shape with None where an axis has only a name."""
    return tuple(int(d) if isinstance(d, int | np.integer) else None for d in shape)


def _is_channels_first(image: Sequence[int | str | None]) -> bool:
    """Tell whether an image is (B, 3, H, W)."""
    return len(image) == 4 and image[1] == 3 and image[-1] != 3


def _gives_channels_first(
    result: Sequence[int | str | None], image: Sequence[int | str | None]
) -> bool:
    """Tell whether a result is (B, C, h, w): whichever two of its axes have the image's shape.

    A converter may turn the image alone; where shapes do not tell, both are of one order.
    """
    first = _is_channels_first(image)
    result, (_, *size, _) = _numbers(result), (*_channels_last(image, first), None, None)[:4]
    if len(result) != 4 or None in (*result[1:], *size[:2]):
        return first
    wanted = math.log(size[0] / size[1])
    off = [abs(math.log(result[i] / result[i + 1]) - wanted) for i in (1, 2)]
    return first if abs(off[0] - off[1]) < 0.1 else off[1] < off[0]


def _turned(pixels: np.ndarray, first: bool) -> np.ndarray:
    return pixels.transpose(2, 0, 1) if first else pixels


def _turned_back(result: np.ndarray, first: bool) -> np.ndarray:
    return result.transpose(1, 2, 0) if first else result


def _channels_last(shape: Sequence[int | str | None], first: bool) -> tuple[int | None, ...]:
    """Return a shape with its channels last."""
    dims = _numbers(shape)
    return (dims[0], *dims[2:], dims[1]) if first and len(dims) == 4 else dims


def _read_of(results: Iterable[str]) -> str:
    """Return the name of the output that is read: the one that has kseg's name, else the first."""
    first, *others = results
    return next((name for name in (first, *others) if name in ("logits", "class_map")), first)


def _image_name(interpreter: Interpreter) -> str:
    for signature in interpreter.get_signature_list().values():
        return signature["inputs"][0]
    return interpreter.get_input_details()[0]["name"]


def _results(interpreter: Interpreter) -> dict[str, dict[str, Any]]:
    """Return the name of each output, and what LiteRT tells of it."""
    results = interpreter.get_output_details()
    for signature in interpreter.get_signature_list():
        named = interpreter.get_signature_runner(signature).get_output_details()
        # Another signature may be of another graph of the file than that which `invoke` runs.
        if {one["index"] for one in named.values()} == {one["index"] for one in results}:
            return named
    return {one["name"]: one for one in results}


def _kind(path: Path, shape: tuple[int, ...], dtype: type) -> tuple[Output, int | None]:
    """Tell by its shape what an output is: (1, h, w) or (1, h, w, 1) ids, (1, h, w, C) logits."""
    ids = np.issubdtype(dtype, np.integer)
    if ids and (len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1)):
        return "classes", None
    if len(shape) == 4 and shape[-1] > 1:
        return "logits", int(shape[-1])
    raise UserError(
        f"{path} gives {_typed(dtype, shape)}; kseg takes logits (1, h, w, classes) "
        "or a map of integer class ids (1, h, w)"
    )


def _image_size(path: Path, shape: tuple[int | None, ...]) -> tuple[int, int]:
    if len(shape) != 4 or shape[-1] != 3 or shape[0] not in (None, -1, 1):
        raise UserError(f"{path} takes {shape}; kseg takes files with an image (1, H, W, 3)")
    height, width = shape[1:3]
    if height is None or width is None:
        raise UserError(f"{path} has no fixed input size; export it for one size")
    return int(height), int(width)


def _bytes_as(pixels: np.ndarray, dtype: type) -> np.ndarray:
    if dtype == np.int8:
        return (pixels ^ 0x80).view(np.int8)  # flipping the top bit subtracts 128
    return pixels.astype(dtype, copy=False)


def _quantised(values: np.ndarray, quantization: tuple[float, int], dtype: type) -> np.ndarray:
    scale, zero = quantization
    if scale == 0:
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(dtype)


def _dequantised(raw: np.ndarray, quantization: tuple[float, int]) -> np.ndarray:
    scale, zero = quantization
    if scale == 0:
        return raw.astype(np.float32, copy=False)
    return (raw.astype(np.float32) - zero) * np.float32(scale)


def _as_ids(raw: np.ndarray, first: bool) -> np.ndarray:
    """Return ids (h, w) of a map (1, h, w), (1, h, w, 1) or (1, 1, h, w)."""
    ids = raw[0] if raw.ndim == 3 else raw[0].squeeze(0 if first else -1)
    return ids.astype(np.uint8, copy=False)


def _typed(dtype: str | type, shape: Any) -> str:  # noqa: ANN401  (tuple, array or TensorShape)
    dims = ", ".join("None" if d is None else str(int(d)) for d in shape)
    return f"{np.dtype(dtype).name} ({dims})"


def _damaged(path: Path, error: Exception, what: str = "opened") -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{path} cannot be {what}: {reason}. It is damaged, or needs code that kseg does not have"
    )
