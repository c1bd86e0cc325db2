"""The proof: each written file, opened by its own runtime, against the Keras model."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kseg import runtimes
from kseg.artifact import Artifact, floored
from kseg.inference import Predictor, feed, load
from kseg.runtimes import FED

from . import tflite
from .arena import arena_bytes
from .behaviour import behavioural_faults, bilinear_resizes, probes
from .comparison import Counts, View, agreements, count, scores, shift, stacked
from .faults import Fault, departure, kernel_fault, nearest_fault, structural_faults
from .interface import Interface
from .operators import float_operators, layer_of, macs, read_network
from .xnnpack import outside_xnnpack

# LiteRT has reference kernels alone for these, 25 to 45 times slower than int8's.
SLOW, SLOW_IMAGES = ("int16x8",), 16
SHOWN = 4  # images on which a file differs most, that are kept to be looked at
FARTHEST_SHIFT = 0.25  # pixels; rounding has no direction, so that it stays far below
# Agreement below which a fault is looked for, per cent: rounding alone explains what is above.
SUSPICIOUS, SUSPICIOUS_FLOAT = 98.0, 99.9
RIGHT = 95.0  # per cent of labels, at which a file is right if fed otherwise
FOUND, LOST = 5.0, 0.5  # IoU of the model, per cent, and the share of it that a file must keep
FLOAT_VARIANTS = ("float32", "float16")
SECONDS = 20.0
_FORMS = {
    "bytes": "images of 0..255",
    "unit": "images of 0..1",
    "signed": "images of -1..1",
    "imagenet": "images less ImageNet's mean, by its deviation",
}


@dataclass(frozen=True)
class Worst:
    """An image on which a file differs much: its agreement, per cent, and the ids (H, W)."""

    agreement: float
    view: View
    labels: np.ndarray


@dataclass(frozen=True)
class Attempt:
    """One way to write a file, and what it bought.

    Attributes:
        remedy: what was done.
        miou_change: mean IoU less the float model's, points.
        sentence: both, for a person.
    """

    remedy: str
    miou_change: float
    sentence: str


@dataclass(frozen=True)
class Structure:
    """What the operators of a `.tflite` file tell.

    Attributes:
        arena_bytes: largest memory of all maps alive at once.
        macs: multiply-accumulates of one image.
        operators: "XNNPACK" and "LiteRT" to the operators that each runs, with their counts.
        floats: operators of an int8 file that compute in float, with their counts.
    """

    arena_bytes: int
    macs: int
    operators: Mapping[str, Mapping[str, int]]
    floats: Mapping[str, int]


@dataclass(frozen=True)
class Proof:
    """What was found of one file.

    Attributes:
        artifact: the file, and its main numbers.
        counts: what was counted of each image.
        worst: the images on which it differs most, the worst first.
        seconds: the time of each run, in their order; none where it was not measured.
        faults: what is wrong with it.
        structure: of a `.tflite` file.
        tried: what was tried to make it lose less.
    """

    artifact: Artifact
    counts: Counts
    worst: tuple[Worst, ...]
    seconds: tuple[float, ...]
    faults: tuple[Fault, ...]
    structure: Structure | None
    tried: tuple[Attempt, ...] = ()


def prove(
    reference: Predictor,
    artifacts: Sequence[Artifact],
    seen: Iterable[View],
    *,
    seconds: float = SECONDS,
) -> list[Proof]:
    """Run files on the images that the Keras model has seen.

    Agreement compares the class maps at the model's own size, pixel by pixel, from the same
    bytes; mean IoU is taken at each mask's own size.

    Args:
        reference: the Keras model in float, of the weights that the files were written from.
        artifacts: the files.
        seen: images as the model sees them; of a slow file, only the first `SLOW_IMAGES` count.
        seconds: how long each file is timed.
    """
    tallies = [_Tally(one, _open(one), reference.num_classes) for one in artifacts]
    for one in seen:
        for tally in tallies:
            tally.add(one)
    return [tally.proof(reference, seconds) for tally in tallies]


@dataclass
class _Tally:
    """One file under proof, and what was counted of it."""

    artifact: Artifact
    file: Predictor
    num_classes: int
    counts: list[Counts] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)

    def add(self, seen: View) -> None:
        """Count an image."""
        if self.artifact.variant in SLOW and len(self.counts) >= SLOW_IMAGES:
            return
        result = self.file.forward(seen.pixels)
        labels = self.file.labels(result, seen.labels.shape)
        scored = self.file.labels(result, seen.mask.shape)
        self.counts.append(
            count(
                seen,
                labels,
                scored,
                num_classes=self.num_classes,
                as_map=self.file.output == "classes",
            )
        )
        found = Worst(100 * float(np.mean(labels == seen.labels)), seen, labels)
        self.worst = sorted([*self.worst, found], key=lambda one: one.agreement)[:SHOWN]

    def proof(self, reference: Predictor, seconds: float) -> Proof:
        """Return what was found, after a look for faults."""
        counts = stacked(self.counts)
        miou, _ = scores(counts)
        found = replace(
            self.artifact,
            inputs=dict(self.file.runtime.inputs),
            outputs=dict(self.file.runtime.outputs),
            agreement=agreements(counts)[0],
            miou=miou.value / 100,
            keras_miou=miou.reference / 100,
            images=len(self.counts),
        )
        faults = _faults(found, self.file, reference, counts, self.worst)
        times = _times(found, self.file, self.worst[0].view.pixels, seconds)
        structure = structure_of(found.path) if found.target == "tflite" else None
        found = replace(
            found,
            milliseconds=1000 * float(np.median(times)) if times else None,
            outside=None if structure is None else structure.operators["LiteRT"],
            notes=(*_notes(found, structure, reference), *_unread(self.file)),
            # What is wrong comes before what it does.
            reasons=(
                *(fault.sentence for fault in faults),
                *_too_different(found),
                *_lost_classes(counts, reference.classes),
            ),
        )
        return Proof(found, counts, tuple(self.worst), times, tuple(faults), structure)


def _too_different(one: Artifact) -> tuple[str, ...]:
    if one.agreement >= one.min_agreement:
        return ()
    equal = f"{floored(one.agreement)} % of its labels are those of Keras"
    return (f"{equal}, {one.min_agreement:g} % are needed",)


def _lost_classes(counts: Counts, classes: Sequence[str]) -> Iterator[str]:
    """Give a reason for each class that the model finds and the file does not."""
    for name, score in zip(classes, scores(counts)[1], strict=True):
        if score.reference >= FOUND and score.value < LOST * score.reference:
            fall = f"{score.reference:.1f} to {score.value:.1f} %"
            yield f"class {name} is lost: its IoU goes from {fall}"


def _open(one: Artifact) -> Predictor:
    """Open a file as a client would, on one thread; of a SavedModel, its default signature."""
    file = load(one.path, threads=1, fed_as=one.fed_as)
    if one.target == "saved_model":
        served = runtimes.open_saved_model(one.path, signature="serving_default", fed_as=one.fed_as)
        return replace(file, runtime=served)
    return file


def _faults(
    one: Artifact, file: Predictor, reference: Predictor, counts: Counts, worst: Sequence[Worst]
) -> list[Fault]:
    """Return what is wrong with a file: as it is built, then as it behaves."""
    found = structural_faults(read_network(one.path)) if one.target == "tflite" else []
    limit = SUSPICIOUS_FLOAT if one.variant in FLOAT_VARIANTS else SUSPICIOUS
    moved = max(map(abs, shift(counts))) >= FARTHEST_SHIFT
    if one.agreement >= limit and not moved:
        return found
    if not np.isfinite(file.forward(worst[0].view.pixels)).all():
        return [*found, Fault("result", "it gives values that are no numbers (NaN or infinity)")]
    otherwise = _other_feed(one, worst)
    if otherwise is not None:
        return [*found, otherwise]
    seen = probes(file, [image.view for image in worst])
    hidden = one.target != "tflite" or _hides_resizes(one.path, reference)
    behaves = behavioural_faults(reference.model, seen, resizes=hidden)
    if behaves:
        return [*found, *behaves]
    if not found and one.target == "tflite" and one.agreement < one.min_agreement:
        return _departures(one, reference, [image.pixels for image in seen])
    return found


def _hides_resizes(path: Path, reference: Predictor) -> bool:
    """Tell whether a file enlarges maps by other operators than those that tell how they do it."""
    shown = [one for one in read_network(path).operators if one.name == "RESIZE_BILINEAR"]
    return len(shown) < bilinear_resizes(reference.model)


def _other_feed(one: Artifact, worst: Sequence[Worst]) -> Fault | None:
    """Return the fault of a file that is right if its images come in another form."""
    for form in FED:
        if form == one.fed_as:
            continue
        file = _open(replace(one, fed_as=form))
        labels = [file.labels(file.forward(w.view.pixels), w.labels.shape) for w in worst]
        equal = [100 * np.mean(a == w.view.labels) for a, w in zip(labels, worst, strict=True)]
        if np.mean(equal) >= max(one.min_agreement, RIGHT):
            text = (
                f"wrong normalisation: the file takes {_FORMS[form]}, and was given "
                f"{_FORMS[one.fed_as]} (where clients give it the former, say so: --feed {form})"
            )
            return Fault("normalisation", text, float(np.mean(equal)))
    return None


def faults_beside_twin(path: Path, reference: Predictor) -> list[Fault]:
    """Return how a `.tflite` file differs from a float one of the model: in resizes, in a kernel.

    Kernels are compared where their names are the converter's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        twin = _float_twin(reference, Path(folder))
        nearest = nearest_fault(read_network(path), read_network(twin))
        found = [nearest, kernel_fault(path, twin)]
    return [fault for fault in found if fault is not None]


