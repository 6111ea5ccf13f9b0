"""Score with SDP and WinCLIP as a graph in the same process, and compare with plain torch.

    python benchmarks/graphs.py --models demo --compile

The graphs are the exported program in ONNX Runtime and, with ``--compile``, torch.compile. The text
vectors are constants. Processor seconds per image are the minimum over rounds in which all take
turns, for each number of threads and batch size, as fractions of torch's. ``build_seconds`` is the
processor time to make a graph, ``images_to_pay`` the number of images whose saving outweighs it
(null: none). OpenMP's threads wait passively, as otherwise their waiting counts as work.

The exit status is 1 if maps differ by more than 1e-5 of their range.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Bound, at_most, fastest, parser, report
from startup import children_seconds
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.exporting.graph import DetectorGraph, trace
from anomaly_clip.exporting.programs import write_program
from anomaly_clip.methods import SDP, WinCLIP
from anomaly_clip.methods.prompted_method import PromptedMethod

MOST_APART = 1e-5  # difference of maps as a fraction of their range
METHODS: dict[str, Callable[[CLIPBackbone], PromptedMethod]] = {"sdp": SDP, "winclip": WinCLIP}
MODELS = {"demo": CLIPSettings(pretrained="demo"), "base": CLIPSettings(pretrained="random")}
"""The demo CLIP, and ViT-B-16-plus-240."""
POLICY = "OMP_WAIT_POLICY"
Scorer = Callable[[Tensor], Any]


class Scoring(DetectorGraph):
    """Images in, scores and maps out, for constant random text vectors."""

    def __init__(self, method: PromptedMethod) -> None:
        super().__init__(method, "any")
        self.scored = method
        torch.manual_seed(0)
        self.text = F.normalize(torch.randn(1, method.backbone.embed_dim, 2), dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return image scores and maps of uint8 images ``(B, 3, S, S)``."""
        scores = self.scored.score_with_text(images, self.text.expand(len(images), -1, -1))
        return scores["image_score"], scores["anomaly_map"]


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments.add_argument("--methods", nargs="+", choices=list(METHODS), default=["sdp"])
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    options = arguments.parse_args()
    if POLICY not in os.environ:  # OpenMP reads it when torch is imported
        environment = {**os.environ, POLICY: "PASSIVE"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    values: dict[str, Any] = {"rounds": options.rounds, "rows": []}
    bounds: dict[str, Bound] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            torch.manual_seed(0)
            backbone = CLIPBackbone.of(MODELS[model])
            for name in options.methods:
                graph = Scoring(METHODS[name](backbone)).eval()
                start = time.process_time()
                file = write_program(trace(graph), "onnx", Path(folder), None)
                build = time.process_time() - start
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    start = time.process_time()
                    run = session(file, threads)
                    built = {"onnx": build + time.process_time() - start}
                    for size in options.batches:
                        place = {"model": model, "method": name, "threads": threads, "batch": size}
                        tasks: dict[str, Scorer] = {"torch": graph, "onnx": run}
                        if options.compile:
                            tasks["compile"] = compiled(graph)
                        row = measured(backbone, tasks, size, built, options.rounds)
                        values["rows"].append({**place, **row})
                        sys.stderr.write(f"{values['rows'][-1]}\n")
                file.unlink()
    for row in values["rows"]:
        name = f"{row['method']} on {row['model']}, batch {row['batch']}, {row['threads']} threads"
        bounds[f"difference of maps, {name}"] = at_most(row["map_difference"], MOST_APART)
    return report("graphs", values, bounds)


def session(file: Path, threads: int) -> Scorer:
    """Return the program in ONNX Runtime; its threads do not spin while they wait."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 4, threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    opened = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    return lambda images: opened.run(["image_score", "anomaly_map"], {"images": images.numpy()})


def compiled(graph: Scoring) -> Scorer:
    """Return the graph as torch.compile makes it for one batch size, from nothing."""
    torch.compiler.reset()
    return torch.compile(graph, dynamic=False)


def measured(
    backbone: CLIPBackbone,
    tasks: dict[str, Scorer],
    size: int,
    built: dict[str, float],
    rounds: int,
) -> dict[str, Any]:
    """Return times of a batch size, and the largest difference from torch's maps."""
    side = backbone.image_size
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    expected = np.asarray(tasks["torch"](images)[1])
    apart, seconds_to_build = 0.0, dict(built)
    for name, task in tasks.items():
        start = time.process_time() + children_seconds()  # the C++ compiler is a child
        maps = np.asarray(task(images)[1])
        if name == "compile":
            seconds_to_build[name] = time.process_time() + children_seconds() - start
        apart = max(apart, float(np.abs(maps - expected).max() / np.ptp(expected)))
    seconds = fastest(rounds, {name: partial(task, images) for name, task in tasks.items()})
    saved = {name: (seconds["torch"] - seconds[name]) / size for name in seconds_to_build}
    return {
        "ms_per_image": {name: round(1000 * value / size, 2) for name, value in seconds.items()},
        "fraction": {name: round(seconds[name] / seconds["torch"], 3) for name in saved},
        "build_seconds": {name: round(value, 1) for name, value in seconds_to_build.items()},
        "images_to_pay": {
            name: math.ceil(seconds_to_build[name] / value) if value > 0 else None
            for name, value in saved.items()
        },
        "map_difference": apart,
    }


if __name__ == "__main__":
    sys.exit(main())
