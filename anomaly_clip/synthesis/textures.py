"""Textures of Perlin anomalies, and augmentations that vary them.

The ten augmentations are those of DRAEM (arXiv 2108.07610). The ranges of sharpness, posterise and
autocontrast are the defaults of the library that DRAEM's code uses, quoted from memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.demo.surfaces import FAMILIES
from anomaly_clip.folders import image_files
from anomaly_clip.images import open_image

__all__ = ["CHANGES", "Source", "augmented", "texture"]

Source = Literal["folder", "self", "noise", "code"]
Image = NDArray[np.uint8]

PIECES = 8  # pieces along each side for source self
SMOOTH = (1.0, 8.0)  # range of the Gaussian filter's standard deviation, at NOISE_SIDE pixels
NOISE_SIDE = 256
CODE_SIDE = 128  # side in pixels of a generated surface


def texture(image: Image, source: Source, folder: str | None, rng: np.random.Generator) -> Image:
    """Return a texture of the image's size.

    Args:
        image: ``(H, W, 3)``.
        source: Origin of the texture; see :class:`~anomaly_clip.synthesis.perlin.Perlin`.
        folder: Folder of texture images.
        rng: Source of all random numbers.
    """
    height, width = image.shape[:2]
    if source == "folder" and folder is not None:
        files = _textures(folder)
        if files:
            file = files[int(rng.integers(len(files)))]
            whole = np.asarray(open_image(file))
            return _as_image(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA))
    if source == "noise":
        sigma = float(np.exp(rng.uniform(*np.log(SMOOTH))))
        coarse = rng.normal(size=(NOISE_SIDE, NOISE_SIDE, 3)).astype(np.float32)
        blurred = cv2.GaussianBlur(coarse, (0, 0), sigma).astype(np.float32, copy=False)
        blurred = np.asarray(cv2.resize(blurred, (width, height)), np.float32)
        smooth = blurred / max(float(blurred.std()), 1e-6)
        tone, spread = rng.uniform(60, 190, 3), rng.uniform(20, 60)
        return _as_image((tone + spread * smooth).clip(0, 255))
    if source == "code":
        return _surface((height, width), rng)
    return _shuffled(image, rng)


def augmented(image: Image, count: int, rng: np.random.Generator) -> Image:
    """Return the image after ``count`` different augmentations, sampled without replacement."""
    for number in rng.choice(len(CHANGES), size=min(count, len(CHANGES)), replace=False):
        image = CHANGES[number](image, rng)
    return image


@lru_cache(maxsize=8)
def _textures(folder: str) -> tuple[Path, ...]:
    listed = sorted(image_files(Path(folder).expanduser()))
    files = tuple(file for file in listed if file.is_file())
    if len(files) < len(listed):
        missing = next(file for file in listed if not file.is_file())
        number = len(listed) - len(files)
        warnings.warn(f"{missing}: {number} such links lead to no texture image", stacklevel=2)
    if not files:
        warnings.warn(
            f"{folder}: contains no texture images, so pieces of the image itself are used instead",
            stacklevel=2,
        )
    return files


def _shuffled(image: Image, rng: np.random.Generator) -> Image:
    """Return the pieces of an image in random order."""
    height, width = image.shape[:2]
    rows, columns = -(-height // PIECES), -(-width // PIECES)
    padded = cv2.copyMakeBorder(
        image, 0, rows * PIECES - height, 0, columns * PIECES - width, cv2.BORDER_REFLECT
    )
    pieces = padded.reshape(PIECES, rows, PIECES, columns, 3).swapaxes(1, 2)
    pieces = pieces.reshape(PIECES * PIECES, rows, columns, 3)[rng.permutation(PIECES * PIECES)]
    whole = pieces.reshape(PIECES, PIECES, rows, columns, 3).swapaxes(1, 2)
    return np.ascontiguousarray(whole.reshape(padded.shape)[:height, :width])


def _surface(size: tuple[int, int], rng: np.random.Generator) -> Image:
    """Return a generated surface of the demo data."""
    names = [name for name, look in CATEGORIES.items() if not FAMILIES[look.family].is_object]
    name = names[int(rng.integers(len(names)))]
    drawn = draw_photograph(name, int(rng.integers(2**31)), 0, size=CODE_SIDE).image
    return _as_image(cv2.resize(drawn, size[::-1], interpolation=cv2.INTER_LINEAR))


def _lookup_table(values: NDArray[np.float64]) -> Image:
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def _as_image(values: NDArray[np.generic]) -> Image:
    return np.ascontiguousarray(values).astype(np.uint8, copy=False)


LEVELS = np.arange(256, dtype=np.float64)


def gamma(image: Image, rng: np.random.Generator) -> Image:
    """Apply a random gamma to each channel."""
    tables = [_lookup_table(255 * (LEVELS / 255) ** rng.uniform(0.5, 2.0)) for _ in range(3)]
    return _as_image(cv2.LUT(image, np.stack(tables, axis=-1)[None]))


def brightness(image: Image, rng: np.random.Generator) -> Image:
    """Scale and shift brightness."""
    return _as_image(
        cv2.LUT(image, _lookup_table(LEVELS * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)))
    )


def sharpness(image: Image, rng: np.random.Generator) -> Image:
    """Blur slightly or sharpen."""
    factor = rng.uniform(0, 3)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = cv2.filter2D(image, -1, kernel)
    return _as_image(cv2.addWeighted(image, factor, smooth, 1 - factor, 0))


def hue_and_saturation(image: Image, rng: np.random.Generator) -> Image:
    """Shift hue and saturation; each has values from 0 to 255."""
    hue, saturation = rng.uniform(-50, 50, 2)
    parts = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turned = ((LEVELS + round(hue)) % 256).astype(np.uint8)
    tables = np.stack(
        [turned, _lookup_table(LEVELS + saturation), LEVELS.astype(np.uint8)], axis=-1
    )
    return _as_image(cv2.cvtColor(cv2.LUT(parts, tables[None]), cv2.COLOR_HSV2RGB_FULL))


def solarise(image: Image, rng: np.random.Generator) -> Image:
    """Invert bright values with probability 1/2."""
    if rng.random() < 0.5:
        return image
    threshold = rng.uniform(32, 128)
    return _as_image(
        cv2.LUT(image, _lookup_table(np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS)))
    )


def posterise(image: Image, rng: np.random.Generator) -> Image:
    """Keep one to eight bits of each value."""
    kept = 256 - 2 ** (8 - int(rng.integers(1, 9)))
    return image & np.uint8(kept)


def invert(image: Image, rng: np.random.Generator) -> Image:
    """Return the negative."""
    return 255 - image


def autocontrast(image: Image, rng: np.random.Generator) -> Image:
    """Stretch each channel after cutting off a fraction of pixels at both ends of its histogram."""
    cut = rng.uniform(0, 20)
    tables = []
    for channel in range(3):
        low, high = np.percentile(image[::2, ::2, channel], [cut, 100 - cut])
        tables.append(_lookup_table((LEVELS - low) * (255 / max(high - low, 1.0))))
    return _as_image(cv2.LUT(image, np.stack(tables, axis=-1)[None]))


def equalise(image: Image, rng: np.random.Generator) -> Image:
    """Equalise the histogram of each channel."""
    return np.stack([cv2.equalizeHist(channel) for channel in cv2.split(image)], axis=-1)


def rotate(image: Image, rng: np.random.Generator) -> Image:
    """Rotate by up to 45 degrees; corners are filled by reflection (our choice)."""
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), float(rng.uniform(-45, 45)), 1.0)
    border = cv2.BORDER_REFLECT_101
    return _as_image(cv2.warpAffine(image, turn, (width, height), borderMode=border))


CHANGES: tuple[Callable[[Image, np.random.Generator], Image], ...] = (
    gamma,
    brightness,
    sharpness,
    hue_and_saturation,
    solarise,
    posterise,
    invert,
    autocontrast,
    equalise,
    rotate,
)
