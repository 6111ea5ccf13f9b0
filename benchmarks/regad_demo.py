"""Train RegAD on some generated categories, test it on others, and print one JSON line.

    python benchmarks/regad_demo.py
    python benchmarks/regad_demo.py --weights tab_resnet18.safetensors

RegAD is trained on normal images of eight demo categories, with small images and few epochs, and
tested in turn on three others. The ResNet-18 starts from random weights. With ``--weights``, a
second run starts from the weights in that file, for example one that
``benchmarks/tab_pretraining.py`` wrote to its folder. Each metric is the mean over ten sets of four
reference images, with its standard deviation. No setting was chosen by its results. The exit status
is 1 if a run fails.
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

from common import parser, report

from anomaly_clip.cli import main as anomaly_clip

ROOT = Path(__file__).parent.parent
TESTED = ["brass washer", "oak wood board", "white pill"]
TRAINED = [
    "blue denim cloth",
    "brass nut",
    "chocolate chip cookie",
    "green capsule",
    "grey concrete wall",
    "red woven fabric",
    "steel gear",
    "tan leather",
]
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
LINE = (
    f"--config configs/regad_4shot.yaml --data Demo --data.categories '{json.dumps(TESTED)}' "
    f"--data.train_categories '{json.dumps(TRAINED)}' --data.num_train 30 --data.num_test 40 "
    "--data.seed 0 --data.resize '{rule: square, size: null}' --model.image_size 128 "
    "--trainer.max_epochs 10"
)


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, help="ResNet-18 weights for a second run")
    arguments.add_argument("--folder", type=Path, help="folder to keep the runs in")
    options = arguments.parse_args()
    weights = [str(options.weights.resolve())] if options.weights else []
    kept = options.folder and options.folder.resolve()
    os.chdir(ROOT)
    by_weights: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = kept or Path(scratch)
        for source in ["random", *weights]:
            target = folder / Path(source).stem
            words = [*shlex.split(LINE), "--model.backbone.weights", source]
            if not (target / "metrics.json").is_file():
                with contextlib.redirect_stdout(sys.stderr):
                    code = anomaly_clip(["each", *words, "--output.folder", str(target)])
                assert code == 0, words
            metrics = json.loads((target / "metrics.json").read_text())
            spread = metrics["run"]["protocol"]["spread"]
            by_weights["random" if source == "random" else "TAB"] = {
                name: {
                    metric: [round(values[metric], 4), round(spread[name][metric], 4)]
                    for metric in METRICS
                }
                for name, values in metrics["categories"].items()
            }
    values = {
        "run": f"anomaly_clip each {LINE} --model.backbone.weights WEIGHTS",
        "form": "mean and standard deviation over rounds",
        "by_weights": by_weights,
    }
    return report("regad_demo", values, {})


if __name__ == "__main__":
    sys.exit(main())
