"""Fit and test the CLIP methods on the demo's held-out categories and print one JSON line.

    python benchmarks/clip_methods_demo.py
    python benchmarks/clip_methods_demo.py --folder demo_runs --seeds 501 --only SDP AnomalyCLIP
    python benchmarks/clip_methods_demo.py --folder demo_runs --tiles DIR --brain DIR --head DIR

All rows use the demo CLIP and are tested on the same images of 13 categories that this CLIP was not
trained on. SDP+, AnomalyCLIP and APRIL-GAN are fitted on labelled images of the 35 categories that
it was trained on, CLIP-ADA on normal images of the tested categories themselves. Rows with random
weights are controls, run with the first seed only. A seed determines the test images, the training
images and all random choices.

With ``--tiles``, ``--brain`` and ``--head``, the fits of the first seed are also tested on
photographs. ``--folder`` keeps the runs in a folder; finished runs in this folder are not repeated.
``WinCLIP``, which takes several times as long as the others, has to be named in ``--only``.

The exit status is 1 if SDP+ falls more than 0.02 below SDP in image AUROC, pixel AUROC or pixel AP,
or if the pixel AP of AnomalyCLIP or APRIL-GAN is less than 5 times that of its control.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bound, at_least, parser, report

CONFIGS = Path(__file__).parent.parent / "configs"
SEEDS = (501, 502, 503)
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_pro")
COMPARED = METRICS[:3]
MOST_LOST, LEAST_TIMES = 0.02, 5
AUXILIARY_SEED = 1000  # added to the seed of the test images
RANDOM = "--model.backbone.pretrained random"
QUIET = ("--trainer.enable_progress_bar", "false", "--data.num_workers", "0")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        config: Name of the configuration.
        options: Further options of the fit, or of the test if there is no fit.
        fitted: True if the method has to be fitted.
        fit_of: Row whose fit is tested; default: the row itself.
        test: Further options of the test of a fit.
        weights: Option that takes trained weights, and the file with them in the folder of a fit.
    """

    config: str
    options: str = ""
    fitted: bool = True
    fit_of: str | None = None
    test: str = ""
    weights: tuple[str, str] | None = None


PROMPTS = ("--model.prompts_file", "prompts.pth")
LAYERS = ("--model.linear_layers", "linear_layers.pth")
WINCLIP = "--model WinCLIP"
FOUR_SHOTS = "--data.shots 4"
CRANE = "--model.inference crane"
ROWS = {
    "SDP": Row("demo", fitted=False),
    "SDP+": Row("sdp_plus_demo", weights=LAYERS),
    "CLIP-ADA": Row("clip_ada_demo"),
    "AnomalyCLIP": Row("anomalyclip_demo", weights=PROMPTS),
    "AnomalyCLIP, inference of Crane": Row(
        "anomalyclip_demo", fit_of="AnomalyCLIP", test=CRANE, weights=PROMPTS
    ),
    "APRIL-GAN": Row("april_gan_demo", weights=LAYERS),
    "APRIL-GAN, 4 shots": Row(
        "april_gan_demo", fit_of="APRIL-GAN", test=FOUR_SHOTS, weights=LAYERS
    ),
    "AnomalyCLIP, random weights": Row("anomalyclip_demo", RANDOM, weights=PROMPTS),
    "APRIL-GAN, random weights": Row("april_gan_demo", RANDOM, weights=LAYERS),
    "WinCLIP": Row("demo", WINCLIP, fitted=False),
    "WinCLIP, 4 shots": Row("demo", f"{WINCLIP} {FOUR_SHOTS}", fitted=False),
}
DEFAULT_ROWS = [name for name in ROWS if not name.startswith("WinCLIP")]
CONTROLS = {name: f"{name}, random weights" for name in ("AnomalyCLIP", "APRIL-GAN")}
PHOTOGRAPHS = {"tiles": "MagneticTile", "brain": "BrainMRI", "head": "HeadCT"}
NO_REFERENCES = {"brain", "head"}  # no split into training and test images


def fit_line(name: str, seed: int) -> list[str] | None:
    """Return the command line of a row's fit; None if there is none."""
    row = ROWS[ROWS[name].fit_of or name]
    if not row.fitted:
        return None
    line = f"fit --config configs/{row.config}.yaml --data.seed {seed} --seed_everything {seed}"
    if row.weights:
        line += f" --data.auxiliary.seed {seed + AUXILIARY_SEED}"
    return shlex.split(f"{line} {row.options}")


def test_line(name: str, seed: int, fit: Path) -> list[str]:
    """Return the command line of a row's test.

    Args:
        name: Name of the row.
        seed: Seed of the test images.
        fit: Folder of the fit.
    """
    row = ROWS[name]
    if not row.fitted:
        seeds = f"--data.seed {seed} --seed_everything {seed}"
        return shlex.split(f"test --config configs/{row.config}.yaml {row.options} {seeds}")
    return ["test", "--ckpt_path", str(fit / "checkpoints" / "last.ckpt"), *shlex.split(row.test)]


def photograph_line(name: str, data: str, root: str, fit: Path) -> list[str]:
    """Return the command line of a test on photographs with the weights of a fit.

    Args:
        name: Name of the row.
        data: Key of :data:`PHOTOGRAPHS`.
        root: Folder of the data set.
        fit: Folder of the fit.
    """
    row = ROWS[name]
    # --data follows --config, so that the options that the data set lacks are dropped.
    line = ["test", "--config", f"configs/{row.config}.yaml", "--data", PHOTOGRAPHS[data]]
    line += ["--data.root", root, "--data.categories", "null", "--data.seed", "0"]
    if row.weights:
        option, file = row.weights
        line += ["--data.auxiliary", "null", "--data.val_split", "none", option, str(fit / file)]
    return [*line, *shlex.split(f"{row.test} {row.options}")]


