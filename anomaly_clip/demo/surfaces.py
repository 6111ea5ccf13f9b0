"""Procedural surfaces and objects that the demo images show.

A family is a function from a `Canvas` (size, pose, generator, noise) to a `Surface` (colour, relief
and outline, before lighting).
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from anomaly_clip.demo.canvas import Canvas, Category, Plane, Surface, mix, ramp, rgb

__all__ = ["FAMILIES", "fitting_defects", "vary"]

LEAST_CONTRAST = 0.1  # between an object and its ground, mean over the channels; 1 = white on black
LOOK_TRIES = 8
RECOLOURED = 0.6  # fraction of varied looks with new hues
DARKEST, LIGHTEST = 0.04, 0.92  # bounds of the channels of a varied colour


def weave(c: Canvas) -> Surface:
    """Plain weave: threads along u and v alternate over and under each other."""
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
    """Growth rings, cut lengthwise, with pores along the grain."""
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
    """Sheet metal with hairlines along u and a broad gleam across them."""
    fine, broad = c.noise("grain", 0.9, 60), c.noise("fractal", 0.7, 40)
    gleam = c.v * c.rng.uniform(1.5, 3.5) + c.rng.uniform(-1, 1)
    gleam = 1 / (1 + gleam * gleam)
    tone = 0.72 + 0.3 * gleam + 0.05 * fine + 0.05 * broad + 0.02 * c.noise("cloud")
    return c.surface(c.colour(0) * tone, 0.0006 * (fine + broad), c.colour(0) * 1.1)


def tiles(c: Canvas) -> Surface:
    """Rows of glazed tiles in varying tones, with rough joints."""
    pitch = c.zoom / c.category.count
    v = c.v / pitch
    row = np.floor(v)
    aspect = 1.0 if len(c.category.colours) > 2 else 2.0  # mosaic or brick bond
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
    facet = 0.8 + 0.4 * (grain - np.floor(grain))  # each grain reflects a different light
    albedo = albedo * facet * (1 + 0.07 * speck + 0.05 * vein) * (0.88 + 0.12 * ramp(edge, 0, 0.2))
    return c.surface(albedo, 0.0004 * speck, c.colour(0) * 0.85)


def stripes(c: Canvas) -> Surface:
    """Cloth with printed stripes, broad and narrow ones, in gentle folds."""
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
    swing = 0.5 * radius * np.cos(math.pi * (i + j))  # sign: the wire on top at a crossing
    near_u, near_v = (ramp(d, 0.45 * pitch, 0.1 * pitch) for d in (du, dv))
    round_u, round_v = (np.sqrt(np.maximum(1.15 * radius**2 - d * d, 0)) for d in (dv, du))
    wire_u, wire_v = c.edge(dv - radius), c.edge(du - radius)
    along_u, along_v = wire_u * (round_u - swing * near_u), wire_v * (round_v + swing * near_v)
    top, lower = np.maximum(along_u, along_v), np.minimum(along_u, along_v)
    touch = ramp(top - lower, 0.5 * radius, 0.0) * ramp(lower, 0, 0.004)  # dark where wires meet
    tone = (1 + 0.06 * c.noise("grain") + 0.06 * c.noise("fractal")) * (1 - 0.35 * touch)
    far = 0.02 + 0.1 * c.rng.random()  # distance from the ground
    return c.object(c.colour(0) * tone, top, np.maximum(wire_u, wire_v), far)


def plaster(c: Canvas) -> Surface:
    """Cast or trowelled wall: clouds, grit, and pores of trapped air."""
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
    """Densely packed loops of yarn in two similar tones."""
    centre, value = c.noises(("cell_centre", "cell_value"), 0.52 * c.zoom)
    lay, fibre = c.noise("cloud"), c.noise("grain", 0.8, 2)
    dome = np.clip(1 - centre * centre * 1.5, 0, 1)
    other = c.rng.uniform(0.3, 0.9)
    albedo = mix(c.colour(0), c.colour(1, 0.15), ramp(value, other, other + 0.1))
    albedo = albedo * ((0.5 + 0.5 * dome) * (1 + 0.14 * fibre + 0.08 * lay + 0.2 * (value - 0.5)))
    height = 0.02 * c.zoom * dome + 0.002 * fibre + 0.006 * lay
    return c.surface(albedo, height, c.colour(0) * 0.3)


def bevel(distance: Plane, width: float, slope: float) -> Plane:
    """Return the relief of a rounded edge: a border of the given width, flat inside."""
    t = np.clip(1 + distance / width, 0, 1)
    return 0.5 * slope * width * (1 - t * t)


def turned_gleam(c: Canvas, r: Plane) -> Plane:
    """Return the reflection of lathe marks, two bright sectors; values in ``[-1, 1]``."""
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
    """A toothed wheel with hub, bore and weight-saving holes."""
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
    """Two gelatine halves, the cap pushed over the body."""
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
    """A biscuit: uneven outline, brown rim, crumbs, and chips if there is a third colour."""
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
    """Drawing function of a family, with the defects that its products can have."""

    draw: Callable[[Canvas], Surface]
    is_object: bool
    defects: tuple[str, ...]
    counts: tuple[int, ...] = (0,)
    """Possible values of `Category.count`."""


def _without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in (*_MARKS, "dent") if name not in names)


FAMILIES: dict[str, Family] = {
    "weave": Family(weave, False, _without("scratch", "crack", "dent")),
    "wood": Family(wood, False, _without()),
    "brushed": Family(brushed, False, _without("missing part")),
    "tiles": Family(tiles, False, _without("dent"), (3, 4, 5, 6, 7)),
    "granite": Family(granite, False, _without("dent")),
    "stripes": Family(stripes, False, _without("crack", "scratch", "dent")),
    "leather": Family(leather, False, _without("missing part")),
    "grid": Family(grid, True, _without("crack", "hole", "dent")),
    "plaster": Family(plaster, False, _without()),
    "carpet": Family(carpet, False, _without("scratch", "crack", "dent")),
    "washer": Family(washer, True, _without("hole")),
    "nut": Family(nut, True, _without("hole")),
    "gear": Family(gear, True, _without("hole"), tuple(range(9, 23))),
    "capsule": Family(capsule, True, _without()),
    "pill": Family(pill, True, _without("dent"), (0, 1)),
    "button": Family(button, True, _without("dent"), (2, 4)),
    "cookie": Family(cookie, True, _without("scratch", "dent")),
}


def fitting_defects(category: Category) -> tuple[str, ...]:
    """Return the kinds of defects that products of a category can have."""
    return FAMILIES[category.family].defects


def vary(look: Category, rng: np.random.Generator) -> Category:
    """Return a product of the same family with a different look.

    Colours, size, metal, gloss and the number of parts vary. Either all colours roughly keep their
    hue, or all get a new hue, from grey to vivid. A detector can therefore not rely on an unusual
    colour alone. The colours of an object and its ground stay distinct.
    """
    change = _another_hue if rng.random() < RECOLOURED else _another_tone
    colours, ground = look.colours, look.ground
    for _ in range(LOOK_TRIES):
        colours = tuple(change(colour, rng) for colour in look.colours)
        ground = change(look.ground, rng)
        apart = float(np.abs(rgb(colours[0]) - rgb(ground)).mean())
        if not FAMILIES[look.family].is_object or apart > LEAST_CONTRAST:
            break
    return replace(
        look,
        colours=colours,
        ground=ground,
        scale=look.scale * math.exp(rng.uniform(-0.3, 0.3)),
        metal=min(1.0, look.metal * rng.uniform(0.7, 1.3)),
        gloss=look.gloss * rng.uniform(0.3, 1.7) + 0.15 * rng.exponential() * (rng.random() < 0.3),
        count=int(rng.choice(FAMILIES[look.family].counts)),
    )


def _another_tone(colour: int, rng: np.random.Generator) -> int:
    """Lighten or darken a colour ``0xRRGGBB`` and tint it."""
    changed = rgb(colour).ravel() * np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.12, 3))
    return _packed(changed + rng.normal(0, 0.04))


def _another_hue(colour: int, rng: np.random.Generator) -> int:
    """Replace hue and saturation of a colour ``0xRRGGBB`` at random; roughly keep its lightness."""
    light = float(rgb(colour).max()) * math.exp(rng.normal(0, 0.25))
    hue, saturation = rng.random(), rng.random()
    return _packed(colorsys.hsv_to_rgb(hue, saturation, light))


def _packed(colour: Iterable[float]) -> int:
    """Pack a colour as ``0xRRGGBB``, clipped to between ``DARKEST`` and ``LIGHTEST``."""
    red, green, blue = (round(255 * min(max(float(x), DARKEST), LIGHTEST)) for x in colour)
    return red << 16 | green << 8 | blue
