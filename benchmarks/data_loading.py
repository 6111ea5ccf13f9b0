"""Measure the speed of loading images as tensors and print one JSON line.

    python benchmarks/data_loading.py

The rates are images per second on one core, from files of 1024 x 1024 pixels to uint8 tensors of
240 x 240. They are measured for the project's dataset, for the dataset with its cache, and for a
plain loop that decodes and resizes with PIL. The exit status is 1 if the dataset reaches less than
0.9 times the rate of the plain loop, or if the dataset with its cache reaches less than 10 times
the rate of the plain loop.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Bound, at_least, fastest, parser, report
from PIL import Image

from anomaly_clip.data import Sample, SampleDataset
from anomaly_clip.data.image_cache import ImageCache
from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.files import CACHE_VARIABLE

SIDE, SIZE = 1024, 240
COUNT = 12
ROUNDS = 9
LEAST = {"decoded": 0.9, "cached": 10.0}


def make_files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {"png": [], "jpg": []}
    for name in list(CATEGORIES)[:: len(CATEGORIES) // COUNT][:COUNT]:
        picture = Image.fromarray(draw_photograph(name, 0, 0, size=SIDE).image)
        for kind, paths in files.items():
            paths.append(folder / f"{name}.{kind}")
            picture.save(paths[-1])
    return files


def plain(files: list[Path]) -> list[torch.Tensor]:
    tensors = []
    for file in files:
        with Image.open(file) as picture:
            small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        tensors.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous())
    return tensors


def ours(dataset: SampleDataset) -> list[torch.Tensor]:
    return [dataset[row]["image"] for row in range(len(dataset))]


def measure(files: list[Path]) -> dict[str, float]:
    samples = [Sample(file, "thing", label=False) for file in files]
    decoded = SampleDataset(samples, SIZE, SIZE, has_masks=False)
    cached = SampleDataset(samples, SIZE, SIZE, has_masks=False, cache=ImageCache())
    expected = plain(files)
    for dataset in (decoded, cached, cached):  # the first pass fills the cache
        assert all(torch.equal(a, b) for a, b in zip(ours(dataset), expected, strict=True))
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(files),
        "decoded": lambda: ours(decoded),
        "cached": lambda: ours(cached),
    }
    best = fastest(ROUNDS, runs, warm_up=0)
    return {name: len(files) / value for name, value in best.items()}


def main() -> int:
    """Run the benchmark and return its exit status."""
    parser(__doc__).parse_args()
    torch.set_num_threads(1)
    values: dict[str, object] = {
        "pixels": SIDE,
        "image_size": SIZE,
        "rounds": ROUNDS,
        "unit": "images a second, one core, the best round",
    }
    bounds: dict[str, Bound] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = str(Path(folder, "cache"))
        for kind, files in make_files(Path(folder)).items():
            rates = measure(files)
            ratios = {name: rates[name] / rates["plain"] for name in LEAST}
            for name, ratio in ratios.items():
                bounds[f"{kind}, {name} over plain"] = at_least(ratio, LEAST[name])
            values[kind] = {
                **{name: round(rate, 1) for name, rate in rates.items()},
                **{f"{name}_ratio": round(ratio, 2) for name, ratio in ratios.items()},
            }
    return report("data_loading", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
