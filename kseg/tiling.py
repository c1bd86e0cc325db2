"""Tiles: an image at its own pixels, cut to the model's size and blended where tiles overlap."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kseg import resize
from kseg.errors import UserError
from kseg.inference import Predictor, pixels_of
from kseg.wrapped import WrappedPredictor, need_probabilities

# Tiles begin at multiples of the largest stride of nets, so that each map's pixels lie where they
# lie in the whole image.
ALIGNED = 32
# Sides that the models of kseg take at least.
SMALLEST_SIDE = 64
# Images on which tiles are compared with the whole: each costs about as much as a dozen tiles.
COMPARED = 5


@dataclass(frozen=True)
class Place:
    """Where a tile lies on one axis of the image.

    Attributes:
        start: its first pixel.
        weights: how much it counts at each pixel that it covers, 0..1 float32; what all tiles
            over a pixel count is 1 in sum.
    """

    start: int
    weights: np.ndarray


def places(length: int, tile: int, overlap: int) -> list[Place]:
    """Return where tiles lie on one axis, and how much each counts there.

    Tiles begin at multiples of 32, but for the last, which ends where the image ends. Towards a
    neighbour, the outer quarter of the overlap counts nothing, since there the padding of the net
    shows most; over the middle half the weight rises as half a wave of a cosine.

    Args:
        length: side of the image, pixels.
        tile: side of a tile.
        overlap: what neighbours share at least, at most half of the tile.

    Returns:
        One place, shorter than the tile, where the image is no longer than that.
    """
    step = (tile - overlap) // ALIGNED * ALIGNED or tile - overlap
    last = max(0, length - tile)
    starts = [*range(0, last, step), last]
    windows = [_window(length, start, min(tile, length), overlap) for start in starts]
    total = np.zeros(length)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + len(window)] += window
    return [
        Place(start, (window / total[start : start + len(window)]).astype(np.float32))
        for start, window in zip(starts, windows, strict=True)
    ]


def _window(length: int, start: int, covered: int, overlap: int) -> np.ndarray:
    """Return a tile's weights before they are shared out; 1 up to the border of the image."""
    depth = np.full(covered, np.inf)  # of the pixels' centres, from the nearest neighbour's side
    inwards = np.arange(covered) + 0.5
    if start > 0:
        depth = np.minimum(depth, inwards)
    if start + covered < length:
        depth = np.minimum(depth, inwards[::-1])
    ramp = (depth - overlap / 4) / max(overlap / 2, 1e-9)
    return np.sin(ramp.clip(0, 1) * np.pi / 2) ** 2


