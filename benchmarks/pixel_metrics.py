"""Time the four pixel metrics on 83 images and print CPU seconds and ratios as one JSON object.

    python benchmarks/pixel_metrics.py
    python benchmarks/pixel_metrics.py --sizes 256 --rounds 7

The baselines are scikit-learn (three metrics, as it has no PRO), torchmetrics without bins (two),
a plain PRO over 200 thresholds, implemented here, and a plain exact ranking, which sorts all pixels
and looks up each anomalous one. The exact form must equal the latter. Each form also has a lower
limit, timed in the same rounds. For the streaming form, it is the conversion to half precision, one
histogram and the connected components. For the exact form, it is one ``numpy.sort`` of all pixels.
Peak memory beyond the inputs is measured in a separate process.

The streaming form is also run on maps of other ranges and offsets and on maps with few different
scores (`TRANSFORMS`), and on PaDiM's distances with a regularisation of 1e-12, which exceed the
range of half precision. For each, the table ``other maps`` has its time as a fraction of
scikit-learn's, its metrics next to the exact ones, and the widest certified bound. The exit status
is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from common import Bound, at_most, fastest, parser, report
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomaly_clip.maps import gaussian_blur
from anomaly_clip.methods.gaussians import few_sample_gaussians
from anomaly_clip.metrics import PixelHistogram, PixelRanking
from anomaly_clip.metrics.image import rank_sorted
from anomaly_clip.metrics.pro import area_of_ranking, region_weights

NUM_IMAGES = 83
BATCH = 16  # the default of the data modules
SECONDS = "cpu_seconds"
TARGETS = {
    "streaming to scikit-learn": 1 / 200,
    "streaming to limit": 2.5,
    "exact to scikit-learn": 1 / 12,
    "exact to one sort": 1.0,
    "exact off from plain": 1e-12,
    "streaming MiB": 100,
    "exact bytes a pixel": 12,
    "streaming off in AUROC or PRO": 1e-6,
    "streaming off in AP or F1-max": 1e-5,
    "half precision off": 1e-12,
}
GOALS = {"streaming to limit": 1.5, "exact to one sort": 0.7}
OTHER_TARGETS = {
    "affine to scikit-learn": 1 / 200,
    "other maps off": 1e-3,
    "other maps' bounds": 1e-3,
    "exact off from plain, other maps": 1e-12,
}
AFFINE = ("x + 1000", "0.5 + 1e-4 x", "1e6 x", "1e-9 x", "1e9 x - 1e13", "1e-9 x + 1e-5")
"""Names of the transforms that keep all distances between scores, but for a factor."""
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + 1000": lambda x: x + 1000,
    "0.5 + 1e-4 x": lambda x: 0.5 + 1e-4 * x,
    "1e6 x": lambda x: 1e6 * x,
    "1e-9 x": lambda x: 1e-9 * x,
    "1e9 x - 1e13": lambda x: 1e9 * x - 1e13,
    "1e-9 x + 1e-5": lambda x: 1e-9 * x + 1e-5,
    "constant": lambda x: torch.full_like(x, 0.3),
    "two values": lambda x: torch.where(x > 0.3, 0.7, 0.1),
    "8 bits": lambda x: (255 * x).round() / 255,
    "clipped": lambda x: x.clamp(0.15, 0.5),
    "sigmoid(40 x - 12)": lambda x: (40 * x - 12).sigmoid(),
    "exp(30 x)": lambda x: (30 * x).exp(),
    "PaDiM, regularisation 1e-12": lambda x: padim(x),
}

Values = dict[str, float]


def make(size: int) -> tuple[Tensor, Tensor]:
    """Return float32 maps in (0, 1) and masks; three of four images have defects.

    The maps are smooth, like those of detectors, which upsample patch scores and blur them.
    """
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(NUM_IMAGES, 1, 32, 32, generator=rng)
    maps = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[:, 0]
    masks = torch.zeros(maps.shape, dtype=torch.bool)
    for i in range(NUM_IMAGES):
        for _ in range(i % 4):
            top, left = (int(torch.randint(0, size * 3 // 4, (1,), generator=rng)) for _ in "xy")
            side = int(torch.randint(size // 16, size // 5, (1,), generator=rng))
            masks[i, top : top + side, left : left + side] = True
    return (gaussian_blur(maps + 3 * masks, size / 80) - 2).sigmoid(), masks


def batches(maps: Tensor, masks: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(maps.split(BATCH), masks.split(BATCH), strict=True))


def ours(metric: PixelHistogram | PixelRanking, maps: Tensor, masks: Tensor) -> Values:
    for part, mask in batches(maps, masks):
        metric.update(part, mask)
    values = metric.compute()[0].metrics
    return {name: math.nan if value is None else value for name, value in values.items()}


def streaming(maps: Tensor, masks: Tensor) -> Values:
    return ours(PixelHistogram(), maps, masks)


def fine(maps: Tensor, masks: Tensor) -> Values:
    return ours(PixelHistogram(fine=True), maps, masks)


def half(maps: Tensor, masks: Tensor) -> Values:
    return ours(PixelHistogram(), maps.half(), masks)


def exact(maps: Tensor, masks: Tensor) -> Values:
    return ours(PixelRanking(), maps, masks)


def plain_exact(maps: Tensor, masks: Tensor) -> Values:
    """Sort all pixels, and look up the scores of the anomalous ones."""
    weights = np.concatenate([np.zeros(0), *(region_weights(mask) for mask in masks.numpy())])
    hit = maps[masks].numpy()
    order = np.argsort(hit)
    ranking = rank_sorted(np.sort(maps.flatten().numpy()), hit[order])
    shares = weights[order][::-1] / round(weights.sum())
    starts = np.append(0, ranking.true_positives[:-1])
    return {
        "pixel_auroc": ranking.auroc(),
        "pixel_ap": ranking.average_precision(),
        "pixel_f1_max": ranking.f1_max(),
        "pixel_pro": area_of_ranking(ranking, np.add.reduceat(shares, starts), 0.3),
    }


def scikit_learn(maps: Tensor, masks: Tensor) -> Values:
    scores, target = maps.flatten().numpy(), masks.flatten().numpy()
    area = roc_auc_score(target, scores)
    average = average_precision_score(target, scores)
    precision, recall, _ = precision_recall_curve(target, scores)
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    return {"pixel_auroc": area, "pixel_ap": average, "pixel_f1_max": best}


def torchmetrics_exact(maps: Tensor, masks: Tensor) -> Values:
    scores, target = maps.flatten(), masks.flatten().long()
    return {
        "pixel_auroc": float(binary_auroc(scores, target)),
        "pixel_ap": float(binary_average_precision(scores, target)),
    }


def plain_pro(maps: Tensor, masks: Tensor) -> Values:
    """Compare all maps with each of 200 thresholds, region by region."""
    scores, ground_truth = maps.numpy(), masks.numpy()
    low, high = scores.min(), scores.max()
    regions = []
    for image, mask in enumerate(ground_truth):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions += [scores[image][labels == number] for number in range(1, count)]
    normal = scores[~ground_truth]
    rates, overlaps = [], []
    for step in range(200):
        threshold = low + step * (high - low) / 200
        rates.append((normal > threshold).mean())
        overlaps.append(np.mean([(region > threshold).mean() for region in regions]))
    fpr, overlap = np.array(rates), np.array(overlaps)
    kept = fpr < 0.3
    fpr, overlap = fpr[kept], overlap[kept]
    fpr = (fpr - fpr.min()) / (fpr.max() - fpr.min())
    return {"pixel_pro": float(((overlap[1:] + overlap[:-1]) / 2 * -np.diff(fpr)).sum())}


def limit(maps: Tensor, masks: Tensor) -> Values:
    for part, mask in batches(maps, masks):
        keys = part.half().view(torch.int16).numpy().view(np.uint16)
        cv2.calcHist([keys.reshape(1, -1)], [0], None, [1 << 16], [0, 1 << 16])
        for image_mask in mask.numpy():
            if image_mask.any():
                cv2.connectedComponents(image_mask.astype(np.uint8), connectivity=8)
    return {}


def one_sort(maps: Tensor, masks: Tensor) -> Values:
    np.sort(maps.flatten().numpy())
    return {}


RUNS: dict[str, Callable[[Tensor, Tensor], Values]] = {
    "streaming": streaming,
    "streaming, fine keys": fine,
    "streaming, float16 maps": half,
    "exact": exact,
    "plain exact": plain_exact,
    "scikit-learn": scikit_learn,
    "torchmetrics": torchmetrics_exact,
    "plain 200-step PRO": plain_pro,
    "limit": limit,
    "one sort": one_sort,
}


def padim(maps: Tensor) -> Tensor:
    """Return PaDiM's maps with a covariance that is hardly regularised.

    There are fewer normal samples than channels, so differences outside their subspace are divided
    by the square root of the regularisation.
    """
    rng = torch.Generator().manual_seed(0)
    samples, channels, side = 8, 12, 16
    cells = torch.nn.functional.adaptive_avg_pool2d(maps, side).flatten(1)  # (B, side * side)
    normal = torch.randn(samples, side * side, channels, generator=rng)
    gaussians = few_sample_gaussians(lambda chunk: normal[:, chunk], side * side, 1e-12)
    features = torch.randn(len(maps), side * side, channels, generator=rng)
    distances = gaussians.distances(features * (1 + 20 * cells[..., None]))
    grid = distances.view(len(maps), 1, side, side)
    large = torch.nn.functional.interpolate(grid, maps.shape[-2:], mode="bilinear")[:, 0]
    return gaussian_blur(large, maps.shape[-1] / 56)


def other_maps(size: int, scikit_learn_seconds: float) -> tuple[dict[str, Any], dict[str, Bound]]:
    """Return the table of transformed maps, and its bounds."""
    maps, masks = make(size)
    table: dict[str, dict[str, Any]] = {}
    for name, transform in TRANSFORMS.items():
        scores = transform(maps)
        metric = PixelHistogram()
        seconds = fastest(3, {"streaming": partial(streaming, scores, masks)}, warm_up=0)
        values, reference = ours(metric, scores, masks), exact(scores, masks)
        plain = plain_exact(scores, masks)
        bounds = metric.compute()[0].bounds
        widest = max(
            (max(values[k] - bounds[k][0], bounds[k][1] - values[k]) for k in bounds), default=0.0
        )
        table[name] = {
            "to scikit-learn": float(f"{seconds['streaming'] / scikit_learn_seconds:.3g}"),
            "streaming": {key: round(value, 6) for key, value in values.items()},
            "exact": {key: round(value, 6) for key, value in reference.items()},
            "off": float(f"{max(abs(values[key] - reference[key]) for key in reference):.3g}"),
            "widest bound": float(f"{widest:.3g}"),
            "exact off from plain": max(abs(plain[key] - reference[key]) for key in reference),
        }
    reached = {
        "affine to scikit-learn": max(table[name]["to scikit-learn"] for name in AFFINE),
        "other maps off": max(row["off"] for row in table.values()),
        "other maps' bounds": max(row["widest bound"] for row in table.values()),
        "exact off from plain, other maps": max(
            row["exact off from plain"] for row in table.values()
        ),
    }
    return table, {f"{n}, {size} px": at_most(reached[n], OTHER_TARGETS[n]) for n in OTHER_TARGETS}


def keep(values: dict[str, Values], name: str, maps: Tensor, masks: Tensor) -> None:
    values[name] = RUNS[name](maps, masks)


def peak_memory(name: str, size: int) -> float:
    """Return the peak memory of a run beyond its inputs, in MiB, from a separate process."""
    python = [sys.executable, __file__, "--memory_of", name, "--sizes", str(size)]
    return float(subprocess.run(python, capture_output=True, text=True, check=True).stdout)


def measure_memory(name: str, size: int) -> float:
    maps, masks = make(size)
    small = maps[:BATCH, :64, :64].contiguous(), masks[:BATCH, :64, :64].contiguous()
    small[1][0, :8, :8] = True
    RUNS[name](*small)  # loads libraries and allocates their buffers
    # A run that reuses freed memory, or stays below an earlier peak, would hide its memory use.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    filler = fill_up_to(before)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    RUNS[name](maps, masks)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del filler
    return (after - before) / 1024


def fill_up_to(kib: int) -> NDArray[np.uint8]:
    """Allocate memory until the process is as large as its earlier peak."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * resource.getpagesize() // 1024
    return np.ones(max(kib - now, 0) * 1024, dtype=np.uint8)


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[256, 518])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.memory_of:
        print(measure_memory(options.memory_of, options.sizes[0]))
        return 0
    bounds: dict[str, Bound] = {}
    content: dict[str, Any] = {"images": NUM_IMAGES, "rounds": options.rounds}
    for size in options.sizes:
        maps, masks = make(size)
        values: dict[str, Values] = {}
        tasks = {name: partial(keep, values, name, maps, masks) for name in RUNS}
        seconds = fastest(options.rounds, tasks, warm_up=0)
        memory = {name: round(peak_memory(name, size), 1) for name in RUNS}
        reference = values["exact"]
        difference = {
            name: {key: abs(values[name][key] - reference[key]) for key in reference}
            for name in ("streaming", "streaming, fine keys")
        }
        rounded = ours(PixelRanking(), maps.half(), masks)
        difference["streaming, float16 maps"] = {
            key: abs(values["streaming, float16 maps"][key] - rounded[key]) for key in rounded
        }
        off = difference["streaming"]
        reached = {
            "streaming to scikit-learn": seconds["streaming"] / seconds["scikit-learn"],
            "streaming to limit": seconds["streaming"] / seconds["limit"],
            "exact to scikit-learn": seconds["exact"] / seconds["scikit-learn"],
            "exact to one sort": seconds["exact"] / seconds["one sort"],
            "exact off from plain": max(
                abs(values["exact"][key] - values["plain exact"][key]) for key in reference
            ),
            "streaming MiB": memory["streaming"],
            "exact bytes a pixel": memory["exact"] * 2**20 / maps.numel(),
            "streaming off in AUROC or PRO": max(off["pixel_auroc"], off["pixel_pro"]),
            "streaming off in AP or F1-max": max(off["pixel_ap"], off["pixel_f1_max"]),
            "half precision off": max(difference["streaming, float16 maps"].values()),
        }
        content[f"{size} px"] = {
            SECONDS: {name: round(value, 4) for name, value in seconds.items()},
            "peak_extra_MiB": memory,
            "values": {n: {k: round(v, 8) for k, v in each.items()} for n, each in values.items()},
            "difference_from_exact": difference,
            "reached": {name: float(f"{value:.3g}") for name, value in reached.items()},
        }
        bounds |= {
            f"{n}, {size} px": at_most(reached[n], TARGETS[n], GOALS.get(n)) for n in TARGETS
        }
        table, others = other_maps(size, seconds["scikit-learn"])
        content[f"{size} px"]["other maps"] = table
        bounds |= others
    return report("pixel_metrics", content, bounds)


if __name__ == "__main__":
    sys.exit(main())
