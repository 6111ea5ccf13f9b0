"""Time the start of every command, of imports and of a second call in the same process.

    python benchmarks/startup.py --rounds 3

The script prints one JSON line with the processor seconds (user and system time) of processes. Each
value is the minimum over several rounds; every round runs each command once.
``import torch`` and ``import lightning.pytorch.cli`` are measured in the same rounds: bounds are
multiples of them, as seconds depend on the machine. Lightning imports torchmetrics, which imports
torchvision, scipy and, if it is installed, transformers.

The commands run on generated images, with a PatchCore on a SqueezeNet with random weights: ``fit``
on four images, ``test`` of two, ``predict`` of one, ``each --dry-run`` of two categories. They
include the work itself, a second or less. ``second`` is the processor time of the second of two
equal calls of ``main`` or ``load`` in one process, as a fraction of the first one. The exported
detector is loaded by ``anomaly_clip.load`` and scores one image; its memory is the peak of the
process. The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import Bound, at_most, fastest, parser, report

ROOT = Path(__file__).resolve().parent.parent
FRONT_DOOR = 0.3
"""Seconds of a command line that runs no verb."""
EXPORTED_SECONDS, EXPORTED_MEGABYTES = 1.0, 200.0

DEMO = ["--data", "Demo", "--data.categories", "[walnut wood board]"]
COUNTS = ["--data.num_train", "4", "--data.num_test", "2"]
SQUEEZENET = ["--model.backbone.name", "squeezenet1_1", "--model.backbone.weights", "random"]
PATCHCORE = ["--model", "PatchCore", *SQUEEZENET, "--model.layers", "[features.7,features.10]"]
QUIET = ["--trainer.enable_progress_bar", "false"]
FIT = ["fit", *PATCHCORE, *DEMO, *COUNTS, *QUIET, "--output.folder"]
TEST = ["test", "--ckpt_path", "RUN", *QUIET, "--output.folder"]
PREDICT = ["predict", "--ckpt_path", "RUN", "--data", "ImageFolder", "--data.root", "IMAGES"]
PREDICT += ["--data.categories", "null", *QUIET, "--output.folder"]

IMPORTS = {
    "python": "pass",
    "import torch": "import torch",
    "import lightning": "import lightning.pytorch.cli",
    "import anomaly_clip.methods": "import anomaly_clip.methods",
    "one method": "from anomaly_clip.methods import PatchCore",
    "all methods": "from anomaly_clip.methods import *",
}
FRONT = {
    "no word": [],
    "help": ["--help"],
    "version": ["--version"],
    "unknown verb": ["tset"],
}
COMMANDS = {
    "fit --help": ["fit", "--help"],
    "fit --help of one method": ["fit", "--help", "--model", "PatchCore"],
    "configs": ["configs"],
    "report --help": ["report", "--help"],
    "report --dry-run": ["report", "--table", "clip_ad", "--dry-run"],
    "check": ["check", *DEMO, *COUNTS],
    "each --dry-run": ["each", *PATCHCORE, "--data", "Demo", "--dry-run"],
    "sweep --dry-run": ["sweep", "sweeps/demo", "--dry-run"],
}
TWO_CALLS = {"fit": FIT, "test": TEST, "predict": PREDICT}
"""Commands that are called twice in one process."""
LIGHT = ("fit --help", "fit --help of one method", "configs", "report --help", "report --dry-run")
"""Commands that need no torch."""
OF_TORCH = {**dict.fromkeys(LIGHT, 0.5), "import anomaly_clip.methods": 0.1}
"""Largest time of commands and imports, as a multiple of ``import torch``."""
OF_LIGHTNING = {
    "one method": 1.15,
    "all methods": 1.25,
    "check": 1.25,
    "each --dry-run": 1.5,
    "sweep --dry-run": 1.9,
    "fit": 1.5,
    "test": 1.5,
    "predict": 1.4,
}
"""Largest time of commands and imports, as a multiple of ``import lightning``."""
SECOND = {"fit": 0.3, "test": 0.3, "predict": 0.2, "exported": 0.5}
"""Largest time of a second call, as a fraction of the first one in the same process."""

TWICE = """
import contextlib, io, json, sys, time
from anomaly_clip.cli import main
times = []
for number in range(2):
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*sys.argv[1:-1], f"{sys.argv[-1]}_{number}"]) == 0
    times.append(time.process_time() - begin)
