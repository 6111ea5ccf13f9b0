"""Calibrate detectors on real photographs of magnetic tiles and print one JSON line.

    python benchmarks/calibration_magnetic_tile.py DIR --weights squeezenet1_1_imagenet.safetensors

DIR holds the data set in MVTec-AD's layout, and ``split.csv`` with the tile of each normal image:
each tile was photographed under six exposures. PatchCore and PaDiM on SqueezeNet are fitted once on
200 normal images, and all other images are scored once. Then 100 of the other normal images are
drawn as calibration images, 20 times with the seeds 0 to 19, in three ways: image by image, as the
theory needs; by whole tiles, so that images are not exchangeable; and from tiles of the fit, with
images of new tiles as the test. Each draw has a threshold for 5 % false alarms, and an observed
rate on the remaining normal images. For exchangeable images its count follows the beta-binomial
distribution. The exit status is 1 if fewer than 17 of 20 rates of the first way are within its
95 % interval.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import at_least, parser, report
from lightning import Trainer
from numpy.typing import NDArray
from scipy.stats import betabinom

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.data import MagneticTile
from anomaly_clip.data.samples import Sample
from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.decisions.conformal import binomial_interval
from anomaly_clip.methods import PaDiM, PatchCore
from anomaly_clip.methods.feature_method import FittedMethod

SIDE, BATCH = 224, 16
FITTED, CALIBRATED, DRAWS = 200, 100, 20
ALPHA = 0.05
LEAST = 17
"""Least number of draws within the interval."""

Draw = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices of calibration images and of the normal images to test on."""


def methods(weights: str) -> dict[str, FittedMethod]:
    """Return the detectors, with the settings of ``benchmarks/magnetic_tile.py``."""
    backbone = CNNSettings("squeezenet1_1", weights)
    layers = ["features.4", "features.7", "features.10"]
    return {
        "PatchCore": PatchCore(backbone, SIDE, layers[1:]),
        "PaDiM": PaDiM(backbone, SIDE, layers),
    }


def fit(method: FittedMethod, root: str) -> MagneticTile:
    """Fit on normal training images, sampled with seed 0, and return the data."""
    data = MagneticTile(root=root, image_size=SIDE, shots=FITTED, seed=0, batch_size=BATCH)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)
    return data


@torch.inference_mode()
def scores(method: FittedMethod, data: MagneticTile, samples: list[Sample]) -> NDArray[np.float64]:
    """Return the image scores ``(m,)`` of samples."""
    method.eval()
    images = data.as_tensors(samples)
    parts = []
    for start in range(0, len(samples), BATCH):
        items = [images[row] for row in range(start, min(start + BATCH, len(samples)))]
        batch = torch.stack([item["image"] for item in items])
        parts.append(method.score(batch, [item["category"] for item in items])["image_score"])
    return torch.cat(parts).double().numpy()


def tiles(root: Path) -> dict[str, str]:
    """Return the tile of each normal image, by the name of its file."""
    with (root / "split.csv").open(encoding="utf-8", newline="") as rows:
        return {row["file"]: row["tile_group"] for row in csv.DictReader(rows)}


def draws(way: str, tile: NDArray[np.str_], is_new: NDArray[np.bool_]) -> Iterator[Draw]:
    """Yield a draw per seed.

    Args:
        way: See ``WAYS``.
        tile: Tile of each normal image that was not fitted on ``(m,)``.
        is_new: Whether the image is of a tile without fitted images ``(m,)``.
    """
    every = np.arange(len(tile))
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        if way == "by image":
            chosen = rng.permutation(every)[:CALIBRATED]
        elif way == "by tile":
            order = rng.permutation(np.unique(tile))
            sizes = np.cumsum([(tile == name).sum() for name in order])
            names = order[: np.searchsorted(sizes, CALIBRATED) + 1]  # at least so many images
            chosen = every[np.isin(tile, names)]
        else:
            chosen = rng.permutation(every[~is_new])[:CALIBRATED]
        rest = np.setdiff1d(every, chosen)
        yield chosen, rest[is_new[rest]] if way == "new tiles" else rest


