"""Run all benchmarks in order, store their results, and print one table of their bounds.

    python benchmarks/bench.py --tiles DIR --squeezenet FILE
    python benchmarks/bench.py --only startup export --tiles DIR --squeezenet FILE

Benchmarks of data that is not given are left out, and named. Each runs in a process of its own. A
result replaces the stored one only if the benchmark comes to its end. Results of this commit are
kept, so that an interrupted call resumes; ``--again`` measures anew. Nothing else should run on the
machine meanwhile. The exit status is 1 if a benchmark fails or a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, ROOT, commit, parser
from status import print_table

__all__ = ["BENCHMARKS", "main"]

GIVEN = {
    "tiles": "folder of the magnetic tiles in MVTec-AD's layout",
    "squeezenet": "weights of SqueezeNet 1.1 for ImageNet",
    "resnet": "weights of a ResNet-18 for ImageNet",
    "brain": "folder of Brain MRI",
    "head": "folder of Head CT",
}
"""Data and weights that benchmarks may need."""


class Benchmark(NamedTuple):
    """A script, and which of its arguments are data or weights."""

    name: str
    needs: tuple[tuple[str, str], ...] = ()
    """Option (empty for a positional argument) and key of `GIVEN`; without them it cannot run."""
    takes: tuple[tuple[str, str], ...] = ()
    """The same, of what may be missing."""
    words: tuple[str, ...] = ()
    """Further arguments."""


TILES, SQUEEZENET = ("", "tiles"), ("--weights", "squeezenet")
BENCHMARKS = (
    Benchmark("pixel_metrics"),
    Benchmark("detectors"),
    Benchmark("coreset", (TILES, SQUEEZENET)),
    Benchmark("patchcore_memory", (TILES, SQUEEZENET)),
    Benchmark("end_to_end", (TILES,)),
    Benchmark("startup"),
    Benchmark("export", (TILES, SQUEEZENET)),
    Benchmark("zero_shot"),
    Benchmark("graphs"),
    Benchmark("musc", (TILES, SQUEEZENET)),
    Benchmark("synthesis"),
    Benchmark("feature_cache"),
    Benchmark("clip_ada_step"),
    Benchmark("data_loading"),
    Benchmark("demo_data"),
    Benchmark("report_page"),
    Benchmark("large_images"),
    Benchmark("towers", (("--root", "tiles"), ("--squeezenet", "squeezenet"))),
    Benchmark("gpu"),
    Benchmark("conformal"),
    Benchmark("calibration_magnetic_tile", (TILES, SQUEEZENET)),
    Benchmark("demo_clip", (), (("--magnetic_tile", "tiles"),)),
    Benchmark("magnetic_tile", (TILES, SQUEEZENET), (("--resnet", "resnet"),)),
    Benchmark("musc_tiles", (TILES, SQUEEZENET), (("--brain", "brain"), ("--head", "head"))),
    Benchmark("regad_demo", (), (("--weights", "resnet"),)),
    Benchmark(
        "clip_methods_demo",
        (),
        (("--tiles", "tiles"), ("--brain", "brain"), ("--head", "head")),
    ),
    Benchmark("clip_ada_demo"),
    Benchmark("tab_pretraining", (TILES,)),
)
"""All benchmarks: first speed and memory, then quality, which trains for hours."""


def arguments_of(benchmark: Benchmark, given: Mapping[str, Path | None]) -> list[str]:
    """Return the arguments of a benchmark.

    Raises:
        LookupError: With the options that are missing.
    """
    missing = [f"--{key}" for _, key in benchmark.needs if given.get(key) is None]
    if missing:
        raise LookupError(" and ".join(missing))
    words = list(benchmark.words)
    for option, key in (*benchmark.needs, *benchmark.takes):
        path = given.get(key)
        if path is not None:
            words += [option, str(path)] if option else [str(path)]
    return words


def read_result(output: str, name: str) -> dict[str, Any] | None:
    """Return the result on the last line of a benchmark's output; None if there is none."""
    try:
        content = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    is_result = isinstance(content, dict) and content.get("benchmark") == name
    return content if is_result else None


def store(content: Mapping[str, Any], file: Path) -> None:
    """Write a result atomically."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def is_current(file: Path, now: str) -> bool:
    """Return whether a stored result is of this commit, without changes to its files."""
    if now == "unknown" or now.endswith("-dirty") or not file.exists():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8"))["header"]["commit"] == now)


def run(benchmark: Benchmark, words: Sequence[str], folder: Path, minutes: float) -> str:
    """Run a benchmark, store its result and return what to say of it; empty: it is done."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{benchmark.name}.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # children of a benchmark import it, too
    try:
        process = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, timeout=60 * minutes
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {minutes:g} minutes; --minutes allows more"
    content = read_result(process.stdout, benchmark.name)
    if content is None:
        last = process.stdout.strip().splitlines()[-1:]
        if process.returncode == 0 and last:  # such as gpu.py without a device
            return last[0].removeprefix(f"{benchmark.name}: ")
        return f"failed with exit status {process.returncode}; its stored result is unchanged"
    store(content, folder / f"{benchmark.name}.json")
    return ""


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> int:
    """Run the benchmarks and return the exit status."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    options = parser(__doc__)
    for key, what in GIVEN.items():
        options.add_argument(f"--{key}", type=Path, help=what)
    options.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    options.add_argument("--again", action="store_true", help="repeat results of this commit, too")
    options.add_argument("--minutes", type=float, default=240.0, help="time limit of a benchmark")
    chosen = options.parse_args(arguments)
    given = {key: getattr(chosen, key) for key in GIVEN}
    absent = [f"--{key} {path}" for key, path in given.items() if path and not path.exists()]
    if absent:
        options.error(f"{absent[0]} does not exist")
    try:
        left_out, failed = _run_all(chosen, given, folder)
    except KeyboardInterrupt:
        _say("interrupted; the same command resumes")
        return 130
    missed = print_table(folder)
    for name, reason in left_out.items():
        _say(f"{name}: not run: {reason}")
    for name, reason in failed.items():
        _say(f"{name}: {reason}")
    return int(bool(missed or failed))


def _run_all(
    chosen: argparse.Namespace, given: Mapping[str, Path | None], folder: Path
) -> tuple[dict[str, str], dict[str, str]]:
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    now = commit()
    for benchmark in BENCHMARKS:
        if benchmark.name not in chosen.only:
            continue
        if not chosen.again and is_current(folder / f"{benchmark.name}.json", now):
            left_out[benchmark.name] = "measured at this commit; --again repeats it"
            continue
        try:
            words = arguments_of(benchmark, given)
        except LookupError as error:
            left_out[benchmark.name] = f"it needs {error.args[0]}"
            continue
        _say(f"{benchmark.name} ...")
        start = time.monotonic()
        reason = run(benchmark, words, folder, chosen.minutes)
        if reason.startswith(("failed", "stopped")):
            failed[benchmark.name] = reason
        elif reason:
            left_out[benchmark.name] = reason
        _say(f"{benchmark.name}: {reason or 'done'} ({time.monotonic() - start:.0f} s)")
    return left_out, failed


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
