"""What the demo pictures show: surfaces and objects, drawn by code from a few stocks of noise.

A family is a function from a `Canvas` (size, pose, generator, noise) to a `Surface` (colour, relief
and outline, no light yet). Lengths are in picture widths, so that a scene looks alike in all sizes;
noise is cut from tiles made once, since drawing it anew would take longer than all the rest.
Planes are float32 ``(H, W)``, colours are planar ``(3, H, W)`` in ``[0, 1]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["FAMILIES", "Canvas", "Category", "Light", "Plane", "Surface", "cut_noise"]

Plane = NDArray[Any]  # float32, which the stubs of numpy and OpenCV cannot promise

TILE_WIDTHS = 3  # our choice: a turned picture, shrunk to half, still fits
CELLS_PER_WIDTH = 16
FINEST = 7  # octave: the finest noise that 128 pixels show;
FADING = 0.4  # beyond it noise fades this fast an octave, or large pictures had steeper relief


@dataclass(frozen=True)
class Category:
    """One product line: a family and what its pictures have in common.

    Attributes:
        family: Key of `FAMILIES`.
        words: What a person would call it; a singular noun without article.
        colours: ``0xRRGGBB``, from the main one on; what each means is the family's business.
        ground: Colour of what an object lies on; unused where the surface fills the picture.
        scale: Size of the object, or period of the pattern, relative to the family's usual.
        metal: 0 for paint, cloth or stone; 1 for bare metal, which mirrors its surroundings.
        gloss: Strength of the highlight.
        count: Parts of a kind: teeth of a gear, holes of a button, boards or tiles in a row.
    """

    family: str
    words: str
    colours: tuple[int, ...]
    ground: int = 0x808080
    scale: float = 1.0
    metal: float = 0.0
    gloss: float = 0.1
    count: int = 0

    @property
    def defects(self) -> tuple[str, ...]:
        """Names of the defects which such a product can have."""
        return FAMILIES[self.family].defects


@dataclass(frozen=True)
class Light:
    """Where the light comes from; ``x`` to the right, ``y`` down, ``z`` to the camera, length 1."""

    x: float
    y: float
    z: float
    softness: float  # 0 = a bare lamp, 1 = a cloudy sky


@dataclass
class Surface:
    """A scene without its light.

    Attributes:
        albedo: ``(3, H, W)``, colour of the product.
        height: ``(H, W)``, relief in picture widths.
        cover: ``(H, W)``, 1 on the product and 0 beside it; None if it fills the picture.
        under: ``(3, H, W)`` or ``(3, 1, 1)``, what is seen where nothing covers it.
        core: ``(3, 1, 1)``, the material inside, laid open by a break.
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
        """Return a part of the scene, which shares its memory."""

        def part(plane: Any) -> Any:
            whole = isinstance(plane, np.ndarray) and plane.shape[-1] > 1
            return plane[..., rows, columns] if whole else plane

        return Surface(*(part(getattr(self, name)) for name in self.__dataclass_fields__))


