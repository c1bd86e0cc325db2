"""The built-in data set `scenes`: drawn street scenes, so that everything can be tried at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from kseg.data.dataset import ArrayDataset
from kseg.data.drawing import (
    BLOTCH,
    BRICK,
    GRAIN,
    LEAVES,
    PANEL,
    PLAIN,
    SLAB,
    Camera,
    Canvas,
    Colour,
    Material,
    Point,
    Surface,
    Weather,
    Windows,
    sky,
)
from kseg.errors import UserError
from kseg.registry import DATASETS

CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "pedestrian", "pole", "sign")
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PEDESTRIAN, POLE, SIGN = range(9)
PALETTE = (
    (70, 130, 180),
    (84, 84, 92),
    (128, 64, 128),
    (244, 35, 232),
    (107, 142, 35),
    (20, 40, 150),
    (220, 20, 60),
    (190, 170, 150),
    (240, 200, 20),
)
LENGTHS = {"train": 400, "val": 80, "test": 80}
SIZE = (192, 256)

NEAR, FAR = 1.0, 3000.0
SKYLINE = 250.0
EYE = 2.0  # about the height of the camera
DETAILED = 28.0  # beyond this Z, small things are too small to be drawn
LANE = 2.9
GROUND_LIT = 0.8
PAINT = Material(PLAIN, 1.0, 0.0)

T = TypeVar("T")


@DATASETS.register("scenes")
class Scenes(ArrayDataset):
    """Street scenes in nine classes, drawn on demand; needs no files.

    A sample depends on nothing but the seed, the split and the index. Colours and textures are
    shared between classes, so a model has to look at shapes and surroundings.
    """

    name = "scenes"
    classes = CLASSES
    palette = PALETTE
    splits = tuple(LENGTHS)
    licence = "Apache-2.0 (drawn by kseg itself)"
    homepage = "kseg/data/adapters/scenes.py"
    epochs = 12.0  # three minutes of two processor cores

    def __init__(self, path: str | None = None) -> None:
        """Choose the street.

        Args:
            path: a seed, as in `scenes:7`; other seeds draw other scenes. None is seed 0.

        Raises:
            UserError: if `path` is not a whole number from 0.
        """
        if path is not None and not (path.isascii() and path.isdigit()):
            raise UserError(
                f"scenes:{path}: what follows the colon is the seed of the drawn scenes, a whole "
                "number from 0; write scenes or, for example, scenes:7"
            )
        self.seed = int(path or 0)

    def length(self, split: str) -> int:
        """Return the number of samples of a split."""
        self.check_split(split)
        return LENGTHS[split]

    def sample(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw one sample.

        Args:
            split: "train", "val" or "test".
            index: its number in the split.

        Returns:
            The image, uint8 (192, 256, 3), and the mask of class ids, uint8 (192, 256).

        Raises:
            UserError: if there is no such split.
            IndexError: if there is no such sample.
        """
        if not 0 <= index < self.length(split):
            raise IndexError(f"scenes {split} has no sample {index}, it has {LENGTHS[split]}")
        return draw_scene(self.chance(split, index))

    def chance(self, split: str, index: int) -> np.random.Generator:
        """Return where the chance of one sample comes from, the same each time."""
        entropy = [self.seed, self.splits.index(split), index]
        return np.random.default_rng(np.random.SeedSequence(entropy))


class Sun(NamedTuple):
    """Where shadows fall: (dx, dz) metres on the ground for each metre of height."""

    dx: float
    dz: float

    def on_wall(self, side: int) -> float:
        """Return the share of the sun on a wall left (-1) or right (1) of the street."""
        return max(0.0, self.dx * side) / math.hypot(1, self.dx, self.dz)

    @property
    def on_front(self) -> float:
        """Share of the sun on what faces the camera."""
        return max(0.0, self.dz) / math.hypot(1, self.dx, self.dz)


class Street(NamedTuple):
    """The plan of a street.

    Attributes:
        left: X of the left kerb.
        right: X of the right kerb.
        left_wall: X of the houses on the left.
        right_wall: X of the houses on the right.
        middle: X of the line between the two directions.
        margin: metres between kerb and outermost lane; wide enough to park if `parking`.
        crossing: Z where the road that crosses this one begins and ends, or None.
    """

    left: float
    right: float
    left_wall: float
    right_wall: float
    middle: float
    margin: float
    crossing: tuple[float, float] | None

    @property
    def parking(self) -> bool:
        """Whether cars park along the kerbs."""
        return self.margin > 1

    def on_crossing(self, z1: float, z2: float) -> bool:
        """Return whether z1 to z2 touches the crossing road."""
        return self.crossing is not None and z1 < self.crossing[1] and z2 > self.crossing[0]


