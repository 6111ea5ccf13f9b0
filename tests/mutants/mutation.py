"""Mutation testing: apply one change to a copy of the repository and run the tests that must fail.

The working tree is never modified. A change replaces whole lines that occur exactly once in their
file, regardless of their line numbers, so that the change still
applies after edits elsewhere in the file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("anomaly_clip", "tests", "configs", "benchmarks", "docs", "examples")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")

Outcome = Literal["killed", "survived", "timeout"]
"""timeout: the tests took too long, for example because of an endless loop."""


class Change(NamedTuple):
    """Whole lines of a file and their replacement."""

    file: str
    old: str
    new: str


@contextmanager
def copied_repository() -> Iterator[Path]:
    """Yield a copy of the working tree in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name) / "repository"
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        for part in FILES:
            if (ROOT / part).is_file():
                shutil.copy(ROOT / part, folder / part)
        yield folder


def apply(change: Change, folder: Path) -> bool:
    """Apply a change to a copy of the repository and return whether it was possible."""
    path = folder / change.file
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    starts = places(text, change.old)
    if len(starts) != 1:
        return False
    end = starts[0] + len(change.old)
    path.write_text(text[: starts[0]] + change.new + text[end:], encoding="utf-8")
    return True


def places(text: str, lines: str) -> list[int]:
    """Return the offsets at which these whole lines occur in a text."""
    return [m.start() for m in re.finditer(rf"^(?={re.escape(lines)}$)", text, re.MULTILINE)]


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """Restore a file's content on exit."""
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    finally:
        if before is not None:
            path.write_bytes(before)


def run_tests(tests: Sequence[str], folder: Path, seconds: float) -> Outcome:
    """Run tests until one fails.

    Raises:
        RuntimeError: If pytest cannot run the tests.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    variables = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *tests],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a timeout also kills processes that tests start
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "timeout"
    if process.returncode == 0:
        return "survived"
    # Exit code 2: a test file cannot be imported, which a mutant may cause.
    if process.returncode in (1, 2):
        return "killed"
    raise RuntimeError(
        f"pytest cannot run {' '.join(tests)} (exit code {process.returncode}):\n{output[-2000:]}"
    )


def find_tests(names: Sequence[str]) -> list[str]:
    """Return the pytest ids of test functions, given their names.

    Raises:
        ValueError: If a name is in no test file, or in several.
    """
    ids = []
    texts = {file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")}
    for name in names:
        pattern = re.compile(rf"^def {name}\(", re.MULTILINE)
        files = [file for file, text in texts.items() if pattern.search(text)]
        if len(files) != 1:
            raise ValueError(f"{name}: expected in exactly one test file, found in {len(files)}")
        ids.append(f"tests/{files[0].name}::{name}")
    return ids
