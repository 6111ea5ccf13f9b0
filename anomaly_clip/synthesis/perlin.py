"""Perlin anomalies as in DRAEM (arXiv 2108.07610): a texture blended in where noise is high.

The noise is a weighted sum over lattice points. The weights factorise into rows and columns, so the
noise of a whole image is computed by a few products of small matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.records import Synthetic
from anomaly_clip.synthesis.checks import check_fields, check_image
from anomaly_clip.synthesis.recipe import Image, Mask, Recipe
from anomaly_clip.synthesis.textures import Source, augmented, texture

__all__ = ["Perlin", "perlin_noise"]

LARGEST = 5  # largest exponent: at most 2 ** 5 cells per axis
STEP = 2**LARGEST  # noise is generated with sides that are multiples of this, then cropped

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Perlin(Recipe):
    """Perlin recipe; call it with an image and a random generator.

    Args:
        threshold: Noise value above which a pixel is defective; noise lies in about [-1, 1].
        source: Origin of the textures: a folder of images (folder), shuffled pieces of the same
            image (self), smoothed colour noise (noise), or generated surfaces (code).
        folder: Folder of texture images for source folder, searched recursively (DRAEM: DTD).
        num_changes: Number of different augmentations of the texture, out of ten.
        least_opacity: Smallest weight of the texture; the largest is 1.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.synthesis.perlin import Perlin
        >>> grey = np.full((64, 64, 3), 128, np.uint8)
        >>> result = Perlin(source="noise")(grey, np.random.default_rng(0))
        >>> bool((result.image == grey)[~result.mask].all())
        True
    """

    threshold: float = 0.5
    source: Source = "self"
    folder: str | None = None
    num_changes: int = 3
    least_opacity: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self)
        check_between("threshold", self.threshold, -1, 1, open_low=True, open_high=True)
        check_between("least_opacity", self.least_opacity, 0, 1, open_low=True)
        check_at_least("num_changes", self.num_changes, 0)
        if self.source == "folder" and self.folder is None:
            raise ValueError(
                f"source {self.source} needs texture images: set folder, got {self.folder}"
            )

    def __call__(
        self,
        image: Image,
        rng: np.random.Generator,
        donor: Callable[[], Image] | None = None,
        foreground: Mask | None = None,
    ) -> Synthetic:
        """Blend a texture into the image, inside the foreground only; the mask may be empty."""
        check_image(image)
        height, width = image.shape[:2]
        cells = tuple(int(2 ** rng.integers(0, LARGEST + 1)) for _ in range(2))
        noise = perlin_noise((height, width), (cells[0], cells[1]), rng)
        angle = float(rng.uniform(-90, 90))
        mask = _rotated(noise, angle) > self.threshold
        if foreground is not None:
            mask &= foreground
        drawn = texture(image, self.source, self.folder, rng)
        changed = augmented(drawn, self.num_changes, rng)
        opacity = float(1 - rng.uniform(0, 1 - self.least_opacity))
        result = image.copy()
        mixed = opacity * changed[mask].astype(np.float32) + (1 - opacity) * image[mask]
        result[mask] = np.rint(mixed).astype(np.uint8)
        info: dict[str, Any] = {"recipe": "perlin", "cells": cells, "opacity": opacity}
        return Synthetic(result, mask, mask.astype(np.float32), info)


def perlin_noise(
    size: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return gradient noise in about [-1, 1].

    Args:
        size: Height and width in pixels; any size, because noise is generated at the next multiple
            of 32 and cropped.
        cells: Cells of the lattice along height and width, powers of 2 up to 32.
        rng: Source of the unit gradients at the lattice points.
    """
    angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    whole = [-(-side // STEP) * STEP for side in size]
    near_y, far_y = _lattice(whole[0], cells[0])
    near_x, far_x = _lattice(whole[1], cells[1])
    # The sum over corners of weight_y weight_x (cos dy + sin dx) factorises along the axes.
    noise = far_y @ np.cos(angles) @ near_x.T + near_y @ np.sin(angles) @ far_x.T
    return (np.sqrt(2) * noise[: size[0], : size[1]]).astype(np.float32)


@lru_cache(maxsize=64)
def _lattice(side: int, cells: int) -> tuple[Floats, Floats]:
    """Return the weight of each lattice line at each pixel, and the weight times the distance.

    Both have the shape ``(side, cells + 1)``; distances are in cells.
    """
    position = np.arange(side) * (cells / side)
    cell = position.astype(int)
    inside = position - cell
    fade = inside**3 * (inside * (inside * 6 - 15) + 10)
    near, far = np.zeros((2, side, cells + 1))
    rows = np.arange(side)
    near[rows, cell], near[rows, cell + 1] = 1 - fade, fade
    far[rows, cell], far[rows, cell + 1] = (1 - fade) * inside, fade * (inside - 1)
    return near, far


def _rotated(noise: NDArray[np.float32], angle: float) -> NDArray[np.float32]:
    height, width = noise.shape
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    return cv2.warpAffine(noise, turn, (width, height)).astype(np.float32, copy=False)