def _octaves(level: int, kind: int, first: int, last: int, persistence: float) -> Plane:
    """Add noise of ``2 ** first`` to ``2 ** last`` knots a width; ``(T, T)``, deviation 1."""
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
    """Return the stock of one kind of noise for pictures of ``level`` pixels, ``(T, T)``.

    Kinds ``cloud``, ``fractal`` and ``grain`` have mean 0 and deviation 1; ``cell_edge`` and
    ``cell_centre`` are distances in cells, and ``cell_value`` is one number in ``[0, 1)`` a cell.
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
    """Divide a tile among jittered points; the borders are bent, as those of grains are."""
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
    """Cut the same place from several tiles; features grow by ``zoom``, along ``angle`` more so."""
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
    """Turn ``0xRRGGBB`` into ``(3, 1, 1)``."""
    channels = [(colour >> 16) & 255, (colour >> 8) & 255, colour & 255]
    return np.array(channels, np.float32).reshape(3, 1, 1) / 255


def mix(a: Plane, b: Plane, share: Plane) -> Plane:
    """Go from ``a`` to ``b`` by the share ``(H, W)``."""
    return a + share * (b - a)


def ramp(x: Plane, low: float, high: float) -> Plane:
    """Rise from 0 at ``low`` to 1 at ``high``."""
    return np.clip((x - low) / (high - low), 0, 1)


class Canvas:
    """Size, pose and generator of one picture, and the shorthands that families are written in."""

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
        """Cut noise whose long axis is the u axis."""
        return self.noises((kind,), zoom, stretch)[0]

    def noises(
        self, kinds: tuple[str, ...], zoom: float = 1.0, stretch: float = 1.0
    ) -> tuple[Plane, ...]:
        """Cut several kinds in the same place."""
        shape = (self.size, self.size)
        return cut_noise(kinds, self.rng, self.size, shape, zoom, stretch, self.angle)

    def colour(self, which: int, spread: float = 0.05) -> Plane:
        """Return a colour of the category as this piece has it, ``(3, 1, 1)``."""
        tint = self.rng.normal(0, spread / 3, (3, 1, 1)) + self.rng.normal(0, 1.5 * spread)
        return (rgb(self.category.colours[which]) * np.exp(tint)).astype(np.float32)

    def edge(self, distance: Plane) -> Plane:
        """Cover what has a negative distance, with one pixel of transition."""
        return np.clip(0.5 - distance * self.size, 0, 1)

    def rings(self, t: Plane, step: float) -> Plane:
        """Look up a random profile along ``t``: the marks of a lathe, deviation about 1."""
        table = self.rng.standard_normal(512).astype(np.float32)
        return table[(np.abs(t) / step).astype(np.int32) & 511]

    def uneven(self, albedo: Plane) -> Plane:
        """Let dye, age and wear differ from place to place, in some pieces more than in others."""
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
        """Finish a surface that fills the picture."""
        look = self.category
        albedo = self.uneven(albedo)
        height = height * math.exp(self.rng.normal(0, 0.3))
        return Surface(albedo, height, None, core * 0.3, core, look.metal, look.gloss)

    def object(self, albedo: Plane, height: Plane, cover: Plane, tall: float) -> Surface:
        """Lay an object on its ground, with a shadow as long as it is ``tall``."""
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


def weave(c: Canvas) -> Surface:
    """Plain weave: threads along u and v go over and under each other in turn."""
    pitch = 0.042 * c.zoom
    bend = c.noise("cloud")
    u = (c.u + 0.25 * pitch * bend) * (math.pi / pitch)
    v = (c.v + 0.2 * pitch * c.noise("cloud")) * (math.pi / pitch)
    a, b = np.sin(u), np.sin(v)
    warp, weft = np.abs(a) + a * b, np.abs(b) - a * b
    warp_on_top = ramp(warp - weft, -0.25, 0.25)
    relief = np.maximum(warp, weft)
    slubs = c.noise("fractal", 0.9, 9)
    slubs_across = c.noise("fractal", 0.9, 1 / 9)
    thread = slubs + warp_on_top * (slubs_across - slubs)
    albedo = mix(c.colour(1, 0.12), c.colour(0), warp_on_top)
    albedo = albedo * ((0.62 + 0.24 * relief) * (1 + 0.1 * thread + 0.06 * c.noise("grain")))
    height = pitch * (0.2 * relief + 0.03 * thread) + 0.012 * bend
    return c.surface(albedo, height, c.colour(0) * 0.35)


def wood(c: Canvas) -> Surface:
    """Rings of a trunk, cut lengthwise, with pores along the grain."""
    wander, fibre = c.noise("fractal", 1.5, 7), c.noise("fractal", 0.5, 22)
    pits = ramp(c.noise("grain", 0.8, 24), 1.0, 2.2)
    axis, tilt = c.rng.uniform(-0.8, 0.8), c.rng.uniform(0.05, 0.3)
    far = cv2.magnitude(c.v + axis, (c.u + 0.4) * tilt)
    rings = far * (11 / c.zoom) + 0.35 * wander
    late = rings - np.floor(rings)
    late = late * late * ramp(late, 1.0, 0.9)
    tone = 0.75 * late + 0.16 * fibre + 0.1 * c.noise("cloud")
    albedo = mix(c.colour(0), c.colour(1), np.clip(tone, 0, 1.2))
    albedo = albedo * (1 - 0.4 * pits + 0.04 * fibre)
    return c.surface(albedo, 0.0012 * fibre - 0.003 * pits, c.colour(0) * 1.05)


def brushed(c: Canvas) -> Surface:
    """Sheet metal with hair lines along u, and the broad gleam across them."""
    fine, broad = c.noise("grain", 0.9, 60), c.noise("fractal", 0.7, 40)
    gleam = c.v * c.rng.uniform(1.5, 3.5) + c.rng.uniform(-1, 1)
    gleam = 1 / (1 + gleam * gleam)
    tone = 0.72 + 0.3 * gleam + 0.05 * fine + 0.05 * broad + 0.02 * c.noise("cloud")
    return c.surface(c.colour(0) * tone, 0.0006 * (fine + broad), c.colour(0) * 1.1)


def tiles(c: Canvas) -> Surface:
    """Glazed tiles in rows, each with its own tone, with rough joints."""
    pitch = c.zoom / c.category.count
    v = c.v / pitch
    row = np.floor(v)
    aspect = 1.0 if len(c.category.colours) > 2 else 2.0  # mosaics are square, others a brick bond
    u = c.u / (pitch * aspect) + (0.5 * row if aspect > 1 else 0)
    column = np.floor(u)
    across = (0.5 - np.abs(v - row - 0.5)) * pitch
    along = (0.5 - np.abs(u - column - 0.5)) * (pitch * aspect)
    rough, mottle = c.noise("grain"), c.noise("fractal", 1.4)
    inside = np.minimum(across, along) - 0.007 * c.zoom**0.5 - 0.0008 * mottle
    glazed = ramp(inside, 0, 0.008)
    which = (row.astype(np.int32) * 37 + column.astype(np.int32) * 11) & 255
    tone = c.rng.normal(1, 0.06, 256).astype(np.float32)[which] + 0.04 * mottle
    albedo = c.colour(0) * tone
    if aspect == 1:
        other = (c.rng.random(256) < 0.4).astype(np.float32)[which]
        albedo = mix(albedo, c.colour(2) * tone, other)
    joint = c.colour(1) * (1 + 0.1 * rough)
    curve = ramp(inside, 0, 0.03)
    tilt = c.rng.normal(0, 0.012, (2, 256)).astype(np.float32)[:, which]
    height = 0.012 * (1 - (1 - curve) ** 2) + 0.0012 * mottle + tilt[0] * c.u + tilt[1] * c.v
    height = height * glazed + 0.001 * rough * (1 - glazed)
    surface = c.surface(mix(joint, albedo, glazed), height, c.colour(1) * 1.05)
    surface.gloss = c.category.gloss * glazed
    return surface


def granite(c: Canvas) -> Surface:
    """Polished stone: grains of three minerals in two sizes."""
    value, edge = c.noises(("cell_value", "cell_edge"), 0.62 * c.zoom)
    small, _ = c.noises(("cell_value", "cell_edge"), 0.34 * c.zoom)
    vein, speck = c.noise("fractal", 1.2), c.noise("grain")
    value = np.clip(value + 0.07 * vein, 0, 1)
    albedo = mix(c.colour(0), c.colour(1), ramp(value, 0.45, 0.55))
    albedo = mix(albedo, c.colour(2), ramp(small - 0.05 * vein, 0.74, 0.8))
    grain = value * 11 + small * 7
    facet = 0.8 + 0.4 * (grain - np.floor(grain))  # each grain mirrors its own part of the room
    albedo = albedo * facet * (1 + 0.07 * speck + 0.05 * vein) * (0.88 + 0.12 * ramp(edge, 0, 0.2))
    return c.surface(albedo, 0.0004 * speck, c.colour(0) * 0.85)


def stripes(c: Canvas) -> Surface:
    """Printed stripes on cloth, a broad and a narrow one, in gentle folds."""
    pitch = 0.16 * c.zoom
    fold = c.noise("cloud", 1.2)
    t = (c.v + 0.006 * fold) / pitch
    t = np.abs(t - np.floor(t) - 0.5)
    soft = 0.7 / (c.size * pitch)
    broad = ramp(t, 0.27 - soft, 0.27 + soft)
    narrow = ramp(np.abs(t - 0.16), 0.035 + soft, 0.035 - soft)
    ink = np.maximum(broad, 0.9 * narrow) * (1 - 0.08 * np.abs(c.noise("grain")))
    albedo = mix(c.colour(1), c.colour(0), ink)
    thread = np.sin(c.u * (2 * math.pi / 0.02)) * np.sin(c.v * (2 * math.pi / 0.02))
    fibre = 0.6 * c.noise("grain", 0.8, 6) + 0.6 * c.noise("grain", 0.8, 1 / 6)
    albedo = albedo * (1 + 0.05 * fibre + 0.04 * thread)
    height = 0.03 * fold + 0.0007 * (fibre + thread)
    return c.surface(albedo, height, c.colour(1) * 0.4)


def leather(c: Canvas) -> Surface:
    """Grained hide: small cushions between creases, and long wrinkles."""
    edge, value = c.noises(("cell_edge", "cell_value"), 0.6 * c.zoom, 1.25)
    crease = ramp(edge, 0.3, 0.0)
    wrinkle, mottle = c.noise("fractal", 1.3, 2.2), c.noise("cloud")
    deep = ramp(np.abs(wrinkle), 0.16, 0.0)
    albedo = c.colour(0) * (1 + 0.07 * mottle + 0.05 * wrinkle + 0.1 * (value - 0.5))
    albedo = mix(albedo, c.colour(1), 0.7 * crease + 0.15 * deep)
    cushion = np.sqrt(np.clip(edge, 0, 1))
    height = 0.012 * c.zoom * cushion + 0.004 * wrinkle - 0.004 * deep + 0.0006 * c.noise("grain")
    return c.surface(albedo, height, c.colour(0) * 0.8)


def grid(c: Canvas) -> Surface:
    """Woven wires over an open space."""
    pitch = 0.125 * c.zoom
    warp = 0.03 * pitch * c.noise("cloud")
    u, v = (c.u + warp) / pitch, (c.v - warp) / pitch
    i, j = np.floor(u), np.floor(v)
    du, dv = np.abs(u - i - 0.5) * pitch, np.abs(v - j - 0.5) * pitch
    radius = 0.19 * pitch
    swing = 0.5 * radius * np.cos(math.pi * (i + j))  # which wire is on top at a crossing
    near_u, near_v = (ramp(d, 0.45 * pitch, 0.1 * pitch) for d in (du, dv))
    round_u, round_v = (np.sqrt(np.maximum(1.15 * radius**2 - d * d, 0)) for d in (dv, du))
    wire_u, wire_v = c.edge(dv - radius), c.edge(du - radius)
    along_u, along_v = wire_u * (round_u - swing * near_u), wire_v * (round_v + swing * near_v)
    top, lower = np.maximum(along_u, along_v), np.minimum(along_u, along_v)
    touch = ramp(top - lower, 0.5 * radius, 0.0) * ramp(lower, 0, 0.004)  # dark where wires meet
    tone = (1 + 0.06 * c.noise("grain") + 0.06 * c.noise("fractal")) * (1 - 0.35 * touch)
    far = 0.02 + 0.1 * c.rng.random()  # from the ground
    return c.object(c.colour(0) * tone, top, np.maximum(wire_u, wire_v), far)


def plaster(c: Canvas) -> Surface:
    """Cast or trowelled wall: clouds, grit, and pores where air was."""
    centre, value = c.noises(("cell_centre", "cell_value"), 0.8 * c.zoom)
    cloud, rough, grit = c.noise("cloud"), c.noise("fractal", c.zoom), c.noise("grain")
    pore = ramp(centre - 1.5 * (value - 0.86), 0.1, 0.0) * (value > 0.86)
    sweep = c.noise("fractal", 0.8, 5)
    albedo = c.colour(0) * (1 + 0.06 * cloud + 0.045 * rough + 0.05 * grit + 0.03 * sweep)
    albedo = mix(albedo, c.colour(1), ramp(rough + cloud, 0.8, 3.2))
    albedo = albedo * (1 - 0.45 * pore)
    height = 0.0022 * rough + 0.0007 * grit + 0.0015 * sweep - 0.006 * pore
    return c.surface(albedo, height, c.colour(1) * 0.7)


def carpet(c: Canvas) -> Surface:
    """Loops of yarn, packed, in two near tones."""
    centre, value = c.noises(("cell_centre", "cell_value"), 0.52 * c.zoom)
    lay, fibre = c.noise("cloud"), c.noise("grain", 0.8, 2)
    dome = np.clip(1 - centre * centre * 1.5, 0, 1)
    other = c.rng.uniform(0.3, 0.9)
    albedo = mix(c.colour(0), c.colour(1, 0.15), ramp(value, other, other + 0.1))
    albedo = albedo * ((0.5 + 0.5 * dome) * (1 + 0.14 * fibre + 0.08 * lay + 0.2 * (value - 0.5)))
    height = 0.02 * c.zoom * dome + 0.002 * fibre + 0.006 * lay
    return c.surface(albedo, height, c.colour(0) * 0.3)


def bevel(distance: Plane, width: float, slope: float) -> Plane:
    """Round the edge of a plate: relief of a border ``width`` wide, flat farther inside."""
    t = np.clip(1 + distance / width, 0, 1)
    return 0.5 * slope * width * (1 - t * t)


def turned_gleam(c: Canvas, r: Plane) -> Plane:
    """Two bright sectors, as the fine rings of a lathe show them; in ``[-1, 1]``."""
    a = 2 * c.rng.uniform(0, math.pi)
    u, v = c.u, c.v
    cos, sin = math.cos(a), math.sin(a)
    return ((u * u - v * v) * cos + 2 * u * v * sin) / (r * r + 1e-4)


def washer(c: Canvas) -> Surface:
    """A flat ring, turned or punched."""
    outer = 0.36 * c.zoom
    inner = outer * 0.5
    r = cv2.magnitude(c.u, c.v)
    distance = np.maximum(r - outer, inner - r)
    marks, mottle, grain = c.rings(r, 0.006), c.noise("fractal"), c.noise("grain")
    metal = c.category.metal
    tone = 1 + 0.05 * mottle + 0.03 * grain + metal * (0.16 * turned_gleam(c, r) + 0.025 * marks)
    height = bevel(distance, 0.035 * c.zoom, 1.2) + 0.0004 * metal * marks + 0.0006 * mottle
    return c.object(c.colour(0) * tone, height, c.edge(distance), 0.03)


def nut(c: Canvas) -> Surface:
    """A hexagon nut from above: chamfered corners, thread inside."""
    radius = 0.3 * c.zoom
    x, y = np.abs(c.u), np.abs(c.v)
    hexagon = np.maximum(x * 0.8660254 + y * 0.5, y) - radius
    r = cv2.magnitude(c.u, c.v)
    bore = radius * 0.56
    distance = np.maximum(hexagon, 0.8 * bore - r)
    thread = ramp(r, bore * 1.02, bore * 0.98)
    turns = np.sin(r * (2 * math.pi / (0.075 * bore)) + cv2.phase(c.u, c.v))
    mottle, grain = c.noise("fractal"), c.noise("grain")
    tone = 1 + 0.06 * mottle + 0.03 * grain + 0.14 * c.category.metal * turned_gleam(c, r)
    tone = tone * (1 - thread * (0.5 + 0.2 * turns))
    chamfer = np.maximum(r - 0.99 * radius, 0)
    funnel = np.maximum(1.14 * bore - r, 0)
    height = bevel(hexagon, 0.015, 0.8) - 0.55 * chamfer - 0.6 * funnel + 0.0006 * mottle
    return c.object(c.colour(0) * tone, height, c.edge(distance), 0.06)


def gear(c: Canvas) -> Surface:
    """A toothed wheel with hub, bore and holes that save weight."""
    pitch_radius, teeth = 0.33 * c.zoom, c.category.count
    r, angle = cv2.magnitude(c.u, c.v), cv2.phase(c.u, c.v)
    tooth = np.clip(np.cos(angle * teeth) * 1.6, -1, 1)
    rim = r - pitch_radius - (0.55 / teeth * c.zoom) * tooth
    bore = 0.24 * pitch_radius
    near = angle * (5 / (2 * math.pi))
    near = (near - np.floor(near) - 0.5) * (2 * math.pi / 5)
    hole = cv2.magnitude(r * np.cos(near) - 0.6 * pitch_radius, r * np.sin(near))
    distance = np.maximum(rim, bore - r)
    distance = np.maximum(distance, 0.14 * pitch_radius - hole)
    marks, mottle = c.rings(r, 0.008), c.noise("fractal")
    metal = c.category.metal
    tone = 1 + 0.05 * mottle + 0.03 * c.noise("grain")
    tone = tone + metal * (0.14 * turned_gleam(c, r) + 0.02 * marks)
    web = ramp(np.abs(r - 0.61 * pitch_radius), 0.2 * pitch_radius, 0.25 * pitch_radius)
    height = bevel(distance, 0.014, 1.0) + 0.012 * web + 0.0005 * mottle
    return c.object(c.colour(0) * (tone * (0.86 + 0.14 * web)), height, c.edge(distance), 0.045)


def capsule(c: Canvas) -> Surface:
    """Two halves of gelatine, the cap pushed over the body."""
    half, radius = 0.24 * c.zoom, 0.145 * c.zoom
    cap = ramp(c.u, 0.02 - 0.5 / c.size, 0.02 + 0.5 / c.size)
    thick = radius * (1 + 0.05 * cap)
    ends = np.maximum(np.abs(c.u) - half, 0)
    r = cv2.magnitude(ends, c.v)
    dome = np.sqrt(np.maximum(thick * thick - r * r, 0) + 1e-4)
    seam = ramp(np.abs(c.u - 0.02), 0.014, 0.0)
    ring = ramp(np.abs(c.u - 0.62 * half), 0.012, 0.0)
    mottle = c.noise("fractal", 1.2)
    albedo = mix(c.colour(1, 0.04), c.colour(0, 0.04), cap) * (1 + 0.03 * mottle)
    albedo = albedo * (1 - 0.25 * seam) * (0.78 + 0.22 * ramp(dome, 0, radius))
    height = 0.85 * dome - 0.004 * ring + 0.0006 * mottle
    return c.object(albedo, height, c.edge(r - thick), 0.1)


def pill(c: Canvas) -> Surface:
    """A pressed tablet, round or long, with a score line and a powdery skin."""
    radius = (0.3 if c.category.count == 0 else 0.19) * c.zoom
    half = 0.0 if c.category.count == 0 else 0.17 * c.zoom
    r = cv2.magnitude(np.maximum(np.abs(c.u) - half, 0), c.v)
    inside = ramp(r, radius, 0)
    dome = np.sqrt(inside * (2 - inside))
    score = ramp(np.abs(c.u), 0.022 * c.zoom, 0.0)
    speck, mottle, powder = c.noise("cell_value", 0.3), c.noise("fractal", 1.2), c.noise("grain")
    specks = ramp(speck, 0.9, 1.0) * (0.12 if len(c.category.colours) > 1 else 0.04)
    tone = (1 + 0.025 * mottle + 0.025 * powder - specks) * (1 - 0.18 * score)
    height = 0.28 * radius * dome - 0.022 * c.zoom * score * score + 0.0006 * (mottle + powder)
    distance = r - radius
    height = height + bevel(distance, 0.04 * c.zoom, 0.9)
    return c.object(c.colour(0, 0.04) * tone, height, c.edge(distance), 0.06)


def button(c: Canvas) -> Surface:
    """A sewing button: raised rim, dished middle, two or four holes."""
    radius, holes = 0.33 * c.zoom, c.category.count
    r = cv2.magnitude(c.u, c.v)
    du = np.abs(c.u) - 0.2 * radius
    dv = np.abs(c.v) - 0.2 * radius if holes == 4 else c.v
    distance = np.maximum(r - radius, 0.095 * radius - cv2.magnitude(du, dv))
    rim = ramp(r, 0.66 * radius, 0.8 * radius)
    grainy, swirl = c.noise("grain", 1.0, 12), c.noise("fractal", 1.3, 3)
    albedo = mix(c.colour(0), c.colour(1), np.clip(0.3 + 0.28 * swirl + 0.1 * grainy, 0, 1))
    height = bevel(r - radius, 0.2 * radius, 0.9) + 0.016 * c.zoom * rim * rim * (3 - 2 * rim)
    height = height + bevel(distance, 0.02, 0.8) + 0.0004 * grainy
    return c.object(albedo, height, c.edge(distance), 0.04)


def cookie(c: Canvas) -> Surface:
    """A baked biscuit: uneven outline, brown rim, crumbs, and chips where it has a third colour."""
    bumps, crumbs = c.noise("fractal", 0.9), c.noise("grain")
    radius = 0.36 * c.zoom
    r = cv2.magnitude(c.u, c.v) + 0.012 * c.noise("cloud", 0.8) + 0.003 * bumps
    distance = r - radius
    baked = ramp(r, 0.55 * radius, radius)
    tone = np.clip(0.75 * baked * baked + 0.16 * bumps + 0.1, 0, 1)
    albedo = mix(c.colour(0), c.colour(1), tone) * (1 + 0.07 * crumbs)
    height = 0.05 * np.sqrt(np.clip(-distance / radius, 0, 1)) + 0.005 * bumps
    height = height + 0.0012 * crumbs
    if len(c.category.colours) > 2:
        centre, value = c.noises(("cell_centre", "cell_value"), 2.0)
        chip = ramp(centre - 0.3 * (value - 0.6), 0.26, 0.18) * (value > 0.6)
        albedo = mix(albedo, c.colour(2), chip)
        height = height + 0.016 * chip
    return c.object(albedo, height, c.edge(distance), 0.04)


_MARKS = ("scratch", "crack", "hole", "stain", "missing part", "colour spot", "contamination")


@dataclass(frozen=True)
class Family:
    """How a kind of thing is drawn, whether it is an object, and what can happen to it."""

    draw: Callable[[Canvas], Surface]
    is_object: bool
    defects: tuple[str, ...]


def _without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in (*_MARKS, "dent") if name not in names)


FAMILIES: dict[str, Family] = {
    "weave": Family(weave, False, _without("scratch", "crack", "dent")),
    "wood": Family(wood, False, _without()),
    "brushed": Family(brushed, False, _without("missing part")),
    "tiles": Family(tiles, False, _without("dent")),
    "granite": Family(granite, False, _without("dent")),
    "stripes": Family(stripes, False, _without("crack", "scratch", "dent")),
    "leather": Family(leather, False, _without("missing part")),
    "grid": Family(grid, True, _without("crack", "hole", "dent")),
    "plaster": Family(plaster, False, _without()),
    "carpet": Family(carpet, False, _without("scratch", "crack", "dent")),
    "washer": Family(washer, True, _without("hole")),
    "nut": Family(nut, True, _without("hole")),
    "gear": Family(gear, True, _without("hole")),
    "capsule": Family(capsule, True, _without()),
    "pill": Family(pill, True, _without("dent")),
    "button": Family(button, True, _without("dent")),
    "cookie": Family(cookie, True, _without("scratch", "dent")),
}
