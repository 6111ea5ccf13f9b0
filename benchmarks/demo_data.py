"""Measure the speed of generating demo images on one thread and print one JSON line.

    python benchmarks/demo_data.py

The baseline, timed in the same rounds, is Pillow decoding PNG files of the same images from memory.
The exit status is 1 if alternating normal and defective images are generated more slowly than the
target.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import cv2
from common import at_least, fastest, parser, report
from PIL import Image

from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.demo.surfaces import fitting_defects

TARGET = 500  # images per second, half of them defective
ROUNDS = 9  # the best round counts, as other work on the machine only slows a round down
PER_CATEGORY = 6
SIZE = 128

Job = tuple[str, int, str | None]


def jobs(defective: Callable[[int], bool]) -> list[Job]:
    chosen = []
    for name, category in CATEGORIES.items():
        for index in range(PER_CATEGORY):
            defect = fitting_defects(category)[index % len(fitting_defects(category))]
            chosen.append((name, index, defect if defective(index) else None))
    return chosen


def draw(chosen: list[Job]) -> None:
    for name, index, defect in chosen:
        draw_photograph(name, 0, index, defect, SIZE)


def encoded(chosen: list[Job]) -> list[bytes]:
    files = []
    for name, index, defect in chosen:
        file = io.BytesIO()
        Image.fromarray(draw_photograph(name, 0, index, defect, SIZE).image).save(file, "png")
        files.append(file.getvalue())
    return files


def decode(files: list[bytes]) -> None:
    for file in files:
        Image.open(io.BytesIO(file)).convert("RGB").load()


def main() -> int:
    """Run the benchmark and return its exit status."""
    parser(__doc__).parse_args()
    cv2.setNumThreads(1)
    mixed = jobs(lambda index: index % 2 == 1)
    normal, defective = jobs(lambda index: False), jobs(lambda index: True)
    files = encoded(mixed)  # drawing them is the warm-up
    work: dict[str, Callable[[], None]] = {
        "normal": lambda: draw(normal),
        "defective": lambda: draw(defective),
        "mixed": lambda: draw(mixed),
        "png_decode": lambda: decode(files),
    }
    seconds = fastest(ROUNDS, work, clock=time.perf_counter, warm_up=0)
    rates = {name: round(len(mixed) / best, 1) for name, best in seconds.items()}
    values = {
        "size": SIZE,
        "rounds": ROUNDS,
        "images_per_second": rates,
        "ratio_to_png_decode": round(rates["mixed"] / rates["png_decode"], 3),
    }
    bounds = {"images per second, half of them defective": at_least(rates["mixed"], TARGET)}
    return report("demo_data", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
