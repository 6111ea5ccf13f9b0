"""Eight kinds of defects for the products of `surfaces`, applied before lighting.

A defect changes colour, relief, outline or gloss in a small patch of a scene. Its place is sampled
on the product. It is lighter or darker than the product at random, unless the product is itself too
light or too dark. A detector can therefore not rely on either tone alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from anomaly_clip.demo.canvas import Light, Plane, Surface, cut_noise, mix, ramp

__all__ = ["DEFECTS", "spoil"]

MARGIN = 0.04  # image widths around a defect, for the blur of the lens
BULGE = 1.5  # largest extent of an uneven blob relative to its ellipse
FINER = 4  # supersampling factor of thin lines


class DefectPatch:
    """The part of a scene that a defect changes, with local coordinates.

    Attributes:
        surface: The part of the scene. Its planes are views of the scene's: a defect replaces
            them and never modifies them in place.
        x, y: ``(1, w)`` and ``(h, 1)``, offsets from the place of the defect in image widths.
    """

    def __init__(
        self,
        whole: Surface,
        light: Light,
        rng: np.random.Generator,
        place: tuple[float, float],
        reach: tuple[float, float, float, float],
    ) -> None:
        """Cut out ``reach``: left, top, right and bottom bounds, in image widths from ``place``."""
        self.size, self.light, self.rng = whole.height.shape[0], light, rng
        bounds = [place[i % 2] + reach[i] + (MARGIN if i > 1 else -MARGIN) for i in range(4)]
        even = (2 * round(bound * self.size / 2) for bound in bounds)  # images may be halved later
        left, top, right, bottom = (min(max(bound, 0), self.size) for bound in even)
        self.rows, self.columns = slice(top, bottom), slice(left, right)
        self.surface = whole.cut(self.rows, self.columns)
        self.corner = left / self.size - place[0], top / self.size - place[1]
        step = 1 / self.size
        x = (np.arange(right - left, dtype=np.float32) + 0.5) * step
        y = (np.arange(bottom - top, dtype=np.float32) + 0.5) * step
        self.x = x[None, :] + self.corner[0]
        self.y = y[:, None] + self.corner[1]

    def noise(self, kind: str, zoom: float = 1.0) -> Plane:
        """Cut noise of the patch's shape."""
        shape = self.surface.height.shape
        return cut_noise((kind,), self.rng, self.size, (shape[0], shape[1]), zoom)[0]

    def on_product(self, share: Plane) -> Plane:
        """Limit the weights of a defect to the product: 0 on the ground."""
        cover = self.surface.cover
        return share if cover is None else share * cover

    def strokes(self, lines: list[tuple[Plane, Plane]]) -> Plane:
        """Return the cover ``(h, w)`` of polylines with ``(n, 2)`` points and ``(n,)`` widths."""
        height, width = self.surface.height.shape
        paper = np.zeros((height * FINER, width * FINER), np.uint8)
        unit = self.size * FINER
        for points, widths in lines:
            pixels = ((points - np.array(self.corner)) * unit * 16).astype(np.int32)
            for start, end, wide in zip(pixels[:-1], pixels[1:], widths, strict=False):
                cv2.line(paper, start, end, 255, max(round(float(wide) * unit), 1), cv2.LINE_AA, 4)
        return _shrink(paper, (width, height))

    def blob(
        self, radius: float, long: float = 1.0, rough: float = 0.2, ragged: float = 0.0
    ) -> Plane:
        """Return the depth in an uneven ellipse: 1 at the centre, 0 on the outline, < 0 outside."""
        turn = self.rng.uniform(0, math.pi)
        cos, sin = math.cos(turn), math.sin(turn)
        a = (self.x * cos + self.y * sin) / (radius * math.sqrt(long))
        b = (self.y * cos - self.x * sin) * (math.sqrt(long) / radius)
        distance, angle = cv2.magnitude(a, b), cv2.phase(a, b)
        outline: Plane | float = 1.0
        for wave in range(2, 6):
            swing, phase = rough * self.rng.normal() / wave, self.rng.uniform(0, 2 * math.pi)
            outline = outline + swing * np.cos(angle * wave + phase)
        if ragged > 0:
            outline = outline + ragged * self.noise("fractal", 0.5)
        return 1 - distance / np.clip(outline, 0.25, BULGE)

    def crisp(self, depth: Plane, radius: float, pixels: float = 1.0) -> Plane:
        """Convert the depth in a blob to 1 inside and 0 outside, with a border of ``pixels``."""
        return np.clip(depth * (radius * self.size / pixels) + 0.5, 0, 1)

    def mean_colour(self, where: Plane) -> Plane:
        """Return the product's mean colour under a defect, ``(3, 1, 1)``."""
        weight = self.on_product(where) + 1e-6
        total = (self.surface.albedo * weight).sum((1, 2), keepdims=True)
        return total / weight.sum()

    def lift(self, height: Plane) -> None:
        """Raise or lower the relief."""
        self.surface.height = self.surface.height + height

    def paint(self, colour: Plane, share: Plane) -> None:
        """Blend a colour ``(3, 1, 1)`` or ``(3, h, w)`` over the product."""
        self.surface.albedo = mix(self.surface.albedo, colour, share)

    def shine(self, gloss: float, share: Plane) -> None:
        """Blend the gloss towards a value."""
        self.surface.gloss = self.surface.gloss + share * (gloss - self.surface.gloss)

    def lean(self, radius: float) -> Plane:
        """Return a slope from -1 on the side facing the light to 1 on the opposite side."""
        towards = self.x * self.light.x + self.y * self.light.y
        flat = math.hypot(self.light.x, self.light.y)
        return np.clip(-towards / (radius * flat), -1, 1)


