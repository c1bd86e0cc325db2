"""The report of a run: one HTML page of what it was told, how it learnt and how good it is."""

from __future__ import annotations

import csv
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kseg.advice import WAITED, advice
from kseg.arguments import with_settings
from kseg.config import TrainConfig
from kseg.data.dataset import IGNORE_LABEL, Dataset
from kseg.errors import UserError
from kseg.evaluate import Evaluation, evaluate, plain
from kseg.html import render
from kseg.html.charts import Chart, line_chart
from kseg.html.pictures import Layers, Picture, layers
from kseg.inference import Predictor, feed
from kseg.losses.class_weights import weights_for
from kseg.losses.expression import parse_loss, takes_class_weights
from kseg.machine import machine
from kseg.runs import COLUMNS, STEP_COLUMNS, Run
from kseg.version import VERSION

TEMPLATE = "report.html.jinja"
METRICS = ("boundary_f1", "boundary_iou", "trimap", "sizes", "calibration")
SHOWN = 2  # images of each kind: the worst, those in the middle, the best
LARGEST_MATRIX = 40  # classes; a larger confusion matrix cannot be read


@dataclass(frozen=True)
class Shown:
    """An image of the report.

    Attributes:
        kind: "worst", "median" or "best".
        miou: of the image by itself.
        layers: what is drawn of it.
    """

    kind: str
    miou: float
    layers: Layers


def report(
    predictor: Predictor,
    dataset: Dataset,
    *,
    run: Run | None,
    split: str = "val",
    limit: int | None = None,
    data: str = "",
    tiles_apart: Callable[[], float | None] = lambda: None,
    on_image: Callable[[int, int], None] | None = None,
) -> str:
    """Evaluate a model and return the report as an HTML document, to be written as UTF-8.

    Args:
        predictor: the model.
        dataset: what it is evaluated on; its training masks tell the class weights.
        run: the run that it is of; without one, nothing is said of a training.
        split: which images.
        limit: only the first so many of them.
        data: how the data set was named, to be shown.
        tiles_apart: measures, after the evaluation, the share of the labels that tiles change
            against whole images; None where there are no tiles or it cannot be measured.
        on_image: called after each image with how many are done and how many there are.

    Raises:
        UserError: as `kseg.evaluate.evaluate`.
    """
    names = [name for name in METRICS if name != "calibration" or predictor.output != "classes"]
    found = evaluate(predictor, dataset, split=split, limit=limit, metrics=names, on_image=on_image)
    config = None if run is None else run.config()
    validations = [] if run is None else _numbers(run.metrics_file, COLUMNS)
    steps = [] if run is None else _numbers(run.steps_file, STEP_COLUMNS)
    waiting = _waiting(steps)
    values = {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": _model(predictor, run),
        "evaluation": found,
        "tiles_apart": tiles_apart(),
        "metrics": {name: plain(metric.result()) for name, metric in found.metrics.items()},
        "advice": advice(found, config, validations, waiting),
        "classes": _classes(found, _weights(config, dataset)),
        "matrix": _matrix(found),
        "shown": list(_shown(found, predictor, dataset, split)),
        "charts": _charts(found, validations, steps),
        "waiting": waiting,
        "waited": WAITED,
        "facts": _facts(config, dataset, data),
        "files": _files(run),
    }
    return render("kseg", TEMPLATE, values)


def page_path(model: Path) -> Path:
    """Return where the report of a run or of a model file goes."""
    if Run.is_run(model):
        return model / "report.html"
    return model.with_name(f"{model.stem}-report.html")


def _model(predictor: Predictor, run: Run | None) -> dict[str, Any]:
    card = predictor.card
    return {
        "name": card.model or predictor.path.name,
        "options": dict(card.options),
        "size": "{} x {}".format(*predictor.size),
        "source": str(predictor.path),
        "run": "" if run is None else str(run.folder),
        "refinements": predictor.refinements,
    }


