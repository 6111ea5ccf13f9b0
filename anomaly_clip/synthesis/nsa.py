"""NSA (arXiv 2109.15222): patches of another image of the same category, Poisson-blended.

This recipe follows the authors' code step by step, including its quirks. docs/synthesis.md lists
the steps, and comments cite their numbers. Three differences are our choice: all random numbers
come from the random generator that is passed in, blending and labels are our own faster
implementations, and pasted content never moves inside its patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.records import Synthetic
from anomaly_clip.synthesis.checks import check_fields, check_image
from anomaly_clip.synthesis.masks import foreground_of
from anomaly_clip.synthesis.nsa_labels import LabelKind, label_of
from anomaly_clip.synthesis.poisson import Gradients, blend, blend_opencv
from anomaly_clip.synthesis.recipe import Image, Mask, Recipe

__all__ = ["NSA", "Interval", "Mode"]

Mode = Literal["normal", "mixed", "mix", "swap", "uniform"]
Interval = tuple[float, float]

TRIES = 200  # largest number of positions sampled until one covers enough of an object
LEAST_PIXELS = 50  # smallest size of a Poisson-blended patch
ASPECTS = ((0.3, 1.0), (1.0, 3.3))  # two ranges of width / height, with equal probability
OBJECT_BLUR = 7  # side of the median filter that smooths object masks


class SourcePatch(NamedTuple):
    """A patch cut out of the source image."""

    image: Image
    """``(h, w, 3)``."""
    mask: Mask
    """``(h, w)``, pixels to paste."""
    object: Mask | None
    """``(h, w)``, pixels of an object; None without object masks."""
    place: tuple[int, int]
    """Row and column of the upper left corner in the source."""


class Refused(Exception):
    """Raised to skip a patch; the message is the reason."""


@dataclass(frozen=True)
class NSA(Recipe):
    """NSA recipe; call it with an image, a random generator and a donor.

    Args:
        bounds: Smallest and largest half height of a patch, then smallest and largest half width,
            as fractions of the image side.
        gamma: Shape, scale and offset of the gamma distribution of half sizes, which are then
            clipped to ``bounds``. None samples half sizes uniformly within ``bounds``.
        area: Smallest and largest fraction of the image that a patch covers. If set, it replaces
            ``bounds`` and ``gamma``: the patch lies fully inside the image and its aspect ratio is
            sampled from (0.3, 1) or (1, 3.3).
        num_patches: Largest number of patches. The first patch is always tried, each further patch
            with probability 1/2.
        resize: Smallest and largest scale factor of a patch; None keeps its size.
        shift: Whether to paste a patch at a new random position.
        same: Whether to cut patches out of the image itself instead of a donor.
        mode: normal, mixed: Poisson blending with normal or mixed gradients; mix: one of these two
            for all patches of an image, with equal probability; swap: plain paste; uniform:
            weighted mean.
        background: One or several pairs of background brightness and tolerance. A pixel belongs to
            an object if, for every pair, its brightness differs from the background's by more than
            the tolerance. Empty: no object masks.
        least_object: More than this fraction of a patch must lie on an object.
        least_overlap: More than this fraction of the patch's object must fall on the destination's
            object.
        ellipses: Number of random ellipses that form the mask of a patch; 0 for rectangles.
        label: Kind of label; see :func:`~anomaly_clip.synthesis.nsa_labels.label_of`.
        logistic: Steepness and midpoint of the logistic label.
        tolerance: A pixel counts as changed if it differs by more than this many grey levels.
        require_change: Largest number of further attempts while the label is empty.
        solver: own: our Poisson solver; opencv: ``cv2.seamlessClone``.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.synthesis.nsa import NSA
        >>> noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        >>> result = NSA()(noise, np.random.default_rng(1), lambda: noise[::-1].copy())
        >>> result.image.shape, bool(result.mask.any())
        ((64, 64, 3), True)
    """

    bounds: tuple[Interval, Interval] = ((0.03, 0.4), (0.03, 0.4))
    gamma: tuple[float, float, float] | None = (2.0, 0.05, 0.03)
    area: Interval | None = None
    num_patches: int = 4
    resize: Interval | None = (0.5, 2.0)
    shift: bool = True
    same: bool = False
    mode: Mode = "normal"
    background: tuple[tuple[float, float], ...] = ()
    least_object: float = 0.25
    least_overlap: float = 0.25
    ellipses: int = 0
    label: LabelKind = "logistic-intensity"
    logistic: tuple[float, float] = (1 / 6, 20.0)
    tolerance: float = 1.0
    require_change: int = 0
    solver: Literal["own", "opencv"] = "own"

    def __post_init__(self) -> None:
        if self.background and not isinstance(self.background[0], (list, tuple)):
            object.__setattr__(self, "background", (self.background,))  # a single pair
        check_fields(self)
        for low, high in self.bounds:
            if not 0 < low <= high <= 0.5:
                raise ValueError(f"bounds {self.bounds}: expected 0 < smallest <= largest <= 0.5")
        if self.area is not None and not 0 < self.area[0] <= self.area[1] < 1:
            raise ValueError(f"area {self.area}: expected 0 < smallest <= largest < 1")
        if self.resize is not None and not 0 < self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize {self.resize}: expected 0 < smallest <= largest")
        if self.gamma is not None and min(self.gamma[:2]) <= 0:
            raise ValueError(f"gamma {self.gamma}: shape and scale must be above 0")
        check_at_least("num_patches", self.num_patches, 1)
        check_at_least("ellipses", self.ellipses, 0)
        check_at_least("require_change", self.require_change, 0)
        check_between("least_object", self.least_object, 0, 1, open_high=True)
        check_between("least_overlap", self.least_overlap, 0, 1, open_high=True)
        if not self.shift and self.resize is not None:
            raise ValueError(
                f"resize {self.resize}: without shift a patch keeps its place and size; set "
                "resize to null, or shift to true"
            )
        if self.label == "continuous" and self.mode != "uniform":
            raise ValueError(
                f"label {self.label} is the weight of mode uniform, but mode is {self.mode}: "
                "choose mode uniform or another label"
            )

    def __call__(
        self,
        image: Image,
        rng: np.random.Generator,
        donor: Callable[[], Image] | None = None,
        foreground: Mask | None = None,
    ) -> Synthetic:
        """Blend patches of a donor, or of the image itself with ``same``, into the image.

        The foreground is the object mask of the image; the object mask of the donor is estimated.
        If ``background`` is set, it defines both object masks instead. See :class:`Recipe`.
        """
        check_image(image)
        if donor is None and not self.same:
            raise ValueError(
                f"NSA takes patches from another normal image if same is {self.same}: pass a "
                "donor, or set same to true"
            )
        source = image if self.same or donor is None else donor()
        if source.shape != image.shape:
            raise ValueError(
                f"the donor {source.shape} must have the image's shape {image.shape}: resize one "
                "of them"
            )
        objects: tuple[Mask | None, Mask | None] = (self._object(source), self._object(image))
        if foreground is not None and not self.background:
            objects = (foreground_of(source), foreground)
        result = self._once(image, source, objects, rng)
        for _ in range(self.require_change):
            if result.mask.any():
                break
            result = self._once(image, source, objects, rng)
        return result

    def _once(
        self,
        image: Image,
        source: Image,
        objects: tuple[Mask | None, Mask | None],
        rng: np.random.Generator,
    ) -> Synthetic:
        mode = self.mode
        if mode == "mix":  # step 0
            mode = "normal" if rng.random() < 0.5 else "mixed"
        factor = float(rng.uniform(0.05, 0.95)) if self.label == "continuous" else 1.0
        result, pasted = image.copy(), np.zeros(image.shape[:2], bool)
        tried: list[dict[str, Any]] = []
        count = 1 + int(rng.binomial(self.num_patches - 1, 0.5))  # step 2
        for _ in range(count):
            try:
                box, mask = self._paste(result, source, objects, mode, factor, rng)
            except Refused as reason:
                tried.append({"refused": str(reason)})
            else:
                pasted[box] = mask  # step 9: a later patch overwrites earlier ones
                rows, columns = box
                place = (rows.start, columns.start, rows.stop, columns.stop)
                tried.append({"box": place})
        label = label_of(
            image, result, pasted, self.label, self.tolerance, factor, self.logistic
        )  # step 10
        info = {"recipe": "nsa", "mode": mode, "factor": factor, "patches": tried}
        return Synthetic(result, label > 0, label, info)

    def _object(self, image: Image) -> Mask | None:
        """Return the object mask of an image (step 1)."""
        if not self.background:
            return None
        brightness = image.mean(axis=2)
        inside = np.ones(brightness.shape, bool)
        for level, threshold in self.background:
            inside &= np.abs(brightness - level) > threshold
        return cv2.medianBlur(inside.astype(np.uint8), OBJECT_BLUR).astype(bool)

    def _paste(
        self,
        result: Image,
        source: Image,
        objects: tuple[Mask | None, Mask | None],
        mode: Mode,
        factor: float,
        rng: np.random.Generator,
    ) -> tuple[tuple[slice, slice], Mask]:
        """Paste one patch into ``result``; return its box and its mask."""
        source_object, target_object = objects
        patch = self._cut(source, source_object, rng)
        if self.resize is not None:
            patch = self._scaled(patch, self.resize, source.shape, rng)
        box = self._placed(patch, target_object, result.shape, rng)
        mask, blended = patch.mask, patch.mask
        if patch.object is not None and target_object is not None:
            either = patch.object | target_object[box]
            mask = mask & either  # step 7
            blended = mask | ~either  # pure background is blended, too
        below = result[box]
        if mode in ("normal", "mixed"):  # step 8
            blended = blended.copy()
            blended[[0, -1]] = blended[:, [0, -1]] = False
            if (num_pixels := int(blended.sum())) < LEAST_PIXELS:
                raise Refused(f"{num_pixels} pixels are left, fewer than {LEAST_PIXELS}")
            gradients: Gradients = "normal" if mode == "normal" else "mixed"
            clone = blend if self.solver == "own" else blend_opencv
            result[box] = clone(below, patch.image, blended, gradients)
        elif mode == "swap":
            below[mask] = patch.image[mask]
        else:
            mean = below[mask] * (1 - factor) + patch.image[mask] * factor
            below[mask] = mean.astype(np.uint8)
        return box, mask

    def _half_sizes(self, side: tuple[int, int], rng: np.random.Generator) -> list[int]:
        halves = []
        for (low, high), size in zip(self._limits(side), side, strict=True):
            if self.gamma is None:
                halves.append(int(rng.integers(low, max(low + 1, high))))
            else:
                shape, scale, offset = self.gamma
                drawn = (offset + rng.gamma(shape, scale)) * size
                halves.append(int(np.clip(drawn, low, high)))
        return halves

    def _limits(self, side: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the smallest and largest half sizes in pixels."""
        return [
            (max(1, round(low * size)), max(1, round(high * size)))
            for (low, high), size in zip(self.bounds, side, strict=True)
        ]

    def _cut(self, source: Image, inside: Mask | None, rng: np.random.Generator) -> SourcePatch:
        """Cut a patch out of the source (steps 3 and 4)."""
        side = (source.shape[0], source.shape[1])
        limits = self._limits(side)
        halves = self._half_sizes(side, rng)
        for _ in range(TRIES):
            if self.area is not None:
                box = self._inside(side, self.area, rng)
            else:
                spans = []
                for size, half, (low, _) in zip(side, halves, limits, strict=True):
                    centre = int(rng.integers(low, max(low + 1, size - low)))
                    spans.append(slice(max(0, centre - half), min(size, centre + half)))
                box = (spans[0], spans[1])
            if inside is None or inside[box].mean() > self.least_object:
                break
        else:
            raise Refused(
                f"no source position with more than {self.least_object} of the patch on an object"
            )
        image = source[box]
        mask = np.ones(image.shape[:2], bool)
        if self.ellipses:
            mask = self._ellipses((image.shape[0], image.shape[1]), limits, halves, rng)
        corner = (box[0].start, box[1].start)
        return SourcePatch(image, mask, None if inside is None else inside[box], corner)

    def _inside(
        self, side: tuple[int, int], area: Interval, rng: np.random.Generator
    ) -> tuple[slice, slice]:
        """Sample a rectangle inside the image by area and aspect ratio."""
        aspect = rng.uniform(*ASPECTS[int(rng.integers(len(ASPECTS)))])
        pixels = rng.uniform(*area) * side[0] * side[1]
        shape = (math.sqrt(pixels / aspect), math.sqrt(pixels * aspect))
        spans = []
        for size, drawn in zip(side, shape, strict=True):
            # The destination box must lie inside the image with a margin of one pixel.
            length = int(np.clip(round(drawn), 1, max(1, size - 3)))
            start = int(rng.integers(size - length + 1))
            spans.append(slice(start, start + length))
        return spans[0], spans[1]

    def _ellipses(
        self,
        shape: tuple[int, int],
        limits: list[tuple[int, int]],
        halves: list[int],
        rng: np.random.Generator,
    ) -> Mask:
        height, width = shape
        mask = np.zeros(shape, np.uint8)
        for _ in range(self.ellipses):
            angle = rng.uniform(0, 180)
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            axes = [
                int(rng.integers(low, max(low + 1, half // 2)))
                for (low, _), half in zip(limits, halves, strict=True)
            ]
            cv2.ellipse(mask, centre, (axes[1], axes[0]), angle, 0, 360, 1, -1)
        return mask.astype(bool)

    def _scaled(
        self, patch: SourcePatch, bounds: Interval, shape: tuple[int, ...], rng: np.random.Generator
    ) -> SourcePatch:
        """Scale a patch (step 5).

        The bounds of half sizes limit full sizes here, as in the authors' code. A pasted patch is
        therefore never larger than the largest half size.
        """
        height, width = patch.mask.shape
        rows, columns = self._limits((shape[0], shape[1]))
        scale = float(np.clip(rng.normal(1, 0.5), *bounds))
        new_height = np.clip(scale * height, *rows)
        new_width = int(np.clip(int(new_height / height * width), *columns))
        new_height = int(np.clip(int(new_width / width * height), *rows))
        size = (new_width, new_height)
        mask = cv2.resize(patch.mask.astype(np.uint8), size).astype(bool)
        inside = patch.object
        if inside is not None:
            inside = cv2.resize(inside.astype(np.uint8), size).astype(bool)
        image = cv2.resize(np.ascontiguousarray(patch.image), size)
        return patch._replace(image=image.astype(np.uint8, copy=False), mask=mask, object=inside)

    def _placed(
        self,
        patch: SourcePatch,
        inside: Mask | None,
        shape: tuple[int, ...],
        rng: np.random.Generator,
    ) -> tuple[slice, slice]:
        """Sample the destination of a patch (step 6)."""
        height, width = patch.mask.shape
        if not self.shift:
            top, left = patch.place
            return slice(top, top + height), slice(left, left + width)
        for _ in range(TRIES):
            spans = []
            for size, length in zip(shape[:2], (height, width), strict=True):
                low, high = length // 2 + 1, size - length // 2 - 1
                if high <= low:
                    raise Refused(f"{height} x {width} pixels are too large for the image")
                centre = int(rng.integers(low, high))
                spans.append(slice(centre - length // 2, centre + (length + 1) // 2))
            box = (spans[0], spans[1])
            if inside is None or patch.object is None:
                return box
            num_object = int(patch.object.sum())
            shared = int((inside[box] & patch.object & patch.mask).sum())
            if (
                num_object / (height * width) > self.least_object
                and shared / num_object > self.least_overlap
            ):
                return box
        raise Refused(
            f"no destination with more than {self.least_overlap} of the patch's object on an object"
        )