def _float_twin(reference: Predictor, folder: Path) -> Path:
    twin = folder / "twin.tflite"
    tflite.write(
        reference.model, twin, variant="float32", interface=Interface(), samples=lambda: iter(())
    )
    return twin


def _departures(one: Artifact, reference: Predictor, images: Sequence[np.ndarray]) -> list[Fault]:
    """Return where a file departs from a float one that is made for this."""
    with tempfile.TemporaryDirectory() as folder:
        twin = _float_twin(reference, Path(folder))
        fault = departure(one.path, twin, images, fed_as=one.fed_as)
    return [] if fault is None else [fault]


def structure_of(path: Path) -> Structure:
    """Return what the operators of a `.tflite` file tell."""
    network, outside = read_network(path), set(outside_xnnpack(path))
    operators = {"XNNPACK": Counter(), "LiteRT": Counter()}
    for operator in network.operators:
        operators["LiteRT" if operator.index in outside else "XNNPACK"][operator.name] += 1
    return Structure(
        arena_bytes=arena_bytes(network),
        macs=macs(network),
        operators={where: dict(count) for where, count in operators.items()},
        floats=dict(Counter(operator.name for operator in float_operators(network))),
    )


def _notes(one: Artifact, structure: Structure | None, reference: Predictor) -> tuple[str, ...]:
    notes = []
    if one.variant in SLOW:
        notes.append(f"proved on {one.images} images: LiteRT computes {one.variant} slowly")
    if one.variant == "qat":
        notes.append("labels are compared with its own Keras model, mIoU with the float one")
    if one.variant in ("int8", "qat") and structure is not None and structure.floats:
        listed = ", ".join(f"{number} {name}" for name, number in structure.floats.items())
        parts = ", ".join(_float_layers(one.path, reference))
        where = f" (of {parts})" if parts else ""
        notes.append(f"in float, for want of an int8 kernel: {listed}{where}")
    return tuple(notes)


