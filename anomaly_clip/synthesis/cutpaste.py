"""CutPaste (arXiv 2104.04015): paste a piece of an image elsewhere in the same image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from anomaly_clip.errors import check_between
from anomaly_clip.records import Synthetic
from anomaly_clip.synthesis.checks import check_fields, check_image
from anomaly_clip.synthesis.masks import tightened
from anomaly_clip.synthesis.recipe import Image, Mask, Recipe

__all__ = ["CutPaste", "jittered"]

SIDE = 256  # image side in pixels to which scar sizes refer
MOST_SHARED = 0.5  # largest intersection over union of a patch's source and destination
TRIES = 20  # largest number of destinations sampled for a patch


@dataclass(frozen=True)
class CutPaste(Recipe):
    """CutPaste recipe; call it with an image and a random generator.

    Args:
        kind: patch: a rectangle; scar: a thin, rotated rectangle; union: one of these two, with
            equal probability.
        area: Smallest and largest fraction of the image that a patch covers.
        aspect: Smallest and largest width / height of a patch, sampled log-uniformly.
        scar_width: Smallest and largest width of a scar in pixels, for images of 256 x 256.
        scar_height: Smallest and largest height of a scar in pixels, for images of 256 x 256.
        jitter: Largest change of brightness, contrast, saturation and hue.
        tighten: Whether to remove from the mask those pixels that did not visibly change.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.synthesis.cutpaste import CutPaste
        >>> noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        >>> result = CutPaste("patch")(noise, np.random.default_rng(0))
        >>> bool((result.image == noise)[~result.mask].mean() > 0.99)
        True
    """

    kind: Literal["patch", "scar", "union"] = "union"
    area: tuple[float, float] = (0.02, 0.15)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    scar_width: tuple[float, float] = (2.0, 16.0)
    scar_height: tuple[float, float] = (10.0, 25.0)
    jitter: float = 0.1
    tighten: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("area", "aspect", "scar_width", "scar_height"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 < smallest <= largest")
        if self.area[1] > 1:
            raise ValueError(f"area {self.area}: expected at most 1, the whole image")
        check_between("jitter", self.jitter, 0, 0.5)

    def __call__(
        self,
        image: Image,
        rng: np.random.Generator,
        donor: Callable[[], Image] | None = None,
        foreground: Mask | None = None,
    ) -> Synthetic:
        """Paste a piece of the image, with the centre of the pasted piece in the foreground.

        See :class:`Recipe`.
        """
        check_image(image)
        kind = self.kind
        if kind == "union":
            kind = "patch" if rng.random() < 0.5 else "scar"
        piece, alpha, place = (self._patch if kind == "patch" else self._scar)(
            image, rng, foreground
        )
        top, left = place
        box = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        result, mask = image.copy(), np.zeros(image.shape[:2], bool)
        result[box][alpha] = piece[alpha]
        mask[box] = alpha
        info: dict[str, Any] = {"recipe": "cutpaste", "kind": kind, "place": place}
        if self.tighten:
            mask = tightened(image, result, mask)
            if not mask.any():
                result, info["failed"] = image.copy(), "no visible change"
        return Synthetic(result, mask, mask.astype(np.float32), info)

    def _patch(
        self, image: Image, rng: np.random.Generator, foreground: Mask | None
    ) -> tuple[Image, Mask, tuple[int, int]]:
        height, width = image.shape[:2]
        share = rng.uniform(*self.area)
        low, high = self.aspect
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        shape = (
            int(np.clip(round(math.sqrt(share * height * width / aspect)), 1, height)),
            int(np.clip(round(math.sqrt(share * height * width * aspect)), 1, width)),
        )
        start = _corner(image.shape, shape, rng, None)
        piece = jittered(_cut(image, start, shape), self.jitter, rng)
        place = start
        for _ in range(TRIES):
            place = _corner(image.shape, shape, rng, foreground)
            if _overlap(start, place, shape) <= MOST_SHARED:
                break
        return piece, np.ones(shape, bool), place

    def _scar(
        self, image: Image, rng: np.random.Generator, foreground: Mask | None
    ) -> tuple[Image, Mask, tuple[int, int]]:
        height, width = image.shape[:2]
        shape = (
            int(np.clip(round(rng.uniform(*self.scar_height) * height / SIDE), 1, height)),
            int(np.clip(round(rng.uniform(*self.scar_width) * width / SIDE), 1, width)),
        )
        start = _corner(image.shape, shape, rng, None)
        piece = jittered(_cut(image, start, shape), self.jitter, rng)
        angle = float(rng.uniform(-45, 45))
        turn = cv2.getRotationMatrix2D(((shape[1] - 1) / 2, (shape[0] - 1) / 2), angle, 1.0)
        cos, sin = abs(turn[0, 0]), abs(turn[0, 1])
        grown = (
            min(height, math.ceil(shape[0] * cos + shape[1] * sin)),
            min(width, math.ceil(shape[0] * sin + shape[1] * cos)),
        )
        turn[:, 2] += [(grown[1] - shape[1]) / 2, (grown[0] - shape[0]) / 2]
        size = grown[::-1]
        turned = cv2.warpAffine(piece, turn, size, borderMode=cv2.BORDER_REPLICATE)
        alpha = cv2.warpAffine(np.ones(shape, np.float32), turn, size) > 0.5
        place = _corner(image.shape, grown, rng, foreground)
        return turned.astype(np.uint8, copy=False), alpha, place


def jittered(image: Image, amount: float, rng: np.random.Generator) -> Image:
    """Change brightness, contrast, saturation and hue slightly, in random order.

    Args:
        image: ``(h, w, 3)``.
        amount: Brightness, contrast and saturation change by factors in
            ``[1 - amount, 1 + amount]``; the hue shifts by at most ``amount`` of the hue circle.
        rng: Source of all random numbers.
    """
    factors = rng.uniform(1 - amount, 1 + amount, 3)
    turn = round(rng.uniform(-amount, amount) * 256)
    changed = image.astype(np.float32)
    for change in rng.permutation(4):
        if change == 3:
            if turn == 0:  # a round trip through HSV is not lossless
                continue
            parts = cv2.cvtColor(changed.clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV_FULL)
            parts[..., 0] += np.uint8(turn % 256)
            changed = cv2.cvtColor(parts, cv2.COLOR_HSV2RGB_FULL).astype(np.float32)
            continue
        grey = changed @ np.array([0.299, 0.587, 0.114], np.float32)
        towards: Any = (0.0, grey.mean(), grey[..., None])[change]
        changed = (factors[change] * changed + (1 - factors[change]) * towards).clip(0, 255)
    return np.rint(changed).astype(np.uint8)


def _cut(image: Image, corner: tuple[int, int], shape: tuple[int, int]) -> Image:
    top, left = corner
    return image[top : top + shape[0], left : left + shape[1]]


def _corner(
    whole: tuple[int, ...],
    shape: tuple[int, int],
    rng: np.random.Generator,
    foreground: Mask | None,
) -> tuple[int, int]:
    """Sample the upper left corner of a piece, with its centre in the foreground if given."""
    free = (whole[0] - shape[0], whole[1] - shape[1])
    if foreground is not None and foreground.any():
        rows, columns = np.nonzero(foreground)
        chosen = int(rng.integers(len(rows)))
        centre = (int(rows[chosen]), int(columns[chosen]))
        top, left = (
            int(np.clip(at - length // 2, 0, most))
            for at, length, most in zip(centre, shape, free, strict=True)
        )
        return top, left
    return int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))


def _overlap(first: tuple[int, int], second: tuple[int, int], shape: tuple[int, int]) -> float:
    """Return the intersection over union of two boxes of the same shape."""
    shared = math.prod(
        max(0, length - abs(a - b)) for a, b, length in zip(first, second, shape, strict=True)
    )
    return shared / (2 * math.prod(shape) - shared)