def _shrink(paper: Plane, shape: tuple[int, int]) -> Plane:
    small = cv2.resize(paper, shape, interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) * (1 / 255)


def _place(surface: Surface, rng: np.random.Generator, rim: bool = False) -> tuple[float, float]:
    """Sample a place on the product, or on its rim; ``(x, y)`` in image widths."""
    size = surface.height.shape[0]
    if surface.cover is None:
        x, y = rng.uniform(0.02, 0.98, 2)
        return float(x), float(y)
    allowed = surface.cover > 0.9
    if rim:
        allowed = (surface.cover > 0.1) & (surface.cover < 0.9)
    candidates = np.flatnonzero(allowed)
    row, column = divmod(int(candidates[int(rng.random() * len(candidates))]), size)
    return (column + 0.5) / size, (row + 0.5) / size


def _radius(rng: np.random.Generator, surface: Surface, small: float, large: float) -> float:
    """Sample a radius, log-uniformly; smaller on objects, which do not fill the image."""
    radius = small * (large / small) ** rng.random()
    return float(radius * (1 if surface.cover is None else 0.75))


def _square(radius: float, long: float = 1.0) -> tuple[float, float, float, float]:
    """Return bounds that contain a blob at any rotation."""
    reach = BULGE * radius * math.sqrt(long)
    return (-reach, -reach, reach, reach)


