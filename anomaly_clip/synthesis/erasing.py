"""Erasing: fill parts of an image with a constant or with noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anomaly_clip.errors import check_at_least
from anomaly_clip.records import Synthetic
from anomaly_clip.synthesis.checks import check_fields, check_image
from anomaly_clip.synthesis.masks import tightened
from anomaly_clip.synthesis.recipe import Image, Mask, Recipe

__all__ = ["Erasing"]

TRIES = 10  # largest number of attempts per rectangle
FILLS = ("black", "mean", "colour", "noise")


@dataclass(frozen=True)
class Erasing(Recipe):
    """Erasing recipe; call it with an image and a random generator.

    Args:
        kind: rectangles: as in random erasing; cells: some cells of a grid, as in TAB (arXiv
            2312.09480).
        count: Smallest and largest number of rectangles.
        area: Smallest and largest fraction of the image that a rectangle covers.
        aspect: Smallest and largest aspect ratio (width divided by height), sampled log-uniformly.
        grid: Number of cells along each side, for kind cells.
        groups: Number of groups that the cells are split into at random; one group is filled.
        fill: black, mean (the image's mean colour), colour (one random colour) or noise (a random
            colour per pixel); any: one of the four at random per image.
        tighten: Whether to remove from the mask those pixels that did not visibly change.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.synthesis.erasing import Erasing
        >>> white = np.full((64, 64, 3), 255, np.uint8)
        >>> result = Erasing(fill="black")(white, np.random.default_rng(0))
        >>> bool((result.image[result.mask] == 0).all())
        True
    """

    kind: Literal["rectangles", "cells"] = "rectangles"
    count: tuple[int, int] = (1, 3)
    area: tuple[float, float] = (0.01, 0.10)
    aspect: tuple[float, float] = (0.3, 3.3)
    grid: int = 14
    groups: int = 52
    fill: Literal["black", "mean", "colour", "noise", "any"] = "any"
    tighten: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("count", "area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 < smallest <= largest")
        if self.area[1] > 1:
            raise ValueError(f"area {self.area}: expected at most 1, the whole image")
        check_at_least("grid", self.grid, 1)
        check_at_least("groups", self.groups, 1)

    def __call__(
        self,
        image: Image,
        rng: np.random.Generator,
        donor: Callable[[], Image] | None = None,
        foreground: Mask | None = None,
    ) -> Synthetic:
        """Fill rectangles centred in the foreground, or the parts of grid cells that lie in it."""
        check_image(image)
        shape = (image.shape[0], image.shape[1])
        if self.kind == "cells":
            mask = self._cells(shape, rng)
            if foreground is not None:
                mask &= foreground
        else:
            mask = self._rectangles(shape, rng, foreground)
        fill = self.fill if self.fill != "any" else FILLS[int(rng.integers(len(FILLS)))]
        result = image.copy()
        if fill == "noise":
            result[mask] = rng.integers(0, 256, (int(mask.sum()), 3), dtype=np.uint8)
        elif fill == "colour":
            result[mask] = rng.integers(0, 256, 3, dtype=np.uint8)
        else:
            result[mask] = 0 if fill == "black" else np.rint(image.mean(axis=(0, 1)))
        info: dict[str, Any] = {"recipe": "erasing", "kind": self.kind, "fill": fill}
        if self.tighten:
            mask = tightened(image, result, mask)
        if not mask.any():
            result, info["failed"] = image.copy(), "no visible change"
        return Synthetic(result, mask, mask.astype(np.float32), info)

    def _rectangles(
        self, shape: tuple[int, int], rng: np.random.Generator, foreground: Mask | None
    ) -> Mask:
        mask = np.zeros(shape, bool)
        for _ in range(int(rng.integers(self.count[0], self.count[1] + 1))):
            for _ in range(TRIES):
                area = rng.uniform(*self.area) * shape[0] * shape[1]
                low, high = self.aspect
                aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
                height = max(1, round(math.sqrt(area / aspect)))
                width = max(1, round(math.sqrt(area * aspect)))
                if height > shape[0] or width > shape[1]:
                    continue
                top = int(rng.integers(shape[0] - height + 1))
                left = int(rng.integers(shape[1] - width + 1))
                if foreground is None or foreground[top + height // 2, left + width // 2]:
                    mask[top : top + height, left : left + width] = True
                    break
        return mask

    def _cells(self, shape: tuple[int, int], rng: np.random.Generator) -> Mask:
        """Split the cells at random into groups of equal size and return the mask of one group."""
        order = rng.permutation(self.grid**2)
        order = np.resize(order, -(-len(order) // self.groups) * self.groups)
        chosen = order.reshape(-1, self.groups)[:, rng.integers(self.groups)]
        cells = np.zeros(self.grid**2, bool)
        cells[chosen] = True
        rows, columns = (np.arange(side) * self.grid // side for side in shape)
        return cells.reshape(self.grid, self.grid)[rows[:, None], columns]
