"""Train variants of CLIP-ADA on the demo and print one JSON line.

    python benchmarks/clip_ada_demo.py
    python benchmarks/clip_ada_demo.py --folder /tmp/ada --only standard "no refinement"

Each run fits and tests ``configs/clip_ada_demo.yaml`` with other options. CLIP-ADA is trained on
normal images of the demo's held-out categories, which the demo CLIP never saw, and tested on the
same test images as zero-shot SDP. Each run is repeated with two seeds, which determine the images
and all random choices. ``--folder`` keeps the runs in a folder; finished runs in this folder are
not repeated. The exit status is 1 if the image AUROC or the pixel AP of the standard run, averaged
over the seeds, does not exceed that of SDP.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import at_least, parser, report

CONFIGS = Path(__file__).parent.parent / "configs"
SEEDS = (501, 502)
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap")
TWO_PROMPTS = (
    "--model.prompt.n_prompts 2 "
    "--model.loss.focal 4 --model.loss.dice 4 --model.loss.normal_dice 4 "
    "--model.prompt.init_text '[a photo of a normal object, a photo of a damaged object]'"
)
FROM_SCRATCH = (
    "--model.head_init random --model.prompt.init_text null --model.prompt.n_ctx 16 "
    "--model.optim.lr_prompt 5e-3 --model.optim.lr_head 3e-3 --model.optim.lr_block 5e-4"
)
FIXED_WORDS = "--model.prompt.prefix 'a photo of a' --model.prompt.init_text 'damaged object'"
RUNS = {
    "standard": "",
    "no refinement": "--model.refine.mode none",
    "fine map alone": "--model.refine.fuse fine",
    "map alone": "--model.class_token false",
    "from scratch": FROM_SCRATCH,
    "fixed words, 2 vectors": f"{FIXED_WORDS} --model.prompt.n_ctx 2",  # the same initial prompt
    "fixed words, 6 vectors": FIXED_WORDS,
    "two prompts": TWO_PROMPTS,
    "nsa": "--data.synthesis.recipe nsa",
    "mixture": "--data.synthesis.recipe mixture "
    "--data.synthesis.weights '{perlin: 0.6, nsa: 0.3, cutpaste: 0.1}'",
    "1 %": "--data.fraction 0.01",
    "5 %": "--data.fraction 0.05",
    "10 %": "--data.fraction 0.1",
    "50 %": "--data.fraction 0.5",
}


def line_of(name: str, seed: int, extra: str = "") -> list[str]:
    """Return the command line of a run's fit."""
    seeds = f"--data.seed {seed} --seed_everything {seed}"
    return [
        "fit",
        "--config",
        "configs/clip_ada_demo.yaml",
        *shlex.split(f"{seeds} {RUNS[name]} {extra}"),
    ]


def sdp_line(seed: int) -> list[str]:
    """Return the command line of zero-shot SDP's test on the same images."""
    line = f"test --config configs/demo.yaml --data.seed {seed} --output.maps false"
    return line.split()


def run(name: str, seed: int, folder: str, extra: str) -> dict[str, float]:
    """Fit and test a variant of CLIP-ADA, or test SDP without a fit; return the mean metrics."""
    import torch

    from anomaly_clip.cli import main as anomaly_clip

    torch.set_num_threads(1)
    os.chdir(CONFIGS.parent)
    root = Path(folder) / f"{name.replace(' ', '_').replace('_%', '')}-{seed}"
    if not (root / "done").is_file():
        shutil.rmtree(root, ignore_errors=True)
        # Two runs share the machine's processors, so neither starts data loader workers.
        quiet = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
        with contextlib.redirect_stdout(sys.stderr):
            if name == "sdp":
                words = sdp_line(seed)[1:]
            else:
                words = [*line_of(name, seed, extra), *quiet]
                code = anomaly_clip([*words, "--output.folder", str(root / "fit")])
                assert code == 0, words
                words = ["--ckpt_path", str(root / "fit" / "checkpoints" / "last.ckpt")]
            code = anomaly_clip(["test", *words, *quiet, "--output.folder", str(root / "test")])
            assert code == 0, words
        (root / "done").touch()
    metrics: dict[str, Any] = json.loads((root / "test" / "metrics.json").read_text())
    return {metric: round(metrics["mean"][metric], 4) for metric in METRICS}


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", help="folder to keep the runs in")
    arguments.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--options", default="", help="further options of every fit, in quotes")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or scratch
        jobs = [(name, seed) for name in ["sdp", *options.only] for seed in options.seeds]
        pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        with pool:
            futures = {job: pool.submit(run, *job, folder, options.options) for job in jobs}
            metrics = {}
            for job, future in futures.items():
                metrics[job] = future.result()
                print(*job, metrics[job], file=sys.stderr, flush=True)
    from anomaly_clip.backbones.clip import CLIPBackbone

    rows: dict[str, dict[str, Any]] = {}
    for name in ["sdp", *options.only]:
        by_seed = {seed: metrics[name, seed] for seed in options.seeds}
        means = {
            metric: round(sum(row[metric] for row in by_seed.values()) / len(by_seed), 4)
            for metric in METRICS
        }
        rows[name] = {"seeds": by_seed, "mean": means}
        first = options.seeds[0]
        line = sdp_line(first) if name == "sdp" else line_of(name, first, options.options)
        rows[name]["command"] = shlex.join(["anomaly_clip", *line])
    standard, sdp = rows.get("standard", rows["sdp"])["mean"], rows["sdp"]["mean"]
    values = {"weights": CLIPBackbone(pretrained="demo").identity, "runs": rows}
    bounds = {
        f"standard run over SDP, {name}": at_least(round(standard[name] - sdp[name], 4), 1e-4)
        for name in ("image_auroc", "pixel_ap")
    }
    return report("clip_ada_demo", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
