"""Checks with processes of their own: two processes, killed and terminated fits."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.testing import callbacks
from anomaly_clip.testing.processes import Done, can_fork, run_command
from anomaly_clip.testing.run_files import (
    compare_checkpoints,
    image_scores,
    load,
    read_scores,
)
from anomaly_clip.testing.subject import Subject

__all__ = [
    "interrupted_single_pass_leaves_nothing",
    "killed_fit_resumes_to_the_bit",
    "terminated_fit_resumes_to_the_bit",
    "two_processes_fit_one_model",
    "two_processes_test_as_one",
]

TOLERANCE = 1e-3
"""See the tolerance of the checks of ``score``."""

Check = TypeVar("Check", bound=Callable[[Subject], None])


def _slow(check: Check) -> Check:
    """Mark a check that starts processes."""
    check.slow = True  # type: ignore[attr-defined]
    return check


@_slow
def two_processes_test_as_one(subject: Subject) -> None:
    """``test`` in two processes scores each image once and has the metrics of one process."""
    subject.require(issubclass(subject.kind, EvaluatedModule), "has no test")
    folder = _in_two(subject, "test")
    before, after = (_metrics(path) for path in (subject.tested, folder))
    for name, value in before.items():
        other = after[name]
        same = value == other if value is None or other is None else abs(value - other) < TOLERANCE
        assert same, f"{name} is {value} in one process and {other} in two"
    paths = [[row["path"] for row in read_scores(path)] for path in (subject.tested, folder)]
    assert paths[0] == paths[1], "scores.csv lists other images, or in another order"
    if subject.scores:
        scores, others = image_scores(subject.tested), image_scores(folder)
        apart = np.abs(scores - others).max() / max(np.ptp(scores), np.finfo(float).tiny)
        assert apart <= TOLERANCE, f"image scores differ by {apart:.2g} of their range"


@_slow
def two_processes_fit_one_model(subject: Subject) -> None:
    """``fit`` in two processes ends with the same model in both, and one checkpoint."""
    subject.require(subject.can_be_fitted, "cannot be fitted")
    folder = _in_two(subject, "fit", **subject.with_callback(callbacks.CompareProcesses))
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert files == ["last.ckpt"], f"checkpoints: {', '.join(files)}"
    ours, theirs = (set(load(file)["state_dict"]) for file in (subject.checkpoint, _last(folder)))
    assert ours == theirs, f"the state has other entries: {sorted(ours ^ theirs)[0]}"


@_slow
def killed_fit_resumes_to_the_bit(subject: Subject) -> None:
    """After SIGKILL in the second epoch, a resumed fit equals one that was not killed."""
    ended, folder = _end_by(subject, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL, (
        f"exit code {ended.returncode}: {ended.stderr[-500:]}"
    )
    _compare_resumed(subject, folder)


@_slow
def terminated_fit_resumes_to_the_bit(subject: Subject) -> None:
    """After SIGTERM, exit code 143 and the way to continue; the resumed fit equals another."""
    ended, folder = _end_by(subject, signal.SIGTERM)
    assert ended.returncode == 128 + signal.SIGTERM, (
        f"exit code {ended.returncode}: {ended.stderr[-500:]}"
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert str(_last(folder)) in last, f"the last line does not tell how to continue: {last}"
    assert "Traceback" not in ended.stderr, ended.stderr
    _compare_resumed(subject, folder)


@_slow
def interrupted_single_pass_leaves_nothing(subject: Subject) -> None:
    """After SIGTERM in its only pass, a fit leaves no checkpoint that looks fitted."""
    subject.require(subject.can_be_fitted and not subject.is_trained, "is trained in epochs")
    ended, folder = _signalled(subject, signal.SIGTERM, epoch=0, batch=1)
    assert ended.returncode == 128 + signal.SIGTERM, (
        f"exit code {ended.returncode}: {ended.stderr[-500:]}"
    )
    left = sorted(path.name for path in folder.rglob("*.ckpt"))
    assert not left, f"the fit has left {left[0]}"


def _in_two(subject: Subject, verb: str, **trainer: Any) -> Path:
    """Run a verb in two processes and return its folder."""
    subject.require(can_fork(), "cannot be forked on this system")
    words, folder = subject.words(verb, "--output.page", "false", devices=2, **trainer)
    ended = run_command(words, processes=2, variables=subject.variables)
    end = ended.stderr[-1000:]
    assert ended.returncode == 0, f"{verb} in two processes ends with {ended.returncode}: {end}"
    return folder


def _end_by(subject: Subject, number: int) -> tuple[Done, Path]:
    """Run a fit that receives a signal before the first step of its second epoch."""
    subject.require(subject.is_trained, "is not trained in epochs")
    file = subject.checkpoint
    subject.require(load(file)["epoch"] > 0, "trains for a single epoch here")
    return _signalled(subject, number, epoch=1, batch=0)


def _signalled(subject: Subject, number: int, epoch: int, batch: int) -> tuple[Done, Path]:
    subject.require(can_fork(), "cannot be forked on this system")
    options = subject.with_callback(
        callbacks.SignalAtStep, number=int(number), epoch=epoch, batch=batch
    )
    words, folder = subject.words("fit", "--output.page", "false", **options)
    return run_command(words, variables=subject.variables), folder


def _check_code(ended: Done, expected: int) -> None:
    code, end = ended.returncode, ended.stderr[-500:]
    assert code == expected, f"exit code {code} instead of {expected}: {end}"


def _compare_resumed(subject: Subject, folder: Path) -> None:
    assert _last(folder).is_file(), "the fit has left no last.ckpt"
    resumed = subject.succeed("fit", "--ckpt_path", str(_last(folder)))
    compare_checkpoints(subject.checkpoint, _last(resumed))


def _last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _metrics(folder: Path) -> dict[str, float | None]:
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    mean: dict[str, float | None] = content["mean"]
    return mean