def _around(lines: list[tuple[Plane, Plane]]) -> tuple[float, float, float, float]:
    points = np.concatenate([points for points, _ in lines])
    low, high = points.min(0), points.max(0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _other_tone(rng: np.random.Generator, colour: Plane, strength: float) -> Plane:
    """Make a colour lighter or darker at random; dark colours are more likely to become lighter."""
    bright = float(colour.mean())
    darker = rng.random() < np.clip((bright - 0.12) / 0.5, 0, 1) * 0.9
    goal = colour * 0.12 if darker else 0.9 + 0 * colour
    return colour + strength * (goal - colour)


def _vivid(rng: np.random.Generator, colour: Plane) -> Plane:
    """Sample a vivid colour that differs from the product's."""
    for _ in range(8):
        hue, low = rng.uniform(0, 6), rng.uniform(0.02, 0.35)
        high = rng.uniform(0.5, 0.95)
        wheel = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        vivid = (low + (high - low) * wheel).astype(np.float32).reshape(3, 1, 1)
        if float(np.abs(vivid - colour).max()) > 0.35:
            break
    return vivid


def _line(
    rng: np.random.Generator, length: float, bend: float, turn: float, steps: int = 12
) -> Plane:
    """Return the points ``(steps, 2)`` of an arc of the given length through the origin."""
    t = np.linspace(-0.5, 0.5, steps)
    angle = turn + bend * t * 2
    moves = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (length / steps)
    points = np.cumsum(moves, axis=0)
    return points - points[steps // 2]


def scratch(s: Surface, light: Light, rng: np.random.Generator, strength: float) -> DefectPatch:
    """One to three scratches of a tool: grooves with burrs, lighter or darker than the product."""
    place, turn = _place(s, rng), rng.uniform(0, math.pi)
    length = _radius(rng, s, 0.18, 0.8)
    lines: list[tuple[Plane, Plane]] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        bend, askew = rng.normal(0, [0.25, 0.06])
        points = _line(rng, length * rng.uniform(0.5, 1), bend, turn + askew)
        points = points + rng.normal(0, 0.012, 2) * (len(lines) > 0)
        taper = np.sin(np.linspace(0.25, math.pi - 0.25, len(points)))
        lines.append((points, rng.uniform(0.006, 0.013) * taper))
    p = DefectPatch(s, light, rng, place, _around(lines))
    groove = p.on_product(p.strokes(lines))
    skips = 0.75 + 0.25 * p.noise("grain")
    groove = groove * np.clip(skips, 0.3, 1)
    p.paint(_other_tone(rng, p.mean_colour(groove), 0.35 + 0.5 * strength), groove)
    burr = cv2.blur(groove, (3, 3))
    p.lift((0.004 * burr - 0.01 * groove) * strength)
    return p


def _walk(rng: np.random.Generator, length: float, turn: float, wide: float) -> tuple[Plane, Plane]:
    """Return a random walk: ``(n, 2)`` points and ``(n,)`` decreasing widths."""
    steps = max(int(length / 0.016), 4)
    angles = turn + np.cumsum(rng.normal(0, 0.22, steps)) + rng.normal(0, 0.45, steps)
    moves = rng.uniform(0.5, 1.5, (steps, 1)) * (length / steps)
    moves = moves * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    moves[0] = 0
    points = np.cumsum(moves, axis=0)
    widths = wide * np.linspace(1, 0.3, steps) * rng.uniform(0.6, 1.3, steps)
    return points, widths


def crack(s: Surface, light: Light, rng: np.random.Generator, strength: float) -> DefectPatch:
    """A narrow, deep, branching fracture with one lip slightly higher than the other."""
    place, turn = _place(s, rng), rng.uniform(0, 2 * math.pi)
    length, wide = _radius(rng, s, 0.15, 0.6), rng.uniform(0.006, 0.013)
    lines = [_walk(rng, length / 2, turn + side, wide) for side in (0, math.pi)]
    for _ in range(rng.integers(0, 5)):
        trunk = lines[rng.integers(0, 2)][0]
        root = trunk[rng.integers(1, len(trunk))]
        side = rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
        branch, widths = _walk(rng, length * rng.uniform(0.15, 0.35), turn + side, 0.7 * wide)
        lines.append((branch + root, widths))
    p = DefectPatch(s, light, rng, place, _around(lines))
    gap = p.on_product(p.strokes(lines))
    colour = p.mean_colour(gap)
    dust = float(colour.mean()) < 0.22  # dark products show dust or bright fracture faces
    inside = colour * 3.0 + 0.15 if dust else colour * 0.12
    p.paint(inside, gap * (0.45 + 0.5 * strength))
    shift = np.array([[1, 0, light.x * 1.2], [0, 1, light.y * 1.2]])
    lip = cv2.warpAffine(gap, shift, gap.shape[::-1])
    p.lift((0.004 * lip - 0.012 * gap) * strength)
    return p


def hole(s: Surface, light: Light, rng: np.random.Generator, strength: float) -> DefectPatch:
    """A dark puncture with a lit far wall and a raised rim; some holes go through the object."""
    radius = _radius(rng, s, 0.028, 0.11)
    long = rng.uniform(1, 1.6)
    p = DefectPatch(s, light, rng, _place(s, rng), _square(1.3 * radius, long))
    depth = p.blob(radius, long, 0.2, 0.14)
    inside = p.on_product(p.crisp(depth, radius))
    lit_wall = np.clip(p.lean(radius) * 1.2 - depth, 0, 1)
    colour = p.mean_colour(inside)
    dark = 0.22 - 0.14 * strength
    wall = s.core * (dark + 0.75 * lit_wall)
    bright = float(colour.mean())
    if bright < 0.2:
        wall = wall + 0.35 * lit_wall + 0.1 * (p.lean(radius) + 1)
    ring = ramp(np.abs(depth + 0.12), 0.3, 0.0)
    p.lift(p.on_product(ring) * (0.16 * radius * strength))
    p.paint(wall, inside)
    p.shine(0.0, inside)
    if p.surface.cover is not None and rng.random() < 0.5:
        through = inside * ramp(depth, 0.1, 0.25)
        p.surface.under = p.surface.under * (1 - 0.35 * through)
        p.surface.cover = p.surface.cover * (1 - through)
    return p


def stain(s: Surface, light: Light, rng: np.random.Generator, strength: float) -> DefectPatch:
    """A dried liquid: translucent, blotchy, with a border where the drop dried last."""
    radius = _radius(rng, s, 0.05, 0.16)
    long = rng.uniform(1, 2)
    p = DefectPatch(s, light, rng, _place(s, rng), _square(radius, long))
    depth = p.blob(radius, long, 0.35, 0.1)
    soft = rng.uniform(0.1, 0.5)
    blotch = np.clip(0.8 + 0.25 * p.noise("fractal", 0.9), 0.2, 1.1)
    share = ramp(depth, -0.05, soft) * blotch
    share = share + rng.uniform(0, 0.6) * ramp(np.abs(depth - 0.08), 0.14, 0.0)
    share = p.on_product(np.clip(share, 0, 1)) * (0.4 + 0.5 * strength)
    colour = p.mean_colour(share)
    if rng.random() < np.clip(float(colour.mean()) * 1.6 - 0.2, 0, 0.65):
        tint = np.array(rng.uniform([0.35, 0.25, 0.08], [0.65, 0.6, 0.5]), np.float32)
        p.paint(p.surface.albedo * tint.reshape(3, 1, 1), share)
    else:
        pale = np.array(rng.uniform([0.6, 0.58, 0.5], [0.9, 0.88, 0.86]), np.float32)
        p.paint(0.45 * p.surface.albedo + 0.6 * pale.reshape(3, 1, 1), share)
    p.shine(float(rng.choice([0.0, 0.35])), share)
    return p


def missing_part(
    s: Surface, light: Light, rng: np.random.Generator, strength: float
) -> DefectPatch:
    """A broken-off piece: reveals the ground at the rim of an object, the core of a surface."""
    radius = _radius(rng, s, 0.045, 0.13)
    long = rng.uniform(1, 1.8)
    p = DefectPatch(s, light, rng, _place(s, rng, rim=True), _square(radius, long))
    depth = p.blob(radius, long, 0.45, 0.16)
    gone = p.crisp(depth, radius)
    if p.surface.cover is not None:
        face = p.on_product(p.crisp(depth + 0.016 / radius, radius))
        grit = 1 + 0.15 * p.noise("grain")
        lit = 0.75 + 0.5 * np.clip(p.lean(radius), -1, 1)
        p.paint(s.core * (lit * grit), face)
        p.surface.cover = p.surface.cover * (1 - gone)
        return p
    floor = 1 + 0.12 * p.noise("fractal", 0.5) + 0.08 * p.noise("grain")
    p.paint(s.core * (floor * (0.75 + 0.25 * ramp(depth, 0, 0.4))), gone)
    sunk = (0.02 + 0.02 * strength) * ramp(depth, 0.0, 0.025 / radius)
    p.surface.height = mix(p.surface.height, 0.004 * floor, gone) - sunk
    p.shine(0.02, gone)
    return p


def colour_spot(s: Surface, light: Light, rng: np.random.Generator, strength: float) -> DefectPatch:
    """A drop of paint or ink, possibly with smaller drops; thick paint is raised and glossy."""
    radius = _radius(rng, s, 0.022, 0.09)
    p = DefectPatch(s, light, rng, _place(s, rng), _square(1.7 * radius))
    depth = p.blob(radius, rng.uniform(1, 1.4), 0.15)
    for _ in range(rng.integers(0, 4)):
        away = rng.uniform(1.2, 2.2) * radius
        turn, small = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.1, 0.3)
        dx, dy = p.x - away * math.cos(turn), p.y - away * math.sin(turn)
        drop = small - cv2.magnitude(*np.broadcast_arrays(dx, dy))
        depth = np.maximum(depth, drop / radius)
    share = p.on_product(p.crisp(depth, radius, 2.0))
    opaque = 0.45 + 0.5 * strength
    p.paint(_vivid(rng, p.mean_colour(share)), share * opaque)
    if rng.random() < 0.5:
        thick = np.sqrt(np.clip(depth, 0, 1)) * p.on_product(np.ones_like(depth))
        p.lift(0.12 * radius * thick)
        p.shine(0.5, share)
    return p


def contamination(
    s: Surface, light: Light, rng: np.random.Generator, strength: float
) -> DefectPatch:
    """Foreign matter on the product: a fibre or crumbs, with small shadows."""
    place = _place(s, rng)
    if rng.random() < 0.45:
        length = _radius(rng, s, 0.12, 0.35)
        curl = _line(rng, length, rng.normal(0, 1.6), rng.uniform(0, 2 * math.pi), 20)
        curl = curl + np.cumsum(rng.normal(0, 0.0025, curl.shape), axis=0)
        lines = [(curl, np.full(len(curl), rng.uniform(0.007, 0.012)))]
    else:
        spread = _radius(rng, s, 0.03, 0.1)
        lines = []
        for _ in range(rng.integers(5, 26)):
            middle = rng.normal(0, spread, 2)
            grain = rng.uniform(0.002, 0.012)
            turn, long = rng.uniform(0, 2 * math.pi), grain * rng.uniform(0.2, 1.2)
            tip = np.array([math.cos(turn), math.sin(turn)]) * long
            lines.append((np.stack([middle - tip, middle, middle + tip]), np.array([grain, grain])))
    p = DefectPatch(s, light, rng, place, _around(lines))
    dirt = p.on_product(p.strokes(lines))
    pixels = 0.012 * p.size
    move = np.array([[1, 0, -light.x * pixels], [0, 1, -light.y * pixels]])
    shadow = cv2.blur(cv2.warpAffine(dirt, move, dirt.shape[::-1]), (3, 3))
    p.surface.albedo = p.surface.albedo * (1 - 0.4 * p.on_product(shadow))
    colour = p.mean_colour(dirt)
    tone = _other_tone(rng, colour, 0.5 + 0.45 * strength)
    if rng.random() < 0.4:
        tone = 0.5 * tone + 0.5 * _vivid(rng, colour)
    p.paint(tone * (1 + 0.12 * p.noise("grain")), dirt)
    p.lift(0.006 * dirt)
    p.shine(0.05, dirt)
    return p


def dent(s: Surface, light: Light, rng: np.random.Generator, strength: float) -> DefectPatch:
    """A dent or a bulge: changes only the relief, so only its shading is visible."""
    radius = _radius(rng, s, 0.06, 0.18)
    long = rng.uniform(1, 2.2)
    p = DefectPatch(s, light, rng, _place(s, rng), _square(radius, long))
    depth = p.blob(radius, long, 0.2)
    bowl = np.clip(depth, 0, 1)
    bowl = bowl * bowl * (3 - 2 * bowl)
    sign = -1 if rng.random() < 0.75 else 1
    p.lift(sign * radius * (0.25 + 0.3 * strength) * p.on_product(bowl))
    return p


_KINDS: dict[str, Callable[[Surface, Light, np.random.Generator, float], DefectPatch]] = {
    "scratch": scratch,
    "crack": crack,
    "hole": hole,
    "stain": stain,
    "missing part": missing_part,
    "colour spot": colour_spot,
    "contamination": contamination,
    "dent": dent,
}
DEFECTS = tuple(_KINDS)


def spoil(
    surface: Surface, defect: str, light: Light, rng: np.random.Generator, push: float = 0.0
) -> tuple[slice, slice, Surface]:
    """Return the part of a scene that a defect changes; the scene itself is not modified.

    Args:
        surface: The whole scene.
        defect: One of `DEFECTS`.
        light: Direction of the light, which shapes walls and shadows.
        rng: Source of place, size, strength and tone.
        push: Minimum strength in ``[0, 1]``; to be raised after attempts that were too faint.

    Returns:
        Rows, columns, and the changed part of the scene.
    """
    patch = _KINDS[defect](surface, light, rng, push + (1 - push) * rng.random())
    return patch.rows, patch.columns, patch.surface
