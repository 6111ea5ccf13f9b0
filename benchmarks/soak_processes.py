"""Part of the soak: the test of each method in one, two and three processes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from soak_common import Row, in_parallel, run_main
from soak_kills import subject_of

from anomaly_clip.testing.processes import run_command
from anomaly_clip.testing.run_files import image_scores, read_scores

__all__ = ["TESTED", "TOLERANCE", "processes"]

TESTED = (
    "SDP",
    "WinCLIP",
    "WinCLIP+",
    "SDP+",
    "CLIP-ADA",
    "PaDiM",
    "PatchCore",
    "RD4AD",
    "SimpleNet",
    "RegAD",
    "linear probe",
)
"""Cases of tests/contract_subjects.py that have a test."""
TOLERANCE = 1e-3
"""Largest difference of a metric, and of an image score as a fraction of the scores' range."""


def processes(count: int, seed: int, jobs: int) -> Iterator[Row]:
    """Test each method in 1 to ``count`` processes; yield a row for each method.

    Args:
        count: Largest number of processes.
        seed: Unused: the methods have seeds of their own.
        jobs: Unused: the processes of one test are enough at a time.
    """
    for name in TESTED:
        yield from in_parallel([partial(_compared, name, count)], 1)


def _compared(name: str, most: int) -> Row:
    row = Row("processes", name, f"test in 1 to {most} processes")
    subject = subject_of(name)
    subject.__dict__["folder"] = Path(tempfile.mkdtemp(prefix="test_")).resolve()
    more = ["--output.page", "false"]
    if subject.must_be_fitted:
        words, fitted = subject.words("fit", *more)
        ended = run_main(words, subject.variables)
        if ended.code:
            row.fail(f"fit ends with {ended.code}: {ended.last_line}")
            return row
        more += ["--ckpt_path", str(fitted / "checkpoints" / "last.ckpt")]
    folders: list[Path] = []
    for number in range(1, most + 1):
        words, folder = subject.words("test", *more, devices=number)
        done = run_command(words, number, subject.variables)
        row.tried += 1
        if done.returncode:
            row.fail(f"{number} processes end with {done.returncode}: {done.stderr[-200:]}")
            return row
        folders.append(folder)
    largest = 0.0
    for number, folder in enumerate(folders[1:], start=2):
        apart, problem = _difference(folders[0], folder)
        largest = max(largest, apart)
        if problem is not None:
            row.fail(f"{number} processes: {problem}", seed=0)
    row.note = f"largest difference {largest:.2g}"
    return row


def _difference(first: Path, second: Path) -> tuple[float, str | None]:
    """Return the largest difference of two tests, and what is wrong if it is too large."""
    before, after = (
        json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for folder in (first, second)
    )
    largest = 0.0
    for group in ("mean", *(f"categories/{name}" for name in before["categories"])):
        ours, theirs = before, after
        for part in group.split("/"):
            ours, theirs = ours[part], theirs.get(part, {})
        if list(ours) != list(theirs):
            return math.inf, f"{group} has other metrics"
        for name, value in ours.items():
            if (value is None) != (theirs[name] is None):
                return math.inf, f"{group}.{name} is {value} and {theirs[name]}"
            if value is not None:
                largest = max(largest, abs(value - theirs[name]))
    paths = [[row["path"] for row in read_scores(folder)] for folder in (first, second)]
    if paths[0] != paths[1]:
        return math.inf, "scores.csv lists other images"
    if "image_score" in read_scores(first)[0]:
        ours, theirs = image_scores(first), image_scores(second)
        largest = max(largest, float(np.abs(ours - theirs).max() / max(np.ptp(ours), 1e-300)))
    problem = None if largest <= TOLERANCE else f"differs by {largest:.2g}"
    return largest, problem