WAYS = ("by image", "by tile", "new tiles")


def rates(normal: NDArray[np.float64], chosen: list[Draw]) -> dict[str, Any]:
    """Return the observed false-alarm rates of draws, and how many are within the interval."""
    observed, inside, numbers, limits = [], 0, [], []
    for calibration, rest in chosen:
        record = CategoryCalibration(tuple(np.sort(normal[calibration])))
        level = record.level(ALPHA)
        count, n = int((normal[rest] > level.threshold).sum()), len(calibration)
        low, high = betabinom(len(rest), level.k, n + 1 - level.k).interval(0.95)
        inside += int(low <= count <= high)
        observed.append(round(count / len(rest), 4))
        numbers.append(n)
        limits.append([round(float(limit) / len(rest), 4) for limit in (low, high)])
    return {
        "calibration_images": [min(numbers), max(numbers)],
        "test_images": [min(len(rest) for _, rest in chosen), max(len(r) for _, r in chosen)],
        "rates": observed,
        "mean": round(float(np.mean(observed)), 4),
        "interval_of_first": limits[0],
        "inside": inside,
    }


def recalls(
    normal: NDArray[np.float64], by_kind: dict[str, NDArray[np.float64]], chosen: list[Draw]
) -> dict[str, dict[str, Any]]:
    """Return the recall of each kind of defect at the threshold of the first draw."""
    levels = [CategoryCalibration(tuple(np.sort(normal[c]))).level(ALPHA) for c, _ in chosen]
    result = {}
    for kind, values in by_kind.items():
        counts = [int((values > level.threshold).sum()) for level in levels]
        low, high = binomial_interval(counts[0], len(values))
        result[kind] = {
            "count": counts[0],
            "total": len(values),
            "value": round(counts[0] / len(values), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "mean_of_draws": round(float(np.mean(counts)) / len(values), 4),
        }
    return result


def run(method: FittedMethod, root: Path) -> dict[str, Any]:
    """Fit once, score once, and draw calibration images."""
    data = fit(method, str(root))
    fitted = {sample.image for sample in data.fit_samples()}
    train = [sample for sample in data.samples("train") if sample.image not in fitted]
    test = data.samples("test")
    normals = train + [sample for sample in test if not sample.label]
    normal = scores(method, data, normals)
    defects = [sample for sample in test if sample.label]
    kinds = np.array([sample.image.parent.name for sample in defects])
    defect_scores = scores(method, data, defects)
    by_kind = {str(kind): defect_scores[kinds == kind] for kind in np.unique(kinds)}
    by_kind["all"] = defect_scores
    tile_of = tiles(root)
    tile = np.array([tile_of[sample.image.name] for sample in normals])
    is_new = np.arange(len(normals)) >= len(train)
    chosen = {way: list(draws(way, tile, is_new)) for way in WAYS}
    return {
        "fitted_images": len(fitted),
        "normal_images": len(normals),
        "tiles": len(np.unique(tile)),
        "ways": {way: rates(normal, chosen[way]) for way in WAYS},
        "recall": recalls(normal, by_kind, chosen["by image"]),
    }


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", type=Path, help="folder of the data set")
    arguments.add_argument("--weights", default="imagenet", help="SqueezeNet: file or imagenet")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    runs = {name: run(m, options.root) for name, m in methods(options.weights).items()}
    bounds = {
        f"{name}: draws by image within the 95 % interval, of {DRAWS}": at_least(
            result["ways"]["by image"]["inside"], LEAST
        )
        for name, result in runs.items()
    }
    values = {"alpha": ALPHA, "draws": DRAWS, "runs": runs}
    return report("calibration_magnetic_tile", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
