"""Draws and photographs a small 3-D world: polygons in metres in, an image and its mask out.

Every polygon belongs to a `Surface`, and the number of that surface is drawn, in the same geometry
but without antialiasing, beside the colours. The numbers are looked up afterwards: they give the
mask, and for each pixel its place in the world, from which follow texture, windows and haze.

Metres: X to the right of the camera, Y up from the ground, Z ahead. Pixels: x right, y down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[float, float, float]
Point = tuple[float, float, float]

SUPERSAMPLING = 2
TILE = 128
LEVELS = 5
PLAIN, GRAIN, BLOTCH, BRICK, SLAB, LEAVES, PANEL = range(7)
SHADE_SCALE = 2
GLOW_SCALE = 4
FROM_FINE_TO_GLOW = 1 / (SUPERSAMPLING * GLOW_SCALE)
FIELD = 512
LAST_NUMBER = 255
SKY_Z = 10_000.0


@dataclass(frozen=True)
class Camera:
    """A camera that looks along Z, level, from `height` metres.

    Attributes:
        focal: focal length in pixels.
        centre: x of the vanishing point.
        horizon: y of the vanishing point.
        height: metres above the ground.
    """

    focal: float
    centre: float
    horizon: float
    height: float

    def ground(self) -> Plane:
        """Return the plane of the ground."""
        slope = 1 / (self.focal * self.height)
        return Plane(0.0, slope, -slope * self.horizon)

    def wall(self, x: float) -> Plane:
        """Return the plane that runs along the street at X = `x`."""
        slope = 1 / (self.focal * x)
        return Plane(slope, 0.0, -slope * self.centre)

    def front(self, z: float) -> Plane:
        """Return the plane that faces the camera at Z = `z`."""
        return Plane(0.0, 0.0, 1 / z)


class Plane(NamedTuple):
    """Where a surface lies: 1 / Z = `by_x` * x + `by_y` * y + `constant`.

    `by_y` is 0 unless it is the ground, `by_x` unless it is a wall along the street.
    """

    by_x: float
    by_y: float
    constant: float


class Material(NamedTuple):
    """Texture of a surface: which tile, its texels a metre, and its strength."""

    tile: int
    texels: float
    strength: float


class Windows(NamedTuple):
    """Windows of a facade, in metres; `width` and `height` are shares of bay and storey.

    The ground floor has glass of `shop_width` instead. `origin` is where the first bay begins,
    `seed` makes the panes of this facade differ from those of others.
    """

    bay: float
    storey: float
    floors: int
    width: float
    height: float
    shop_width: float
    origin: float
    seed: int


class Surface(NamedTuple):
    """What a drawn polygon is: its class, its place and its looks."""

    class_id: int
    plane: Plane
    material: Material
    windows: Windows | None = None


@dataclass(frozen=True)
class Weather:
    """Light and air.

    Attributes:
        zenith: colour of the sky overhead.
        skyline: colour of the sky at the horizon.
        cloud: colour of the clouds.
        cover: share of the sky under clouds, 0 to 1.
        ambient: light that reaches everything, per channel.
        sun: light that reaches what the sun shines on, per channel.
        haze: colour of the air.
        visibility: metres after which 63 % of a colour is lost to haze.
        lit: share of windows with a lamp behind; above 0 car and street lamps are on as well.
        wet: how much the ground mirrors, 0 to 1.
        rain: strength of rain streaks.
        noise: standard deviation of the sensor's noise.
    """

    zenith: Colour
    skyline: Colour
    cloud: Colour
    cover: float
    ambient: Colour
    sun: Colour
    haze: Colour
    visibility: float
    lit: float = 0.0
    wet: float = 0.0
    rain: float = 0.0
    noise: float = 4.0


class Canvas:
    """Takes polygons in painter's order; `develop` then makes the image and the mask of them."""

    def __init__(
        self,
        camera: Camera,
        weather: Weather,
        size: tuple[int, int],
        *,
        sky: np.ndarray,
        sky_class: int,
    ) -> None:
        """Start with nothing but sky.

        Args:
            camera: from where the world is seen.
            weather: the light everything is drawn in.
            size: (H, W) of the image.
            sky: the background, uint8 (rows, W, 3); below its rows there is none.
            sky_class: class id of the background.
        """
        self.camera, self.weather = camera, weather
        self.height, self.width = size
        large = (self.width * SUPERSAMPLING, self.height * SUPERSAMPLING)
        self.colours = Image.new("RGB", large)
        rows = len(sky) * SUPERSAMPLING
        self.colours.paste(Image.fromarray(sky).resize((large[0], rows), Image.Resampling.NEAREST))
        self.numbers = Image.new("L", large)
        self.shade = Image.new("L", (self.width // SHADE_SCALE, self.height // SHADE_SCALE), 255)
        self.glow = Image.new("RGB", (self.width // GLOW_SCALE, self.height // GLOW_SCALE))
        self._colour_pen = ImageDraw.Draw(self.colours)
        self._number_pen = ImageDraw.Draw(self.numbers)
        self._shade_pen = ImageDraw.Draw(self.shade)
        self._glow_pen = ImageDraw.Draw(self.glow)
        self.surfaces = [Surface(sky_class, camera.front(SKY_Z), Material(PLAIN, 1.0, 0.0))]

    def add(self, surface: Surface) -> int:
        """Return the number to draw polygons of `surface` with.

        There are 255 numbers; further surfaces share that of one of their class, whose mask is
        theirs too and whose texture is close enough.
        """
        if len(self.surfaces) <= LAST_NUMBER:
            self.surfaces.append(surface)
            return len(self.surfaces) - 1
        same = [k for k, known in enumerate(self.surfaces) if known.class_id == surface.class_id]
        return same[-1]

    def project(self, points: Sequence[Point], scale: float) -> list[float]:
        """Return x, y, x, y, ... of `points` in an image `scale` times the size of this one."""
        camera = self.camera
        focal, x0, y0 = camera.focal * scale, camera.centre * scale, camera.horizon * scale
        level, flat = camera.height, []
        for x, y, z in points:
            k = focal / z
            flat += (x0 + x * k, y0 + (level - y) * k)
        return flat

    def polygon(
        self, points: Sequence[Point], colour: Colour, *, number: int = 0, lit: float = 0.0
    ) -> None:
        """Fill a polygon.

        Args:
            points: its corners.
            colour: its own colour, before light.
            number: the surface it is; 0 paints on whatever surface is there.
            lit: share of the sun's light it receives.
        """
        flat = self.project(points, SUPERSAMPLING)
        xs = flat[::2]
        if max(xs) < 0 or min(xs) > self.width * SUPERSAMPLING:
            return
        self._colour_pen.polygon(flat, self.illuminate(colour, lit))
        if not number:
            return
        self._number_pen.polygon(flat, number)
        if self.weather.lit:  # what stands in front of a lamp hides its light
            self._glow_pen.polygon([value * FROM_FINE_TO_GLOW for value in flat], 0)

    def illuminate(self, colour: Colour, lit: float) -> tuple[int, int, int]:
        """Return how `colour` looks in this weather with the share `lit` of the sun on it."""
        ambient, sun = self.weather.ambient, self.weather.sun
        return (
            min(255, int(colour[0] * (ambient[0] + lit * sun[0]))),
            min(255, int(colour[1] * (ambient[1] + lit * sun[1]))),
            min(255, int(colour[2] * (ambient[2] + lit * sun[2]))),
        )

    def shadow(self, points: Sequence[Point], strength: float) -> None:
        """Darken the ground, and only the ground, by `strength` (0 to 1) inside a polygon."""
        light, flat = int(255 * (1 - strength)), self.project(points, 1 / SHADE_SCALE)
        # The outline keeps the shadows of posts, thinner than a pixel, in one piece.
        self._shade_pen.polygon(flat, light)
        self._shade_pen.line(flat + flat[:2], light)

    def lamp(self, point: Point, radius: float, colour: Colour) -> None:
        """Let light spread in the air around `point`, `radius` metres wide."""
        x, y = self.project([point], 1 / GLOW_SCALE)
        r = max(0.6, self.camera.focal / GLOW_SCALE * radius / point[2])
        red, green, blue = (int(value) for value in colour)
        self._glow_pen.ellipse([x - r, y - r, x + r, y + r], (red, green, blue))

    def develop(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, uint8 (H, W, 3), and its mask of class ids, uint8 (H, W)."""
        own, seen = self._numbers()
        table = np.array([_row(surface) for surface in self.surfaces], np.float32).T

        def look_up(column: int) -> np.ndarray:
            return table[column].take(seen)

        view = _view(self.camera, look_up)
        planes = (
            np.asarray(self.colours.reduce(SUPERSAMPLING)).transpose(2, 0, 1).astype(np.float32)
        )
        planes *= _texture(view, look_up, self.camera) * _shading(view, self.shade)
        facades = np.flatnonzero(look_up(FLOORS) > 0)
        if facades.size:
            rows = table[BAY:].take(seen.ravel()[facades], axis=1)
            _glaze(planes.reshape(3, -1), facades, rows, view, self.camera, self.weather)
        if self.weather.wet:
            _mirror(planes, view, self.camera, self.weather.wet)
        _haze(planes, view, self.weather)
        if self.weather.lit:
            planes += _spread(self.glow, (self.width, self.height))
        _expose(planes, rng, self.weather)
        image = np.empty((self.height, self.width, 3), np.uint8)
        for k in range(3):
            image[..., k] = planes[k]
        return image, table[CLASS].astype(np.uint8).take(own)

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the surface in one corner of each pixel, and the one that colours the pixel.

        They differ where the sky begins: a little of a roof in a pixel of sky needs its haze, or
        roofs would have a dark outline in fog.
        """
        fine, step = np.asarray(self.numbers), SUPERSAMPLING
        own, other = fine[1::step, 1::step], fine[::step, ::step]
        return own.astype(np.intp), np.where(own == 0, other, own).astype(np.intp)


# Columns of the table that `Canvas.develop` looks surfaces up in; the last are those of `Windows`.
CLASS, BY_X, BY_Y, CONSTANT, TILE_START, TEXELS, STRENGTH, BAY, STOREY, FLOORS = range(10)
NO_WINDOWS = Windows(1.0, 1.0, 0, 0.0, 0.0, 0.0, 0.0, 0)


def _row(surface: Surface) -> tuple[float, ...]:
    """Return the table's column of one surface."""
    tile, texels, strength = surface.material
    start = tile * LEVELS * TILE * TILE
    windows = surface.windows or NO_WINDOWS
    return (surface.class_id, *surface.plane, start, texels, strength, *windows)


class _View(NamedTuple):
    """Where in the world each pixel lies: depth, and place on its own surface, all (H, W)."""

    z: np.ndarray
    u: np.ndarray
    v: np.ndarray
    y: np.ndarray
    lying: np.ndarray
    along: np.ndarray


def _view(camera: Camera, look_up: Callable[[int], np.ndarray]) -> _View:
    """Intersect the ray of each pixel with the plane of its surface."""
    by_x, by_y = look_up(BY_X), look_up(BY_Y)
    height, width = by_y.shape
    x = np.arange(width, dtype=np.float32) + 0.5
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    lying, along = by_y != 0, by_x != 0
    z = 1 / np.maximum(by_x * x + by_y * y + look_up(CONSTANT), 1 / SKY_Z)
    across = (x - camera.centre) / camera.focal * z
    up = camera.height - (y - camera.horizon) / camera.focal * z
    return _View(z, np.where(along, z, across), np.where(lying, z, up), up, lying, along)


def _texture(view: _View, look_up: Callable[[int], np.ndarray], camera: Camera) -> np.ndarray:
    """Return the brightness texture gives each pixel, 1 on average."""
    texels = look_up(TEXELS)
    # Texels a pixel covers; the ground is seen at a low angle and covers more of them.
    footprint = texels * view.z * np.float32(1 / camera.focal)
    footprint *= 1 + view.z * (view.lying * np.float32(0.15))
    # The exponent of a number, read from its bits, is its logarithm rounded down.
    level = np.clip((footprint.view(np.int32) >> 23) - 126, 0, LEVELS - 1)
    column = (view.u * texels).astype(np.int32) & (TILE - 1)
    row = (view.v * texels).astype(np.int32) & (TILE - 1)
    start = look_up(TILE_START).astype(np.int32)
    texture = tiles().take(start + (level * TILE + row) * TILE + column)
    return 1 + look_up(STRENGTH) * texture


def _shading(view: _View, shade: Image.Image) -> np.ndarray:
    """Return shadows on the ground, and the darkness at the foot of whatever stands on it."""
    height, width = view.z.shape
    soft = shade.resize((width, height), Image.Resampling.BILINEAR)
    cast = np.asarray(soft) * np.float32(1 / 255)
    return np.where(view.lying, cast, np.clip(0.72 + 0.14 * view.y, 0.72, 1))


def _glaze(
    pixels: np.ndarray,
    where: np.ndarray,
    rows: np.ndarray,
    view: _View,
    camera: Camera,
    weather: Weather,
) -> None:
    """Put windows into the facades, antialiased by how many metres a pixel covers.

    Args:
        pixels: (3, H * W), changed in place.
        where: numbers of the pixels that are facade.
        rows: the fields of `Windows` for each of these.
        view: places of all pixels.
        camera: from where they are seen.
        weather: what panes mirror.
    """
    bay, storey, floors, glass_width, glass_height, shop_width, origin, seed = rows
    z = view.z.ravel()[where]
    v = view.y.ravel()[where] / storey
    u = (view.u.ravel()[where] - origin) / bay
    floor, column = np.floor(v), np.floor(u)
    half_width = np.where(floor == 0, shop_width, glass_width) / 2
    du, dv = u - column - 0.5, v - floor - 0.52
    pixel = z / camera.focal
    # A wall along the street is seen at an angle: a pixel covers more of its length.
    wide = pixel * np.where(view.along.ravel()[where], np.clip(z / 8, 1, 8), 1)
    inside = (half_width - np.abs(du)) * bay, (glass_height / 2 - np.abs(dv)) * storey
    there = (floor < floors) & (half_width > 0)
    cover, frame = (
        np.clip((inside[0] + margin) / wide + 0.5, 0, there)
        * np.clip((inside[1] + margin) / pixel + 0.5, 0, 1)
        for margin in (0, 0.12)
    )
    frame = 1 + 0.22 * frame
    pane = (column * 37 + floor * 101 + seed).astype(np.int32) & (TILE * TILE - 1)
    glass = _glass(chances().take(pane), dv, weather)
    for plane, colour in zip(pixels, glass, strict=True):
        wall = plane[where] * frame
        plane[where] = wall + (colour - wall) * cover


def _glass(chance: np.ndarray, dv: np.ndarray, weather: Weather) -> list[np.ndarray]:
    """Return the three planes of panes: dark rooms, mirrored sky, or the lamp behind."""
    share = 0.12 + 0.5 * chance * chance + 0.25 * np.clip(dv, -0.4, 0.4)
    on, glow = chance < weather.lit, 0.5 + 0.5 * ((chance * 61) % 1)
    planes = []
    for k, (dark, lamp) in enumerate(((26, 255), (32, 206), (40, 120))):
        glass = dark + (weather.skyline[k] * weather.ambient[k] - dark) * share
        planes.append(np.where(on, lamp * glow, glass) if weather.lit else glass)
    return planes


def _mirror(planes: np.ndarray, view: _View, camera: Camera, wet: float) -> None:
    """Let wet ground mirror what stands above the horizon."""
    height = planes.shape[1]
    rows = np.clip((2 * camera.horizon - np.arange(height)).astype(np.int32), 0, height - 1)
    mirrored = planes[:, rows] + planes[:, np.clip(rows - 4, 0, None)]
    planes += (mirrored * 0.5 - planes) * (view.lying * np.float32(wet))


def _haze(planes: np.ndarray, view: _View, weather: Weather) -> None:
    """Fade what is far away into the colour of the air; the sky has its haze already."""
    clear = np.exp(view.z * np.float32(-1 / weather.visibility))
    clear[view.z > SKY_Z / 2] = 1
    planes *= clear
    np.subtract(1, clear, out=clear)
    for plane, colour in zip(planes, weather.haze, strict=True):
        plane += clear * np.float32(colour)


def _spread(glow: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return the light of lamps, spread and brought to the image's size, as three planes."""
    near, far = glow.filter(ImageFilter.BoxBlur(1)), glow.filter(ImageFilter.BoxBlur(4))
    small = np.asarray(near, np.float32) * 0.55 + np.asarray(far, np.float32) * 0.6
    small = Image.fromarray(np.minimum(small, 255).astype(np.uint8))
    large = small.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(large).transpose(2, 0, 1).astype(np.float32)


def _expose(planes: np.ndarray, rng: np.random.Generator, weather: Weather) -> None:
    """Do what a camera does to light: exposure, white balance, dark corners, noise; to 0..255."""
    size = planes.shape[1:]
    balance = (rng.uniform(0.95, 1.05, 3) * rng.uniform(0.86, 1.14)).tolist()
    corners = vignette(*size)
    start = rng.integers(0, 1 << 20, (4, 2))
    for plane, gain, at in zip(planes, balance, start, strict=False):
        plane *= corners * np.float32(gain)
        plane += _window(sensor_noise(), at, size) * np.float32(0.6 * weather.noise)
    grey = _window(sensor_noise(), start[3], size) * np.float32(0.8 * weather.noise)
    if weather.rain:
        grey += _window(rain_streaks(), start[3], size) * np.float32(weather.rain)
    planes += grey
    np.clip(planes, 0, 255, out=planes)


def _window(field: np.ndarray, start: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `size` of a field of noise that is FIELD wide and high."""
    row, column = (start % (FIELD + 1 - np.array(size))).tolist()
    return field[row : row + size[0], column : column + size[1]]


def sky(
    weather: Weather,
    width: int,
    *,
    horizon: float,
    sun: tuple[float, float],
    drift: tuple[int, int],
) -> np.ndarray:
    """Return a sky.

    Args:
        weather: its colours and clouds.
        width: width of the image.
        horizon: y at which it ends.
        sun: (x, y) of the sun; it may lie outside the image.
        drift: two large numbers that say which clouds.

    Returns:
        uint8 (rows, width, 3), as many rows as reach below the horizon.
    """
    height = int(horizon) + 4
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)
    low = np.clip(y / horizon, 0, 1) ** np.float32(0.8)
    clouds = _window(cloud_field(), np.array(drift), (height, width))
    alpha = np.clip((clouds - (1.3 - 2.6 * weather.cover)) * 0.8, 0, 0.95)
    bright = 0.93 + 0.05 * clouds
    distance = np.sqrt((x - sun[0]) ** 2 + (y - sun[1]) ** 2)
    shine = np.clip(9 - distance, 0, 1) + 0.5 / (1 + distance / 24) ** 2
    shine *= 190 * (1 - 0.6 * alpha)
    drawn = np.empty((height, width, 3), np.uint8)
    for k in range(3):
        plane = weather.zenith[k] + (weather.skyline[k] - weather.zenith[k]) * low
        plane = plane + (weather.cloud[k] * bright - plane) * alpha + shine * weather.sun[k]
        drawn[..., k] = np.clip(plane, 0, 255)
    return drawn


# The textures below are the same for every picture: drawn once from a fixed seed, then kept.


def _blurred(tile: np.ndarray, radius: int) -> np.ndarray:
    """Box-blur a tile that repeats."""
    for axis in (0, 1):
        shifts = range(-radius, radius + 1)
        tile = sum(np.roll(tile, shift, axis) for shift in shifts) / len(shifts)
    return tile


def _standard(tile: np.ndarray) -> np.ndarray:
    return (tile - tile.mean()) / tile.std()


def _octaves(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return smooth noise of many sizes, mean 0 and deviation 1."""
    total = np.zeros(shape)
    for radius in (1, 2, 5, 11, 23):
        noise = _blurred(_blurred(rng.standard_normal(shape), radius), radius)
        total += _standard(noise) * radius**0.7
    return _standard(total)


def _joints(rows: int, columns: int, *, shifted: bool) -> np.ndarray:
    """Return 1 in the joints between stones of `rows` x `columns` texels, 0 elsewhere."""
    y, x = np.mgrid[:TILE, :TILE]
    if shifted:
        x = x + (y // rows % 2) * (columns // 2)
    return ((y % rows == 0) | (x % columns == 0)).astype(float)


def _stones(rng: np.random.Generator, rows: int, columns: int, *, shifted: bool) -> np.ndarray:
    """Return masonry: stones of different brightness with dark joints."""
    y, x = np.mgrid[:TILE, :TILE]
    if shifted:
        x = (x + (y // rows % 2) * (columns // 2)) % TILE
    stones = rng.standard_normal((TILE // rows + 1, TILE // columns + 1))[y // rows, x // columns]
    grain = rng.standard_normal((TILE, TILE))
    return stones * 0.7 + grain * 0.35 - 2.2 * _joints(rows, columns, shifted=shifted)


@functools.cache
def tiles() -> np.ndarray:
    """Return all texture tiles, each blurred to all levels, one after the other."""
    rng = np.random.default_rng(20)
    shape = (TILE, TILE)
    grain = _blurred(rng.standard_normal(shape), 1) * 2 + rng.standard_normal(shape) * 0.5
    blotch = _octaves(rng, shape)
    leaves = np.abs(_blurred(rng.standard_normal(shape), 2)) * 6 + rng.standard_normal(shape) * 0.4
    panel = _standard(_blurred(rng.standard_normal(shape), 1)) * 0.3 - 2 * _joints(
        32, 16, shifted=False
    )
    drawn = [
        np.zeros(shape),
        _standard(grain + blotch * 0.6),
        blotch,
        _standard(_stones(rng, 4, 8, shifted=True)),
        _standard(_stones(rng, 16, 32, shifted=True)),
        _standard(leaves),
        _standard(panel),
    ]
    levels = [[_blurred(tile, (1 << level) // 2) for level in range(LEVELS)] for tile in drawn]
    return np.clip(np.array(levels), -2.5, 2.5).astype(np.float32).ravel()


@functools.cache
def chances() -> np.ndarray:
    """Return TILE * TILE uniform numbers: what is random about each window."""
    return np.random.default_rng(21).random(TILE * TILE, dtype=np.float32)


@functools.cache
def cloud_field() -> np.ndarray:
    """Return noise for clouds, which are wider than high."""
    flat = _octaves(np.random.default_rng(22), (FIELD, FIELD // 2))
    wide = flat.repeat(2, axis=1)
    return ((wide + np.roll(wide, 1, axis=1)) / 2).astype(np.float32)


@functools.cache
def vignette(height: int, width: int) -> np.ndarray:
    """Return how much light reaches each pixel: less in the corners of the image."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    return 1 - np.float32(0.09) * (x * x + y * y)


@functools.cache
def sensor_noise() -> np.ndarray:
    """Return noise of deviation 1."""
    return np.random.default_rng(23).standard_normal((FIELD, FIELD), np.float32)


@functools.cache
def rain_streaks() -> np.ndarray:
    """Return streaks of falling drops, between 0 and about 1."""
    rng = np.random.default_rng(24)
    drops = (rng.random((FIELD, FIELD)) > 0.9985).astype(float)
    return sum(np.roll(drops, (k, k // 5), (0, 1)) for k in range(11)).astype(np.float32)
