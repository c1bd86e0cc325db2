"""Milliseconds of a dense CRF, and of pydensecrf2 on the same probabilities and images."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kseg import resize
from kseg.crf import DenseCRF
from kseg.data.dataset import IGNORE_LABEL, open_dataset
from kseg.data.pipeline import read_samples
from kseg.errors import UserError
from kseg.inference import feed
from kseg.probabilities import softmax
from tools.benchmarks.camvid import shared_camvid

EQUAL_LABELS = 0.99  # the least share of pixels that should be labelled as the peer does
# DeepLab v2's published script, and its ResNet-101.
CRF_SETTINGS = ((4.0, 49.0, 5.0, 3.0, 3.0), (4.0, 67.0, 3.0, 3.0, 1.0))


@dataclass(frozen=True)
class Crf:
    """Milliseconds of a dense CRF, and of pydensecrf2 on the same probabilities and images.

    Images are 500 x 375 with 21 classes, drawn ones and, where it is found, CamVid's; the
    probabilities are what a net of stride 8 might give, made from the masks. From probabilities
    to probabilities, set-up included. Turns are taken in the order kseg, peer, kseg, peer, ...,
    and the median of each side counts. The peer has one thread, kseg one a core. Needs
    `pip install 'kseg[peers]'`.
    """

    camvid: Path | None = None
    """Folder of CamVid; by default camvid/ in the folder KSEG_SHARED names, or in ../shared."""
    images: int = 3
    """Images of each data set."""
    turns: int = 3
    """How often each side is measured on each image."""
    size: tuple[int, int] = (375, 500)
    """Height and width of the images."""
    classes: int = 21
    """Classes of the probabilities."""
    iterations: int = 10
    """Iterations of mean field."""


def benchmark_crf(options: Crf) -> int:
    """Measure, print a table; 0 if kseg is never slower and its labels are the peer's, else 1."""
    table = Table("images", "w1, sa, sb, w2, sg", "kseg ms", "peer ms", "ratio", "labels equal")
    source = options.camvid or shared_camvid()
    specs = ["scenes", *([f"camvid:{source}"] if source.is_dir() else [])]
    good = True
    for spec, settings in itertools.product(specs, CRF_SETTINGS):
        crf = DenseCRF(*settings, iterations=options.iterations)
        ours, peer, equal = _crf_duel(spec, crf, options)
        good &= ours <= peer and equal >= EQUAL_LABELS
        name, text = spec.partition(":")[0], ", ".join(f"{value:g}" for value in settings)
        numbers = (f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}", f"{equal:.4%}")
        table.add_row(name, text, *numbers)
    console = Console()
    console.print(table)
    console.print(
        "{} x {}, {} classes, {} iterations, {} cores; peer: pydensecrf2, one thread".format(
            *options.size[::-1], options.classes, options.iterations, os.cpu_count()
        )
    )
    return 0 if good else 1


def _crf_duel(spec: str, crf: DenseCRF, options: Crf) -> tuple[float, float, float]:
    """Return the medians in milliseconds, and the share of equal labels."""
    times, equal = [], []
    for image, mask in read_samples(open_dataset(spec), "val", limit=options.images):
        image = feed(image, options.size)
        probabilities = guess(mask, options)
        for _ in range(options.turns):
            ours, our_time = _timed(crf.refine, probabilities, image)
            theirs, their_time = _timed(peer_crf, crf, probabilities, image)
            times.append((our_time, their_time))
        equal.append(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    first, second = np.median(times, axis=0)
    return float(first), float(second), float(np.mean(equal))


def _timed(function: Callable[..., np.ndarray], *arguments: Any) -> tuple[np.ndarray, float]:  # noqa: ANN401
    start = time.perf_counter()
    result = function(*arguments)
    return result, 1000 * (time.perf_counter() - start)


def guess(mask: np.ndarray, options: Crf) -> np.ndarray:
    """Return what a net of stride 8 might say of a mask: coarse, and noisy."""
    coarse = resize.nearest(mask, tuple(side // 8 for side in options.size))
    coarse = np.where(coarse == IGNORE_LABEL, options.classes - 1, coarse)
    noise = np.random.default_rng(0).normal(0, 1.5, (*coarse.shape, options.classes))
    return softmax(resize.bilinear(5 * np.eye(options.classes)[coarse] + noise, options.size))


def peer_crf(crf: DenseCRF, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Refine by pydensecrf2.

    Raises:
        UserError: if it is missing.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise UserError(f"the peer needs pip install 'kseg[peers]' ({error})") from error
    height, width, classes = probabilities.shape
    peer = densecrf.DenseCRF2D(width, height, classes)
    unary = -np.log(np.maximum(probabilities, 1e-5)).transpose(2, 0, 1)  # its own least
    peer.setUnaryEnergy(np.ascontiguousarray(unary).reshape(classes, -1))
    peer.addPairwiseGaussian(sxy=crf.sigma_gamma, compat=crf.w2)
    peer.addPairwiseBilateral(
        sxy=crf.sigma_alpha, srgb=crf.sigma_beta, rgbim=image.copy(), compat=crf.w1
    )
    refined = np.asarray(peer.inference(crf.iterations))
    return refined.reshape(classes, height, width).transpose(1, 2, 0)
