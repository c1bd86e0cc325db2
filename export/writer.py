"""The files of one model: written aside, proved, certified, and only then put in their place."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from kseg import card as cards
from kseg.artifact import REJECTED, Artifact
from kseg.config import Feed
from kseg.data.dataset import Dataset
from kseg.errors import UserError
from kseg.files import replacing
from kseg.inference import Predictor
from kseg.version import VERSION

from . import TARGETS, budget, certificate
from .calibrate import Samples, calibration_names, calibration_samples
from .comparison import spread, views
from .demands import Demands
from .interface import Interface
from .operators import number_format, read_network
from .speed import why_slower
from .verify import Proof, faults_beside_twin, prove, timed

# Labels equal to Keras's, per cent, that a sound file has; rounded ones depend on the model.
LEAST = {"float32": 99.9, "float16": 99.5, "qat": 99.5}
MANIFEST = "manifest.json"
DEFAULT_INTERFACE, DEFAULT_DEMANDS = Interface(), Demands()
# Images that kseg's own ranges are taken from, as a multiple of the converter's.
MORE_IMAGES = 3
ENOUGH_RUNS = 3  # of each of two files, before one is called slower


def export_model(
    predictor: Predictor,
    dataset: Dataset,
    *,
    folder: Path,
    plan: Mapping[str, tuple[str, ...]],
    quantisation_aware: Callable[[], Predictor] | None = None,
    suffix: str = "",
    interface: Interface = DEFAULT_INTERFACE,
    demands: Demands = DEFAULT_DEMANDS,
) -> list[Artifact]:
    """Write a Keras model as files into a folder, prove each of them, and certify it.

    Args:
        predictor: a float32 Keras model with logits as its only output.
        dataset: gives training images for calibration and validation images for the proof.
        folder: where the files go; those of the same names are replaced.
        plan: export target to its variants, as `{"tflite": ("float32", "int8")}`.
        quantisation_aware: trains and gives the model that "qat" is written from; also the last
            remedy for an int8 file that loses too much.
        suffix: stands behind the names of the files, before what tells their format.
        interface: what the files take and give.
        demands: what they must reach.

    Returns:
        One artifact a file, in the order of the plan.

    Raises:
        UserError: if the data does not fit the model or the disk is full.
    """
    _check(predictor, dataset, splits=("train", "val"))
    # The manifest takes its place last, and only if all the rest went well.
    with replacing(folder / MANIFEST) as manifest, _staging(folder) as staging:
        work = _Work(predictor, dataset, staging, interface, demands, quantisation_aware)
        proofs = [_place(proof, staging, folder) for proof in _proved(work, plan, suffix)]
        artifacts = [proof.artifact for proof in proofs]
        facts = certificate.certificate(
            predictor,
            proofs,
            data=_proved_on(dataset, demands.verify_images),
            calibration=calibration_names(dataset, count=demands.calibration_images),
            sha256=digest(predictor.path),
        )
        page = certificate.write(
            folder, facts, proofs, palette=predictor.palette, stem=f"certificate{suffix}"
        )
        artifacts = [replace(one, certificate=str(page)) for one in artifacts]
        record = _record(predictor, dataset, artifacts, _earlier(folder, artifacts))
        manifest.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return artifacts


def verify_model(
    file: Predictor,
    reference: Predictor,
    dataset: Dataset,
    *,
    quantisation_aware: Predictor | None = None,
    folder: Path | None = None,
    demands: Demands = DEFAULT_DEMANDS,
    fed_as: Feed = "bytes",
) -> list[Artifact]:
    """Compare a model file of any origin with a Keras model, and certify what was found.

    Args:
        file: the opened file.
        reference: the Keras model in float, at the file's size.
        dataset: gives validation images.
        quantisation_aware: the model in whole numbers that the file was written from, if so: the
            labels are to be its labels, IoU is compared with `reference` as ever.
        folder: where NAME.certificate.json and .html go; beside the file by default.
        demands: what the file must reach.
        fed_as: the form of the images that clients give the file.

    Returns:
        The file as an artifact.
    """
    _check(reference, dataset, splits=("val",))
    if file.runtime.num_classes not in (None, reference.num_classes):
        raise UserError(
            f"{file.path} gives {file.runtime.num_classes} classes, {reference.path} has "
            f"{reference.num_classes}; they are not the same model"
        )
    target = _target(file.path)
    variant = _variant(file.path, target) if quantisation_aware is None else "qat"
    one = replace(measured(file.path, target, variant, demands.min_agreement), fed_as=fed_as)
    model = quantisation_aware or reference
    (proof,) = _compared(model, reference, dataset, [one], demands)
    # What explains the whole file comes before what it does to single kernels.
    known = proof.faults or target != "tflite"
    faults = () if known else faults_beside_twin(file.path, model.without_quantization())
    more = (*(fault.sentence for fault in faults), *budget.over(proof, demands.max_drop))
    one = replace(proof.artifact, reasons=(*proof.artifact.reasons, *more))
    proof = replace(proof, artifact=one, faults=(*proof.faults, *faults))
    facts = certificate.certificate(
        reference,
        [proof],
        data=_proved_on(dataset, demands.verify_images),
        calibration=(),
        sha256=digest(reference.path),
    )
    page = certificate.write(
        folder or file.path.parent,
        facts,
        [proof],
        palette=reference.palette,
        stem=f"{file.path.name}.certificate",
    )
    return [replace(proof.artifact, certificate=str(page))]


def _proved_on(dataset: Dataset, limit: int | None) -> dict[str, object]:
    names = [dataset.sample_name("val", place) for place in spread(dataset.length("val"), limit)]
    return {"name": dataset.name, "split": "val", "images": len(names), "names": names}


def _target(path: Path) -> str:
    return {".tflite": "tflite", ".onnx": "onnx", ".keras": "keras"}.get(path.suffix, "saved_model")


def _variant(path: Path, target: str) -> str:
    """Return what a file of another program would be called here."""
    return number_format(read_network(path)) if target == "tflite" else "float32"


@dataclass(frozen=True)
class _Work:
    """What one export works with."""

    predictor: Predictor
    dataset: Dataset
    staging: Path
    interface: Interface
    demands: Demands
    quantisation_aware: Callable[[], Predictor] | None

    def samples(self, times: int = 1) -> Samples:
        """Return the calibration images, or a multiple of them."""
        count = times * self.demands.calibration_images
        return calibration_samples(self.dataset, self.predictor.size, count=count)

    def trained(self) -> Predictor:
        """Return the quantisation-aware model."""
        if self.quantisation_aware is None:
            raise UserError("a qat file needs a run, in which its training goes on")
        return self.quantisation_aware()


def _proved(work: _Work, plan: Mapping[str, tuple[str, ...]], suffix: str) -> list[Proof]:
    """Write all files of a plan into the staging folder, and prove them."""
    written, trained = [], []
    for target, variants in plan.items():
        module = importlib.import_module(f".{TARGETS[target]}", __package__)
        for variant in variants:
            path = work.staging / module.file_name(variant, suffix=suffix)
            if variant == "qat":
                trained.append((len(written) + len(trained), path))
            else:
                written.append(_write(work, target, variant, path, work.predictor))
    proofs = _compared(work.predictor, work.predictor, work.dataset, written, work.demands)
    for place, path in trained:
        model = work.trained()
        one = _write(work, "tflite", "qat", path, model)
        proofs[place:place] = _compared(model, work.predictor, work.dataset, [one], work.demands)
    return _told_slow([_within_budget(work, proof, proofs) for proof in proofs])


def _told_slow(proofs: Sequence[Proof]) -> list[Proof]:
    """Return proofs that say why an int8 file is no faster than the float one."""
    floats = [one for one in proofs if one.artifact.variant == "float32" and one.structure]
    return [_with_reason(one, floats[0]) if floats else one for one in proofs]


def _with_reason(proof: Proof, twin: Proof) -> Proof:
    one, other = proof.artifact, twin.artifact
    timed = min(len(proof.seconds), len(twin.seconds)) >= ENOUGH_RUNS
    if one.variant not in ("int8", "qat") or not timed or one.milliseconds < other.milliseconds:
        return proof
    reason = why_slower(one.path, other.path)
    notes = one.notes if reason is None else (*one.notes, reason)
    return replace(proof, artifact=replace(one, notes=notes))


def _write(work: _Work, target: str, variant: str, path: Path, model: Predictor) -> Artifact:
    module = importlib.import_module(f".{TARGETS[target]}", __package__)
    path.parent.mkdir(exist_ok=True)
    module.write(
        model.model, path, variant=variant, interface=work.interface, samples=work.samples()
    )
    return _embedded(work, path, target, variant)


def _embedded(work: _Work, path: Path, target: str, variant: str) -> Artifact:
    card = replace(work.predictor.card, output=work.interface.output, version=VERSION)
    if variant == "qat":
        card = replace(card, extra={**card.extra, "quantize_aware": True})
    cards.embed(path, card)
    return measured(path, target, variant, work.demands.min_agreement)


def _compared(
    model: Predictor,
    reference: Predictor,
    dataset: Dataset,
    files: Sequence[Artifact],
    demands: Demands,
) -> list[Proof]:
    """Prove files against the Keras model they were written from, IoU against the float one."""
    if not files:
        return []
    scored = None if model is reference else reference
    seen = views(model, dataset, limit=demands.verify_images, scored_by=scored)
    return prove(model.without_quantization(), files, seen, seconds=demands.seconds)


def _within_budget(work: _Work, proof: Proof, proofs: Sequence[Proof]) -> Proof:
    """Return a proof that keeps to --max-drop, by whatever remedy, or says that none does."""
    limit = work.demands.max_drop
    if not budget.over(proof, limit):
        return proof
    if proof.artifact.variant != "int8":
        reasons = (*proof.artifact.reasons, *budget.over(proof, limit))
        return replace(proof, artifact=replace(proof.artifact, reasons=reasons))
    floats = [one.artifact.path for one in proofs if one.artifact.variant == "float32"]
    remedies = budget.Remedies(
        model=work.predictor.model,
        float_file=floats[0],
        samples=work.samples(MORE_IMAGES),
        interface=work.interface,
        prove=lambda write: _attempted(work, proof.artifact, write),
        train=None if work.quantisation_aware is None else lambda: _trained(work, proof.artifact),
        told=lambda attempt: Console().print(attempt.sentence, soft_wrap=True),
    )
    chosen = budget.within_budget(proof, remedies, max_drop=limit)
    return timed(chosen, seconds=work.demands.seconds)


def _attempted(work: _Work, first: Artifact, write: Callable[[Path], None]) -> Proof:
    """Write and prove another file in place of one."""
    path = _aside(work, first)
    write(path)
    return _untimed(work, work.predictor, _embedded(work, path, first.target, first.variant))


def _trained(work: _Work, first: Artifact) -> Proof:
    """Write the quantisation-aware model in place of a file, and prove it by its own labels."""
    model = work.trained()
    return _untimed(work, model, _write(work, first.target, "qat", _aside(work, first), model))


def _aside(work: _Work, first: Artifact) -> Path:
    """Return where an attempt goes: each has a folder of its own."""
    return Path(tempfile.mkdtemp(dir=work.staging)) / first.path.name


def _untimed(work: _Work, model: Predictor, one: Artifact) -> Proof:
    demands = replace(work.demands, seconds=0)
    return _compared(model, work.predictor, work.dataset, [one], demands)[0]


def _check(predictor: Predictor, dataset: Dataset, *, splits: Sequence[str]) -> None:
    if predictor.model is None:
        raise UserError(f"{predictor.path} is exported already; name a run or a .keras file")
    if len(dataset.classes) != predictor.num_classes:
        raise UserError(
            f"{dataset.name} has {len(dataset.classes)} classes, {predictor.path} has "
            f"{predictor.num_classes}; name the data set it was trained on with --data"
        )
    for split in splits:
        if not dataset.length(split):
            raise UserError(f"{dataset.name} has no image in its split {split}")


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give a folder on the same disk, where files stay until they are proved."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging:
        yield Path(staging)


def measured(path: Path, target: str, variant: str, minimum: float | None) -> Artifact:
    """Return what is known of a file before its proof."""
    return Artifact(
        path=path,
        target=target,
        variant=variant,
        bytes=sum(file.stat().st_size for file in _files(path)),
        sha256=digest(path),
        inputs={},
        outputs={},
        agreement=0.0,
        min_agreement=minimum if minimum is not None else LEAST.get(variant, 95.0),
        miou=0.0,
        keras_miou=0.0,
        images=0,
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Of a folder: the SHA-256 over the lines `SHA256  NAME` of its files, sorted by name, as
    `sha256sum` prints them.
    """
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [f"{digest(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted((file for file in path.rglob("*") if file.is_file()), key=Path.as_posix)


def _place(proof: Proof, staging: Path, folder: Path) -> Proof:
    """Move a proved file to its name, or to NAME.rejected; what stood at the other one goes."""
    one = proof.artifact
    good = folder / _below(one.path, staging)
    bad = good.with_name(good.name + REJECTED)
    place, other = (good, bad) if one.accepted else (bad, good)
    with replacing(place) as temporary:
        os.rename(one.path, temporary)
    shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
    return replace(proof, artifact=replace(one, path=place))


def _below(path: Path, staging: Path) -> Path:
    """Return a path below the staging folder, without the folder of an attempt."""
    inner = path.relative_to(staging)
    return Path(*inner.parts[1:]) if inner.parts[0].startswith("tmp") else inner


def _earlier(folder: Path, artifacts: list[Artifact]) -> list[dict]:
    """Return the entries of the last manifest whose files still stand unchanged."""
    manifest = folder / MANIFEST
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return []  # none yet, or damaged: the files are proved anew when they are exported again
    ours = {one.name.removesuffix(REJECTED) for one in artifacts}
    return [
        entry
        for entry in entries
        if entry["path"].removesuffix(REJECTED) not in ours
        and (folder / entry["path"]).exists()
        and digest(folder / entry["path"]) == entry["sha256"]
    ]


def _record(
    predictor: Predictor, dataset: Dataset, artifacts: list[Artifact], earlier: list[dict]
) -> dict:
    facts = {
        "source": predictor.path.name,
        "source_sha256": digest(predictor.path),
        "data": f"{dataset.name} val",
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return {
        "versions": certificate.versions(),
        "model": predictor.card.model,
        "classes": list(predictor.classes),
        "files": [*earlier, *(one.to_dict() | facts for one in artifacts)],
    }
