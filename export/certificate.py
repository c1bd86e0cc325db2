"""The certificate: all that was found of the files of an export, for machines and for people."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from kseg.files import write_text
from kseg.html.pictures import Picture
from kseg.inference import Predictor, feed
from kseg.machine import machine
from kseg.version import VERSION

from .comparison import Score, agreement_interval, agreements, scores, shift
from .page import certificate_page
from .verify import Proof, Structure, percentiles

WITNESSES = ("tensorflow", "keras", "ai-edge-litert", "numpy")
ONNX_WITNESSES = ("onnx", "tf2onnx", "onnxruntime")  # an extra: not everyone has them


def certificate(
    reference: Predictor,
    proofs: Sequence[Proof],
    *,
    data: Mapping[str, Any],
    calibration: Sequence[str],
    sha256: str,
) -> dict[str, Any]:
    """Return all that was found of some files, as JSON takes it.

    Args:
        reference: the Keras model that they were compared with.
        proofs: one a file.
        data: name of the data set, its split and count of images.
        calibration: names of the images that set the int8 ranges.
        sha256: of the reference's file.

    Returns:
        Agreements and IoUs in per cent, changes in points, times in milliseconds. What was not
        measured, or has no meaning, is None.
    """
    card = reference.card
    return {
        "kseg": VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        "versions": versions(),
        "model": {
            "name": card.model,
            "options": dict(card.options),
            "source": str(reference.path),
            "sha256": sha256,
        },
        "data": {**data, "classes": list(reference.classes)},
        "calibration": {"images": list(calibration)},
        "files": [_facts(proof, reference.classes) for proof in proofs],
    }


def versions() -> dict[str, str]:
    """Return the versions of what took part."""
    found = {name: metadata.version(name) for name in WITNESSES}
    for name in ONNX_WITNESSES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"kseg": VERSION, "python": platform.python_version()}


def write(
    folder: Path,
    found: Mapping[str, Any],
    proofs: Sequence[Proof],
    *,
    palette: Sequence[tuple[int, int, int]],
    stem: str = "certificate",
) -> Path:
    """Write a certificate as STEM.json and STEM.html, each whole or not at all; return the page."""
    pictures = {proof.artifact.name: _pictures(proof) for proof in proofs}
    write_text(folder / f"{stem}.json", json.dumps(_plain(found), indent=1, ensure_ascii=False))
    page = folder / f"{stem}.html"
    write_text(page, certificate_page(_plain(found), pictures, palette=palette))
    return page


def _facts(proof: Proof, classes: Sequence[str]) -> dict[str, Any]:
    one, counts = proof.artifact, proof.counts
    whole, band, interior, by_margin = agreements(counts)
    miou, each = scores(counts)
    rows, columns = shift(counts)
    return {
        "path": one.name,
        "target": one.target,
        "variant": one.variant,
        "bytes": one.bytes,
        "sha256": one.sha256,
        "inputs": dict(one.inputs),
        "outputs": dict(one.outputs),
        "fed_as": one.fed_as,
        "accepted": one.accepted,
        "reasons": list(one.reasons),
        "faults": [vars(fault) for fault in proof.faults],
        "images": one.images,
        "agreement": whole,
        "agreement_interval": agreement_interval(counts),
        "min_agreement": one.min_agreement,
        "agreement_boundary": band,
        "agreement_interior": interior,
        "agreement_by_margin": by_margin,
        "miou": miou.value / 100,
        "reference_miou": miou.reference / 100,
        "miou_change": miou.change,
        "miou_change_interval": miou.interval,
        "classes": [_class(name, score) for name, score in zip(classes, each, strict=True)],
        "shift": {"rows": rows, "columns": columns},
        "latency": _latency(proof.seconds),
        **_structure(proof.structure),
        "notes": list(one.notes),
        "tried": [vars(attempt) for attempt in proof.tried],
        "worst": [{"image": w.view.name, "agreement": w.agreement} for w in proof.worst],
    }


def _class(name: str, score: Score) -> dict[str, Any]:
    return {
        "name": name,
        "iou": score.value / 100,
        "reference_iou": score.reference / 100,
        "change": score.change,
        "interval": score.interval,
    }


def _latency(seconds: Sequence[float]) -> dict[str, Any] | None:
    if not seconds:
        return None
    return {"runs": len(seconds), "threads": 1, "milliseconds": percentiles(seconds)}


def _structure(found: Structure | None) -> dict[str, Any]:
    if found is None:
        return {"arena_bytes": None, "macs": None, "operators": {}}
    facts = vars(found)
    return {name: facts[name] for name in ("arena_bytes", "macs", "operators")}


def _pictures(proof: Proof) -> list[Picture]:
    return [
        Picture(
            name=Path(one.view.name).name,
            agreement=one.agreement,
            image=feed(one.view.pixels, one.labels.shape),
            reference=one.view.labels,
            labels=one.labels,
        )
        for one in proof.worst
        if one.agreement < 100
    ]


def _plain(value: Any) -> Any:  # noqa: ANN401  (anything that JSON may hold)
    """Return a value with None for every NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
