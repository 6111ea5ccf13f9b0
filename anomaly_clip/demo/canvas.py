"""Drawing primitives of the demo images: noise tiles, colours, the canvas and the parts of a scene.

Lengths are in image widths, so that a scene looks the same at all sizes. Noise is cut from cached
tiles, since generating it for every image would take longer than everything else. Planes are
float32 ``(H, W)``, colours are planar ``(3, H, W)`` in ``[0, 1]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Canvas", "Category", "Light", "Plane", "Surface", "cut_noise", "mix", "ramp", "rgb"]

Plane = NDArray[Any]  # always float32; the type stubs of numpy and OpenCV cannot express this

TILE_WIDTHS = 3  # image widths per tile (our choice): a rotated image fits even at zoom 0.5
CELLS_PER_WIDTH = 16
FINEST = 7  # octave of the finest noise that an image of 128 pixels can show
FADING = 0.4  # factor per octave beyond FINEST, so that large images do not have steeper relief


@dataclass(frozen=True)
class Category:
    """A product category: its family and the properties that all its images share.

    Attributes:
        family: Key of `surfaces.FAMILIES`.
        words: Category name in prompts; a singular noun without article.
        colours: ``0xRRGGBB``, the main colour first; the family defines the meaning of the others.
        ground: Colour of the ground under an object; unused if the surface fills the image.
        scale: Size of the object, or period of the pattern, relative to the family's default.
        metal: Strength of reflections: 0 for paint, cloth or stone, 1 for bare metal.
        gloss: Strength of the highlight.
        count: Number of repeated parts: teeth of a gear, holes of a button, tiles in a row.
    """

    family: str
    words: str
    colours: tuple[int, ...]
    ground: int = 0x808080
    scale: float = 1.0
    metal: float = 0.0
    gloss: float = 0.1
    count: int = 0


@dataclass(frozen=True)
class Light:
    """Unit vector towards the light: ``x`` to the right, ``y`` down, ``z`` to the camera."""

    x: float
    y: float
    z: float
    softness: float  # 0 = a bare lamp, 1 = a cloudy sky


@dataclass
class Surface:
    """A scene before lighting.

    Attributes:
        albedo: ``(3, H, W)``, colour of the product.
        height: ``(H, W)``, relief in image widths.
        cover: ``(H, W)``, 1 on the product and 0 around it; None if the product fills the image.
        under: ``(3, H, W)`` or ``(3, 1, 1)``, colour of the ground where the product is absent.
        core: ``(3, 1, 1)``, colour of the material inside, visible at a break.
        metal: As in `Category`.
        gloss: ``(H, W)`` or a number, as in `Category`.
    """

    albedo: Plane
    height: Plane
    cover: Plane | None
    under: Plane
    core: Plane
    metal: float
    gloss: Plane | float

    def cut(self, rows: slice, columns: slice) -> Surface:
        """Return a rectangular part of the scene; its planes are views of the whole planes."""

        def part(plane: Any) -> Any:
            whole = isinstance(plane, np.ndarray) and plane.shape[-1] > 1
            return plane[..., rows, columns] if whole else plane

        return Surface(*(part(getattr(self, name)) for name in self.__dataclass_fields__))


def _octaves(level: int, kind: int, first: int, last: int, persistence: float) -> Plane:
    """Return noise ``(T, T)`` of several octaves, with standard deviation 1.

    Octave ``n``, from ``first`` to ``last``, has ``2 ** n`` knots per image width.
    """
    side = TILE_WIDTHS * level
    total = np.zeros((side, side), np.float32)
    for octave in range(first, last + 1):
        knots = TILE_WIDTHS * 2**octave
        if knots > side:
            break
        rng = np.random.default_rng([7, kind, octave])
        values = rng.standard_normal((knots, knots), np.float32)
        smooth = cv2.resize(values, (side, side), interpolation=cv2.INTER_CUBIC)
        amount = persistence ** (min(octave, FINEST) - first) * FADING ** max(octave - FINEST, 0)
        total += amount * smooth
    return total / total.std()


@lru_cache(maxsize=64)
def noise_tile(kind: str, level: int) -> Plane:
    """Return the tile ``(T, T)`` of one kind of noise, for images with a side of ``level`` pixels.

    The kinds ``cloud``, ``fractal`` and ``grain`` have mean 0 and standard deviation 1. The kinds
    ``cell_edge`` and ``cell_centre`` are distances in cells; ``cell_value`` is constant in each
    cell, a random number in ``[0, 1)``.
    """
    if kind == "cloud":
        return _octaves(level, 1, 0, 2, 0.6)
    if kind == "fractal":
        return _octaves(level, 2, 1, 9, 0.62)
    if kind == "grain":
        return _octaves(level, 3, 5, 9, 0.9)
    return _cell_tiles(level)[kind]


@lru_cache(maxsize=4)
def _cell_tiles(level: int) -> dict[str, Plane]:
    """Return noise of Voronoi cells around jittered points, with bent borders as in minerals."""
    cells, side = TILE_WIDTHS * CELLS_PER_WIDTH, TILE_WIDTHS * level
    rng = np.random.default_rng([7, 4])
    points = rng.uniform(0.08, 0.92, (2, cells, cells)).astype(np.float32)
    values = rng.random((cells, cells), np.float32)
    y, x = np.mgrid[:side, :side].astype(np.float32) * (cells / side)
    x += 0.12 * _octaves(level, 5, 4, 9, 0.7)
    y += 0.12 * _octaves(level, 6, 4, 9, 0.7)
    column, row = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    nearest = np.full((side, side), 9.0, np.float32)
    second = nearest.copy()
    value = np.zeros((side, side), np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            i, j = row + down, column + right
            dx, dy = points[:, i % cells, j % cells]
            far = np.hypot(x - j - dx, y - i - dy).astype(np.float32)
            closer = far < nearest
            second = np.where(closer, nearest, np.minimum(second, far))
            value = np.where(closer, values[i % cells, j % cells], value)
            nearest = np.where(closer, far, nearest)
    return {"cell_centre": nearest, "cell_edge": second - nearest, "cell_value": value}


def cut_noise(
    kinds: tuple[str, ...],
    rng: np.random.Generator,
    size: int,
    shape: tuple[int, int],
    zoom: float = 1.0,
    stretch: float = 1.0,
    angle: float = 0.0,
) -> tuple[Plane, ...]:
    """Cut the same region from several tiles, scaled by ``zoom`` and stretched along ``angle``."""
    level = 128
    while level < size:
        level *= 2
    middle = level * rng.uniform(1.2, TILE_WIDTHS - 1.2, 2)
    step, cos, sin = level / size / zoom, math.cos(angle), math.sin(angle)
    turn = np.array([[step / stretch * cos, step / stretch * sin], [-step * sin, step * cos]])
    corner = middle - turn @ np.array([shape[1] / 2, shape[0] / 2])
    matrix = np.concatenate([turn, corner[:, None]], axis=1)
    flags = cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
    return tuple(
        cv2.warpAffine(
            noise_tile(kind, level), matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT
        )
        for kind in kinds
    )


def rgb(colour: int) -> Plane:
    """Convert ``0xRRGGBB`` to ``(3, 1, 1)``."""
    channels = [(colour >> 16) & 255, (colour >> 8) & 255, colour & 255]
    return np.array(channels, np.float32).reshape(3, 1, 1) / 255


def mix(a: Plane, b: Plane, share: Plane) -> Plane:
    """Interpolate from ``a`` to ``b``; the weight of ``b`` is ``share``, ``(H, W)``."""
    return a + share * (b - a)


def ramp(x: Plane, low: float, high: float) -> Plane:
    """Map ``x`` linearly to [0, 1]: 0 up to ``low``, 1 from ``high``."""
    return np.clip((x - low) / (high - low), 0, 1)


class Canvas:
    """Size, pose and random generator of one image, with the drawing helpers of the families."""

    def __init__(
        self, category: Category, light: Light, rng: np.random.Generator, size: int, turned: bool
    ) -> None:
        self.category, self.light, self.rng, self.size = category, light, rng, size
        self.angle = rng.uniform(-math.pi, math.pi) if turned else rng.uniform(-0.3, 0.3)
        self.zoom = category.scale * rng.uniform(0.86, 1.14)
        shift = rng.uniform(-0.07, 0.07, 2) if turned else rng.uniform(-0.5, 0.5, 2)
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        x, y = axis[None, :] - float(shift[0]), axis[:, None] - float(shift[1])
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        self.u: Plane = x * cos + y * sin
        self.v: Plane = y * cos - x * sin

    def noise(self, kind: str, zoom: float = 1.0, stretch: float = 1.0) -> Plane:
        """Cut noise that is stretched along the u axis."""
        return self.noises((kind,), zoom, stretch)[0]

    def noises(
        self, kinds: tuple[str, ...], zoom: float = 1.0, stretch: float = 1.0
    ) -> tuple[Plane, ...]:
        """Cut several kinds of noise from the same region."""
        shape = (self.size, self.size)
        return cut_noise(kinds, self.rng, self.size, shape, zoom, stretch, self.angle)

    def colour(self, which: int, spread: float = 0.05) -> Plane:
        """Return a colour of the category with a random tint, ``(3, 1, 1)``."""
        tint = self.rng.normal(0, spread / 3, (3, 1, 1)) + self.rng.normal(0, 1.5 * spread)
        return (rgb(self.category.colours[which]) * np.exp(tint)).astype(np.float32)

    def edge(self, distance: Plane) -> Plane:
        """Return 1 where a signed distance is negative, else 0, with a transition of one pixel."""
        return np.clip(0.5 - distance * self.size, 0, 1)

    def rings(self, t: Plane, step: float) -> Plane:
        """Return random lathe marks: a profile along ``t`` with standard deviation about 1."""
        table = self.rng.standard_normal(512).astype(np.float32)
        return table[(np.abs(t) / step).astype(np.int32) & 511]

    def uneven(self, albedo: Plane) -> Plane:
        """Vary the colour over the surface by a random amount, as dye, age and wear do."""
        wide, narrow = self.noises(("cloud", "fractal"))
        much = self.rng.exponential(0.05) + self.rng.normal(0, 0.012, (3, 1))
        little = self.rng.exponential(0.025) + self.rng.normal(0, 0.01, (3, 1))
        amounts = np.concatenate([much, little], axis=1).astype(np.float32)
        drift = (amounts @ np.stack([wide, narrow]).reshape(2, -1)).reshape(albedo.shape)
        drift += 1
        drift *= albedo
        faded = self.rng.exponential(0.04) + self.rng.exponential(0.04) * np.abs(wide + narrow)
        faded = np.minimum(faded, 0.25)
        pale = albedo.mean() * self.rng.uniform(0.92, 1.08, (3, 1, 1)) + self.rng.uniform(0, 0.06)
        drift *= 1 - faded
        drift += pale.astype(np.float32) * faded
        return np.maximum(drift, 0, out=drift)

    def surface(self, albedo: Plane, height: Plane, core: Plane) -> Surface:
        """Return the scene of a surface that fills the image."""
        look = self.category
        albedo = self.uneven(albedo)
        height = height * math.exp(self.rng.normal(0, 0.3))
        return Surface(albedo, height, None, core * 0.3, core, look.metal, look.gloss)

    def object(self, albedo: Plane, height: Plane, cover: Plane, tall: float) -> Surface:
        """Return the scene of an object of height ``tall`` on its ground, with its shadow."""
        look, light = self.category, self.light
        mottle, grain = self.noises(("fractal", "grain"))
        tint = np.exp(self.rng.normal(0, 0.02, (3, 1, 1)) + self.rng.normal(0, 0.12))
        ground = (rgb(look.ground) * tint).astype(np.float32)
        texture = 1 + 0.03 * mottle + 0.03 * grain
        shift = -tall * self.size / max(light.z, 0.5)
        move = np.array([[1, 0, shift * light.x], [0, 1, shift * light.y]])
        shadow = cv2.warpAffine(cover, move, (self.size, self.size))
        soft = self.size * tall * (0.3 + 0.7 * light.softness)
        width = 2 * int(soft + 1) + 1
        shadow = cv2.blur(cv2.blur(shadow, (width, width)), (width, width))
        near = 2 * (self.size // 50) + 1
        contact = cv2.blur(cover, (near, near))
        dark = (1 - (0.55 - 0.2 * light.softness) * shadow) * (1 - 0.3 * contact)
        under = ground * (texture * dark)
        core = albedo.mean((1, 2), keepdims=True) * 0.9
        albedo = self.uneven(albedo)
        return Surface(albedo, height, cover, under, core, look.metal, look.gloss)
