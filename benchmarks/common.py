"""Shared parts of the benchmarks: header, timer, bounds and result.

A result is one JSON object with the keys ``benchmark``, ``header`` and ``bounds``, and with the
benchmark's own values.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from anomaly_clip import __version__

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # in typing since Python 3.11

__all__ = [
    "HEADER",
    "RESULTS",
    "ROOT",
    "Bound",
    "at_least",
    "at_most",
    "fastest",
    "header",
    "one_line",
    "parser",
    "report",
    "result",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

HEADER = ("command", "commit", "date", "machine", "versions", "threads")
"""Keys of a result's header. Older results have null for values that were not recorded."""

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "torchmetrics",
    "scikit-learn",
    "scipy",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "onnx",
    "onnxruntime",
    "openvino",
)


COMMIT_VARIABLE = "ANOMALY_CLIP_COMMIT"


class Bound(TypedDict):
    """A measured value and its bound."""

    value: float | None
    """None if nothing was measured."""
    bound: float
    rule: Literal["at most", "at least"]
    met: bool | None
    """None if nothing was measured."""
    goal: NotRequired[float]
    """A value beyond the bound that the benchmark should reach."""


def at_most(value: float | None, bound: float, goal: float | None = None) -> Bound:
    """Return a value, rounded to six significant digits, with its upper bound and its goal."""
    met = None if value is None else value <= bound
    return _with_goal(Bound(value=_shortened(value), bound=bound, rule="at most", met=met), goal)


def at_least(value: float | None, bound: float, goal: float | None = None) -> Bound:
    """Return a value, rounded to six significant digits, with its lower bound and its goal."""
    met = None if value is None else value >= bound
    return _with_goal(Bound(value=_shortened(value), bound=bound, rule="at least", met=met), goal)


def _with_goal(bound: Bound, goal: float | None) -> Bound:
    if goal is not None:
        bound["goal"] = goal
    return bound


def _shortened(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def fastest(
    rounds: int,
    tasks: Mapping[str, Callable[[], object]],
    *,
    clock: Callable[[], float] = time.process_time,
    warm_up: int = 1,
) -> dict[str, float]:
    """Return the shortest time of each task, in seconds, over rounds in which all tasks take turns.

    Other work on the machine can only slow a task down, and taking turns spreads the
    slowdown over all tasks.

    Args:
        rounds: Timed rounds.
        tasks: Callables by name.
        clock: ``time.process_time`` for processor seconds, ``time.perf_counter`` for wall time.
        warm_up: Untimed rounds before the timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(warm_up + rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            elapsed = clock() - start
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: min(values) for name, values in seconds.items()}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser, described by the first line of the script's docstring."""
    return argparse.ArgumentParser(description=(doc or "").splitlines()[0])


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, for use in a result."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def header(benchmark: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the provenance of a result, with the keys of :data:`HEADER`.

    Args:
        benchmark: The script's name without its suffix.
        arguments: The command line after the script's name. Default: the arguments of this
            process. Paths are shortened to their last part.
    """
    words = [last_part(w) for w in (sys.argv[1:] if arguments is None else arguments)]
    return {
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *words]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "threads": threads(),
    }


def last_part(word: str) -> str:
    """Return the last part of a path; return any other word unchanged."""
    path = Path(word)
    return path.name if path.is_absolute() or ("/" in word and path.exists()) else word


def commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout (plus ``-dirty`` if files were changed), or ``unknown``.

    The environment variable ``ANOMALY_CLIP_COMMIT`` supplies the commit for a copy that has no git
    history.
    """
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]
    if not (root / ".git").exists():  # otherwise git would describe an enclosing repository
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return process.stdout.strip()


def machine() -> dict[str, Any]:
    """Return the processor, its cores, the system, and the CUDA device if torch detects one."""
    info: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": None,
    }
    torch = sys.modules.get("torch")  # the start-up benchmark does not import torch
    if torch is not None and torch.cuda.is_available():
        info["device"] = torch.cuda.get_device_name()
    return info


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions of Python, this package and its dependencies (None: not installed)."""
    installed: dict[str, str | None] = {
        "python": platform.python_version(),
        "anomaly_clip": __version__,
    }
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def threads() -> int | None:
    """Return the number of threads that torch uses; None if torch is not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def result(
    benchmark: str,
    values: Mapping[str, Any],
    bounds: Mapping[str, Bound],
    arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return a result: its header, its own values, and its bounds.

    Args:
        benchmark: The script's name without its suffix.
        values: Measured values.
        bounds: Bounds by name.
        arguments: See :func:`header`.
    """
    return {
        "benchmark": benchmark,
        "header": header(benchmark, arguments),
        **values,
        "bounds": dict(bounds),
    }


def report(
    benchmark: str,
    values: Mapping[str, Any],
    bounds: Mapping[str, Bound],
    arguments: Sequence[str] | None = None,
) -> int:
    """Print a result as one JSON object and return the exit status: 1 if a bound is missed."""
    sys.stdout.write(json.dumps(result(benchmark, values, bounds, arguments), allow_nan=False))
    sys.stdout.write("\n")
    return int(any(bound["met"] is False for bound in bounds.values()))
