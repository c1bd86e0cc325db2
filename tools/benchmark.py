"""Speed of kseg beside its peers: `python -m tools.benchmark input|crf`."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from kseg import resize
from kseg.crf import DenseCRF
from kseg.data.augment import Augmentation
from kseg.data.dataset import IGNORE_LABEL, FileDataset, open_dataset
from kseg.data.pipeline import read_samples, training_batches
from kseg.errors import UserError
from kseg.inference import feed
from kseg.refinement import softmax

TARGET = 1.25  # the least that `input` should give over its peer
WARM_UP_BATCHES = 4

EQUAL_LABELS = 0.99  # the least share of pixels that `crf` should label as its peer does
# DeepLab v2's published script, and its ResNet-101.
CRF_SETTINGS = ((4.0, 49.0, 5.0, 3.0, 3.0), (4.0, 67.0, 3.0, 3.0, 1.0))

# What both sides do to a sample.
AUGMENTATION = Augmentation(
    scale=(0.5, 2.0), flip=True, brightness=0.125, contrast=0.3, saturation=0.3, hue=0.03
)


@dataclass(frozen=True)
class Input:
    """Images per second of the training pipeline and of a PyTorch DataLoader on the same files.

    Both read CamVid's training pairs, scale them by 0.5 to 2, crop 320 x 320 with padding, flip,
    jitter the colours and form batches of 8; once from PNG images, once from JPEG. Turns are
    taken in the order kseg, peer, kseg, peer, ..., and the median of each side counts. Nothing is
    kept in memory, except in the column that says so. Needs `pip install 'kseg[peers]'`.
    """

    camvid: Path | None = None
    """Folder of CamVid; by default camvid/ in the folder KSEG_SHARED names, or in ../shared."""
    seconds: float = 8.0
    """How long each turn of each side takes."""
    turns: int = 3
    """How often each side is measured."""
    size: int = 320
    """Height and width of a sample."""
    batch_size: int = 8
    """Samples in a batch."""
    workers: int = 2
    """Worker processes of the DataLoader."""


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


def benchmark_input(options: Input) -> int:
    """Measure, print a table, and return 0 if the target is met on both kinds of image, else 1."""
    source = options.camvid or _shared_camvid()
    table = Table("images", "kseg images/s", "peer images/s", "ratio", "kseg cached images/s")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        sets = {
            "PNG": open_dataset(f"camvid:{_as_png(source, Path(folder))}"),
            "JPEG": open_dataset(f"camvid:{source}"),
        }
        # Workers are forked before TensorFlow has threads, which would not survive it.
        peers = {kind: started(peer_batches(sets[kind], options)) for kind in sets}
        for kind, dataset in sets.items():
            ours, peer = _duel(dataset, peers[kind], options)
            kept = images_per_second(_filled(dataset, options), options)
            ratios.append(ours / peer)
            table.add_row(kind, f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}", f"{kept:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"{options.size} x {options.size}, batch {options.batch_size}, {os.cpu_count()} cores; "
        f"peer: torch DataLoader, {options.workers} workers, albumentations; target {TARGET}"
    )
    return 0 if min(ratios) >= TARGET else 1


def images_per_second(batches: Iterator[Any], options: Input) -> float:
    """Return the rate at which an endless iterator of batches gives images, after a warm-up."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        next(batches)
        count += options.batch_size
    return count / (time.perf_counter() - start)


def started(batches: Iterator[Any]) -> Iterator[Any]:
    """Return the iterator after its first batch, with all that it needs running."""
    next(batches)
    return batches


def _duel(dataset: FileDataset, peer: Iterator[Any], options: Input) -> tuple[float, float]:
    ours = started(_our_batches(dataset, options, cache=False))
    turns = [
        (images_per_second(ours, options), images_per_second(peer, options))
        for _ in range(options.turns)
    ]
    first, second = np.median(turns, axis=0)
    return float(first), float(second)


def _our_batches(dataset: FileDataset, options: Input, *, cache: bool) -> Iterator[Any]:
    batches = training_batches(
        dataset,
        size=(options.size, options.size),
        batch_size=options.batch_size,
        seed=0,
        steps=1_000_000,
        augmentation=AUGMENTATION,
        cache=cache,
    )
    return iter(batches)


def _filled(dataset: FileDataset, options: Input) -> Iterator[Any]:
    batches = _our_batches(dataset, options, cache=True)
    for _ in range(dataset.length("train") // options.batch_size + 1):
        next(batches)
    return batches


def peer_batches(dataset: FileDataset, options: Input) -> Iterator[Any]:
    """Return the endless batches of a PyTorch DataLoader on the same files doing the same work.

    Raises:
        UserError: if torch or albumentations is missing.
    """
    try:
        import albumentations
        import cv2
        import torch
    except ImportError as error:
        raise UserError(f"the peer needs pip install 'kseg[peers]' ({error})") from error
    pairs = dataset.pairs("train")
    size, jitter = options.size, AUGMENTATION
    transform = albumentations.Compose(
        [
            # scale_limit is added to 1
            albumentations.RandomScale(scale_limit=(-0.5, 1.0), p=1.0),
            albumentations.PadIfNeeded(size, size, fill=114, fill_mask=255),
            albumentations.RandomCrop(size, size),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.ColorJitter(
                brightness=(1 - jitter.brightness, 1 + jitter.brightness),
                contrast=(1 - jitter.contrast, 1 + jitter.contrast),
                saturation=(1 - jitter.saturation, 1 + jitter.saturation),
                hue=(-jitter.hue, jitter.hue),
                p=1.0,
            ),
        ]
    )

    class Samples(torch.utils.data.Dataset):
        """The pairs, read by OpenCV."""

        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            image = cv2.cvtColor(cv2.imread(str(pairs[index].image)), cv2.COLOR_BGR2RGB)
            mask = cv2.imread(str(pairs[index].mask), cv2.IMREAD_GRAYSCALE)
            done = transform(image=image, mask=mask)
            image = torch.from_numpy(done["image"]).permute(2, 0, 1).contiguous().float()
            return image, torch.from_numpy(done["mask"]).long()

    def setup_worker(number: int) -> None:
        cv2.setNumThreads(0)
        torch.set_num_threads(1)

    loader = torch.utils.data.DataLoader(
        Samples(),
        batch_size=options.batch_size,
        num_workers=options.workers,
        shuffle=True,
        drop_last=True,
        persistent_workers=options.workers > 0,
        worker_init_fn=setup_worker,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _as_png(source: Path, folder: Path) -> Path:
    for pair in open_dataset(f"camvid:{source}").pairs("train"):
        for path in (pair.image, pair.mask):
            target = folder / path.relative_to(source).with_suffix(".png")
            target.parent.mkdir(exist_ok=True)
            with Image.open(path) as image:
                image.save(target)
    return folder


def benchmark_crf(options: Crf) -> int:
    """Measure, print a table; 0 if kseg is never slower and its labels are the peer's, else 1."""
    table = Table("images", "w1, sa, sb, w2, sg", "kseg ms", "peer ms", "ratio", "labels equal")
    source = options.camvid or _shared_camvid()
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


def _shared_camvid() -> Path:
    return Path(os.environ.get("KSEG_SHARED", "../shared")) / "camvid"


def main() -> int:
    """Run the part of the benchmark named on the command line."""
    parts = {"input": Input, "crf": Crf}
    options = tyro.extras.subcommand_cli_from_dict(parts, prog="tools.benchmark")
    return benchmark_crf(options) if isinstance(options, Crf) else benchmark_input(options)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
