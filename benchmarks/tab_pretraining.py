"""Pre-train a ResNet-18 with TAB, evaluate it with PaDiM, and print one JSON line.

    python benchmarks/tab_pretraining.py DIR
    python benchmarks/tab_pretraining.py DIR --folder tab --only TAB

DIR holds the magnetic tiles in MVTec-AD's layout. The training data are one folder per class: the
normal training photographs of the tiles, and normal images of the demo's categories. TAB aligns the
ResNet with text features of the demo CLIP. The ResNet starts from random weights, because ImageNet
weights would have to be downloaded, and is trained at 64 pixels for a few minutes. PaDiM is then
fitted on 150 normal tiles at 128 pixels, sampled with a fixed seed. Its backbone is in turn the
ResNet before training, the ResNet trained with TAB, and the ResNet of the classification baseline,
which is trained on the same images without text.

The demo CLIP's text features of all classes are almost equal (mean cosine 0.9999), so TAB as
published cannot learn from them. The row "as published" shows this. In the row "TAB", the mean of
the normal text features is first subtracted from the normal ones, and the mean of the abnormal text
features from the abnormal ones (``model.prompts.centered sides``). This option, the image size, the
learning rate and the number of epochs were chosen on test images of six demo categories, not on the
tiles. ``--folder`` keeps the runs in a folder; finished runs in this folder are not repeated. The
exit status is 1 if the image or pixel AUROC with TAB, averaged over the seeds, does not exceed that
with random weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import at_least, parser, report
from PIL import Image

from anomaly_clip.cli import main as anomaly_clip
from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1)
SIDE, PER_CLASS, EPOCHS = 64, 20, 10
TEST_SIDE = 128
"""Side of PaDiM's images."""
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
RUNS = {
    "TAB": "--model.prompts.centered sides",
    "as published": "",
    "classification": "--model.loss classification",
}


def write_classes(root: Path, tiles: Path) -> None:
    """Write one folder per class: the normal photographs of the tiles and normal demo images."""
    if root.is_dir():
        return
    partial = root.with_name(f".{root.name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "magnetic tile").mkdir(parents=True)
    for file in sorted((tiles / "magnetic_tile" / "train" / "good").iterdir()):
        shutil.copy(file, partial / "magnetic tile" / file.name)
    for category in CATEGORIES:
        folder = partial / CATEGORIES[category].words
        folder.mkdir(exist_ok=True)
        for number in range(PER_CLASS):
            picture = draw_photograph(category, 0, number, size=TEST_SIDE)
            Image.fromarray(picture.image).save(folder / f"{number:03d}.png")
    partial.rename(root)


def fit_words(name: str, seed: int, classes: str) -> list[str]:
    """Return the command line of a pre-training run."""
    line = (
        f"fit --config configs/tab.yaml --data IndustrialFolders --data.root {shlex.quote(classes)}"
        " --data.resize '{rule: square, size: null}' --data.synthesis.recipe nsa"
        " --data.synthesis.preset tab --data.synthesis.mode pair --data.balanced true"
        f" --data.batch_size 32 --data.seed {seed} --seed_everything {seed} --model.seed {seed}"
        " --model.backbone.weights random --model.text.name demo --model.text.pretrained demo"
        f" --model.image_size {SIDE} --model.optim.lr 0.05 --model.optim.passes 1"
        f" --trainer.max_epochs {EPOCHS} {RUNS[name]}"
    )
    return shlex.split(line)


def compare_words(weights: list[str], seed: int, tiles: str) -> list[str]:
    """Return the command line of the comparison."""
    line = (
        f"--config configs/padim.yaml --data MagneticTile --data.root {shlex.quote(tiles)}"
        f" --model.image_size {TEST_SIDE} --data.resize '{{rule: square, size: null}}'"
        f" --data.shots 150 --data.seed {seed} --seed_everything {seed}"
    )
    return ["compare", "--weights", *weights, *shlex.split(line)]


def run(seed: int, names: list[str], classes: Path, tiles: str, folder: Path) -> dict[str, Any]:
    """Pre-train and evaluate with a seed; return metrics by weights, and minutes of training."""
    minutes = {}
    weights = ["random"]
    for name in names:
        target = folder / f"{name}-{seed}"
        file = target / f"{name}.safetensors"
        if not file.is_file():
            shutil.rmtree(target, ignore_errors=True)
            begun = time.perf_counter()
            words = [*fit_words(name, seed, str(classes)), "--output.folder", str(target)]
            code = anomaly_clip(words)
            assert code == 0, words
            minutes[name] = round((time.perf_counter() - begun) / 60, 1)
            shutil.copy(target / "tab_resnet18.safetensors", file)
        weights.append(str(file))
    comparison = folder / f"padim-{seed}"
    words = [*compare_words(weights, seed, tiles), "--folder", str(comparison)]
    code = anomaly_clip(words)
    assert code == 0, words
    means = json.loads((comparison / "comparison.json").read_text())["figures"]["mean"]
    rounded = {
        label: {metric: round(values[metric], 4) for metric in METRICS}
        for label, values in means.items()
    }
    return {"figures": rounded, "minutes": minutes}


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("tiles", help="folder of the magnetic tiles")
    arguments.add_argument("--folder", type=Path, help="folder to keep the runs in")
    arguments.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = arguments.parse_args()
    tiles = str(Path(options.tiles).resolve())
    kept = options.folder and options.folder.resolve()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        folder: Path = kept or Path(scratch)
        classes = folder / "classes"
        write_classes(classes, Path(tiles))
        seeds = {seed: run(seed, options.only, classes, tiles, folder) for seed in options.seeds}
    labels = list(seeds[options.seeds[0]]["figures"])
    means = {
        label: {
            metric: round(
                sum(result["figures"][label][metric] for result in seeds.values()) / len(seeds), 4
            )
            for metric in METRICS
        }
        for label in labels
    }
    bounds = {}
    for name in ("image_auroc", "pixel_auroc"):
        gain = round(means["TAB"][name] - means["random"][name], 4) if "TAB" in means else None
        bounds[f"TAB over random weights, {name}"] = at_least(gain, 1e-4)
    values = {
        "seeds": seeds,
        "mean": means,
        "commands": {
            name: shlex.join(["anomaly_clip", *words])
            for name, words in {
                **{name: fit_words(name, SEEDS[0], "CLASSES") for name in options.only},
                "PaDiM": compare_words(["random", "FILES"], SEEDS[0], "DIR"),
            }.items()
        },
    }
    return report("tab_pretraining", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
