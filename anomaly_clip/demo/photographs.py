"""Demo images: generated inspection photographs with exact masks and paired normal images.

An image shows a surface or an object (`surfaces`), optionally with a defect (`defects`). This
module adds light, lens and sensor noise. An image depends only on the arguments, such as category,
seed and index, and needs no file. None of this is from a paper: categories, colours and all
constants are our choice, adjusted by eye.

A defect changes colour, relief and outline *before* lighting, so that it is lit, blurred and
covered with noise like the rest. Its mask is then computed by comparison with the paired normal
image. The mask contains the pixels where a channel differs by at least `VISIBLE` levels. Gaps up to
`CLOSING` image widths are closed, or up to `WIDE_CLOSING` for a dent, because the line between the
bright and the dark side of a dent is unchanged. Outside the mask the pixels of the normal image are
restored, so the paired images are equal there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.demo.canvas import Canvas, Category, Light, Plane, Surface
from anomaly_clip.demo.defects import DEFECTS, spoil
from anomaly_clip.demo.surfaces import FAMILIES, fitting_defects

__all__ = [
    "CATEGORIES",
    "DEFECTS",
    "NAME_OF_WORDS",
    "Category",
    "Photograph",
    "caption_of",
    "draw_pair",
    "draw_photograph",
]

VISIBLE = 6  # grey levels: above the sensor noise (0.5 to 4.5); the eye sees 1 % of the range
CLOSING = 0.02  # image widths
WIDE_CLOSING = 0.07  # for dents
LEAST_CHANGE = 22  # grey levels: largest difference over the channels, averaged over the mask
SHARES = (0.002, 0.1)  # of the image area; a defect outside these bounds is sampled again
TRIES = 12
LEAST_SIZE = 64  # pixels; fine patterns would vanish in smaller images
RENDERED = 128  # pixels; smaller images are rendered at twice their size and averaged
_SCENE, _DEFECT, _SENSOR = 0, 1, 2  # keys of separate random number streams

_C = Category
CATEGORIES: dict[str, Category] = {
    "red_fabric": _C("weave", "red woven fabric", (0xA83232, 0x8C2020), gloss=0.02),
    "blue_denim": _C("weave", "blue denim cloth", (0x33507E, 0xA9B4C0), scale=0.75, gloss=0.02),
    "green_canvas": _C("weave", "green canvas", (0x55663A, 0x687848), scale=1.25, gloss=0.02),
    "grey_linen": _C("weave", "grey linen cloth", (0xB4AEA0, 0x9A9488), scale=0.9, gloss=0.02),
    "oak": _C("wood", "oak wood board", (0xC79A63, 0x8F6234), gloss=0.05),
    "walnut": _C("wood", "walnut wood board", (0x7A5338, 0x3F2819), scale=1.2, gloss=0.08),
    "pine": _C("wood", "pine wood board", (0xE2BE86, 0xB98046), scale=1.5, gloss=0.05),
    "brushed_steel": _C("brushed", "brushed steel plate", (0xB4B8BC,), metal=0.8, gloss=0.2),
    "brushed_copper": _C("brushed", "brushed copper plate", (0xC4804F,), metal=0.8, gloss=0.2),
    "brushed_brass": _C("brushed", "brushed brass plate", (0xC2A052,), metal=0.8, gloss=0.2),
    "white_tiles": _C("tiles", "white tiled wall", (0xC9C9C3, 0x85837B), gloss=0.5, count=4),
    "brick_wall": _C("tiles", "red brick wall", (0x9C5340, 0xB0A698), gloss=0.02, count=5),
    "blue_mosaic": _C("tiles", "blue mosaic", (0x2E5E94, 0xC4C4BC, 0x6FA3BE), gloss=0.5, count=6),
    "grey_granite": _C("granite", "grey granite slab", (0xA8A6A4, 0xD0CCC6, 0x3C3B3A)),
    "pink_granite": _C("granite", "pink granite slab", (0xBE8C7C, 0xD6B8A8, 0x4C4442)),
    "black_granite": _C("granite", "black granite slab", (0x2C2D30, 0x45474B, 0x8E9298)),
    "blue_stripes": _C("stripes", "blue striped cloth", (0x355C99, 0xDCD8CE), gloss=0.02),
    "red_stripes": _C("stripes", "red striped cloth", (0xA63A3E, 0xE4DCCB), scale=0.7, gloss=0.02),
    "yellow_stripes": _C("stripes", "yellow striped cloth", (0xD2A637, 0x6C6A66), gloss=0.02),
    "brown_leather": _C("leather", "brown leather", (0x7C4A2C, 0x40230F), gloss=0.14),
    "black_leather": _C("leather", "black leather", (0x35332F, 0x121110), scale=1.2, gloss=0.2),
    "tan_leather": _C("leather", "tan leather", (0xBE9060, 0x80582F), scale=0.8, gloss=0.1),
    "steel_mesh": _C("grid", "steel mesh", (0xA6AAAE,), ground=0x24262A, metal=0.7, gloss=0.4),
    "brass_mesh": _C("grid", "brass mesh", (0xB2924A,), ground=0x3A3836, metal=0.7, gloss=0.3),
    "green_net": _C("grid", "green plastic net", (0x2F6B46,), 0xC9C8C0, 1.2, gloss=0.3),
    "concrete": _C("plaster", "grey concrete wall", (0x9A9A96, 0x7C7C78), gloss=0.02),
    "white_plaster": _C("plaster", "white plaster wall", (0xDAD7CE, 0xB9B5A8), gloss=0.02),
    "sandstone": _C("plaster", "yellow sandstone block", (0xC6A876, 0xA47E4C), gloss=0.02),
    "green_carpet": _C("carpet", "green carpet", (0x45704A, 0x335A3A), gloss=0.0),
    "grey_carpet": _C("carpet", "grey carpet", (0x7C7A7A, 0x5C5B5E), scale=1.25, gloss=0.0),
    "steel_washer": _C("washer", "steel washer", (0xA9ADB1,), 0x34383C, metal=0.8, gloss=0.3),
    "brass_washer": _C("washer", "brass washer", (0xC09A48,), 0x4A4E56, metal=0.8, gloss=0.3),
    "rubber_ring": _C("washer", "black rubber ring", (0x333333,), 0xB9B8B2, gloss=0.12),
    "steel_nut": _C("nut", "steel nut", (0x9FA3A7,), 0x58544C, metal=0.8, gloss=0.4),
    "brass_nut": _C("nut", "brass nut", (0xBE994A,), 0x33404C, scale=0.9, metal=0.8, gloss=0.4),
    "steel_gear": _C("gear", "steel gear", (0x9EA2A6,), 0x6B5A48, metal=0.7, gloss=0.3, count=18),
    "white_gear": _C("gear", "white plastic gear", (0xD8D8D2,), 0x3C5466, gloss=0.3, count=12),
    "blue_capsule": _C("capsule", "blue capsule", (0x2C62A8, 0xDADAD6), 0x9C9A94, gloss=0.7),
    "red_capsule": _C("capsule", "red capsule", (0xB03030, 0xD8AE3A), 0xC6C8C6, gloss=0.7),
    "green_capsule": _C("capsule", "green capsule", (0x3C7A48, 0x3C7A48), 0x383A40, gloss=0.7),
    "white_pill": _C("pill", "white pill", (0xDEDCD6,), 0x3C4654, gloss=0.06),
    "pink_pill": _C("pill", "pink pill", (0xD08C94, 0xA05060), 0xB0B0AA, scale=0.9, gloss=0.1),
    "yellow_tablet": _C("pill", "long yellow tablet", (0xD4B858,), 0x5E6C60, gloss=0.1, count=1),
    "wooden_button": _C("button", "wooden button", (0xC09058, 0x86562C), 0xC4C0B6, count=2),
    "blue_button": _C("button", "blue button", (0x2C4878, 0x3E6296), 0xB8AE9C, gloss=0.6, count=4),
    "horn_button": _C("button", "horn button", (0x54382A, 0x2C1C14), 0x8C98A0, gloss=0.5, count=4),
    "biscuit": _C("cookie", "butter biscuit", (0xD6A862, 0x9C6228), 0x5C6C80, gloss=0.02),
    "chocolate_cookie": _C(
        "cookie", "chocolate chip cookie", (0xC49058, 0x85511F, 0x38200F), 0xAFB4B4, gloss=0.04
    ),
}  # fmt: skip
NAME_OF_WORDS = {category.words: name for name, category in CATEGORIES.items()}
"""Mapping from category names in prompts to keys of `CATEGORIES`."""
# These numbers are part of the seeds: append new categories to CATEGORIES, never insert them.
_NUMBERS = {name: number for number, name in enumerate(CATEGORIES)}


class Photograph(NamedTuple):
    """One demo image with its mask and labels."""

    image: NDArray[np.uint8]
    """``(H, W, 3)``, RGB."""
    mask: NDArray[np.bool_]
    """``(H, W)``, True where the defect is visible; all False for a normal image."""
    category: str
    defect: str
    """One of `DEFECTS`, or ``good``."""


def draw_photograph(
    category: str, seed: int, index: int, defect: str | None = None, size: int = 128
) -> Photograph:
    """Draw one image; ``defect`` is None or ``good`` for a normal one.

    >>> photo = draw_photograph("brass_washer", seed=0, index=3, defect="scratch")
    >>> photo.image.shape, bool(photo.mask.any())
    ((128, 128, 3), True)
    """
    return _draw(category, seed, index, defect, size)[-1]


def draw_pair(
    category: str,
    seed: int,
    index: int,
    defect: str,
    size: int = 128,
    look: Category | None = None,
) -> tuple[Photograph, Photograph]:
    """Draw one scene without and with a defect; the two images are equal outside the mask.

    Args:
        category: Key of `CATEGORIES`.
        seed: Seed of the images.
        index: Number of the scene.
        defect: One of `DEFECTS`.
        size: Side in pixels.
        look: Appearance of the product; see `surfaces.vary`. Default: that of the category.
    """
    if defect == "good":
        raise ValueError(
            f"paired images differ by a defect, got {defect}; use one of {', '.join(DEFECTS)}"
        )
    normal, defective = _draw(category, seed, index, defect, size, look)
    return normal, defective


def caption_of(photograph: Photograph | tuple[str, str]) -> str:
    """Return a caption for an image, or for a pair of category and defect.

    >>> caption_of(("oak", "missing part"))
    'a photo of an oak wood board with a missing part.'
    >>> caption_of(("oak", "good"))
    'a photo of an oak wood board without defect.'
    """
    name, defect = photograph[-2:]  # of a pair, or of a Photograph
    _check(name, defect)
    words = CATEGORIES[name].words
    if defect == "good":
        state = "without defect"
    else:
        state = "with contamination" if defect == "contamination" else f"with a {defect}"
    return f"a photo of {'an' if words[0] in 'aeiou' else 'a'} {words} {state}."


def _check(category: str, defect: str) -> None:
    if category not in CATEGORIES:
        raise ValueError(f"{category!r} is not a demo category; use one of {', '.join(CATEGORIES)}")
    if defect != "good" and defect not in DEFECTS:
        raise ValueError(f"{defect!r} is not a demo defect; use one of good, {', '.join(DEFECTS)}")
    fitting = fitting_defects(CATEGORIES[category])
    if defect != "good" and defect not in fitting:
        raise ValueError(f"{category!r} cannot have {defect!r}; use one of {', '.join(fitting)}")


class Camera(NamedTuple):
    """Exposure, reflections, blur and noise of one image."""

    gain: Plane  # (3, H, W), product of light fall-off, vignette, exposure and white balance
    mirrored: float  # angle at which metal reflects the bright side of the room
    blur: float  # image widths
    noise: float  # grey levels


def _draw(
    category: str,
    seed: int,
    index: int,
    defect: str | None,
    size: int,
    look: Category | None = None,
) -> tuple[Photograph, ...]:
    """Return the normal image, followed by the defective one if a defect is requested.

    Only the patch with the defect is lit and developed again. The defect is sampled again if it is
    too small, too large or too faint.
    """
    defect = defect or "good"
    _check(category, defect)
    if size < LEAST_SIZE:
        raise ValueError(f"demo images need a side of {LEAST_SIZE} pixels or more, got {size}")
    key = [seed, _NUMBERS[category], index]
    rng = np.random.default_rng([*key, _SCENE])
    finer = 1 if size >= RENDERED else 2
    look = look or CATEGORIES[category]
    family = FAMILIES[look.family]
    light = _draw_light(rng)
    camera = _draw_camera(rng, light, size * finer)
    surface = family.draw(Canvas(look, light, rng, size * finer, family.is_object))
    scene = _blur(_expose(surface, light, camera), camera)
    grain = _sensor_noise(np.random.default_rng([*key, _SENSOR]), size, camera)
    normal = _develop(scene, grain)
    defect_free = Photograph(normal, np.zeros((size, size), np.bool_), category, "good")
    if defect == "good":
        return (defect_free,)
    best, least_miss = defect_free, math.inf
    for attempt in range(TRIES):
        rng = np.random.default_rng([*key, _DEFECT, DEFECTS.index(defect), attempt])
        rows, columns, spoilt = spoil(surface, defect, light, rng, attempt / TRIES)
        before = _expose(surface.cut(rows, columns), light, camera, rows, columns)
        change = _blur(_expose(spoilt, light, camera, rows, columns) - before, camera)
        part = tuple(slice(cut.start // finer, cut.stop // finer) for cut in (rows, columns))
        changed = _develop(scene[rows, columns] + change, grain[part])
        difference = _difference(normal[part], changed)
        mask = _close(difference >= VISIBLE, size * (WIDE_CLOSING if defect == "dent" else CLOSING))
        count = max(int(np.count_nonzero(mask)), 1)
        share, strength = count / size**2, float((difference * mask).sum()) / count
        miss = max(SHARES[0] / share, share / SHARES[1], LEAST_CHANGE / max(strength, 0.1))
        if miss < least_miss:
            best = Photograph(normal.copy(), np.zeros_like(defect_free.mask), category, defect)
            cv2.copyTo(changed, mask, best.image[part])
            best.mask[part] = mask
            least_miss = miss
        if miss <= 1:
            break
    assert best.mask.any()
    return defect_free, best


def _draw_light(rng: np.random.Generator) -> Light:
    turn, tilt = rng.uniform(-math.pi, math.pi), rng.uniform(0.25, 0.95)  # tilt from the vertical
    flat = math.sin(tilt)
    return Light(flat * math.cos(turn), flat * math.sin(turn), math.cos(tilt), rng.random())


def _draw_camera(rng: np.random.Generator, light: Light, side: int) -> Camera:
    """Sample exposure, fall-off from the lamp, vignette, white balance, focus and noise."""
    x, y = _axes(side)
    fall = rng.uniform(0, 0.45)
    turn = math.atan2(light.y, light.x) + rng.normal(0, 0.4)
    slope_x, slope_y = fall * math.cos(turn), fall * math.sin(turn)
    vignette = rng.uniform(0, 0.45)
    plane = (1 + slope_x * x + slope_y * y) * (1 - vignette * (x * x + y * y))
    balance = np.exp(rng.normal(0, 0.02, (3, 1, 1)) + rng.uniform(-0.26, 0.2))
    return Camera(
        gain=plane * balance.astype(np.float32),
        mirrored=rng.uniform(-math.pi, math.pi),
        blur=rng.uniform(0, 1) ** 2 * 0.008,
        noise=rng.uniform(0.5, 4.5),
    )


@lru_cache(maxsize=8)
def _axes(side: int) -> tuple[Plane, Plane]:
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    return axis[None, :], axis[:, None]


@lru_cache(maxsize=8)
def _noise_stock(size: int) -> Plane:
    """Return sensor noise of twice the image side; it is mostly grey, with a little colour."""
    rng = np.random.default_rng([11, size])
    shared = rng.standard_normal((2 * size, 2 * size, 1), np.float32)
    return 0.85 * shared + 0.5 * rng.standard_normal((2 * size, 2 * size, 3), np.float32)


def _sensor_noise(rng: np.random.Generator, size: int, camera: Camera) -> Plane:
    """Cut the noise of one image, ``(H, W, 3)`` in grey levels, from the cached noise."""
    top, left = rng.integers(0, size + 1, 2)
    return _noise_stock(size)[top : top + size, left : left + size] * camera.noise


def _expose(
    surface: Surface,
    light: Light,
    camera: Camera,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Plane:
    """Return the light that a scene, or a part of one, reflects into the camera.

    The lighting model has Lambertian shading with a soft sky, a highlight and, for metal,
    reflections of a bright and a dark side of the room. It is cheap and looks realistic enough.

    Returns:
        ``(H, W, 3)``, 1 = white.
    """
    side = camera.gain.shape[-1]
    scale = side / 8  # the Sobel kernel sums to eight times the slope
    slope_x = cv2.Sobel(surface.height, cv2.CV_32F, 1, 0, scale=scale)
    slope_y = cv2.Sobel(surface.height, cv2.CV_32F, 0, 1, scale=scale)
    upright = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)  # z of the surface normal
    facing = (light.z - slope_x * light.x - slope_y * light.y) * upright
    sky = 0.35 + 0.3 * light.softness
    shade = sky * upright + (1 - sky) * np.maximum(facing, 0) / light.z
    length = math.sqrt(2 + 2 * light.z)  # of the half-way vector
    glance = np.maximum(facing + upright, 0) / length
    shine = glance
    for _ in range(5):  # to the 32nd power, several times faster than **
        shine = shine * shine
    tint: Plane | float = 1.0
    if surface.metal > 0:
        axis_x, axis_y = math.cos(camera.mirrored), math.sin(camera.mirrored)
        tilt = -2 * upright * upright * (slope_x * axis_x + slope_y * axis_y)
        tilt = np.clip(tilt, -1, 1)
        room = 1 + 0.75 * tilt * (1.5 - 0.5 * tilt * tilt)
        shade = shade + surface.metal * (room - shade)
        tint = 0.4 + 0.6 * surface.albedo
    lit = surface.albedo * shade + surface.gloss * shine * tint
    if surface.cover is not None:
        under = surface.under
        lit = under + surface.cover * (lit - under)
    return cv2.merge(list(lit * camera.gain[:, rows, columns]))


def _blur(image: Plane, camera: Camera) -> Plane:
    sigma = camera.blur * camera.gain.shape[-1]
    return image if sigma < 0.3 else cv2.GaussianBlur(image, (0, 0), sigma)


def _develop(image: Plane, grain: Plane) -> NDArray[np.uint8]:
    """Resize to the grain's size, compress highlights, add the grain, round and clip."""
    height, width = grain.shape[:2]
    if len(image) != height:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if image.max() > 0.8:
        bent = np.maximum(image - 0.8, 0)
        image = image - bent + bent / (1 + 3.5 * bent)
    levels = image * 255
    levels += grain
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def _difference(normal: NDArray[np.uint8], defective: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the largest difference over the channels, ``(H, W)`` in grey levels."""
    red, green, blue = cv2.split(cv2.absdiff(normal, defective))
    return cv2.max(cv2.max(red, green), blue).astype(np.uint8, copy=False)


def _close(changed: NDArray[np.bool_], gap: float) -> NDArray[np.uint8]:
    """Close the gaps of a mask that are at most ``gap`` pixels long; the values are 0 and 1."""
    width = 2 * round(gap / 2) + 1
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    closed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_CLOSE, brush)
    return closed.astype(np.uint8, copy=False)
