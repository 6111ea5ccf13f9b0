"""Fit and test methods on real photographs of magnetic tiles and print one JSON line.

    python benchmarks/magnetic_tile.py DIR --weights squeezenet1_1_imagenet.safetensors
    python benchmarks/magnetic_tile.py DIR --only "RD4AD, TAB" --resnet tab_resnet18.safetensors
    python benchmarks/magnetic_tile.py DIR --only "CLIPADA, demo CLIP" --folder tiles --pictures

DIR holds the data set in MVTec-AD's layout. ``--weights`` is a file with the weights of a
torchvision SqueezeNet. ``--resnet`` is a file with the weights of a ResNet-18, for example one that
``benchmarks/tab_pretraining.py`` wrote to its folder. Each run is a fit and a test from the command
line. No setting was chosen by its results. Detectors are fitted on 150 normal training images,
sampled with a fixed seed. ``--folder`` keeps the runs in a folder; finished runs in this folder are
not repeated. The exit status is 1 if PatchCore with trained weights stays below 0.70 in image or
pixel AUROC, or does not exceed PatchCore with random weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import at_least, parser, report

from anomaly_clip.cli import main as anomaly_clip
from anomaly_clip.data import MagneticTile
from anomaly_clip.metrics.image import auroc

CONFIGS = Path(__file__).parent.parent / "configs"
LEAST = 0.70
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
SAMPLE = "--data.shots 150 --data.seed 0"
SQUEEZENET = "--model.backbone.name squeezenet1_1 --model.backbone.weights FILE"
SQUARE = "--model.image_size 224 --data.resize '{rule: square, size: null}'"
DETECTOR = f"{SQUEEZENET} {SQUARE} {SAMPLE}"
PATCHCORE = f"--config patchcore.yaml {DETECTOR} --model.layers '[features.7, features.10]'"
LAYERS = "'[features.4, features.7, features.10]'"
PADIM = f"--config padim.yaml {DETECTOR} --model.layers {LAYERS}"
ALL = "--data.categories null --data.seed 0"  # overrides the demo's categories
CLIP_ADA = (
    f"--config clip_ada_demo.yaml {ALL} --data.synthesis.recipe perlin --data.synthesis.share 0.5 "
    "--data.balanced true --data.val_split synthetic --data.val_share 0.05 --data.batch_size 16"
)
# These runs use small images, few epochs, and a ResNet-18 with random weights or those in RESNET:
# ImageNet weights would have to be downloaded.
TRAINED = "--model.backbone.weights RESNET --model.image_size 128 --data.shots 150 --data.seed 0"
RD4AD = f"--config rd4ad.yaml {TRAINED} --trainer.max_epochs 10"
SIMPLENET = (
    f"--config simplenet.yaml {TRAINED} --data.resize '{{rule: square, size: null}}' "
    "--model.pretrain_dim 384 --model.target_dim 384 --trainer.max_epochs 10"
)
RUNS = {
    "PatchCore, ImageNet": PATCHCORE,
    "PatchCore, random": PATCHCORE,
    "PaDiM, ImageNet": PADIM,
    "PaDiM, random": PADIM,
    "SDP, demo CLIP": f"--config demo.yaml {ALL}",
    "CLIPADA, demo CLIP": CLIP_ADA,
    "RD4AD, TAB": RD4AD,
    "RD4AD, random": RD4AD,
    "SimpleNet, TAB": SIMPLENET,
    "SimpleNet, random": SIMPLENET,
}


def words(name: str, root: str, weights: str, resnet: str) -> list[str]:
    """Return the command-line options of a run."""
    if name.endswith("random"):
        weights = resnet = "random"
    line = shlex.split(RUNS[name].replace("FILE", weights).replace("RESNET", resnet))
    line[1] = str(Path(CONFIGS.name) / line[1])
    # --data follows --config, so that the file's options that MagneticTile lacks are dropped.
    return [*line[:2], "--data", "MagneticTile", "--data.root", root, *line[2:]]


def run(
    name: str, root: str, weights: str, resnet: str, folder: Path, pictures: bool
) -> dict[str, Any]:
    """Fit and test, or read an earlier test; return the metrics."""
    target = folder / name.replace(", ", "_").replace(" ", "_").lower()
    if not (target / "test" / "metrics.json").is_file():
        line = words(name, root, weights, resnet)
        test = []
        if not name.startswith("SDP"):
            code = anomaly_clip(["fit", *line, "--output.folder", str(target / "fit")])
            assert code == 0, line
            test = ["--ckpt_path", str(target / "fit" / "checkpoints" / "last.ckpt")]
        more = ["--output.maps", str(pictures).lower(), "--output.folder", str(target / "test")]
        code = anomaly_clip(["test", *(test or line), *more])
        assert code == 0, line
    metrics = json.loads((target / "test" / "metrics.json").read_text())
    verb = "test" if name.startswith("SDP") else "fit"
    return {
        **{metric: round(metrics["mean"][metric], 4) for metric in METRICS},
        "by_defect": by_defect(target / "test" / "scores.csv"),
        "command": shlex.join(["anomaly_clip", verb, *words(name, "DIR", "FILE", "RESNET")]),
    }


def by_defect(file: Path) -> dict[str, float]:
    """Return the image AUROC of each kind of defect against the normal images."""
    import csv

    with file.open(encoding="utf-8") as rows:
        scored = list(csv.DictReader(rows))
    kinds = np.array([Path(row["path"]).parent.name for row in scored])
    scores = torch.tensor([float(row["image_score"]) for row in scored])
    auroc_by_kind = {}
    for kind in sorted(set(kinds) - {"good"}):
        chosen = torch.from_numpy((kinds == kind) | (kinds == "good"))
        label = torch.from_numpy(kinds == kind)[chosen]
        auroc_by_kind[str(kind)] = round(auroc(scores[chosen], label), 4)
    return auroc_by_kind


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", help="folder of the data set")
    arguments.add_argument("--weights", default="imagenet", help="SqueezeNet: file or imagenet")
    arguments.add_argument("--resnet", default="imagenet", help="ResNet-18: file or imagenet")
    arguments.add_argument("--folder", type=Path, help="folder to keep the runs in")
    arguments.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments.add_argument("--pictures", action="store_true", help="save the maps as images")
    options = arguments.parse_args()
    root, weights, resnet = str(Path(options.root).resolve()), options.weights, options.resnet
    folder = options.folder and options.folder.resolve()
    if Path(weights).is_file():
        weights = str(Path(weights).resolve())
    if Path(resnet).is_file():
        resnet = str(Path(resnet).resolve())
    data = MagneticTile(root=root, image_size=224)
    samples = data.samples("test")
    os.chdir(CONFIGS.parent)
    with tempfile.TemporaryDirectory() as scratch:
        runs = {}
        for name in options.only:
            with contextlib.redirect_stdout(sys.stderr):
                kept = folder or Path(scratch)
                runs[name] = run(name, root, weights, resnet, kept, options.pictures)
    trained, random = runs.get("PatchCore, ImageNet"), runs.get("PatchCore, random")
    bounds = {}
    for name in ("image_auroc", "pixel_auroc"):
        if trained:
            bounds[f"PatchCore, {name}"] = at_least(trained[name], LEAST)
        if trained and random:
            gain = round(trained[name] - random[name], 4)
            bounds[f"PatchCore over random weights, {name}"] = at_least(gain, 1e-4)
    values = {
        "test_images": len(samples),
        "anomalous": sum(sample.label for sample in samples),
        "training_images": len(data.samples("train")),
        "runs": runs,
    }
    return report("magnetic_tile", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
