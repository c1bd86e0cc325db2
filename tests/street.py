"""A drawn folder data set small enough to train on in seconds."""

import numpy as np
from PIL import Image

CLASSES = "id,name,r,g,b\n0,ground,128,64,128\n1,thing,220,20,60\n255,ignore,0,0,0\n"
SIZE = (96, 128)
TINY_MODEL = ["-o", "widths=8,8,8,8", "-o", "blocks=1,1,1,1", "-o", "decoder_channels=8"]


def write_street(root, *, train=6, val=2, size=SIZE):
    """Write `folder:` data: bright boxes (id 1) on a dark noisy ground (id 0), one ignored row."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.csv").write_text(CLASSES)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, mask = draw(size, seed=index + 100 * (split == "val"))
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


def draw(size, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    for _ in range(3):
        y, x = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        mask[y : y + size[0] // 3, x : x + size[1] // 4] = 1
    image = 60 + 130 * mask[..., None] + rng.normal(0, 12, (*size, 3))
    mask[-1] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def train_words(data, run, *more):
    """The words of a `kseg train` that takes seconds."""
    return [
        *("train", "--data", f"folder:{data}", "--run", str(run), "--steps", "6"),
        *("--batch-size", "2", "--eval-every", "3", "--checkpoint-every", "2"),
        *(*TINY_MODEL, *more),
    ]
