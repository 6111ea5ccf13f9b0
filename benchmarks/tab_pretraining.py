"""Pre-train a ResNet-18 along the small CLIP's texts, judge it by PaDiM, print one JSON line.

    python benchmarks/tab_pretraining.py DIR
    python benchmarks/tab_pretraining.py DIR --folder tab --only TAB

DIR holds the magnetic tiles in MVTec-AD's layout. The training data are class folders: the normal
training photographs of the tiles, and normal pictures of the demo's categories; the ResNet starts
from random weights, as ImageNet's are a download, and is trained at 64 pixels for a few minutes.
PaDiM then looks at a seeded sample of 150 normal tiles at 128 pixels with the weights that the
training started from, with TAB's and with those of the classification baseline, which sees the same
pictures and no texts.

The small CLIP's texts of all classes are almost the same (mean cosine 0.9999), and TAB as published
can learn nothing from them: this is the row "as published". The row "TAB" takes each side's mean
from the texts before (``model.prompts.centered sides``). This, size, rate and epochs were chosen on
test pictures of six demo categories, not on the tiles. With ``--folder`` runs are kept, and
finished ones are not run again. The exit status is 1 if TAB is not above random in image and pixel
AUROC, both seeds taken together.
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
from anomaly_clip.demo.photographs import CATEGORIES, draw_picture

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1)
SIDE, PER_CLASS, EPOCHS = 64, 20, 10
JUDGED = 128
"""Side of the images that PaDiM looks at."""
FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
RUNS = {
    "TAB": "--model.prompts.centered sides",
    "as published": "",
    "classification": "--model.loss classification",
}


def write_classes(root: Path, tiles: Path) -> None:
    """Write a folder a class: the tiles' normal photographs, and normal pictures of the demo."""
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
            picture = draw_picture(category, 0, number, size=JUDGED)
            Image.fromarray(picture.image).save(folder / f"{number:03d}.png")
    partial.rename(root)


def fit_words(name: str, seed: int, classes: str) -> list[str]:
    """Return the words of a pre-training."""
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


def judge_words(weights: list[str], seed: int, tiles: str) -> list[str]:
    """Return the words of the comparison."""
    line = (
        f"--config configs/padim.yaml --data MagneticTile --data.root {shlex.quote(tiles)}"
        f" --model.image_size {JUDGED} --data.resize '{{rule: square, size: null}}'"
        f" --data.shots 150 --data.seed {seed} --seed_everything {seed}"
    )
    return ["compare", "--weights", *weights, *shlex.split(line)]


def run(seed: int, names: list[str], classes: Path, tiles: str, folder: Path) -> dict[str, Any]:
    """Pre-train with a seed, judge, and return the figures by weights, and minutes."""
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
    judged = folder / f"padim-{seed}"
    words = [*judge_words(weights, seed, tiles), "--folder", str(judged)]
    code = anomaly_clip(words)
    assert code == 0, words
    figures = json.loads((judged / "comparison.json").read_text())["figures"]["mean"]
    found = {
        label: {figure: round(values[figure], 4) for figure in FIGURES}
        for label, values in figures.items()
    }
    return {"figures": found, "minutes": minutes}


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("tiles", help="the data set of magnetic tiles")
    arguments.add_argument("--folder", type=Path, help="where runs are kept")
    arguments.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    asked = arguments.parse_args()
    tiles = str(Path(asked.tiles).resolve())
    kept = asked.folder and asked.folder.resolve()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        folder: Path = kept or Path(scratch)
        classes = folder / "classes"
        write_classes(classes, Path(tiles))
        seeds = {seed: run(seed, asked.only, classes, tiles, folder) for seed in asked.seeds}
    labels = list(seeds[asked.seeds[0]]["figures"])
    means = {
        label: {
            figure: round(
                sum(found["figures"][label][figure] for found in seeds.values()) / len(seeds), 4
            )
            for figure in FIGURES
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
                **{name: fit_words(name, SEEDS[0], "CLASSES") for name in asked.only},
                "PaDiM": judge_words(["random", "FILES"], SEEDS[0], "DIR"),
            }.items()
        },
    }
    return report("tab_pretraining", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
