"""Images per second of the training pipeline and of a PyTorch DataLoader."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from kseg.data.augment import Augmentation
from kseg.data.dataset import FileDataset, open_dataset
from kseg.data.pipeline import training_batches
from kseg.errors import UserError
from tools.benchmarks.camvid import shared_camvid

TARGET = 1.25  # the least that kseg should give over its peer
WARM_UP_BATCHES = 4

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


def benchmark_input(options: Input) -> int:
    """Measure, print a table, and return 0 if the target is met on both kinds of image, else 1."""
    source = options.camvid or shared_camvid()
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
