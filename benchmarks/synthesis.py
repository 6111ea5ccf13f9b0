"""Time synthetic defects and straightforward implementations, and print one JSON line.

    python benchmarks/synthesis.py

All runs use one thread and images of 256 px. The baseline of NSA is a plain implementation of the
official recipe: OpenCV's seamless clone, and labels computed over the whole image with a median
filter over a disk of radius 5 (scikit-image). The baseline of Perlin is DRAEM's noise in its
usual implementation, and a blend of whole images in floating point. The exit status is 1 if a
target is missed, or if NSA's labels are not bit-identical to those of the baseline.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from common import at_least, fastest, parser, report
from numpy.typing import NDArray
from skimage.filters import median
from skimage.morphology import disk
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from anomaly_clip.demo.photographs import draw_photograph
from anomaly_clip.synthesis import NSA, Perlin, preset
from anomaly_clip.synthesis import nsa as nsa_module
from anomaly_clip.synthesis.nsa_labels import label_of
from anomaly_clip.synthesis.poisson import Gradients, blend
from anomaly_clip.synthesis.textures import augmented, texture

TARGETS = {
    "nsa_binary_times": 3.0,
    "nsa_logistic_times": 4.0,
    "tab_images_a_second": 300.0,
    "clone_times": 2.0,
    "mixed_clone_times": 2.0,
    "perlin_times": 3.0,
}
IMAGES, ROUNDS = 30, 7
SIDE = 256
Image = NDArray[np.uint8]


def plain_label(
    before: Image,
    after: Image,
    pasted: NDArray[np.bool_],
    kind: str,
    tolerance: float = 1.0,
    factor: float = 1.0,
    logistic: tuple[float, float] = (1 / 6, 20.0),
) -> NDArray[np.float32]:
    """Return NSA's label (arXiv 2109.15222; ``docs/synthesis.md``) of the whole image."""
    inside = pasted[..., None].astype(np.float64)
    change = np.abs(inside * before - inside * after).mean(axis=2)
    changed = cv2.medianBlur((change > tolerance).astype(np.uint8), 5)
    if kind == "binary":
        return changed.astype(np.float32)
    level = changed[..., None].astype(np.float64)
    intensity = median(np.abs(level * before - level * after).mean(axis=2), disk(5))
    steepness, middle = logistic
    return (changed / (1 + np.exp(-steepness * (intensity - middle)))).astype(np.float32)


def plain_noise(size: int, cells: tuple[int, int], rng: np.random.Generator) -> NDArray[Any]:
    """Return Perlin noise in its usual implementation, with grids of the whole image."""
    step = (cells[0] / size, cells[1] / size)
    pixels = (size // cells[0], size // cells[1])
    grid = np.mgrid[0 : cells[0] : step[0], 0 : cells[1] : step[1]].transpose(1, 2, 0) % 1
    angles = 2 * np.pi * rng.random((cells[0] + 1, cells[1] + 1))
    gradients = np.stack((np.cos(angles), np.sin(angles)), axis=-1)

    def corner(rows: slice, columns: slice) -> NDArray[Any]:
        return np.repeat(np.repeat(gradients[rows, columns], pixels[0], 0), pixels[1], 1)

    def dot(gradient: NDArray[Any], shift: tuple[int, int]) -> NDArray[Any]:
        offset = np.stack((grid[..., 0] + shift[0], grid[..., 1] + shift[1]), axis=-1)
        return np.asarray((offset * gradient).sum(axis=-1))

    first, last = slice(0, -1), slice(1, None)
    n00, n10 = dot(corner(first, first), (0, 0)), dot(corner(last, first), (-1, 0))
    n01, n11 = dot(corner(first, last), (0, -1)), dot(corner(last, last), (-1, -1))
    fade = 6 * grid**5 - 15 * grid**4 + 10 * grid**3
    upper = n00 + fade[..., 0] * (n10 - n00)
    lower = n01 + fade[..., 0] * (n11 - n01)
    return np.asarray(np.sqrt(2) * (upper + fade[..., 1] * (lower - upper)))


def plain_perlin(image: Image, rng: np.random.Generator) -> Image:
    """Apply DRAEM's anomaly with whole images in floating point."""
    cells = (int(2 ** rng.integers(0, 6)), int(2 ** rng.integers(0, 6)))
    noise = plain_noise(SIDE, cells, rng)
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), rng.uniform(-90, 90), 1.0)
    mask = (cv2.warpAffine(noise, turn, (SIDE, SIDE)) > 0.5).astype(np.float32)[..., None]
    overlay = augmented(texture(image, "self", None, rng), 3, rng).astype(np.float32) / 255
    beta = rng.random() * 0.8
    whole = image.astype(np.float32) / 255
    mixed = whole * (1 - mask) + (1 - beta) * overlay * mask + beta * whole * mask
    return np.asarray(mixed * 255).astype(np.uint8)


