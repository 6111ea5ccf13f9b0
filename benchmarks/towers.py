"""Measure cost and metrics of methods on features with backbones of all kinds; print one JSON line.

    python benchmarks/towers.py --root DIR --squeezenet squeezenet1_1_imagenet.safetensors
    python benchmarks/towers.py --only cost --rounds 3

- ``cost``: processor time of scoring one image, as a multiple of the plain forward pass of the
  backbone up to the last layer of the method, in the same run. The weights are random; PatchCore,
  PaDiM, SubspaceAD and AnomalyDINO are fitted on 4 random images.
- ``tiles``: photographs of magnetic tiles (DIR, in MVTec-AD's layout). PatchCore, which keeps 1 %
  of the patches here, PaDiM, SubspaceAD and AnomalyDINO are fitted on 150 normal images, drawn with
  seed 0; ``4 shots`` is the mean of the seeds 0 to 2. Random weights are the control.
  MuSc on the same photographs: musc_tiles.py.

``--folder`` keeps the rows, so that an interrupted run continues. There is no bound.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import fastest, parser, report
from lightning import Trainer
from musc_tiles import BATCH, MASKS, METRICS, NUM_FITTED, evaluated
from torch import Tensor
from torch.utils.data import DataLoader

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.towers import AnyBackbone, BackboneSettings
from anomaly_clip.data import MagneticTile
from anomaly_clip.methods import AnomalyDINO, PaDiM, PatchCore, SubspaceAD
from anomaly_clip.methods.feature_method import FittedMethod

PARTS = ("cost", "tiles")
FITTED, SHOTS, SEEDS, CORESET = 4, 4, (0, 1, 2), 0.01
TOWERS: Mapping[str, tuple[BackboneSettings | CLIPSettings, int]] = {
    "ResNet-18, 224 px": (BackboneSettings("resnet18", "random"), 224),
    "ViT-S/14, 224 px": (BackboneSettings("vit_small_patch14_dinov2", "random"), 224),
    "ViT-S/14, 448 px": (BackboneSettings("vit_small_patch14_dinov2", "random"), 448),
    "CLIP ViT-B/16, 224 px": (CLIPSettings("ViT-B-16", "random"), 224),
}
METHODS: Mapping[str, Any] = {
    "PatchCore": PatchCore,
    "PaDiM": PaDiM,
    "SubspaceAD": SubspaceAD,
    "AnomalyDINO": AnomalyDINO,
}
SQUEEZENET_LAYERS: Mapping[str, list[str]] = {
    "PatchCore": ["features.7", "features.10"],
    "PaDiM": ["features.4", "features.7", "features.10"],
    "SubspaceAD": ["features.10"],
    "AnomalyDINO": ["features.10"],
}
DEMO_LAYERS: Mapping[str, list[int]] = {
    "PatchCore": [4, 6],
    "PaDiM": [2, 4, 6],
    "SubspaceAD": [5, 6],
    "AnomalyDINO": [8],
}
"""Blocks of the demo CLIP, which has eight: those that a method has by default, or similar ones."""
FEW_SHOT = ("SubspaceAD", "AnomalyDINO")
"""Methods that are also fitted on four images, and on random weights."""
DEMO_SIZE, SQUEEZENET_SIZE = 160, 224


# -- cost ------------------------------------------------------------------------------------------


def trainer() -> Trainer:
    """Return a trainer that writes and prints nothing."""
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fitted(method: FittedMethod, images: Tensor) -> FittedMethod:
    """Fit on images ``(n, 3, S, S)``."""
    batches = [
        {"image": part, "category": ["any"] * len(part), "index": torch.arange(i, i + len(part))}
        for i, part in enumerate(images.split(1))
    ]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer().fit(method, loader)
    return method.eval()


def plain(backbone: AnyBackbone, layers: list[Any], images: Tensor) -> object:
    """Run the forward pass of the backbone alone, up to the last layer."""
    if isinstance(backbone, CNNBackbone):
        return backbone(images)
    return backbone.feature_maps(images, [max(layers)])


@torch.no_grad()
def cost_of(name: str, rounds: int) -> dict[str, float]:
    """Return the cost of scoring an image, as a multiple of the plain forward pass."""
    settings, size = TOWERS[name]
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (FITTED, 3, size, size), generator=draws).byte()
    ratios = {}
    for label, kind in METHODS.items():
        options = {"masks": "off", "rotations": "off"} if kind is AnomalyDINO else {}
        method = kind(settings, image_size=size, **options)
        with torch.enable_grad():
            fitted(method, images)
        tasks: dict[str, Callable[[], object]] = {
            "plain": partial(plain, method.backbone, method.layers, images[:1]),
            "method": partial(method.score, images[:1], ["any"]),
        }
        seconds = fastest(rounds, tasks)
        ratios[label] = round(seconds["method"] / seconds["plain"], 2)
        sys.stderr.write(f"{name} {label} {ratios[label]} {seconds['plain']:.3f} s\n")
    return ratios


def cost(rounds: int, keep: Callable[[str, Callable[[], Any]], Any]) -> dict[str, Any]:
    """Return the cost of all methods on all backbones."""
    return {name: keep(f"cost {name}", partial(cost_of, name, rounds)) for name in TOWERS}


# -- photographs -----------------------------------------------------------------------------------


def rows(squeezenet: str) -> Iterator[tuple[str, str, Any, int, list[Any]]]:
    """Yield name, method, settings of the backbone, image size and layers of each row."""
    for weights, label in ((squeezenet, "ImageNet"), ("random", "random weights")):
        for method, layers in SQUEEZENET_LAYERS.items():
            settings = BackboneSettings("squeezenet1_1", weights)
            yield f"SqueezeNet, {label}: {method}", method, settings, SQUEEZENET_SIZE, layers
    for weights, label in (("demo", "demo"), ("random", "random weights")):
        for method, blocks in DEMO_LAYERS.items():
            clip = CLIPSettings("demo", weights)
            yield f"demo CLIP, {label}: {method}", method, clip, DEMO_SIZE, blocks


def tested(
    root: str, method: str, settings: Any, size: int, layers: list[Any], **shots: Any
) -> dict[str, float]:
    """Fit, if the method is fitted, and test; return metrics."""
    torch.manual_seed(0)  # of random weights
    data = MagneticTile(root=root, image_size=size, mask_size=MASKS, batch_size=BATCH, **shots)
    options = {"coreset": CORESET} if method == "PatchCore" else {}
    values = evaluated(
        METHODS[method](settings, image_size=size, layers=layers, **options), data, True
    )
    return {name: values["all"][name] for name in METRICS}


def tiles(
    root: str, squeezenet: str, keep: Callable[[str, Callable[[], Any]], Any]
) -> dict[str, Any]:
    """Return metrics of all rows, and of four shots."""
    result = {}
    for name, method, settings, size, layers in rows(squeezenet):
        if method not in FEW_SHOT and "random" in name:
            continue
        row = (root, method, settings, size, layers)
        result[name] = keep(name, partial(tested, *row, shots=NUM_FITTED, seed=0))
    for name, method, settings, size, layers in rows(squeezenet):
        if method not in FEW_SHOT or "random" in name:
            continue
        row = (root, method, settings, size, layers)
        parts = [
            keep(f"{name}, 4 shots, seed {seed}", partial(tested, *row, shots=SHOTS, seed=seed))
            for seed in SEEDS
        ]
        means = {key: round(sum(p[key] for p in parts) / len(parts), 4) for key in METRICS}
        result[f"{name}, 4 shots"] = {**means, "seeds": parts}
    return result


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--root", help="folder of the magnetic tiles")
    arguments.add_argument("--squeezenet", default="imagenet", help="SqueezeNet: file or imagenet")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--folder", type=Path, help="folder to keep the rows in")
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    values: dict[str, Any] = {
        "rounds": options.rounds,
        "fitted_images": NUM_FITTED,
        "coreset": CORESET,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)

        def keep(name: str, task: Callable[[], Any]) -> Any:
            file = folder / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
            if not file.is_file():
                file.write_text(json.dumps(task()), encoding="utf-8")
                sys.stderr.write(f"{name}: {file.read_text(encoding='utf-8')}\n")
            return json.loads(file.read_text(encoding="utf-8"))

        if "cost" in options.only:
            values["cost"] = cost(options.rounds, keep)
        if "tiles" in options.only and options.root:
            values["tiles"] = tiles(options.root, options.squeezenet, keep)
    return report("towers", values, {})


if __name__ == "__main__":
    sys.exit(main())