class Dice:
    """Where all chance in a scene comes from."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Use this generator, through its plain random numbers only, which are quick to draw."""
        self.rng = rng

    def between(self, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        return low + (high - low) * self.rng.random()

    def count(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def chance(self, share: float) -> bool:
        """Return True this often."""
        return self.rng.random() < share

    def choose(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[int(self.rng.random() * len(items))]

    def colour(self, colours: Sequence[Colour], spread: float = 14) -> Colour:
        """Return one of the colours, a little lighter or darker and a little off."""
        red, green, blue = self.choose(colours)
        lighter = self.between(-spread, spread)
        return (
            min(255.0, max(8.0, red + lighter + self.between(-0.4, 0.4) * spread)),
            min(255.0, max(8.0, green + lighter)),
            min(255.0, max(8.0, blue + lighter + self.between(-0.4, 0.4) * spread)),
        )


@dataclass(frozen=True)
class Stage:
    """What every thing in the street is drawn with."""

    canvas: Canvas
    dice: Dice
    street: Street
    sun: Sun

    @property
    def camera(self) -> Camera:
        """The camera of the canvas."""
        return self.canvas.camera

    @property
    def weather(self) -> Weather:
        """The weather of the canvas."""
        return self.canvas.weather

    @property
    def shadow(self) -> float:
        """How much darker the ground is where the sun does not reach."""
        sun = GROUND_LIT * self.weather.sun[1]
        return sun / (self.weather.ambient[1] + sun)

    def metres(self, pixels: float, z: float) -> float:
        """Return how many metres that many pixels are at depth `z`."""
        return pixels * z / self.camera.focal

    def front(self, class_id: int, z: float, material: Material = PAINT) -> int:
        """Return the number of a new surface that faces the camera."""
        return self.canvas.add(Surface(class_id, self.camera.front(z), material))

    def in_view(self, x: float, z: float, reach: float) -> bool:
        """Return whether something that reaches so far left and right of (x, z) is to be seen."""
        camera, z = self.camera, max(z, NEAR)
        left = camera.centre + (x - reach) * camera.focal / z
        return left < self.canvas.width and left + 2 * reach * camera.focal / z > 0

    def tip(self, x: float, z: float, height: float) -> Point:
        """Return where the shadow of a point above (x, z) falls."""
        return x + self.sun.dx * height, 0.0, max(NEAR, z + self.sun.dz * height)


PAVINGS = (
    Material(SLAB, 24.0, 0.07),
    Material(GRAIN, 30.0, 0.06),
    Material(SLAB, 40.0, 0.09),
    Material(BLOTCH, 10.0, 0.06),
)
ROADS = (Material(GRAIN, 26.0, 0.10),) * 4 + (Material(SLAB, 60.0, 0.09),)
WALLS = (
    Material(BRICK, 14.0, 0.10),
    Material(BLOTCH, 6.0, 0.07),
    Material(GRAIN, 12.0, 0.06),
    Material(PANEL, 8.0, 0.06),
)
TILES = Material(PANEL, 8.0, 0.08)
CLOTH = Material(BLOTCH, 40.0, 0.06)
BARK = Material(GRAIN, 30.0, 0.14)
CROWN = Material(LEAVES, 18.0, 0.21)
HEDGE = Material(LEAVES, 14.0, 0.16)
Thing = tuple[float, Callable[[], None]]  # its Z, and what draws it

FACADES = (
    (168, 112, 88), (142, 78, 62), (196, 176, 148), (214, 206, 192), (150, 148, 146),
    (120, 124, 132), (208, 186, 130), (172, 182, 168), (122, 132, 148), (186, 150, 140),
    (98, 94, 92), (224, 218, 210), (140, 150, 118),
)  # fmt: skip
PAINTS = (
    (28, 30, 34), (60, 64, 70), (120, 124, 130), (188, 190, 194), (232, 232, 230), (150, 24, 28),
    (30, 58, 120), (34, 84, 60), (190, 160, 60), (120, 96, 78), (88, 110, 130), (200, 84, 36),
)  # fmt: skip
FOLIAGE = (
    (92, 128, 52), (74, 112, 58), (120, 140, 62), (140, 146, 62), (84, 128, 60), (66, 104, 60),
    (104, 120, 72), (178, 120, 48),
)  # fmt: skip
CLOTHES = (
    (44, 48, 66), (176, 38, 44), (214, 206, 192), (40, 84, 160), (98, 128, 60), (208, 160, 52),
    (150, 92, 66), (232, 232, 228), (124, 58, 132), (224, 104, 44), (52, 136, 140),
)  # fmt: skip
ASPHALTS = ((96, 98, 102), (84, 86, 90), (108, 106, 104), (76, 78, 82))
SLABS = ((164, 160, 152), (178, 170, 156), (144, 142, 142), (168, 132, 116))
SKINS = ((232, 190, 160), (206, 156, 122), (150, 104, 76), (96, 66, 50))
HAIRS = ((40, 32, 28), (110, 80, 50), (150, 146, 140))
ROOFS = ((110, 66, 54), (74, 76, 82), (92, 84, 78))
BARKS = ((92, 76, 62), (110, 102, 94), (70, 58, 48))
METALS = ((168, 172, 174), (146, 150, 154), (188, 190, 188), (60, 64, 68), (168, 158, 140))
GLASS = (34, 42, 52)
RED, BLUE, YELLOW, GREEN = (196, 30, 36), (30, 76, 160), (236, 190, 40), (30, 110, 66)
WHITE, BLACK, STEEL = (236, 236, 232), (30, 30, 34), (128, 130, 132)


def ring(corners: int, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Return a regular polygon around (0, 0), its first corner `turn` steps from the right."""
    angles = (2 * math.pi * (k + turn) / corners for k in range(corners))
    return tuple((math.cos(angle), math.sin(angle)) for angle in angles)


CIRCLE = ring(10)
# Outlines of foliage: circles whose corners are pulled in and out, each in its own way.
RAGGED = tuple(
    tuple((c * r, s * r) for (c, s), r in zip(ring(18), radii, strict=True))
    for radii in np.random.default_rng(25).uniform(0.8, 1.12, (24, 18)).tolist()
)
# Shapes of signs, and for each the colours (border, field) it comes in.
SIGNS = (
    (ring(16), ((RED, WHITE), (BLUE, WHITE), (WHITE, RED), (WHITE, BLUE))),
    (((-1, -0.8), (0, 1), (1, -0.8)), ((RED, WHITE), (RED, YELLOW))),
    (((-1, 0.8), (0, -1), (1, 0.8)), ((RED, WHITE),)),
    (((-0.85, -0.85), (-0.85, 0.85), (0.85, 0.85), (0.85, -0.85)), ((WHITE, BLUE), (WHITE, GREEN))),
    (ring(4), ((WHITE, YELLOW), (BLACK, YELLOW))),
    (ring(8, 0.5), ((WHITE, RED),)),
    (
        ((-1.5, -0.5), (-1.5, 0.5), (1.5, 0.5), (1.5, -0.5)),
        ((WHITE, BLUE), (WHITE, GREEN), (BLUE, WHITE), (BLACK, YELLOW)),
    ),
)


def scaled(colour: Colour, factor: float) -> Colour:
    """Return a lighter or darker colour."""
    red, green, blue = colour
    return red * factor, green * factor, blue * factor


def strip(x1: float, x2: float, z1: float, z2: float) -> list[Point]:
    """Return a rectangle on the ground."""
    return [(x1, 0.0, z1), (x2, 0.0, z1), (x2, 0.0, z2), (x1, 0.0, z2)]


def upright(x1: float, x2: float, y1: float, y2: float, z: float) -> list[Point]:
    """Return a rectangle that faces the camera."""
    return [(x1, y1, z), (x1, y2, z), (x2, y2, z), (x2, y1, z)]


def along(x: float, y1: float, y2: float, z1: float, z2: float) -> list[Point]:
    """Return an upright rectangle that runs along the street."""
    return [(x, y1, z1), (x, y2, z1), (x, y2, z2), (x, y1, z2)]


def draw_scene(
    rng: np.random.Generator, *, pedestrians: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a street.

    Args:
        rng: where all chance comes from.
        pedestrians: whether people are about.

    Returns:
        The image, uint8 (192, 256, 3), and the mask of class ids, uint8 (192, 256).
    """
    stage = _stage(Dice(rng))
    draw_ground(stage)
    draw_background(stage)
    people = crowd if pedestrians else _nobody
    for things in (buildings(stage), [*roadside(stage), *traffic(stage), *people(stage)]):
        for _, draw in sorted(things, key=_depth, reverse=True):
            draw()
    return stage.canvas.develop(rng)


def _depth(thing: Thing) -> float:
    return thing[0]


def _stage(dice: Dice) -> Stage:
    """Choose camera, weather, light and street."""
    height, width = SIZE
    camera = Camera(
        focal=width * dice.between(0.95, 1.25),
        centre=width * dice.between(0.34, 0.66),
        horizon=height * dice.between(0.40, 0.54),
        height=dice.between(1.5, 2.6),
    )
    weather = dice.choose(WEATHERS)(dice)
    azimuth, length = dice.between(-math.pi, math.pi), dice.between(0.5, 1.7)
    sun = Sun(-math.sin(azimuth) * length, -math.cos(azimuth) * length)
    ahead = math.cos(azimuth) > 0.2
    disc = (
        camera.centre + camera.focal * math.tan(azimuth) if ahead else -1e3,
        camera.horizon - camera.focal * 0.42 / length,
    )
    drift = (dice.count(0, 1 << 20), dice.count(0, 1 << 20))
    background = sky(weather, width, horizon=camera.horizon, sun=disc, drift=drift)
    canvas = Canvas(camera, weather, SIZE, sky=background, sky_class=SKY)
    return Stage(canvas, dice, _street(dice), sun)


def _street(dice: Dice) -> Street:
    """Choose a plan; the camera drives right of the middle line."""
    margin = 2.2 if dice.chance(0.3) else 0.3
    middle = dice.between(-0.5, 0.5) - LANE / 2
    left = middle - LANE * dice.choose((0, 1, 1)) - margin
    right = middle + LANE * dice.choose((1, 1, 1, 2)) + margin
    begin = dice.between(14, 28)
    crossing = (begin, begin + dice.between(7, 11)) if dice.chance(0.35) else None
    walls = left - dice.between(2.6, 6), right + dice.between(2.6, 6)
    return Street(left, right, *walls, middle, margin, crossing)


# Weather


def sunny(dice: Dice) -> Weather:
    """Blue sky, hard shadows."""
    warmth = dice.between(0, 0.1)
    return Weather(
        zenith=(62, 122, 196), skyline=(178, 206, 228), cloud=(246, 246, 246),
        cover=dice.between(0.05, 0.55), ambient=(0.56, 0.60, 0.68),
        sun=(0.62 + warmth, 0.56, 0.46 - warmth), haze=(176, 196, 216),
        visibility=dice.between(180, 500), noise=3.0,
    )  # fmt: skip


def overcast(dice: Dice) -> Weather:
    """A grey lid, light from everywhere."""
    grey = dice.between(150, 214)
    return Weather(
        zenith=(grey * 0.86, grey * 0.9, grey * 0.96), skyline=(grey, grey, grey),
        cloud=(grey * 1.08, grey * 1.08, grey * 1.08), cover=0.6, ambient=(0.78, 0.80, 0.84),
        sun=(0.10, 0.09, 0.08), haze=(grey, grey, grey), visibility=dice.between(110, 260),
        noise=4.0,
    )  # fmt: skip


def rainy(dice: Dice) -> Weather:
    """Low clouds, a mirroring road, lamps on early."""
    grey = dice.between(112, 158)
    return Weather(
        zenith=(grey * 0.82, grey * 0.88, grey * 0.96), cloud=(grey, grey, grey * 1.04),
        skyline=(grey * 1.1, grey * 1.12, grey * 1.16), cover=0.75, ambient=(0.56, 0.60, 0.66),
        sun=(0.04, 0.04, 0.04), haze=(grey * 1.06, grey * 1.08, grey * 1.12),
        visibility=dice.between(60, 110), lit=dice.between(0.05, 0.2),
        wet=dice.between(0.25, 0.42), rain=dice.between(14, 34), noise=4.0,
    )  # fmt: skip


def foggy(dice: Dice) -> Weather:
    """Everything fades after some tens of metres."""
    grey = dice.between(166, 206)
    return Weather(
        zenith=(grey * 0.95, grey * 0.97, grey), skyline=(grey, grey, grey),
        cloud=(grey, grey, grey), cover=0.5, ambient=(0.74, 0.76, 0.80),
        sun=(0.05, 0.05, 0.05), haze=(grey, grey, grey), visibility=dice.between(60, 130),
        lit=0.04, noise=4.0,
    )  # fmt: skip


def dusk(dice: Dice) -> Weather:
    """The sun is down, windows and lamps are lit."""
    glow = dice.between(0.6, 1.05)
    return Weather(
        zenith=(34, 48, 92), skyline=(236 * glow, 152 * glow, 112 * glow),
        cloud=(128, 92, 112), cover=dice.between(0.2, 0.6), ambient=(0.56, 0.54, 0.62),
        sun=(0.10, 0.06, 0.02), haze=(150 * glow, 116 * glow, 118 * glow),
        visibility=dice.between(130, 300), lit=dice.between(0.3, 0.55),
        wet=dice.between(0, 0.2), noise=4.0,
    )  # fmt: skip


# As often as named here.
WEATHERS = (sunny,) * 4 + (overcast,) * 3 + (rainy, foggy, dusk)


# Ground


def draw_ground(stage: Stage) -> None:
    """Draw the pavements, the road between them and what is painted on it."""
    canvas, dice, street, plane = stage.canvas, stage.dice, stage.street, stage.camera.ground()
    pavement = canvas.add(Surface(PAVEMENT, plane, dice.choose(PAVINGS)))
    road = canvas.add(Surface(ROAD, plane, dice.choose(ROADS)))
    grey, asphalt = dice.colour(SLABS, 16), dice.colour(ASPHALTS, 12)
    everywhere, lane = (
        strip(-2 * FAR, 2 * FAR, NEAR, FAR),
        strip(street.left, street.right, NEAR, FAR),
    )
    canvas.polygon(everywhere, grey, number=pavement, lit=GROUND_LIT)
    canvas.polygon(lane, asphalt, number=road, lit=GROUND_LIT)
    _draw_kerbs(stage, grey, pavement)
    if street.crossing:
        canvas.polygon(strip(-400, 400, *street.crossing), asphalt, number=road, lit=GROUND_LIT)
    _draw_patches(stage, asphalt)
    _draw_markings(stage)


def _draw_kerbs(stage: Stage, colour: Colour, pavement: int) -> None:
    """Draw a bright kerb stone and a dark gutter along both sides of the road."""
    for x, side in ((stage.street.left, -1), (stage.street.right, 1)):
        stone = strip(x, x + side * 0.22, NEAR, FAR)
        stage.canvas.polygon(stone, scaled(colour, 1.22), number=pavement, lit=GROUND_LIT)
        gutter = strip(x, x - side * 0.14, NEAR, FAR)
        stage.canvas.polygon(gutter, scaled(colour, 0.5), lit=0.6)


def _draw_patches(stage: Stage, asphalt: Colour) -> None:
    """Draw mended places and a manhole."""
    dice, left, right = stage.dice, stage.street.left, stage.street.right
    for _ in range(dice.count(1, 4)):
        x, z = dice.between(left, right - 1), dice.between(4, 26)
        end = min(x + dice.between(0.6, 2), right)
        patch, colour = strip(x, end, z, z + dice.between(0.8, 7)), dice.between(0.78, 1.14)
        stage.canvas.polygon(patch, scaled(asphalt, colour), lit=GROUND_LIT)
    if dice.chance(0.6):
        x, z = dice.between(left + 1, right - 1), dice.between(5, 14)
        lid = [(x + 0.35 * c, 0.0, z + 0.35 * s) for c, s in CIRCLE]
        stage.canvas.polygon(lid, scaled(asphalt, 0.6), lit=GROUND_LIT)


def _draw_markings(stage: Stage) -> None:
    """Draw lane lines, and zebra and stop line in front of a crossing."""
    dice, street = stage.dice, stage.street
    white = scaled((232, 230, 222), dice.between(0.72, 1.0))
    middle = (226, 184, 70) if dice.chance(0.25) else white
    first, last = street.left + street.margin, street.right - street.margin
    dashed = dice.chance(0.6)
    for x in (street.middle, street.middle + LANE):
        if first + 0.5 < x < last - 0.5:
            _draw_line(stage, x, middle, dashed=dashed)
    if dice.chance(0.7):
        for x in (first, last):
            _draw_line(stage, x, white, dashed=street.parking)
    if street.crossing or dice.chance(0.25):
        z = street.crossing[0] - 4 if street.crossing else dice.between(9, 24)
        _draw_zebra(stage, z, white)


def _draw_line(stage: Stage, x: float, colour: Colour, *, dashed: bool) -> None:
    """Draw a line along the street, up to the crossing if there is one."""
    end = stage.street.crossing[0] - 5 if stage.street.crossing else 120.0
    if not dashed:
        stage.canvas.polygon(strip(x - 0.08, x + 0.08, NEAR, end), colour, lit=GROUND_LIT)
        return
    z = stage.dice.between(NEAR, 6)
    while z < min(end, 50):
        stage.canvas.polygon(strip(x - 0.08, x + 0.08, z, min(z + 3, end)), colour, lit=GROUND_LIT)
        z += 7


def _draw_zebra(stage: Stage, z: float, colour: Colour) -> None:
    """Draw a zebra crossing from `z` on, and the stop line before it."""
    street = stage.street
    x = street.left + 0.4
    while x < street.right - 0.5:
        stage.canvas.polygon(strip(x, x + 0.55, z, z + 3.2), colour, lit=GROUND_LIT)
        x += 1.1
    stop = strip(street.middle + 0.1, street.right - 0.3, z - 1.6, z - 1.15)
    stage.canvas.polygon(stop, colour, lit=GROUND_LIT)


# Buildings


def draw_background(stage: Stage) -> None:
    """Close the street far away with roofs and trees."""
    dice, z = stage.dice, SKYLINE
    for _ in range(dice.count(5, 9)):
        x, width = dice.between(-180, 180), dice.between(14, 44)
        top = dice.between(7, 36) if abs(x) > 18 else dice.between(5, 16)
        windows = Windows(4.5, 4.0, int(top / 4), 0.5, 0.5, 0.5, x, dice.count(0, 9999))
        surface = Surface(BUILDING, stage.camera.front(z), Material(BLOTCH, 1.0, 0.08), windows)
        colour, number = scaled(dice.colour(FACADES), 0.8), stage.canvas.add(surface)
        stage.canvas.polygon(upright(x, x + width, 0, top, z), colour, number=number, lit=0.3)
    for _ in range(dice.count(0, 2)):
        radius = dice.between(4, 9)
        draw_crown(stage, (dice.between(-60, 60), radius / 2, SKYLINE - 30), radius, blobs=4)


def buildings(stage: Stage) -> list[Thing]:
    """Line both sides with houses and, in the gaps, trees."""
    things: list[Thing] = []
    dice, street = stage.dice, stage.street
    for side, wall in ((-1, street.left_wall), (1, street.right_wall)):
        usual, gaps = dice.between(1, 5), dice.between(0.05, 0.4)
        z = dice.between(-12, 0)
        while z < 100:
            bay = dice.between(2.2, 3.6)
            end = z + bay * dice.count(3, 7)
            if street.on_crossing(z, end):
                z = street.crossing[1] + 0.1
                continue
            if dice.chance(gaps):
                things += _gap(stage, side, wall, max(z, NEAR), end)
            elif end > NEAR + 1:
                floors = max(1, int(usual + dice.between(-1, 2.5)))
                things.append((z, _house(stage, side, wall, z, end, bay, floors)))
            z = end + (dice.between(1, 5) if dice.chance(0.2) else 0)
    return things


def _gap(stage: Stage, side: int, wall: float, z1: float, z2: float) -> list[Thing]:
    """Plant trees and a hedge where no house stands."""
    things: list[Thing] = []
    z = max(z1, 9) + 2
    while z < min(z2, 32):
        things.append((z, _tree(stage, wall + side * stage.dice.between(1.5, 6), z)))
        z += stage.dice.between(3, 6)
    if stage.dice.chance(0.6) and z2 > 3:
        height = stage.dice.between(0.7, 1.6)
        things.append((z1, lambda: draw_hedge(stage, side, wall, max(z1, 2.0), z2, height)))
    return things


def draw_hedge(stage: Stage, side: int, wall: float, z1: float, z2: float, height: float) -> None:
    """Draw a hedge along the wall line from `z1` to `z2`."""
    colour, end = stage.dice.colour(FOLIAGE), stage.front(TREE, z1, HEDGE)
    thick = upright(wall, wall + side * 1.2, 0, height, z1)
    stage.canvas.polygon(thick, colour, number=end, lit=stage.sun.on_front)
    face = stage.canvas.add(Surface(TREE, stage.camera.wall(wall), HEDGE))
    lit = stage.sun.on_wall(side)
    stage.canvas.polygon(along(wall, 0, height, z1, z2), colour, number=face, lit=lit)


class House(NamedTuple):
    """A house: where its wall is, from where to where it runs, and its looks."""

    side: int
    x: float
    z1: float
    z2: float
    top: float
    colour: Colour
    roof: Colour
    material: Material
    windows: Windows
    gabled: bool
    shop: Colour | None


def _house(
    stage: Stage, side: int, wall: float, z1: float, z2: float, bay: float, floors: int
) -> Callable[[], None]:
    """Design a house of so many floors whose windows are `bay` metres apart."""
    dice = stage.dice
    storey, shop = dice.between(2.9, 3.5), dice.chance(0.4)
    house = House(
        side=side,
        x=wall + side * (dice.between(0, 1.2) if dice.chance(0.3) else 0),
        z1=z1,
        z2=z2,
        top=floors * storey + dice.between(0.3, 0.9),
        colour=dice.colour(FACADES),
        roof=dice.colour(ROOFS),
        material=dice.choose(WALLS),
        windows=Windows(
            bay=bay,
            storey=storey,
            floors=floors,
            width=dice.between(0.3, 0.72),
            height=dice.between(0.4, 0.68),
            shop_width=dice.between(0.75, 0.9) if shop else dice.between(0, 0.5),
            origin=z1,
            seed=dice.count(0, 9999),
        ),
        gabled=floors < 5 and dice.chance(0.45),
        shop=dice.colour(PAINTS + FACADES) if shop else None,
    )
    return lambda: draw_house(stage, house)


def draw_house(stage: Stage, house: House) -> None:
    """Draw the wall towards the camera, the roof, the wall along the street and its shadow."""
    canvas, x, z1, z2, top = stage.canvas, house.x, max(house.z1, NEAR), house.z2, house.top
    plane = stage.camera.wall(x)
    wall = canvas.add(Surface(BUILDING, plane, house.material, house.windows))
    lit = stage.sun.on_wall(house.side)
    if house.z1 > NEAR:
        _draw_gable(stage, house)
    if house.gabled:
        ridge, back = top + 2.6, x + house.side * 4
        slope = [(x, top, z1), (x, top, z2), (back, ridge, z2), (back, ridge, z1)]
        roof = canvas.add(Surface(BUILDING, plane, TILES))
        canvas.polygon(slope, house.roof, number=roof, lit=lit * 0.7 + 0.2)
    canvas.polygon(along(x, 0, top, z1, z2), house.colour, number=wall, lit=lit)
    if z1 < DETAILED:
        cornice, plinth = along(x, top - 0.3, top, z1, z2), along(x, 0, 0.5, z1, z2)
        canvas.polygon(cornice, scaled(house.colour, 0.72), lit=lit)
        canvas.polygon(plinth, scaled(house.colour, 0.7), lit=lit)
    if house.shop and z1 < DETAILED:
        storey = house.windows.storey
        canvas.polygon(along(x, storey * 0.88, storey * 1.04, z1, z2), house.shop, lit=lit)
    tips = [stage.tip(x, z, top) for z in (z2, z1)]
    canvas.shadow([(x, 0.0, z1), (x, 0.0, z2), *tips], stage.shadow)


def _draw_gable(stage: Stage, house: House) -> None:
    """Draw the wall that faces the camera."""
    x, z, side = house.x, house.z1, house.side
    windows = house.windows._replace(origin=x + side * 0.4, shop_width=house.windows.width)
    surface = Surface(BUILDING, stage.camera.front(z), house.material, windows)
    corners = upright(x, x + side * 8, 0, house.top, z)
    if house.gabled:
        corners.insert(2, (x + side * 4, house.top + 2.6, z))
    number = stage.canvas.add(surface)
    stage.canvas.polygon(corners, house.colour, number=number, lit=stage.sun.on_front)


# Trees


def _tree(stage: Stage, x: float, z: float) -> Callable[[], None]:
    trunk, radius = stage.dice.between(1.7, 3.2), stage.dice.between(1.3, 2.6)
    return lambda: draw_tree(stage, x, z, trunk, radius)


def draw_tree(stage: Stage, x: float, z: float, trunk: float, radius: float) -> None:
    """Draw a tree whose crown begins above `trunk` metres."""
    if not stage.in_view(x, z, radius * 1.3):
        return
    dice, top = stage.dice, trunk + radius * 0.8
    bark = stage.front(TREE, z, BARK)
    foot = max(dice.between(0.12, 0.2), stage.metres(1.1, z))
    neck = foot * 0.6
    stem = [(x - foot, 0.0, z), (x - neck, top, z), (x + neck, top, z), (x + foot, 0.0, z)]
    stage.canvas.polygon(stem, dice.colour(BARKS), number=bark, lit=0.35)
    blobs = dice.count(7, 10) if z < DETAILED else 3
    draw_crown(stage, (x, trunk + radius * 0.85, z), radius, blobs=blobs)
    cx, _, cz = stage.tip(x, z, trunk + radius)
    if cz > 3:
        shade = [(cx + radius * c, 0.0, max(NEAR, cz + radius * s)) for c, s in CIRCLE]
        stage.canvas.shadow(shade, stage.shadow)


def draw_crown(stage: Stage, centre: Point, radius: float, *, blobs: int) -> None:
    """Draw foliage: dark blobs behind, brighter ones towards the light."""
    dice, (x, y, z) = stage.dice, centre
    leaves = stage.front(TREE, z, CROWN)
    colour, tall = dice.colour(FOLIAGE, 18), dice.between(0.8, 1.5)
    towards = -0.25 if stage.sun.dx > 0 else 0.25
    for k in range(blobs):
        light = k / blobs
        reach = radius * (0.68 - 0.3 * light)
        bx = x + reach * dice.between(-1, 1) + radius * towards * light
        by = y + tall * (reach * dice.between(-1, 1) + radius * 0.3 * light)
        size = radius * (0.62 - 0.26 * light + dice.between(-0.08, 0.08))
        blob = [(bx + size * c, by + size * s, z) for c, s in dice.choose(RAGGED)]
        shade = scaled(colour, 0.68 + 0.46 * light)
        stage.canvas.polygon(blob, shade, number=leaves, lit=0.25 + 0.55 * light)


# What stands at the roadside


def roadside(stage: Stage) -> list[Thing]:
    """Set trees, lamps, signs and posts along both kerbs."""
    things: list[Thing] = []
    dice, street = stage.dice, stage.street
    for side, kerb in ((-1, street.left), (1, street.right)):
        green = dice.between(0, 0.55)
        z = dice.between(5, 9)
        while z < 20:
            x = kerb + side * dice.between(0.45, 0.9)
            if not street.on_crossing(z - 1.5, z + 1.5):
                things.append((z, _furniture(stage, side, x, z, green)))
            z += dice.between(3, 7)
        if street.crossing and dice.chance(0.6):
            things.append(_signal(stage, kerb + side * 0.5, street.crossing[0] - 0.8))
    return things


def _furniture(stage: Stage, side: int, x: float, z: float, green: float) -> Callable[[], None]:
    """Choose what stands at (x, z): with the chance `green` a tree."""
    dice = stage.dice
    if z > 8 and dice.chance(green):
        return _tree(stage, x, z)
    if dice.chance(0.32):
        return lambda: draw_lamp(stage, side, x, z)
    if dice.chance(0.8):
        return lambda: draw_sign(stage, x, z)
    return lambda: draw_post(stage, x, z, dice.between(0.9, 1.2), dice.colour(METALS))


def draw_post(stage: Stage, x: float, z: float, top: float, colour: Colour) -> None:
    """Draw an upright post, never thinner than about five pixels, brighter towards the sun."""
    half = max(stage.dice.between(0.12, 0.18), stage.metres(2.8, z))
    post = upright(x - half, x + half, 0, top, z)
    stage.canvas.polygon(post, colour, number=stage.front(POLE, z), lit=0.4)
    sunward = half * (0.6 if stage.sun.dx < 0 else -0.6)
    stage.canvas.polygon(upright(x, x + sunward, 0, top, z), scaled(colour, 1.3), lit=0.5)
    shade = [(x - half, 0.0, z), (x + half, 0.0, z), stage.tip(x, z, top)]
    stage.canvas.shadow(shade, stage.shadow)


def draw_lamp(stage: Stage, side: int, x: float, z: float) -> None:
    """Draw a street lamp with an arm over the road."""
    dice, canvas = stage.dice, stage.canvas
    colour, top, end = (
        dice.colour(METALS),
        dice.between(4.5, 7.5),
        x - side * dice.between(0.8, 1.8),
    )
    draw_post(stage, x, z, top, colour)
    number, half = stage.front(POLE, z), max(0.09, stage.metres(1.6, z))
    arm = [(x, top - half, z), (x, top + half, z), (end, top + 0.15 + half, z)]
    canvas.polygon([*arm, (end, top + 0.15 - half, z)], colour, number=number, lit=0.4)
    low = top - max(0.12, half)
    head = [(end - 0.4, low, z), (end - 0.3, top + 0.22, z), (end + 0.3, top + 0.22, z)]
    canvas.polygon([*head, (end + 0.4, low, z)], scaled(colour, 0.9), number=number, lit=0.4)
    if stage.weather.lit > 0.2:
        canvas.polygon(upright(end - 0.3, end + 0.3, low, low + 0.12, z), (900, 780, 480))
        canvas.lamp((end, low, z), 0.3, (255, 196, 110))


def draw_sign(stage: Stage, x: float, z: float) -> None:
    """Draw one or two traffic signs on a post."""
    dice = stage.dice
    top, size = dice.between(2.3, 3.3), max(dice.between(0.5, 0.7), stage.metres(7.5, z))
    draw_post(stage, x, z, top, dice.colour(METALS))
    draw_plate(stage, x, top, z, size)
    if dice.chance(0.3):
        draw_plate(stage, x, top - size * 2.1, z, size * 0.85)


def draw_plate(stage: Stage, x: float, y: float, z: float, size: float) -> None:
    """Draw the plate of a sign: border, field and a bar for its writing; or its grey back."""
    canvas, dice = stage.canvas, stage.dice
    shape, colours = dice.choose(SIGNS)
    border, field = dice.choose(colours) if dice.chance(0.88) else (STEEL, STEEL)
    lit = 0.15 + stage.sun.on_front * 0.6
    outer = [(x + u * size, y + v * size, z) for u, v in shape]
    canvas.polygon(outer, border, number=stage.front(SIGN, z), lit=lit)
    if border is STEEL:
        return
    inner = [(x + u * size * 0.74, y + v * size * 0.74, z) for u, v in shape]
    canvas.polygon(inner, field, lit=lit)
    w, h = (0.42 * size, 0.13 * size) if dice.chance(0.5) else (0.11 * size, 0.4 * size)
    ink = BLACK if field in (WHITE, YELLOW) else WHITE
    canvas.polygon(upright(x - w, x + w, y - h, y + h, z), ink, lit=lit)


def _signal(stage: Stage, x: float, z: float) -> Thing:
    return z, lambda: draw_signal(stage, x, z)


def draw_signal(stage: Stage, x: float, z: float) -> None:
    """Draw a traffic light; its box counts as sign."""
    canvas, low = stage.canvas, 2.4
    draw_post(stage, x, z, 3.0, stage.dice.colour(METALS))
    half = max(0.26, stage.metres(3.5, z))
    box = upright(x - half, x + half, low, low + 1.1, z)
    canvas.polygon(box, (34, 36, 36), number=stage.front(SIGN, z), lit=0.3)
    on = stage.dice.count(0, 2)
    for k, colour in enumerate(((90, 230, 140), (250, 190, 60), (250, 60, 50))):
        y, r = low + 0.2 + k * 0.35, 0.15
        light = [(x + r * c, y + r * s, z) for c, s in CIRCLE]
        canvas.polygon(light, scaled(colour, 1.6 if k == on else 0.25))
        if k == on and stage.weather.lit:
            canvas.lamp((x, y, z), 0.2, colour)


# Cars


class Body(NamedTuple):
    """Side view of a kind of car: (share of length from the rear, height) over roof to front.

    `windows` are the edges of the outline that hold glass, `panes` the windows in the side.
    """

    length: float
    width: float
    outline: tuple[tuple[float, float], ...]
    windows: tuple[int, ...]
    panes: tuple[tuple[tuple[float, float], ...], ...]


SALOON = Body(
    4.4, 1.8,
    ((0, 0.28), (0, 0.76), (0.02, 0.95), (0.15, 1.0), (0.27, 1.4), (0.36, 1.46), (0.54, 1.46),
     (0.6, 1.41), (0.75, 0.98), (0.97, 0.82), (1, 0.64), (1, 0.28)),
    (3, 7),
    (((0.22, 1.0), (0.3, 1.36), (0.46, 1.38), (0.46, 1.0)),
     ((0.48, 1.0), (0.48, 1.38), (0.58, 1.35), (0.7, 1.0))),
)  # fmt: skip
HATCHBACK = Body(
    3.9, 1.75,
    ((0, 0.28), (0, 0.8), (0.02, 1.0), (0.1, 1.42), (0.16, 1.5), (0.54, 1.52), (0.6, 1.47),
     (0.77, 1.02), (0.97, 0.86), (1, 0.66), (1, 0.28)),
    (2, 6),
    (((0.12, 1.04), (0.17, 1.4), (0.4, 1.43), (0.4, 1.04)),
     ((0.42, 1.04), (0.42, 1.43), (0.58, 1.4), (0.71, 1.04))),
)  # fmt: skip
VAN = Body(
    4.8, 1.95,
    ((0, 0.3), (0, 1.05), (0.01, 1.8), (0.04, 2.0), (0.7, 2.02), (0.76, 1.95), (0.92, 1.12),
     (0.99, 1.0), (1, 0.3)),
    (1, 5),
    (((0.6, 1.1), (0.6, 1.75), (0.74, 1.75), (0.84, 1.1)),),
)  # fmt: skip


class Car(NamedTuple):
    """A car: its middle, where its nose points ((0, 1) is away from the camera), its looks."""

    x: float
    z: float
    nose_x: float
    nose_z: float
    body: Body
    colour: Colour

    def point(self, share: float, across: float, y: float) -> Point:
        """Return the point at a share of the length, `across` half widths to the right, up `y`."""
        along = (share - 0.5) * self.body.length
        side = across * self.body.width * 0.5
        if y > 0.95:  # the cabin is narrower than the doors
            side *= 1.21 - 0.22 * y
        return (
            self.x + along * self.nose_x + side * self.nose_z,
            y,
            self.z + along * self.nose_z - side * self.nose_x,
        )

    def flat(self, across: float, shape: Sequence[tuple[float, float]]) -> list[Point]:
        """Return a shape in side view, put `across` half widths to the right."""
        return [self.point(share, across, y) for share, y in shape]

    def plate(
        self, share: float, left: float, right: float, low: float, high: float
    ) -> list[Point]:
        """Return an upright rectangle across the car."""
        return [
            self.point(share, left, low),
            self.point(share, left, high),
            self.point(share, right, high),
            self.point(share, right, low),
        ]


def traffic(stage: Stage) -> list[Thing]:
    """Put cars into the lanes, along the kerbs and on the crossing road."""
    dice, street = stage.dice, stage.street
    cars = _moving(stage)
    if street.parking:
        cars += _parked(stage)
    if street.crossing and dice.chance(0.6):
        nose = dice.choose((-1.0, 1.0))
        z = street.crossing[0] + dice.between(1.5, 4)
        cars.append(_car(dice, dice.between(-12, 12), z, nose, 0.0))
    return [(car.z, _drawing(stage, car)) for car in cars if stage.in_view(car.x, car.z - 2, 2.5)]


def _car(dice: Dice, x: float, z: float, nose_x: float, nose_z: float) -> Car:
    body = dice.choose((SALOON, SALOON, HATCHBACK, HATCHBACK, HATCHBACK, VAN))
    return Car(x, z, nose_x, nose_z, body, dice.colour(PAINTS, 10))


def _drawing(stage: Stage, car: Car) -> Callable[[], None]:
    return lambda: draw_car(stage, car)


def _moving(stage: Stage) -> list[Car]:
    """Drive on the right: away from the camera in the lanes right of the middle."""
    cars: list[Car] = []
    dice, street = stage.dice, stage.street
    x = street.left + street.margin + LANE / 2
    while x < street.right - street.margin:
        nose = 1.0 if x > street.middle else -1.0
        z = dice.between(7, 32)
        while z < 38:
            cars.append(_car(dice, x + dice.between(-0.3, 0.3), z, 0.0, nose))
            z += dice.between(12, 60)
        x += LANE
    return cars


def _parked(stage: Stage) -> list[Car]:
    cars: list[Car] = []
    dice, street = stage.dice, stage.street
    for x, nose in ((street.left + 1.15, -1.0), (street.right - 1.15, 1.0)):
        z, full = dice.between(5, 11), dice.between(0.2, 0.8)
        while z < 30:
            if dice.chance(full) and not street.on_crossing(z - 8, z + 3):
                cars.append(_car(dice, x, z, dice.between(-0.04, 0.04), nose))
            z += dice.between(5.6, 7)
    return cars


def draw_car(stage: Stage, car: Car) -> None:
    """Draw a car: its shadow, its hull from end to end, the side we see, and the end we see."""
    number = stage.front(CAR, car.z)
    away = car.nose_x * car.x + car.nose_z * car.z > 0
    end = 0.0 if away else 1.0
    _draw_car_shadow(stage, car)
    if car.z < DETAILED:
        for left in (-0.95, 0.6):
            tyre = car.plate(0.1 if away else 0.9, left, left + 0.35, 0.0, 0.4)
            stage.canvas.polygon(tyre, (24, 24, 26), number=number)
    for edge in _visible_edges(car):
        _draw_hull(stage, car, edge, number)
    side = -1.0 if car.x * car.nose_z - car.z * car.nose_x > 0 else 1.0
    _draw_flank(stage, car, side, number)
    _draw_end(stage, car, end)


def _visible_edges(car: Car) -> list[int]:
    """Return the edges of the outline that face the camera, the farthest first."""
    outline, edges = car.body.outline, []
    for k in range(len(outline) - 1):
        (s1, y1), (s2, y2) = outline[k], outline[k + 1]
        x, y, z = car.point((s1 + s2) / 2, 0, (y1 + y2) / 2)
        ahead = x * car.nose_x + z * car.nose_z
        if (y2 - y1) * ahead + (s2 - s1) * car.body.length * (EYE - y) > 0:
            edges.append((z, k))
    return [k for _, k in sorted(edges, reverse=True)]


def _draw_hull(stage: Stage, car: Car, edge: int, number: int) -> None:
    """Draw one strip of the hull from side to side: boot, window, roof, bonnet or bumper."""
    (s1, y1), (s2, y2) = car.body.outline[edge], car.body.outline[edge + 1]
    rise, run = abs(y2 - y1), abs(s2 - s1) * car.body.length
    lower, upper = car.flat(-1, ((s1, y1), (s2, y2))), car.flat(1, ((s2, y2), (s1, y1)))
    lit = 0.9 - 0.5 * rise / (rise + run)
    stage.canvas.polygon(lower + upper, car.colour, number=number, lit=lit)
    if edge in car.body.windows:
        inset = (s2 - s1) * 0.08, (y2 - y1) * 0.08
        low, high = (s1 + inset[0], y1 + inset[1]), (s2 - inset[0], y2 - inset[1])
        pane = car.flat(-0.86, (low, high)) + car.flat(0.86, (high, low))
        stage.canvas.polygon(pane, scaled(GLASS, stage.dice.between(0.8, 2.0)), lit=0.6)


def _draw_flank(stage: Stage, car: Car, side: float, number: int) -> None:
    """Draw one side of the car with windows, sill and wheels."""
    canvas, body = stage.canvas, car.body
    lit = stage.sun.on_wall(-1 if side * car.nose_z > 0 else 1)
    outline, colour = car.flat(side, body.outline), scaled(car.colour, 0.9)
    canvas.polygon(outline, colour, number=number, lit=0.15 + lit * 0.8)
    for pane in body.panes:
        canvas.polygon(car.flat(side, pane), GLASS, lit=0.3 + lit)
    if car.z > DETAILED:
        return
    sill = ((0.02, 0.28), (0.02, 0.4), (0.98, 0.4), (0.98, 0.28))
    canvas.polygon(car.flat(side, sill), scaled(car.colour, 0.45))
    for share in (0.19, 0.81):
        for radius, colour in ((0.33, (22, 22, 24)), (0.19, (150, 152, 156))):
            wheel = [(share + radius * c / body.length, 0.32 + radius * s) for c, s in CIRCLE]
            canvas.polygon(car.flat(side * 1.02, wheel), colour, number=number, lit=0.2)


def _draw_car_shadow(stage: Stage, car: Car) -> None:
    """Darken the ground under the car and, in the sun, beside it."""
    corners = ((0, -1), (0, 1), (1, 1), (1, -1))
    foot = [car.point(share, across, 0.0) for share, across in corners]
    cast = [stage.tip(x, z, 1.1) for x, _, z in foot]
    for k in range(4):
        stage.canvas.shadow([foot[k], foot[k - 1], cast[k - 1], cast[k]], stage.shadow)
    stage.canvas.shadow(cast, stage.shadow)
    stage.canvas.shadow(foot, 0.72)


def _draw_end(stage: Stage, car: Car, end: float) -> None:
    """Draw bumper, number plate and lights of the rear (`end` 0) or the front (1)."""
    canvas, on = stage.canvas, stage.weather.lit > 0
    colour, low, high = ((190, 24, 24), 0.62, 0.8) if end == 0 else ((236, 236, 224), 0.5, 0.63)
    if car.z < DETAILED:
        canvas.polygon(car.plate(end, -1, 1, 0.28, 0.42), (36, 36, 38), lit=0.3)
        canvas.polygon(car.plate(end, -0.3, 0.3, 0.44, 0.56), (228, 226, 206), lit=0.3)
    for side in (-0.81, 0.81):
        lamp = car.plate(end, side - 0.15, side + 0.15, low, high)
        canvas.polygon(lamp, scaled(colour, 2.4 if on else 1), lit=0.3)
        if on:
            canvas.lamp(car.point(end, side, (low + high) / 2), 0.15, scaled(colour, 0.8))


# Pedestrians


def crowd(stage: Stage) -> list[Thing]:
    """Let people walk on the pavements, and cross the road."""
    things: list[Thing] = []
    dice, street = stage.dice, stage.street
    for low, high in ((street.left_wall, street.left), (street.right, street.right_wall)):
        for _ in range(dice.count(2, 5)):
            x = dice.between(low + 0.5, high - 0.4)
            things.append(_walker(stage, x, dice.between(5, 11.5)))
    for _ in range(dice.count(0, 2)):
        z = street.crossing[0] - 2.4 if street.crossing else dice.between(6, 13)
        things.append(_walker(stage, dice.between(street.left, street.right), z))
    return things


def _nobody(stage: Stage) -> list[Thing]:
    return []


def _walker(stage: Stage, x: float, z: float) -> Thing:
    return z, lambda: draw_person(stage, x, z)


def draw_person(stage: Stage, x: float, z: float) -> None:
    """Draw a walking person: legs, arms, coat, head and hair."""
    if not stage.in_view(x, z, 0.5):
        return
    dice = stage.dice
    number, tall = stage.front(PEDESTRIAN, z, CLOTH), dice.between(1.65, 1.95)
    trousers, coat, skin = dice.colour(CLOTHES), dice.colour(CLOTHES), dice.colour(SKINS)
    thick, broad = max(0.13, stage.metres(1.8, z)), dice.between(0.27, 0.35)
    step, hem = dice.between(-0.3, 0.3), 0.32 if dice.chance(0.25) else 0.48

    def part(colour: Colour, lit: float, *corners: tuple[float, float]) -> None:
        points = [(x + u, v * tall, z) for u, v in corners]
        stage.canvas.polygon(points, colour, number=number, lit=lit)

    for foot, colour in ((step, trousers), (-step, scaled(trousers, 0.8))):
        part(colour, 0.3, (foot - thick, 0), (-thick, 0.52), (thick, 0.52), (foot + thick, 0))
    for hand in (-step, step) if z < 20 else ():
        shoulder = broad * 0.4
        sleeve = (hand, 0.45), (-shoulder, 0.82), (shoulder, 0.82), (hand + 0.12, 0.45)
        part(scaled(coat, 0.8), 0.3, *sleeve)
    right = (0.1, 0.86), (broad, 0.8), (broad * 0.85, hem)
    part(coat, 0.5, (-broad * 0.85, hem), (-broad, 0.8), (-0.1, 0.86), *right)
    head = max(0.066, stage.metres(1.3, z) / tall)
    part(skin, 0.4, *((head * 1.6 * c, 0.925 + head * 1.15 * s) for c, s in CIRCLE))
    part(dice.colour(HAIRS), 0.4, *((head * 1.6 * c, 0.95 + head * s) for c, s in CIRCLE[:6]))
    shade = [(x - broad, 0.0, z), (x + broad, 0.0, z), stage.tip(x, z, tall)]
    stage.canvas.shadow(shade, max(0.25, stage.shadow))
