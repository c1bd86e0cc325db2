"""The proof: each written file, opened by its own runtime, against the Keras model."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from kseg import runtimes
from kseg.artifact import Artifact
from kseg.data.dataset import Dataset
from kseg.inference import Predictor, feed, load
from kseg.quiet import quiet
from kseg.registry import METRICS

Sample = tuple[np.ndarray, np.ndarray]


def validation_samples(dataset: Dataset, limit: int | None) -> Iterator[Sample]:
    """Give the first `limit` validation images uint8 (h, w, 3) with their masks uint8 (h, w)."""
    from kseg.data.pipeline import read_samples

    return read_samples(dataset, "val", limit=limit)


def prove(
    reference: Predictor, artifacts: Sequence[Artifact], samples: Iterable[Sample]
) -> list[Artifact]:
    """Run files and the Keras model over the same images.

    Agreement compares the class maps at the model's own size, pixel by pixel, from the same
    bytes; mean IoU is taken at each mask's own size.

    Args:
        reference: the Keras model.
        artifacts: the files.
        samples: images with masks.

    Returns:
        The artifacts with what was found.
    """
    files = [_open(one) for one in artifacts]
    scores = [METRICS["iou"](reference.num_classes) for _ in (reference, *files)]
    equal, images, pixels = [0] * len(files), 0, np.zeros((*reference.size, 3), np.uint8)
    for pixels, mask in samples:
        images += 1
        truth = _scored(reference, pixels, mask, scores[0])
        for index, file in enumerate(files):
            labels = _scored(file, pixels, mask, scores[1 + index])
            equal[index] += int(np.count_nonzero(labels == truth))
    area = images * reference.size[0] * reference.size[1]
    return [
        replace(
            one,
            inputs=dict(file.runtime.inputs),
            outputs=dict(file.runtime.outputs),
            agreement=100 * same / max(area, 1),
            miou=float(score.miou),
            keras_miou=float(scores[0].miou),
            images=images,
            **_looked_at(one, file, pixels),
        )
        for one, file, same, score in zip(artifacts, files, equal, scores[1:], strict=True)
    ]


def _open(one: Artifact) -> Predictor:
    """Open a file as a client would, on one thread; of a SavedModel, its default signature."""
    file = load(one.path, threads=1)
    if one.target == "saved_model":
        served = runtimes.open_saved_model(one.path, signature="serving_default")
        return replace(file, runtime=served)
    return file


def _scored(predictor: Predictor, pixels: np.ndarray, mask: np.ndarray, score: object) -> object:
    """Count an image in `score` and return its class map at the model's size."""
    result = predictor.forward(pixels)
    score.update(mask, predictor.labels(result, mask.shape))
    return predictor.labels(result, predictor.size)


def _looked_at(one: Artifact, file: Predictor, pixels: np.ndarray) -> dict[str, object]:
    # TensorFlow fixes its threads when it starts, so a SavedModel cannot be timed on one here.
    if one.target != "tflite":
        return {}
    return {
        "milliseconds": milliseconds(file, pixels),
        "outside": outside_xnnpack(one.path),
        "notes": _float_note(one.path) if one.variant == "int8" else (),
    }


def milliseconds(file: Predictor, pixels: np.ndarray, *, seconds: float = 3.0) -> float:
    """Return the median time of one image, over at most 30 runs or `seconds`, after a first one."""
    fed = feed(pixels, file.size)
    file.runtime.forward(fed)
    times: list[float] = []
    while len(times) < 30 and sum(times) < seconds:
        start = time.perf_counter()
        file.runtime.forward(fed)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def outside_xnnpack(path: Path) -> dict[str, int]:
    """Return the operators of a `.tflite` file that XNNPACK does not run, with their count.

    An interpreter with XNNPACK keeps the original operators and adds one DELEGATE for each part
    that it took over; going back from the outputs of a DELEGATE to its inputs finds that part.
    """
    # A private method, as the public interface has no list of operators.
    plain = _operators(path, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    made_by = {int(tensor): op["index"] for op in plain for tensor in op["outputs"]}
    by_index = {op["index"]: op for op in plain}
    taken: set[int] = set()
    for part in _operators(path, OpResolverType.AUTO):
        if part["op_name"] == "DELEGATE":
            taken |= _between(part, by_index, made_by)
    return dict(Counter(op["op_name"] for op in plain if op["index"] not in taken))


def _float_note(path: Path) -> tuple[str, ...]:
    """Return a note if operators of an int8 file compute in float; the last step to logits may."""
    interpreter = _interpreter(path, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    floats = {t["index"] for t in interpreter.get_tensor_details() if t["dtype"] == np.float32}
    names = Counter(
        op["op_name"]
        for op in interpreter._get_ops_details()
        if op["op_name"] != "DEQUANTIZE" and floats & {int(tensor) for tensor in op["outputs"]}
    )
    listed = ", ".join(f"{count} {name}" for name, count in names.items())
    return (f"in float, for want of an int8 kernel: {listed}",) if names else ()


def _operators(path: Path, resolver: OpResolverType) -> list[dict]:
    return _interpreter(path, resolver)._get_ops_details()


def _interpreter(path: Path, resolver: OpResolverType) -> Interpreter:
    with quiet():
        interpreter = Interpreter(
            model_path=str(path), num_threads=1, experimental_op_resolver_type=resolver
        )
        interpreter.allocate_tensors()
    return interpreter


def _between(part: dict, by_index: dict[int, dict], made_by: dict[int, int]) -> set[int]:
    """Return the operators on the way from a part's inputs to its outputs."""
    found: set[int] = set()
    edge = {int(tensor) for tensor in part["inputs"]}
    waiting = [int(tensor) for tensor in part["outputs"]]
    while waiting:
        tensor = waiting.pop()
        op = made_by.get(tensor)
        if tensor in edge or op is None or op in found:
            continue
        found.add(op)
        waiting += [int(source) for source in by_index[op]["inputs"]]
    return found
