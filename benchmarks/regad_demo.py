"""Train RegAD on some generated things, test it on others, print one JSON line.

    python benchmarks/regad_demo.py
    python benchmarks/regad_demo.py --weights tab_resnet18.safetensors

Three categories of the demo are tested in turn, none of which is trained on; training is on normal
pictures of eight others, small and short. The ResNet-18 starts from random weights, and from those
of the file if one is given, as ``benchmarks/tab_pretraining.py`` leaves them in its folder. Every
figure is the mean of ten sets of four references, with its standard deviation over them. Nothing
was chosen by the outcome; the exit status is 1 if something fails.
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
FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
LINE = (
    f"--config configs/regad_4shot.yaml --data Demo --data.categories '{json.dumps(TESTED)}' "
    f"--data.train_categories '{json.dumps(TRAINED)}' --data.num_train 30 --data.num_test 40 "
    "--data.seed 0 --data.resize '{rule: square, size: null}' --model.image_size 128 "
    "--trainer.max_epochs 10"
)


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, help="of a ResNet-18, beside random ones")
    arguments.add_argument("--folder", type=Path, help="where runs are kept")
    asked = arguments.parse_args()
    weights = [str(asked.weights.resolve())] if asked.weights else []
    kept = asked.folder and asked.folder.resolve()
    os.chdir(ROOT)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = kept or Path(scratch)
        for source in ["random", *weights]:
            own = folder / Path(source).stem
            words = [*shlex.split(LINE), "--model.backbone.weights", source]
            if not (own / "metrics.json").is_file():
                with contextlib.redirect_stdout(sys.stderr):
                    code = anomaly_clip(["each", *words, "--output.folder", str(own)])
                assert code == 0, words
            metrics = json.loads((own / "metrics.json").read_text())
            spread = metrics["run"]["protocol"]["spread"]
            found["random" if source == "random" else "TAB"] = {
                name: {
                    figure: [round(values[figure], 4), round(spread[name][figure], 4)]
                    for figure in FIGURES
                }
                for name, values in metrics["categories"].items()
            }
    values = {
        "run": f"anomaly_clip each {LINE} --model.backbone.weights WEIGHTS",
        "form": "mean and standard deviation over rounds",
        "by_weights": found,
    }
    return report("regad_demo", values, {})


if __name__ == "__main__":
    sys.exit(main())
