"""Export every method in every format, and measure differences, speed, size, start and drift.

    python benchmarks/export.py DIR --weights squeezenet1_1_imagenet.safetensors

DIR holds the magnetic tiles in MVTec-AD's layout, ``--weights`` the weights of a torchvision
SqueezeNet. PaDiM and PatchCore use these weights and are fitted on 30 tiles; RD4AD, SimpleNet and
RegAD have a ResNet-18 with random weights, CLIP methods the demo CLIP, and are trained for a few
steps only: this changes neither the operations nor their number.

``anomaly_clip benchmark`` measures each method: each runtime in a process of its own, one image at
a time, taking turns with torch. Times are the shortest processor seconds, and fractions of torch's
in the same run. SDP is also measured with a ViT-B-16-plus-240 with random weights. The start is
that of ``Detector.predict`` of an exported PatchCore on a tile, in a new process. The drift is the
AUROC of a test with the exported program minus that of the same test with torch. The exit status is
1 if a bound is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Bound, at_most, parser, report
from startup import children_seconds

from anomaly_clip.cli import main as anomaly_clip
from anomaly_clip.runtime.detector import open_session

ROOT = Path(__file__).parent.parent
FRACTIONS = {"SDP on ViT-B-16-plus-240": 0.55, "PaDiM": 0.6, "PatchCore": 0.6}
"""Largest processor seconds of ONNX Runtime, as fractions of torch's."""
START_SECONDS, START_MEGABYTES = 1.0, 200.0
MOST_APART = 1e-5  # difference of maps as a fraction of their range
MOST_DRIFT = 1e-4  # AUROC
ROUNDS = 7