print(json.dumps(times))
"""
EXPORTED = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
times = []
for number in range(2):
    begin = time.process_time()
    import anomaly_clip
    anomaly_clip.load(sys.argv[1], threads=1).predict(sys.argv[2])
    times.append(time.process_time() - begin)
assert not {"torch", "cv2", "lightning"} & set(sys.modules)
lines = open("/proc/self/status").read().splitlines()
peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
print(json.dumps([*times, peak / 1024]))
"""


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        values, bounds = measured(Path(scratch), options.rounds)
    return report("startup", values, bounds)


def measured(folder: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Bound]]:
    """Measure everything in a scratch folder; return values and bounds."""
    run, images, exported = folder / "run", folder / "images", folder / "exported"
    write_image(images)
    call([*FIT, str(run)])
    call(["export", str(run), "--folder", str(exported)])
    places = {"RUN": str(run), "IMAGES": str(images)}
    tasks: dict[str, Callable[[], object]] = {
        name: partial(start, ["-c", code]) for name, code in IMPORTS.items()
    }
    tasks |= {name: partial(call, words) for name, words in {**FRONT, **COMMANDS}.items()}
    image = str(next(images.iterdir()))
    rows: dict[str, list[list[float]]] = {name: [] for name in SECOND}

    def twice(name: str) -> None:
        words = [places.get(word, word) for word in TWO_CALLS[name]]
        output = str(folder / f"{name}_{len(rows[name])}")
        rows[name].append(json.loads(start(["-c", TWICE, *words, output])))

    def exported_twice() -> None:
        rows["exported"].append(json.loads(start(["-c", EXPORTED, str(exported), image])))

    tasks |= {name: partial(twice, name) for name in TWO_CALLS} | {"exported": exported_twice}
    best = fastest(rounds, tasks, clock=children_seconds, warm_up=0)  # the calls above were one
    best = {name: best[name] for name in best if name not in SECOND}
    return summary(best, rows)


def summary(
    best: Mapping[str, float], rows: Mapping[str, list[list[float]]]
) -> tuple[dict[str, Any], dict[str, Bound]]:
    """Return values and bounds.

    Args:
        best: Processor seconds by command.
        rows: Seconds of the first and the second call by name, in each round; for the exported
            detector also the peak memory in MB.
    """
    torch, lightning = best["import torch"], best["import lightning"]
    first = {name: min(row[0] for row in table) for name, table in rows.items()}
    second = {name: min(row[1] for row in table) / first[name] for name, table in rows.items()}
    megabytes = max(row[2] for row in rows["exported"])
    bounds = {"front door": at_most(max(best[name] for name in FRONT), FRONT_DOOR)}
    for name, bound in OF_TORCH.items():
        bounds[f"{name}, of import torch"] = at_most(best[name] / torch, bound)
    for name, bound in OF_LIGHTNING.items():
        seconds = first.get(name, best.get(name, 0.0))
        bounds[f"{name}, of import lightning"] = at_most(seconds / lightning, bound)
    for name, bound in SECOND.items():
        bounds[f"second {name}, of the first"] = at_most(second[name], bound)
    bounds["exported PatchCore and one image, seconds"] = at_most(
        first["exported"], EXPORTED_SECONDS
    )
    bounds["exported PatchCore and one image, MB"] = at_most(megabytes, EXPORTED_MEGABYTES)
    values = {
        "processor_seconds": {name: round(value, 3) for name, value in best.items()},
        "multiples_of_torch": {name: round(value / torch, 3) for name, value in best.items()},
        "first_seconds": {name: round(value, 3) for name, value in first.items()},
        "second_fractions": {name: round(value, 3) for name, value in second.items()},
        "exported_megabytes": round(megabytes, 1),
    }
    return values, bounds


def write_image(folder: Path) -> None:
    """Write one grey image."""
    from PIL import Image

    folder.mkdir()
    Image.new("RGB", (224, 224), (90, 120, 150)).save(folder / "plain.png")


def call(words: Sequence[str]) -> None:
    """Run a command line of the project in a process; its messages are discarded."""
    start(["-m", "anomaly_clip", *words], check=words[:1] not in ([], ["tset"]))


def start(words: Sequence[str], check: bool = True) -> str:
    """Run a Python process to its end and return its output.

    Raises:
        RuntimeError: If it fails.
    """
    process = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if check and process.returncode != 0:
        raise RuntimeError(f"{words}: {process.stderr[-1000:]}")
    return process.stdout


def children_seconds() -> float:
    """Return the user and system seconds of all finished child processes.

    Other work on the machine hardly affects these times.
    """
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    sys.exit(main())
