"""What each remedy against unbalanced classes does to the IoU of the rare ones."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kseg.config import TrainConfig
from kseg.data.adapters.scenes import PEDESTRIAN, POLE, SIGN, Scenes, draw_scene
from kseg.errors import UserError
from kseg.evaluate import Evaluation
from kseg.registry import DATASETS, nearest

RARE = {"pedestrian": PEDESTRIAN, "pole": POLE, "sign": SIGN}
PEOPLED = 20  # one training scene in so many has pedestrians

# What differs from the plain training, cross entropy without class weights.
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {},
    "sqrt": {"class_weights": "sqrt"},
    "enet": {"class_weights": "enet"},
    "median": {"class_weights": "median"},
    "inverse": {"class_weights": "inverse"},
    "effective": {"class_weights": "effective"},
    "weighted_ce": {"loss": "weighted_ce", "class_weights": "sqrt"},
    "focal": {"loss": "focal"},
    "ohem": {"loss": "ohem"},
    "dice": {"loss": "ce+dice"},
    "tversky": {"loss": "ce+tversky"},
    "lovasz": {"loss": "ce+lovasz"},
    "logit": {"logit_adjustment": 1.0},
    "repeat": {"repeat_rare": 0.5},
    "crops": {"rare_crops": 0.5},
    "sqrt+repeat+crops": {"class_weights": "sqrt", "repeat_rare": 0.5, "rare_crops": 0.5},
}


@dataclass(frozen=True)
class Imbalance:
    """What each remedy against unbalanced classes does to the IoU of the rare ones.

    Trains on street scenes of which one in 20 has pedestrians; the 80 validation scenes are those
    of `scenes`, nearly all with some. Poles and signs are rare as they are. Every remedy is trained
    by itself, once a seed, everything else as in the recipe `scenes`.
    """

    remedies: tuple[str, ...] = tuple(REMEDIES)
    """Which remedies."""
    seeds: int = 2
    """Trainings of each, with the seeds 0, 1, ..."""
    steps: int = 300
    """Steps of a training."""
    batch_size: int = 8
    """Images a step."""
    size: tuple[int, int] = (192, 256)
    """Training window, pixels."""
    options: tuple[str, ...] = field(default=())
    """Options of the model, as for -o; narrow ones make a quick try."""


@DATASETS.register("rare_scenes")
class RareScenes(Scenes):
    """The street scenes, but hardly ever with pedestrians in training: `rare_scenes`."""

    name = "rare_scenes"

    def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw one sample; arguments and result as of `Scenes.sample`."""
        if split != "train" or index % PEOPLED == 0:
            return super().sample(split, index)
        return draw_scene(self.chance(split, index), pedestrians=False)


def benchmark_imbalance(options: Imbalance) -> int:
    """Train, print what each remedy gives, then a table of all and how long they took; 0."""
    for name in options.remedies:
        if name not in REMEDIES:
            raise UserError(
                f"no remedy {name!r}{nearest(name, REMEDIES)} (there are: {', '.join(REMEDIES)})"
            )
    begun = time.perf_counter()
    table = Table("remedy", *RARE, "mIoU", "minutes")
    table.caption = (
        f"IoU on 80 scenes, one training each with the seeds 0 to {options.seeds - 1}; "
        f"{options.steps} steps of {options.batch_size} x {options.size[0]} x {options.size[1]}"
    )
    for name in options.remedies:
        start = time.perf_counter()
        found = [trained(name, seed, options) for seed in range(options.seeds)]
        columns = [[one.confusion.iou[id_] for one in found] for id_ in RARE.values()]
        columns.append([one.miou for one in found])
        cells = [" ".join(f"{value:.3f}" for value in column) for column in columns]
        table.add_row(name, *cells, f"{(time.perf_counter() - start) / 60:.1f}")
        print(name, dict(zip((*RARE, "mIoU"), cells, strict=True)), flush=True)
    Console().print(table)
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes in all")
    return 0


def trained(name: str, seed: int, options: Imbalance) -> Evaluation:
    """Return the evaluation of one training with a remedy."""
    from kseg.train import train

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data="rare_scenes",
            run=Path(folder) / "run",
            scale=(0.75, 1.5),
            jitter=0.6,
            class_weights="none",
            size=options.size,
            steps=options.steps,
            batch_size=options.batch_size,
            eval_every=options.steps,
            checkpoint_every=options.steps,
            seed=seed,
            options=options.options,
        )
        return train(dataclasses.replace(config, **REMEDIES[name])).evaluation