@dataclass(frozen=True)
class TiledPredictor(WrappedPredictor):
    """A predictor that labels an image of any size in tiles, each of the model's own size.

    The image stays at its own pixels (times `scale`). Where it is smaller than a tile it is
    mirrored beyond its right and lower border. The probabilities of tiles are blended by the
    weights of `places`, in rows and columns alike; no more of them are held than a row of tiles.

    What holds: let a net's receptive field reach r pixels to each side, and let it have no
    pooling or attention over the whole image. Where the sides of the image are multiples of 32,
    a pixel has the probabilities that the whole image would give it (but for rounding) if it lies
    r or more from each side of a tile that counts there and is no border of the image. With an
    overlap of 4 r or more, that is every pixel. For other nets, `apart` measures.

    Attributes:
        overlap: pixels that neighbours share at least.
        scale: of the image before it is cut.
    """

    overlap: int
    scale: float = 1.0

    @property
    def refinements(self) -> tuple[object, ...]:
        """What stands around the model until a class is taken, from the model outwards."""
        scale = f" at scale {self.scale:g}" if self.scale != 1 else ""
        tiles = "tiles of {} x {}, overlap {}{}".format(*self.size, self.overlap, scale)
        return (*self.inner.refinements, tiles)

    @staticmethod
    def of(predictor: Predictor, *, overlap: int | None = None) -> TiledPredictor:
        """Return the predictor looking at tiles.

        Args:
            predictor: plain or flipped; its size is that of the tiles.
            overlap: pixels that neighbours share at least, up to half of a tile's shorter side;
                by default a quarter of it.

        Raises:
            UserError: if the file gives a class map, or the overlap is out of range.
        """
        need_probabilities(predictor, "blending tiles")
        shorter = min(predictor.size)
        overlap = shorter // 4 if overlap is None else overlap
        if not 0 <= overlap <= shorter // 2:
            raise UserError(
                f"an overlap of {overlap} pixels does not do: tiles of {predictor.path} are "
                f"{predictor.size[0]} x {predictor.size[1]}, and 0 to {shorter // 2} is wanted"
            )
        return TiledPredictor(predictor.path, predictor.card, predictor.runtime, predictor, overlap)

    def scaled(self, scale: float) -> TiledPredictor:
        """Return the same with the image resized before it is cut."""
        return dataclasses.replace(self, scale=self.scale * scale)

    def bands(self, pixels: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the blended probabilities, as `Predictor.bands`."""
        seen = self.seen(pixels.shape[:2])
        return resize.bilinear_bands(self._blended(pixels, seen), seen, size)

    def seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of an image of `size` when it is cut."""
        height, width = (max(1, round(self.scale * side)) for side in size)
        return height, width

    def _blended(self, pixels: np.ndarray, seen: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield finished rows (any, W, C), top to bottom, at the size `seen` of the cut image."""
        rows = places(seen[0], self.size[0], self.overlap)
        columns = places(seen[1], self.size[1], self.overlap)
        strip = np.zeros((len(rows[0].weights), seen[1], self.num_classes), np.float32)
        ends = [row.start for row in rows[1:]] + [seen[0]]
        for row, end in zip(rows, ends, strict=True):
            for column in columns:
                self._add(strip, pixels, seen, row, column)
            done = end - row.start
            for top in range(0, done, ALIGNED):
                yield strip[top : min(top + ALIGNED, done)].copy()
            strip[:-done] = strip[done:]
            strip[-done:] = 0

    def _add(
        self,
        strip: np.ndarray,
        pixels: np.ndarray,
        seen: tuple[int, int],
        row: Place,
        column: Place,
    ) -> None:
        """Add a tile's weighted probabilities to the rows from `row.start` on."""
        height, width = len(row.weights), len(column.weights)
        down = slice(row.start, row.start + height)
        across = slice(column.start, column.start + width)
        tile = _mirrored(_part(pixels, seen, down, across), self.size)
        probabilities = self.inner.probabilities(tile)[:height, :width]
        probabilities *= np.outer(row.weights, column.weights)[..., None]
        strip[:, across] += probabilities


def _part(pixels: np.ndarray, size: tuple[int, int], down: slice, across: slice) -> np.ndarray:
    """Return `feed(pixels, size)[down, across]`, made from the pixels under it alone."""
    if pixels.shape[:2] == size:
        return pixels[down, across]
    return np.rint(resize.bilinear_part(pixels, size, down, across)).astype(np.uint8)


def _mirrored(tile: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a tile continued to `size` by mirroring it at its right and lower border."""
    missing = [(0, want - have) for want, have in zip(size, tile.shape, strict=False)]
    return np.pad(tile, [*missing, (0, 0)], mode="symmetric")


@dataclass(frozen=True)
class Apart:
    """How far the labels made of tiles are from those of the whole image.

    Attributes:
        share: of the labels that differ, 0..1, over all images.
        largest: the same of the image on which most differ.
        images: how many were compared.
        size: height and width of what was looked at in the largest of them.
    """

    share: float
    largest: float
    images: int
    size: tuple[int, int]

    def __str__(self) -> str:
        """Return what was found as one line."""
        where = "the middle {} x {} of ".format(*self.size)
        if self.images == 1:
            return f"tiles change {self.share:.2%} of the whole image's labels ({where}one image)"
        return (
            f"tiles change {self.share:.2%} of the whole images' labels ({where}{self.images} "
            f"images, evenly spread; of one of them {self.largest:.2%})"
        )


def tiles_of(predictor: Predictor) -> TiledPredictor | None:
    """Return the tiled predictor that `predictor` is or is made around; None if there is none."""
    while isinstance(predictor, WrappedPredictor):
        if isinstance(predictor, TiledPredictor):
            return predictor
        predictor = predictor.inner
    return None


def apart(tiled: TiledPredictor, images: Iterable[np.ndarray | Path]) -> Apart | None:
    """Measure how many labels differ from those that the model gives of images as one.

    The model is rebuilt at the size of the middle of an image: at most two tiles a side, so that
    it does not take much more memory than tiles do, and multiples of 32.

    Args:
        tiled: around a Keras model.
        images: each uint8 (h, w, 3), or the path of an image file. Those that one tile holds, and
            those narrower than 64 pixels, are left out.

    Returns:
        None where all are left out.

    Raises:
        UserError: if the file has one size only.
    """
    differing: list[np.ndarray] = []
    whole = tiled.inner
    for image in images:
        part = _compared_part(tiled, image)
        if part is None:
            continue
        whole = whole.at_size(part.shape[:2])  # built anew only where the size is another one
        by_tiles = dataclasses.replace(tiled, scale=1.0).predict(part)
        differing.append(by_tiles != whole.predict(part))
    if not differing:
        return None
    pixels = sum(one.size for one in differing)
    return Apart(
        share=sum(int(one.sum()) for one in differing) / pixels,
        largest=max(float(one.mean()) for one in differing),
        images=len(differing),
        size=max((one.shape for one in differing), key=math.prod),
    )


def _compared_part(tiled: TiledPredictor, image: np.ndarray | Path) -> np.ndarray | None:
    """Return the middle of an image, None where there is nothing to compare."""
    pixels = pixels_of(image)
    seen = tiled.seen(pixels.shape[:2])
    middles = [_middle(side, tile) for side, tile in zip(seen, tiled.size, strict=True)]
    part = _part(pixels, seen, *middles)
    size = part.shape[:2]
    if min(size) < SMALLEST_SIDE or all(s <= t for s, t in zip(size, tiled.size, strict=True)):
        return None
    return part


def _middle(side: int, tile: int) -> slice:
    """Return the middle of a side: two tiles, or what is there, to a multiple of 32."""
    length = min(2 * tile, side) // ALIGNED * ALIGNED or side
    start = (side - length) // 2
    return slice(start, start + length)