def photograph_rows(data: str, names: Iterable[str]) -> list[str]:
    """Return the rows that can be tested on a set of photographs with the fits of the demo."""
    rows = [name for name in names if not ROWS[name].fitted or ROWS[name].weights]
    rows = [name for name in rows if name not in CONTROLS.values()]
    return [name for name in rows if data not in NO_REFERENCES or "shots" not in name]


def folder_of(name: str) -> str:
    """Return the name of a row's folder."""
    return name.lower().replace(",", "").replace(" ", "_").replace("+", "_plus")


def execute(line: list[str], target: Path) -> None:
    """Run a command of the package, with the folder of its outputs."""
    from anomaly_clip.cli import main as anomaly_clip

    maps = ["--output.maps", "false"] if line[0] == "test" else []
    with contextlib.redirect_stdout(sys.stderr):
        code = anomaly_clip([*line, *maps, *QUIET, "--output.folder", str(target)])
    assert code == 0, line


def measured(line: list[str], target: Path) -> dict[str, float | None]:
    """Run a test, unless it is finished; return its mean metrics."""
    if not (target / "metrics.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        execute(line, target)
    mean: dict[str, float | None] = json.loads((target / "metrics.json").read_text())["mean"]
    values = ((metric, mean.get(metric)) for metric in METRICS)
    return {metric: None if value is None else round(value, 4) for metric, value in values}


def fit(name: str, seed: int, folder: Path) -> Path:
    """Run the fit of a row, unless it is finished; return its folder."""
    target = folder / f"{folder_of(ROWS[name].fit_of or name)}-{seed}" / "fit"
    line = fit_line(name, seed)
    if line and not (target.parent / "fitted").is_file():
        shutil.rmtree(target, ignore_errors=True)
        execute(line, target)
        (target.parent / "fitted").touch()
    return target


def table(by_row: Mapping[str, Mapping[int, Mapping[str, float | None]]]) -> dict[str, Any]:
    """Return the metrics of each row by seed, with mean, minimum and maximum over the seeds."""
    rows: dict[str, Any] = {}
    for name, by_seed in by_row.items():
        columns = {
            metric: [value for row in by_seed.values() if (value := row[metric]) is not None]
            for metric in METRICS
        }
        columns = {metric: values for metric, values in columns.items() if values}
        rows[name] = {
            "seeds": {str(seed): row for seed, row in by_seed.items()},
            "mean": {metric: round(sum(v) / len(v), 4) for metric, v in columns.items()},
            "min": {metric: min(v) for metric, v in columns.items()},
            "max": {metric: max(v) for metric, v in columns.items()},
        }
    return rows


def bounds_of(rows: Mapping[str, Any]) -> dict[str, Bound]:
    """Return the bounds of those rows that were measured."""
    bounds: dict[str, Bound] = {}
    means = {name: row["mean"] for name, row in rows.items()}
    if {"SDP", "SDP+"} <= means.keys():
        for metric in COMPARED:
            difference = round(means["SDP+"][metric] - means["SDP"][metric], 4)
            bounds[f"SDP+ over SDP, {metric}"] = at_least(difference, -MOST_LOST)
    for name, control in CONTROLS.items():
        if {name, control} <= means.keys():
            times = means[name]["pixel_ap"] / means[control]["pixel_ap"]
            bounds[f"{name}, pixel_ap over that of random weights"] = at_least(times, LEAST_TIMES)
    return bounds


def measure(options: Any, folder: Path) -> int:
    """Fit and test all rows, print the report and return the exit status."""
    from anomaly_clip.backbones.clip import CLIPBackbone

    by_row: dict[str, dict[int, dict[str, float | None]]] = {name: {} for name in options.only}
    for seed in options.seeds:
        for name in options.only:
            if name in CONTROLS.values() and seed != options.seeds[0]:
                continue
            fitted = fit(name, seed, folder)
            target = folder / f"{folder_of(name)}-{seed}" / "test"
            by_row[name][seed] = measured(test_line(name, seed, fitted), target)
            print(name, seed, by_row[name][seed], file=sys.stderr, flush=True)
    rows = table(by_row)
    first = options.seeds[0]
    for name, row in rows.items():
        lines = [fit_line(name, first), test_line(name, first, Path("FIT"))]
        row["commands"] = [shlex.join(["anomaly_clip", *line]) for line in lines if line]
    photographs: dict[str, dict[str, Any]] = {}
    for data in PHOTOGRAPHS:
        if root := getattr(options, data):
            photographs[data] = {}
            for name in photograph_rows(data, options.only):
                fitted = fit(name, first, folder)
                target = folder / f"{folder_of(name)}-{first}" / data
                line = photograph_line(name, data, str(root), fitted)
                photographs[data][name] = measured(line, target)
                print(data, name, photographs[data][name], file=sys.stderr, flush=True)
    values = {
        "weights": CLIPBackbone(pretrained="demo").identity,
        "rows": rows,
        "photographs": photographs,
    }
    return report("clip_methods_demo", values, bounds_of(rows))


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, help="folder to keep the runs in")
    arguments.add_argument("--only", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS)
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--threads", type=int, default=2)
    for data, name in PHOTOGRAPHS.items():
        arguments.add_argument(f"--{data}", type=Path, help=f"folder of {name}")
    options = arguments.parse_args()
    for data in PHOTOGRAPHS:
        if root := getattr(options, data):
            setattr(options, data, root.resolve())
    import torch

    from anomaly_clip.files import CACHE_VARIABLE

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        os.environ[CACHE_VARIABLE] = str(folder / "cache")
        os.chdir(CONFIGS.parent)
        return measure(options, folder)


if __name__ == "__main__":
    sys.exit(main())