TILES = "--data MagneticTile --data.root ROOT --data.shots 30 --data.seed 0"
SQUARE = "--data.resize '{rule: square, size: null}'"
SQUEEZENET = f"{TILES} {SQUARE} --model.image_size 224 --model.backbone.name squeezenet1_1"
WEIGHTS = f"{SQUEEZENET} --model.backbone.weights WEIGHTS"
RANDOM = f"{TILES} --model.backbone.weights random"
STEPS = "--trainer.max_epochs 1 --trainer.limit_train_batches 2"
DEMO = "--data Demo --data.categories '[black leather]' --data.num_train 30 --data.num_test 100"
PADIM = "--model.layers '[features.4, features.7, features.10]'"
PATCHCORE = "--model.layers '[features.7, features.10]'"
ON_DEMO = f"{DEMO} {WEIGHTS.removeprefix(TILES)}"
REGAD = (
    "--data Demo --data.categories '[black leather]' --data.train_categories '[tan leather]' "
    "--data.num_train 8 --data.num_test 4 --model.backbone.weights random"
)
FITS = {
    "PaDiM": f"--config padim {WEIGHTS} {PADIM}",
    "PatchCore": f"--config patchcore {WEIGHTS} {PATCHCORE}",
    "RD4AD": f"--config rd4ad {RANDOM} {STEPS}",
    "SimpleNet": f"--config simplenet {RANDOM} {STEPS}",
    "RegAD": f"--config regad_4shot {REGAD} {STEPS}",
    "SDP+": f"--config sdp_plus_demo {STEPS}",
    "CLIP-ADA": f"--config clip_ada_demo {STEPS}",
    "PaDiM, demo": f"--config padim {ON_DEMO} {PADIM}",
    "PatchCore, demo": f"--config patchcore {ON_DEMO} {PATCHCORE}",
}
"""Options of ``fit`` by name."""
ZERO_SHOT = "--model.backbone.pretrained demo --data.category tile"
SUBJECTS = {
    "SDP": f"--config sdp {ZERO_SHOT}",
    "SDP+": "RUN --data.category tile",
    "WinCLIP": f"--config winclip {ZERO_SHOT}",
    "WinCLIP, 4 references": f"--config winclip_4shot {ZERO_SHOT} --references TILES",
    "CLIP-ADA": "RUN --data.category tile",
    "PaDiM": "RUN --data.root TESTED",
    "PatchCore": "RUN --data.root TESTED",
    "RD4AD": "RUN",
    "SimpleNet": "RUN",
    "RegAD": "RUN --data.category tile --references TILES",
    "SDP on ViT-B-16-plus-240": (
        "--config sdp --model.backbone.pretrained random --data.category tile"
    ),
}
"""Options of ``benchmark`` by name; RUN is the folder of the fit."""
SDP_DEMO = (
    "--config demo --data.categories '[black leather]' --data.num_test 100",
    "--config demo --data.category 'black leather'",
)
DRIFTS = {
    "PaDiM, tiles": "PaDiM",
    "PatchCore, tiles": "PatchCore",
    "PaDiM, demo": "PaDiM, demo",
    "PatchCore, demo": "PatchCore, demo",
}
"""Fits whose test is repeated with the exported program."""
AUROCS = ("image_auroc", "pixel_auroc")
START = """
import sys
sys.path.insert(0, sys.argv[1])
from detector import Detector
Detector(sys.argv[1], threads=int(sys.argv[3])).predict(sys.argv[2])
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", help="folder of the magnetic tiles")
    arguments.add_argument("--weights", required=True, help="weights of a SqueezeNet")
    arguments.add_argument("--folder", type=Path, help="folder to keep the runs in")
    arguments.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--seconds", type=float, default=5.0, help="measured per runtime")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.folder and options.folder.resolve()
    places = {"ROOT": Path(options.root).resolve(), "WEIGHTS": Path(options.weights).resolve()}
    os.chdir(ROOT)
    bounds: dict[str, Bound] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        work = Work(kept or Path(scratch), places, options.threads, options.seconds)
        methods = {name: work.measured(name) for name in options.only}
        start = work.start()
        drift = {name: work.drift(fit) for name, fit in DRIFTS.items()}
        drift["SDP, demo"] = work.drift_of("SDP, demo", *map(shlex.split, SDP_DEMO))
    for name, rows in methods.items():
        bounds[f"difference of maps, {name}"] = at_most(_largest(rows), MOST_APART)
    for name, limit in FRACTIONS.items():
        if name in methods:
            fraction = methods[name].get("onnxruntime", {}).get("fraction")
            bounds[f"ONNX Runtime's share of torch's time, {name}"] = at_most(fraction, limit)
    bounds["start to score, processor seconds"] = at_most(start["processor_seconds"], START_SECONDS)
    bounds["start to score, megabytes"] = at_most(start["megabytes"], START_MEGABYTES)
    largest = max(abs(values[name]) for values in drift.values() for name in AUROCS)
    bounds["AUROC drift"] = at_most(largest, MOST_DRIFT)
    values = {"methods": methods, "start": start, "drift": drift}
    return report("export", values, bounds)


def _largest(rows: dict[str, Any]) -> float | None:
    """Return the largest difference of maps over the runtimes; None if a runtime failed."""
    values = [row.get("map_difference") for row in rows.values()]
    return None if None in values else max(values)


class Work:
    """Runs and exports of one folder.

    Args:
        folder: Where they are kept.
        places: Values of the names in capitals that options have.
        threads: Threads of each runtime.
        seconds: Measured seconds of each runtime.
    """

    def __init__(self, folder: Path, places: dict[str, Path], threads: int, seconds: float) -> None:
        self.folder, self.threads, self.seconds = folder, threads, seconds
        tiles = places["ROOT"] / "magnetic_tile"
        normal = sorted((tiles / "train" / "good").iterdir())
        self.references = folder / "references"
        self.references.mkdir(parents=True, exist_ok=True)
        for path in normal[:4]:
            shutil.copy(path, self.references)
        self.tile = normal[-1]
        tested = tiles / "test" / "good"
        self.places = {**places, "TILES": self.references, "TESTED": tested}

    def words(self, text: str, name: str = "") -> list[str]:
        """Return options as words, with paths in place of the names in capitals."""
        places = {**self.places, "RUN": self.run(name)}
        return [str(places.get(word, word)) for word in shlex.split(text)]

    def run(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / name.replace(", ", "_").replace(" ", "_").lower()

    def fitted(self, name: str) -> Path:
        """Return the run of a fit, which is made at its first use."""
        run = self.run(name)
        if not (run / "checkpoints" / "last.ckpt").is_file():
            self.call(["fit", *self.words(FITS[name]), "--output.folder", str(run)])
        return run

    def call(self, words: Sequence[str]) -> None:
        """Run a command, which has to succeed."""
        code = anomaly_clip(list(words))
        assert code == 0, words

    def measured(self, name: str) -> dict[str, Any]:
        """Return the rows of ``anomaly_clip benchmark`` by runtime."""
        if name in FITS:
            self.fitted(name)
        return self.benchmark(name, SUBJECTS[name])

    def benchmark(self, name: str, text: str) -> dict[str, Any]:
        """Return the rows of ``anomaly_clip benchmark`` with some options by runtime."""
        numbers = self.folder / f"{self.run(name).name}.json"
        if not numbers.is_file():
            words = ["--batch_sizes", "[1]", "--threads", str(self.threads), "--images", "8"]
            words += ["--seconds", str(self.seconds), "--json", str(numbers)]
            self.call(["benchmark", *self.words(text, name), *words])
        rows = json.loads(numbers.read_text())["rows"]
        return {row["runtime"]: _shown(row, rows[0]) for row in rows}

    def exported(self, name: str, words: Sequence[str]) -> Path:
        """Return the folder of an export, which is made at its first use."""
        folder = self.folder / f"exported_{self.run(name).name}"
        if not folder.exists():
            self.call(["export", *words, "--format", "onnx", "--folder", str(folder)])
        return folder

    def start(self) -> dict[str, float]:
        """Measure new processes that load the exported PatchCore and score a tile."""
        folder = self.exported("PatchCore", [str(self.fitted("PatchCore"))])
        wall, processor, sizes = [], [], []
        words = [str(folder), str(self.tile), str(self.threads)]
        for _ in range(ROUNDS):
            begin, used = time.perf_counter(), children_seconds()
            done = subprocess.run(
                [sys.executable, "-c", START, *words], capture_output=True, text=True, check=True
            )
            wall.append(time.perf_counter() - begin)
            processor.append(children_seconds() - used)
            sizes.append(int(done.stdout) * 1024 / 1e6)
        return {
            "processor_seconds": round(min(processor), 3),
            "wall_seconds": round(min(wall), 3),
            "megabytes": round(max(sizes), 1),
        }

    def drift(self, name: str) -> dict[str, Any]:
        """Return the drift of a fit; see :meth:`drift_of`."""
        run = str(self.fitted(name))
        return self.drift_of(name, ["--ckpt_path", run], [run])

    def drift_of(self, name: str, test: Sequence[str], export: Sequence[str]) -> dict[str, Any]:
        """Return AUROCs of a test with torch, and what they change by with the exported program."""
        folder = self.exported(name, export)
        outcomes = []
        for kind in ("torch", "exported"):
            target = self.folder / f"test_{self.run(name).name}_{kind}"
            if not (target / "metrics.json").is_file():
                words = ["test", *test, "--output.maps", "false", "--output.folder", str(target)]
                with contextlib.ExitStack() as stack:
                    if kind == "exported":
                        stack.enter_context(scored_by(folder, self.threads))
                    self.call(words)
            outcomes.append(json.loads((target / "metrics.json").read_text())["mean"])
        before, after = outcomes
        return {
            **{name: after[name] - before[name] for name in AUROCS},
            "torch": {name: before[name] for name in AUROCS},
        }


def _shown(row: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of a row; the first one is that of torch."""
    if row["error"] is not None:
        return {"error": row["error"]}
    assert first["runtime"] == "torch"
    difference = row["difference"]
    return {
        "fraction": round(row["fastest_processor_ms"] / first["fastest_processor_ms"], 3),
        "processor_ms": round(row["fastest_processor_ms"], 2),
        "wall_ms": round(row["ms_per_image"], 2),
        "start_seconds": round(row["start_seconds"], 2),
        "peak_megabytes": round(row["peak_memory_bytes"] / 1e6, 1),
        "file_megabytes": None if row["file_bytes"] is None else round(row["file_bytes"] / 1e6, 2),
        "map_difference": difference["anomaly_map"],
        "score_difference": difference["image_score"],
    }


@contextlib.contextmanager
def scored_by(folder: Path, threads: int) -> Iterator[None]:
    """Let the exported program score the images of its method's class."""
    import anomaly_clip.methods as methods

    record = json.loads((folder / "detector.json").read_text())
    kind: Any = getattr(methods, record["method"])
    session = open_session(folder / "detector.onnx", "onnxruntime", threads)
    score, category = kind.score, record["category"]

    def run(method: object, images: torch.Tensor, categories: list[str]) -> dict[str, torch.Tensor]:
        assert record["method"] != "SDP" or set(categories) == {category}, categories
        outputs = session.run(images.numpy())
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    kind.score = run
    try:
        yield
    finally:
        kind.score = score


if __name__ == "__main__":
    sys.exit(main())