def _unread(file: Predictor) -> tuple[str, ...]:
    names = file.runtime.unread
    read = next(iter(file.runtime.outputs))
    return (f"of its outputs, {read} is read, and not {', '.join(names)}",) if names else ()


def _float_layers(path: Path, reference: Predictor) -> list[str]:
    """Return the names of the Keras layers whose operators compute in float, each once."""
    names = set() if reference.model is None else {one.name for one in reference.model.layers}
    network = read_network(path)
    found = [
        layer_of(network.tensors[operator.outputs[0]].name, names)
        for operator in float_operators(network)
    ]
    return list(dict.fromkeys(name for name in found if name is not None))


def timed(proof: Proof, *, seconds: float) -> Proof:
    """Return a proof with the times of runs that take so long in all."""
    one = proof.artifact
    times = _times(one, _open(one), proof.worst[0].view.pixels, seconds)
    milliseconds = 1000 * float(np.median(times)) if times else None
    return replace(proof, seconds=times, artifact=replace(one, milliseconds=milliseconds))


def _times(one: Artifact, file: Predictor, pixels: np.ndarray, seconds: float) -> tuple[float, ...]:
    # TensorFlow fixes its threads when it starts, so what it runs cannot be timed on one here.
    return (
        () if one.target in ("saved_model", "keras") else run_times(file, pixels, seconds=seconds)
    )


def run_times(file: Predictor, pixels: np.ndarray, *, seconds: float) -> tuple[float, ...]:
    """Return the seconds of as many runs on one image as fit in `seconds`, after a first one."""
    fed = feed(pixels, file.size)
    file.runtime.forward(fed)
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        file.runtime.forward(fed)
        times.append(time.perf_counter() - start)
    return tuple(times)


def milliseconds(file: Predictor, pixels: np.ndarray, *, seconds: float = 3.0) -> float:
    """Return the median time of one image, over as many runs as fit in `seconds`."""
    return 1000 * float(np.median(run_times(file, pixels, seconds=seconds)))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the percentiles, milliseconds, that so many runs support: five lie above each."""
    known = [50] + [p for p in (90, 95, 99) if len(seconds) * (100 - p) >= 500]
    return {f"p{p}": 1000 * float(np.percentile(seconds, p)) for p in known} if seconds else {}