def main() -> int:
    """Run the benchmark and return its exit status."""
    parser(__doc__).parse_args()
    cv2.setNumThreads(1)
    with threadpool_limits(1):
        return measure()


def measure() -> int:
    names = ("grey_linen", "brown_leather", "steel_nut", "white_pill", "concrete")
    images = [draw_photograph(names[n % 5], 0, n, size=SIDE).image for n in range(IMAGES)]
    others = [draw_photograph(names[n % 5], 1, n, size=SIDE).image for n in range(IMAGES)]

    def run(make: NSA, label: Callable[..., Any] | None = None) -> Callable[[], object]:
        def task() -> None:
            for number, (image, other) in enumerate(zip(images, others, strict=True)):
                make(image, np.random.default_rng(number), partial(np.copy, other))

        def patched() -> None:
            with patch.object(nsa_module, "label_of", label):
                task()

        return task if label is None else patched

    official = NSA()  # textures: up to 4 patches, scaled by 0.5 to 2
    kinds = {
        "binary": replace(official, label="binary"),
        "logistic": replace(official, label="logistic-intensity"),
    }
    equal = True
    for number, (image, other) in enumerate(zip(images, others, strict=True)):
        for make in kinds.values():
            rng = np.random.default_rng(number)
            result = make(image, rng, partial(np.copy, other))
            pasted = np.zeros(image.shape[:2], bool)
            for patch_info in result.info["patches"]:
                if "box" in patch_info:
                    top, left, bottom, right = patch_info["box"]
                    pasted[top:bottom, left:right] = True
            ours = label_of(image, result.image, pasted, make.label, logistic=make.logistic)
            plain = plain_label(image, result.image, pasted, make.label, logistic=make.logistic)
            equal = equal and np.array_equal(ours, plain) and np.array_equal(ours, result.label)
    tab = preset("nsa", "tab")
    assert isinstance(tab, NSA)
    boxes = [(np.s_[20:120, 30:130], np.ones((100, 100), bool))]
    boxes += [(np.s_[40:90, 50:112], np.ones((50, 62), bool))]
    boxes += [(np.s_[100:124, 10:40], np.ones((24, 30), bool))]

    def own_clones(gradients: Gradients) -> Callable[[], object]:
        def task() -> None:
            for image, other in zip(images, others, strict=True):
                for box, mask in boxes:
                    image_box = image[box]
                    blend(image_box, other[box], mask, gradients)

        return task

    def plain_clones(kind: int) -> Callable[[], object]:
        def task() -> None:
            for image, other in zip(images, others, strict=True):
                for (rows, columns), mask in boxes:
                    piece = np.ascontiguousarray(other[rows, columns])
                    white = mask.astype(np.uint8) * 255  # OpenCV overwrites its mask
                    middle = (
                        columns.start + mask.shape[1] // 2,
                        rows.start + mask.shape[0] // 2,
                    )
                    cv2.seamlessClone(piece, image, white, middle, kind)

        return task

    perlin = Perlin(source="self")
    seconds = fastest(
        ROUNDS,
        {
            **{f"nsa_{kind}": run(make) for kind, make in kinds.items()},
            **{
                f"plain_nsa_{kind}": run(replace(make, solver="opencv"), plain_label)
                for kind, make in kinds.items()
            },
            "tab": run(tab),
            "clone": own_clones("normal"),
            "plain_clone": plain_clones(cv2.NORMAL_CLONE),
            "mixed_clone": own_clones("mixed"),
            "plain_mixed_clone": plain_clones(cv2.MIXED_CLONE),
            "perlin": lambda: [
                perlin(image, np.random.default_rng(n)) for n, image in enumerate(images)
            ],
            "plain_perlin": lambda: [
                plain_perlin(image, np.random.default_rng(n)) for n, image in enumerate(images)
            ],
        },
        clock=time.perf_counter,
        warm_up=0,
    )
    reached = {
        "nsa_binary_times": seconds["plain_nsa_binary"] / seconds["nsa_binary"],
        "nsa_logistic_times": seconds["plain_nsa_logistic"] / seconds["nsa_logistic"],
        "tab_images_a_second": IMAGES / seconds["tab"],
        "clone_times": seconds["plain_clone"] / seconds["clone"],
        "mixed_clone_times": seconds["plain_mixed_clone"] / seconds["mixed_clone"],
        "perlin_times": seconds["plain_perlin"] / seconds["perlin"],
    }
    values = {
        "milliseconds_an_image": {n: round(1e3 * s / IMAGES, 2) for n, s in seconds.items()},
        "found": {name: round(value, 2) for name, value in reached.items()},
    }
    bounds = {name: at_least(reached[name], target) for name, target in TARGETS.items()}
    bounds["labels equal to the bit"] = at_least(int(equal), 1)
    return report("synthesis", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
