"""Image files, refused before they are decoded where they are larger than kseg takes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from kseg.errors import UserError

# 0.45 GB as an array, and some three times that while Pillow decodes it.
MOST_PIXELS = 150_000_000


@contextlib.contextmanager
def opened_image(path: Path | str) -> Iterator[Image.Image]:
    """Open an image file whose header says that it has at most `MOST_PIXELS`.

    Raises:
        UserError: if it has more; whatever Pillow raises if it is no image.
    """
    with warnings.catch_warnings():
        # Pillow warns of half as many pixels as it refuses; the limit here lies between the two.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
    with image:
        check_pixels(path, *image.size)
        yield image


def check_pixels(path: Path | str, width: int, height: int) -> None:
    """Raise UserError if an image file has more pixels than `MOST_PIXELS`."""
    if width * height > MOST_PIXELS:
        raise _too_large(path)


def _too_large(path: Path | str) -> UserError:
    return UserError(
        f"{path} has more than {MOST_PIXELS / 1e6:g} million pixels, the most that kseg decodes "
        "at once; cut it into parts, or make it smaller"
    )
