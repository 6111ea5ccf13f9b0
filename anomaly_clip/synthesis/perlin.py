"""Perlin anomalies in the manner of DRAEM (arXiv 2108.07610): blobs of noise show a texture.

The noise is a sum over lattice points of weights that factorise into rows and columns, so a whole
picture of it is a few products of small matrices.
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

LARGEST = 5  # exponent: at most 2 ** 5 cells an axis
STEP = 2**LARGEST  # noise is made at a multiple of it and cut

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Perlin(Recipe):
    """The generator; call it with an image and a random generator.

    Args:
        threshold: Above which noise is a defect; the noise is in about [-1, 1].
        source: Where textures come from: a folder of pictures (``folder``), the same image in
            shuffled pieces (self), smoothed colour noise (noise), or surfaces made by code (code).
        folder: Pictures of textures, at any depth (DTD in DRAEM); for source folder.
        num_changes: How many of the ten changes of colour and place a texture undergoes.
        least_opacity: Smallest weight of the texture; 1 is the largest.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.synthesis.perlin import Perlin
        >>> grey = np.full((64, 64, 3), 128, np.uint8)
        >>> made = Perlin(source="noise")(grey, np.random.default_rng(0))
        >>> bool((made.image == grey)[~made.mask].all())
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
            raise ValueError("source folder: name it with folder")

    def __call__(
        self,
        image: Image,
        rng: np.random.Generator,
        donor: Callable[[], Image] | None = None,
        foreground: Mask | None = None,
    ) -> Synthetic:
        """Lay a texture over the image, nowhere outside the foreground; the mask may be empty."""
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
        size: Height and width in pixels; any, as the next multiple of 32 is made and cut.
        cells: Cells of the lattice along height and width, powers of 2 up to 32.
        rng: Draws the unit gradients at the lattice points.
    """
    angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    whole = [-(-side // STEP) * STEP for side in size]
    near_y, far_y = _lattice(whole[0], cells[0])
    near_x, far_x = _lattice(whole[1], cells[1])
    # Of the sum over corners of weight_y weight_x (cos dy + sin dx), each factor is of one axis.
    noise = far_y @ np.cos(angles) @ near_x.T + near_y @ np.sin(angles) @ far_x.T
    return (np.sqrt(2) * noise[: size[0], : size[1]]).astype(np.float32)


@lru_cache(maxsize=64)
def _lattice(side: int, cells: int) -> tuple[Floats, Floats]:
    """Return, for each pixel and lattice line, its weight, and that times the distance in cells."""
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
