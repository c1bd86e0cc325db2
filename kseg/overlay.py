"""Class maps made visible: a palette image, and the photo tinted with a legend below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

TINT = 0.5  # share of the class colour in a pixel
LINE = 0.45  # share of white in a border between classes
SMALLEST_TEXT = 12
GAP = 4
PAPER = (255, 255, 255)
INK = (32, 32, 32)
FRAME = (128, 128, 128)


def palette_image(ids: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """Return a class map as a palette image: pixel values are class ids.

    Args:
        ids: (H, W) uint8 class ids.
        palette: one (r, g, b) of 0..255 a class.

    Returns:
        A mode P image. Its palette is filled up to 256 entries, because Pillow packs images
        with fewer into 4 bits or less when it writes a PNG, and other readers expect 8.
    """
    image = Image.fromarray(np.ascontiguousarray(ids, np.uint8)).convert("P")
    flat = [channel for colour in palette for channel in colour]
    image.putpalette(flat + [0] * (768 - len(flat)))
    return image


def blend(image: np.ndarray, ids: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """Return the image mixed with the colours of its classes, with light lines between them.

    The lines tell neighbours apart whose colours are alike or dark. Pixels whose id is no class
    (255 in a mask) are left as they are.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W) uint8 class ids.
        palette: one (r, g, b) of 0..255 a class.

    Returns:
        An RGB image of the same size.
    """
    # Tables and 8-bit sums, because a photo has 12 million pixels.
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = np.asarray(palette) * TINT
    photo = (np.arange(256) * (1 - TINT)).astype(np.uint8)
    light = (np.arange(256) * (1 - LINE) + 255 * LINE).astype(np.uint8)
    mixed = photo[image]
    mixed += colours[ids]
    unknown = ids >= len(palette)
    mixed[unknown] = image[unknown]
    border = _borders(ids)
    mixed[border] = light[mixed[border]]
    return Image.fromarray(mixed)


def contact_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of one size side by side, in rows that make the whole about square.

    Args:
        pictures: at least one.

    Returns:
        An RGB image with a narrow white gap between pictures.
    """
    width, height = (side + GAP for side in pictures[0].size)
    columns = min(len(pictures), max(1, round(math.sqrt(len(pictures) * height / width))))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), PAPER)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet


def overlay(
    image: np.ndarray, ids: np.ndarray, classes: Sequence[str], palette: Sequence[Colour]
) -> Image.Image:
    """Return the tinted image over a legend of the classes that occur, largest first.

    The picture keeps its size and nothing covers it; where it is narrower than the longest
    entry of the legend, the whole is widened.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W) uint8 class ids.
        classes: class names, index is the class id.
        palette: one (r, g, b) of 0..255 a class.

    Returns:
        An RGB image, at least as wide as the given one and higher by the legend.
    """
    height, width = ids.shape
    legend = _Legend.of(_entries(ids, classes, palette), width, height)
    sheet = Image.new("RGB", (max(width, legend.width), height + legend.height), PAPER)
    sheet.paste(blend(image, ids, palette), (0, 0))
    legend.draw(sheet, top=height)
    return sheet


@dataclass(frozen=True)
class _Legend:
    """Where the entries of a legend go: a grid of equal cells, filled row by row."""

    entries: list[tuple[str, Colour]]
    font: ImageFont.FreeTypeFont
    line: int
    columns: int
    cell: int

    @staticmethod
    def of(entries: list[tuple[str, Colour]], width: int, height: int) -> _Legend:
        # One fortieth of the picture's mean side reads well on a screen that shows it whole.
        size = max(SMALLEST_TEXT, round(math.sqrt(width * height) / 40))
        font = ImageFont.load_default(size=size)
        line = round(1.6 * size)
        longest = max((font.getlength(text) for text, _ in entries), default=0)
        cell = math.ceil(longest) + round(2.4 * line)
        columns = max(1, min(len(entries), (width - line // 2) // cell))
        return _Legend(entries, font, line, columns, cell)

    @property
    def width(self) -> int:
        return self.columns * self.cell

    @property
    def height(self) -> int:
        return math.ceil(len(self.entries) / self.columns) * self.line + self.line

    def draw(self, sheet: Image.Image, *, top: int) -> None:
        pen = ImageDraw.Draw(sheet)
        # Cells share what the picture is wider than the grid, so that columns fill its width.
        cell = (sheet.width - self.line // 2) // self.columns
        for number, (text, colour) in enumerate(self.entries):
            row, column = divmod(number, self.columns)
            x = self.line // 2 + column * cell
            y = top + self.line // 2 + row * self.line
            self._draw_entry(pen, (x, y), text, colour)

    def _draw_entry(
        self, pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: Colour
    ) -> None:
        x, y = at
        margin = round(0.15 * self.line)
        box = (x, y + margin, x + round(1.2 * self.line), y + self.line - margin)
        pen.rectangle(box, fill=colour, outline=FRAME, width=max(1, self.line // 30))
        middle = y + self.line // 2
        pen.text((box[2] + self.line // 3, middle), text, fill=INK, font=self.font, anchor="lm")


def _entries(
    ids: np.ndarray, classes: Sequence[str], palette: Sequence[Colour]
) -> list[tuple[str, Colour]]:
    # By Pillow, since NumPy would first make 64-bit numbers of 8-bit ones.
    counts = Image.fromarray(ids).histogram()[: len(classes)]
    order = sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
    return [(f"{classes[i]}  {_percent(counts[i] / ids.size)}", palette[i]) for i in order]


def _percent(share: float) -> str:
    return "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def _borders(ids: np.ndarray) -> np.ndarray:
    """Return which pixels lie on the upper or left side of a border between classes."""
    thickness = max(1, round(math.sqrt(ids.size) / 500))
    border = np.zeros(ids.shape, bool)
    border[:-thickness] |= ids[:-thickness] != ids[thickness:]
    border[:, :-thickness] |= ids[:, :-thickness] != ids[:, thickness:]
    return border
