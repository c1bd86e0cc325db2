"""What to try next, from what was measured of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kseg.config import TrainConfig
from kseg.evaluate import Evaluation
from kseg.losses.expression import parse_loss, takes_class_weights
from kseg.resolve import has_backbone

RARE = 0.01  # share of the pixels below which a class is rare
WEAK = 0.5  # a weak class has less than this share of the mean IoU
WAITED = 0.2  # share of the time that a training waited for data, from which that is its limit
WIDE = 0.05  # width of an interval of mIoU from which small differences cannot be seen
MISCALIBRATED = 0.05  # expected calibration error
CONFUSED = 0.15  # share of a class's pixels that are given one other class
MISSED = 0.7  # recall of small objects as a share of that of large ones
BLURRED = 0.75  # mIoU at the borders as a share of the whole
GAINED = 0.01  # mIoU between the last two validations, from which a training was not at its end
MOST = 3  # classes or pairs named in a sentence


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Attributes:
        seen: what was measured.
        remedy: what to do about it.
    """

    seen: str
    remedy: str


def advice(
    evaluation: Evaluation,
    config: TrainConfig | None,
    validations: Sequence[Mapping[str, float]],
    waiting: float,
) -> list[Advice]:
    """Return what to try next, the most promising first.

    Args:
        evaluation: of the model, with the metrics calibration, sizes and trimap where they can be.
        config: what it was trained by; None of a file that does not tell.
        validations: step and mIoU of each validation of the training, in their order.
        waiting: share of its time that the training waited for data; NaN if that is not known.
    """
    found = [
        *_of_training(config, validations),
        *_of_classes(evaluation, config),
        *_of_metrics(evaluation),
        *_of_speed(waiting),
        *_of_interval(evaluation),
    ]
    return list(found)


def _of_training(
    config: TrainConfig | None, validations: Sequence[Mapping[str, float]]
) -> Iterator[Advice]:
    scores = [row["miou"] for row in validations if math.isfinite(row["miou"])]
    if len(scores) > 1:
        gained = scores[-1] - scores[-2]
        best = max(range(len(scores)), key=scores.__getitem__)
        if gained > GAINED and best == len(scores) - 1:
            yield Advice(
                f"The last validation was still {100 * gained:.1f} points better than the one "
                "before.",
                "Train longer, twice the `--steps`, if there is time.",
            )
        elif scores[best] - scores[-1] > GAINED:
            step = int(validations[best]["step"])
            fall = 100 * (scores[best] - scores[-1])
            yield Advice(
                f"mIoU was highest at step {step} and fell by {fall:.1f} points until the end: the "
                "model may be learning its training images by heart.",
                "Train for fewer `--steps`, with a wider `--scale` and a larger `--jitter`, or on "
                "more images.",
            )
    if config is not None and config.weights == "none" and has_backbone(config.model):
        yield Advice(
            "The training began with random weights.",
            "Begin with a backbone that has seen ImageNet (`--weights imagenet`) or with published "
            "weights (`kseg weights list`); it is worth most where images are few.",
        )


def _of_classes(evaluation: Evaluation, config: TrainConfig | None) -> Iterator[Advice]:
    matrix, iou = evaluation.confusion.matrix, evaluation.confusion.iou
    share = matrix.sum(axis=1) / matrix.sum()
    weak = [i for i in range(len(iou)) if share[i] and not iou[i] >= WEAK * evaluation.miou]
    rare = [i for i in weak if share[i] < RARE]
    if rare:
        yield Advice(
            f"{_listed([evaluation.classes[i] for i in rare])}: less than {100 * RARE:.0f} % of "
            f"the pixels each, and found badly (IoU {_scores([iou[i] for i in rare])}).",
            _for_rare(config),
        )
    pairs = sorted(_confusions(matrix), reverse=True)[:MOST]
    if pairs:
        listed = "; ".join(
            f"{100 * part:.0f} % of {evaluation.classes[true]} is given as "
            f"{evaluation.classes[given]}"
            for part, true, given in pairs
        )
        yield Advice(
            f"{listed[0].upper()}{listed[1:]}.",
            "Look at these places in the worst images below. If people label them now one way and "
            "now the other, mend the masks; else more such images help.",
        )


def _for_rare(config: TrainConfig | None) -> str:
    """Return what may help rare classes and was not done yet; it helps together, hardly alone."""
    settings = config or TrainConfig()
    weighted = any(takes_class_weights(term.name) for term in parse_loss(settings.loss))
    tries = {
        "--class-weights sqrt": weighted and settings.class_weights == "none",
        "--rare-crops 0.5": not settings.rare_crops,
        "--repeat-rare 0.5": not settings.repeat_rare,
    }
    flags = " ".join(flag for flag, new in tries.items() if new)
    return f"Train with `{flags}`; label more images of them." if flags else "Label more of them."


def _confusions(matrix: Any) -> Iterator[tuple[float, int, int]]:  # noqa: ANN401 - (C, C) array
    for true, row in enumerate(matrix):
        for given, pixels in enumerate(row):
            if given != true and row.sum() and pixels > CONFUSED * row.sum():
                yield float(pixels / row.sum()), true, given


def _of_metrics(evaluation: Evaluation) -> Iterator[Advice]:
    results = {name: metric.result() for name, metric in evaluation.metrics.items()}
    calibration = results.get("calibration")
    if calibration and calibration["ece"] > MISCALIBRATED:
        sure, right = calibration["confidence"], calibration["accuracy"]
        how = (
            "surer of itself than it is right" if sure > right else "more often right than it says"
        )
        remedy = (
            "try `--loss label_smoothing`" if sure > right else "lighter `--class-weights` help"
        )
        yield Advice(
            f"The model is {how}: {100 * sure:.0f} % sure, {100 * right:.0f} % right.",
            f"Do not take its probabilities for chances; {remedy}.",
        )
    sizes = results.get("sizes")
    if sizes and sizes["recall"][0] < MISSED * sizes["recall"][-1]:
        yield Advice(
            f"Of small areas (below {sizes['edges'][0]} pixels, of whatever class) "
            f"{100 * sizes['recall'][0]:.0f} % are found, of large ones "
            f"{100 * sizes['recall'][-1]:.0f} %.",
            "Train and evaluate at a larger `--size` and `--eval-size`, or with a model of output "
            "stride 4 or 8.",
        )
    trimap = results.get("trimap")
    if trimap and trimap["miou"][0] < BLURRED * evaluation.miou:
        yield Advice(
            f"Next to borders mIoU is {trimap['miou'][0]:.3f}, in all {evaluation.miou:.3f}.",
            "A decoder with finer maps (deeplabv3plus, unet), or `--crf` behind the model where "
            "there is time.",
        )


def _of_speed(waiting: float) -> Iterator[Advice]:
    if waiting >= WAITED:
        yield Advice(
            f"The training waited for data {100 * waiting:.0f} % of its time.",
            "Store images at about the size they are trained at, on a local disk, as JPEG; or give "
            "the pipeline more processor cores.",
        )


def _of_interval(evaluation: Evaluation) -> Iterator[Advice]:
    interval = evaluation.intervals.miou
    if interval is None or interval[1] - interval[0] <= WIDE:
        return
    yield Advice(
        f"With {evaluation.images} images mIoU is only known from {interval[0]:.3f} to "
        f"{interval[1]:.3f}.",
        "Compare models by `kseg compare`, which sees smaller differences on the same images, and "
        "label more validation images.",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _scores(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values[:MOST])
