"""Measure the speed-up of SDP+ training by the feature cache and print one JSON line.

    python benchmarks/feature_cache.py

The benchmark measures the seconds of an epoch of SDP+ (ViT-B-16-plus-240, random weights, files of
1024 x 1024 pixels with masks) in four cases:

- an epoch without the cache,
- the first epoch of a first run with the cache, which fills the cache,
- a later epoch of that run,
- the first epoch of a second run with the cache, including the start of the run.

The prompts are encoded beforehand in all cases. The exit status is 1 if the third or the fourth
case is not 10 times faster than the first, if the losses with and without the cache differ by more
than half precision explains, or if the two runs with the cache have different losses.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import at_least, at_most, parser, report
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.prompts import RVSSettings
from anomaly_clip.data import MVTecAD
from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.files import CACHE_VARIABLE
from anomaly_clip.methods import SDPPlus

SIDE = 1024
LEAST_TIMES = 10.0
MOST_APART = 5e-3  # relative difference of losses; cached features have half precision
EPOCHS = 3


def make_files(root: Path, count: int, category: str, seed: int) -> None:
    """Write a category in MVTec-AD's layout with test images and masks."""
    for number in range(count):
        defect = "stain" if number % 2 else "good"
        picture = draw_photograph(category, seed, number, defect, SIDE)
        folder = root / category / "test" / defect
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.image).save(folder / f"{number:03d}.png")
        if defect != "good":
            ground_truth = root / category / "ground_truth" / defect
            ground_truth.mkdir(parents=True, exist_ok=True)
            mask = picture.mask.astype(np.uint8) * 255
            Image.fromarray(mask).save(ground_truth / f"{number:03d}_mask.png")
    (root / category / "train" / "good").mkdir(parents=True, exist_ok=True)
    picture = draw_photograph(category, seed, 10_000, None, SIDE)
    Image.fromarray(picture.image).save(root / category / "train" / "good" / "000.png")


class Clock(Callback):
    """Record the ends of epochs and the losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Record the loss."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


def epochs(make: Callable[[], tuple[SDPPlus, MVTecAD]]) -> tuple[list[float], list[float]]:
    """Fit; return the seconds of each epoch (set-up included in the first), and the losses."""
    method, data = make()
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(method, data)
    marks = [start, *clock.ends]
    return [b - a for a, b in pairwise(marks)], clock.losses


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=16, help="number of training images")
    images = arguments.parse_args().images
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    names = list(CATEGORIES)[:2]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = str(Path(folder, "cache"))
        training, tested = Path(folder, "training"), Path(folder, "tested")
        make_files(training, images, names[0], seed=0)
        make_files(tested, 2, names[1], seed=1)
        backbone = CLIPBackbone.of(CLIPSettings("ViT-B-16-plus-240", "random"))
        with_text = SDPPlus(backbone, rvs=RVSSettings("mean"))
        with_text.text(names[0], MVTecAD.dataset_name)

        def make(gb: float) -> tuple[SDPPlus, MVTecAD]:
            method = SDPPlus(backbone, rvs=RVSSettings("mean"), feature_cache_gb=gb)
            method._text = with_text._text
            auxiliary = MVTecAD(str(training), batch_size=8, shuffle=False)
            return method, MVTecAD(str(tested), auxiliary=auxiliary, num_workers=0)

        without, expected = epochs(lambda: make(0.0))
        first, losses = epochs(lambda: make(20.0))
        second, second_losses = epochs(lambda: make(20.0))
        size = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*.safetensors"))
    plain = min(without)
    apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    times = {"later_epoch": plain / max(first[1:]), "second_run": plain / second[0]}
    values = {
        "images": images,
        "seconds": {
            "epoch_without": round(plain, 3),
            "first_run_first_epoch": round(first[0], 3),
            "first_run_later_epoch": round(max(first[1:]), 3),
            "second_run_first_epoch": round(second[0], 3),
        },
        "times_faster": {name: round(value, 1) for name, value in times.items()},
        "megabytes_an_image": round(size / images / 1e6, 2),
        "losses_apart": float(f"{apart:.1e}"),
    }
    bounds = {
        **{f"times faster, {k}": at_least(v, LEAST_TIMES) for k, v in times.items()},
        "losses apart": at_most(apart, MOST_APART),
        "losses of the second run equal": at_least(int(second_losses == losses), 1),
    }
    return report("feature_cache", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