def _numbers(path: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    """Return the rows of a table of a run that has these columns; what is empty is NaN.

    Raises:
        UserError: if it is damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return [
                {name: float(row[name] or math.nan) for name in columns}
                for row in csv.DictReader(file)
            ]
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}; remove it and report without") from error


def _waiting(steps: Sequence[Mapping[str, float]]) -> float:
    """Return the share of its time that a training waited for data, NaN if that is not known."""
    known = [row["waiting"] for row in steps if math.isfinite(row["waiting"])]
    return float(np.mean(known)) if known else math.nan


def _weights(config: TrainConfig | None, dataset: Dataset) -> Sequence[float | None]:
    """Return the class weights of a training, from the masks it has seen."""
    unknown, none = ((value,) * len(dataset.classes) for value in (None, 1.0))
    if config is None or "train" not in dataset.splits:
        return unknown
    if not any(takes_class_weights(term.name) for term in parse_loss(config.loss)):
        return none
    from kseg.data.pipeline import counting  # brings TensorFlow in

    try:
        return weights_for(config.class_weights, dataset.classes, counting(dataset)) or none
    except UserError:  # the weights' file, or the training images, are elsewhere now
        return unknown


def _classes(found: Evaluation, weights: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return a row for each class, the best found first."""
    matrix = found.confusion.matrix
    true = matrix.sum(axis=1)
    rows = [
        {
            "name": name,
            "iou": float(found.confusion.iou[i]),
            "interval": found.intervals.iou[i],
            "recall": _share(matrix[i, i], true[i]),
            "precision": _share(matrix[i, i], matrix[:, i].sum()),
            "pixels": _share(true[i], true.sum()),
            "weight": weights[i],
        }
        for i, name in enumerate(found.classes)
    ]
    return sorted(rows, key=lambda row: -row["iou"] if math.isfinite(row["iou"]) else 1)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else math.nan


def _matrix(found: Evaluation) -> list[tuple[str, list[float]]] | None:
    """Return what each class is given as, as shares of its pixels; None of too many classes."""
    matrix = found.confusion.matrix
    if len(matrix) > LARGEST_MATRIX:
        return None
    return [
        (name, [_share(pixels, row.sum()) for pixels in row])
        for name, row in zip(found.classes, matrix, strict=True)
    ]


def _shown(
    found: Evaluation, predictor: Predictor, dataset: Dataset, split: str
) -> Iterator[Shown]:
    """Give the worst, the middle and the best images, in this order."""
    from kseg.data.pipeline import read_samples  # brings TensorFlow in

    kinds = _kinds(found.per_image.ranked())
    chosen = {index: kind for kind, places in kinds.items() for index in places}
    mious = found.per_image.mious()
    samples = read_samples(dataset, split, only=list(chosen))
    for (index, kind), (image, mask) in zip(chosen.items(), samples, strict=True):
        drawn = _layers(found, predictor, index, image, mask)
        yield Shown(kind, float(mious[index]), drawn)


def _kinds(ranked: Sequence[int]) -> dict[str, list[int]]:
    """Return the places of the worst, the middle and the best images, none twice."""
    worst, rest = list(ranked[:SHOWN]), list(ranked[SHOWN:])
    best, rest = rest[::-1][:SHOWN], rest[: max(0, len(rest) - SHOWN)]
    middle = max(0, (len(rest) - SHOWN) // 2)
    return {"worst": worst, "median": rest[middle : middle + SHOWN], "best": best}


def _layers(
    found: Evaluation, predictor: Predictor, index: int, image: np.ndarray, mask: np.ndarray
) -> Layers:
    labels = predictor.predict(image, size=mask.shape)
    valid = mask != IGNORE_LABEL
    image = feed(image, mask.shape)  # a mask may be of another size than its image
    picture = Picture(
        name=Path(found.per_image.images[index].name).name,
        agreement=100 * float(np.mean(labels[valid] == mask[valid])),
        image=image,
        reference=mask.astype(np.uint8),
        labels=labels,
    )
    return layers(picture, found.classes, predictor.palette)


def _charts(
    found: Evaluation,
    validations: Sequence[Mapping[str, float]],
    steps: Sequence[Mapping[str, float]],
) -> dict[str, Chart | None]:
    results = {name: metric.result() for name, metric in found.metrics.items()}
    learnt = steps or validations
    return {
        "loss": _curve(learnt, "loss", title="Loss"),
        "miou": _curve(validations, "miou", title="Validation mIoU"),
        "rate": _curve(learnt, "learning_rate", title="Learning rate"),
        "speed": _curve(learnt, "images_per_second", title="Images a second"),
        "calibration": _reliability(results.get("calibration")),
        "trimap": _trimap(results.get("trimap")),
    }


def _curve(rows: Sequence[Mapping[str, float]], column: str, *, title: str) -> Chart | None:
    """Return a column of a table of a run over its steps."""
    points = [(row["step"], row[column]) for row in rows]
    highest = max((y for _, y in points if math.isfinite(y)), default=0.0)
    return line_chart(
        {column: points},
        title=f"{title} over the training",
        x_label="step",
        y_label=column,
        x_range=(0.0, max((x for x, _ in points), default=1.0)),
        # Of a speed, half of what it was must look like half.
        y_range=(0.0, 1.1 * highest) if column == "images_per_second" and highest else None,
    )


def _reliability(found: Mapping[str, Any] | None) -> Chart | None:
    if found is None:
        return None
    bins = found["bins"]
    return line_chart(
        {
            "as sure as right": [(0.0, 0.0), (1.0, 1.0)],
            "the model": list(zip(bins["confidence"], bins["accuracy"], strict=True)),
        },
        title="Share of right pixels over the model's confidence",
        x_label="confidence",
        y_label="share that is right",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
    )


def _trimap(found: Mapping[str, Any] | None) -> Chart | None:
    if found is None:
        return None
    return line_chart(
        {"mIoU": list(zip(map(float, found["widths"]), found["miou"], strict=True))},
        title="mIoU within a distance of the borders",
        x_label="pixels from a border",
        y_label="mIoU",
    )


def _facts(config: TrainConfig | None, dataset: Dataset, data: str) -> dict[str, Any]:
    """Return what one has to know to do the same again."""
    command = [] if config is None else ["kseg", "train", *with_settings([], config)]
    return {
        "command": shlex.join(command),
        "settings": {} if config is None else _settings(config),
        "dataset": data or dataset.name,
        "classes": list(dataset.classes),
        "splits": {name: dataset.length(name) for name in dataset.splits},
        "machine": machine(),
        "kseg": VERSION,
    }


def _settings(config: TrainConfig) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(config).items() if value not in (None, ())}


def _files(run: Run | None) -> list[dict[str, Any]]:
    """Return what the newest certificate of a run says of its exported files."""
    path = None if run is None else run.export / "certificate.json"
    if path is None or not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["files"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; export the run again") from error
