"""Parts shared by the soak: rows of its table, forked commands, and hooks that fail on purpose."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT

from anomaly_clip.cli import main

sys.path.insert(0, str(ROOT / "tests"))  # the methods in small

__all__ = [
    "CHECKPOINT",
    "Ended",
    "Hook",
    "Row",
    "in_parallel",
    "mounted",
    "one_sentence",
    "run_main",
    "wholes",
]

CHECKPOINT = "*.ckpt"
SHORTENED = 300


@dataclass
class Row:
    """One line of the table."""

    part: str
    case: str
    how: str
    tried: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    """Further counts, such as the kills that hit a save."""

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number

    def fail(self, what: str, **where: Any) -> None:
        """Add a failure."""
        self.failures.append({"what": what[-SHORTENED:], **where})

    def line(self) -> str:
        """Return the row as a line of a Markdown table."""
        counts = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        notes = "; ".join(filter(None, (counts, self.note)))
        cells = (self.part, self.case, self.how, self.tried, len(self.failures), notes)
        return f"| {' | '.join(map(str, cells))} |"

    def record(self) -> dict[str, Any]:
        """Return the row for the result."""
        return asdict(self)


class Ended(NamedTuple):
    """A command that ended."""

    code: int
    """Exit code; minus the signal if one ended it."""
    stderr: str
    seconds: float

    @property
    def last_line(self) -> str:
        """Last line on standard error."""
        return (self.stderr.strip().splitlines() or [""])[-1]


# -- commands in forked processes ------------------------------------------------------------------


def run_main(
    words: Sequence[str],
    variables: Mapping[str, str] | None = None,
    prepare: Callable[[], object] | None = None,
    seconds: float = 120,
) -> Ended:
    """Run the command line in a forked process, which is killed after a time limit.

    Standard error is a pipe, so that limits on the size of files do not apply to it.

    Args:
        words: Verb and options.
        variables: Environment variables.
        prepare: Called in the process before the command.
        seconds: Time limit; the exit code is then -9 and the last line names it.
    """
    start = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _enter(words, variables or {}, prepare, reading, writing)
    os.close(writing)
    text, status = bytearray(), None
    while status is None:
        ready = select.select([reading], [], [], 0.02)[0]
        if ready and (block := os.read(reading, 1 << 16)):
            text += block
        elif ready:
            time.sleep(0.02)
        ended, value = os.waitpid(child, os.WNOHANG)
        if ended:
            status = value
        elif time.monotonic() - start > seconds:
            os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            text += f"\nno end within {seconds:g} s".encode()
    while select.select([reading], [], [], 0)[0] and (block := os.read(reading, 1 << 16)):
        text += block
    os.close(reading)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # programs that the command has started
    took = time.monotonic() - start
    return Ended(os.waitstatus_to_exitcode(status), text.decode(errors="replace"), took)


def _enter(
    words: Sequence[str],
    variables: Mapping[str, str],
    prepare: Callable[[], object] | None,
    reading: int,
    writing: int,
) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.dup2(writing, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(variables)
        tempfile.tempdir = None  # as TMPDIR may have changed
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.resetwarnings()
        for kind in (ResourceWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)  # as in a new process
        torch.set_num_threads(1)  # threads do not survive a fork
        try:
            if prepare is not None:
                prepare()
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def in_parallel(tasks: Sequence[Callable[[], Any]], jobs: int) -> Iterator[Any]:
    """Call functions in forked processes, some at a time, and yield their results in order.

    Raises:
        RuntimeError: If a process ends without a result.
    """
    folder = Path(tempfile.mkdtemp(prefix="soak_results_"))
    running: dict[int, int] = {}
    done: set[int] = set()
    waiting = list(enumerate(tasks))[::-1]
    shown = 0
    try:
        while waiting or running or shown < len(tasks):
            while waiting and len(running) < jobs:
                number, task = waiting.pop()
                sys.stdout.flush()
                child = os.fork()
                if child == 0:
                    _call(task, folder / str(number))
                running[child] = number
            if running:
                child, _ = os.waitpid(-1, 0)
                if child in running:
                    done.add(running.pop(child))
            while shown in done:
                file = folder / str(shown)
                if not file.exists():
                    raise RuntimeError(f"task {shown} of the soak ended without a result")
                result = pickle.loads(file.read_bytes())
                if isinstance(result, BaseException):
                    raise result
                yield result
                shown += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(task: Callable[[], Any], file: Path) -> None:
    try:
        try:
            result = task()
        except Exception:
            result = RuntimeError(traceback.format_exc())
        file.write_bytes(pickle.dumps(result))
    finally:
        os._exit(0)


# -- failures on purpose ---------------------------------------------------------------------------


class Hook:
    """Fail when a file is written whose name fits a pattern.

    Python tells of each file that it opens, before it does so; this works for any code that
    writes in Python. ``how`` is one of

    * full: from then on no file may grow beyond ``size`` bytes, as on a full disk
    * full there: such files may not, all others may
    * half: the process ends, as by SIGKILL, when that file has ``size`` bytes
    * rename: SIGKILL before a file is renamed to such a name
    * renamed: SIGKILL after that

    Args:
        pattern: Pattern of the path; empty: the limit begins at once.
        how: See above.
        size: Bytes.
        number: Number of the occasion, from 1.
    """

    def __init__(self, pattern: str, how: str, size: int = 0, number: int = 1) -> None:
        self.pattern, self.how, self.size, self.left = pattern, how, size, number
        self.is_renamed = self.is_limited = False

    def install(self) -> None:
        """Begin in this process, and in those that it forks."""
        if not self.pattern:
            self._limit()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Handle an event of Python."""
        if self.is_renamed:
            self.is_renamed = False  # killing is an event of its own
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how.startswith("rename"):
            if event == "os.rename" and self._fits(arguments[1]):
                if self.how == "rename":
                    os.kill(os.getpid(), signal.SIGKILL)
                self.is_renamed = True
        elif event == "open" and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and self._fits(arguments[0]):
                self._limit()
                self.left += self.how == "full there"
            elif writes and self.is_limited:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                self.is_limited = False

    def _fits(self, name: object) -> bool:
        if not isinstance(name, (str, bytes, os.PathLike)):
            return False
        if not fnmatch.fnmatch(os.fsdecode(name), self.pattern):
            return False
        self.left -= 1
        return self.left == 0

    def _limit(self) -> None:
        if self.how == "half":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        else:
            os.write(2, f"{FULL}\n".encode())
        hard = resource.RLIM_INFINITY if self.how == "full there" else self.size
        self.is_limited = self.how == "full there"
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


FULL = "(soak: from here on the disk is full)"


@contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[bool]:
    """Mount a small file system in memory, where that is allowed; yield whether it is."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f"mount -t tmpfs -o size={kilobytes}k tmpfs '{folder}' 2>/dev/null"
    allowed = os.system(command) == 0
    try:
        yield allowed
    finally:
        if allowed:
            os.system(f"umount -l '{folder}'")


# -- what a failure may leave ----------------------------------------------------------------------


def one_sentence(ended: Ended) -> str | None:
    """Return what is wrong with the end of a command that had to end with 2 and one sentence."""
    if "Traceback" in ended.stderr:
        return f"a traceback: {ended.last_line}"
    if ended.code != 2:
        return f"exit code {ended.code}: {ended.last_line}"
    if not ended.last_line.startswith("anomaly_clip: "):
        return f"the last line is no sentence of anomaly_clip: {ended.last_line!r}"
    return None


def wholes(folder: Path) -> list[str]:
    """Return the files in a folder that are temporary, or that cannot be read completely."""
    bad = []
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if ".tmp" in file.name or file.name == ".scratch":
            bad.append(f"{name}: left over")
        elif file.is_file():
            try:
                _read(file)
            except Exception as error:
                bad.append(f"{name}: {type(error).__name__}: {error}")
    return bad


def _read(file: Path) -> None:
    import csv

    import numpy as np
    import yaml
    from PIL import Image

    content = file.read_bytes()
    kind = file.suffix
    if kind == ".json":
        json.loads(content)
    elif kind == ".yaml":
        if not isinstance(yaml.safe_load(content), dict):
            raise ValueError("no mapping")
    elif kind == ".csv":
        rows = list(csv.reader(io.StringIO(content.decode())))
        if not rows or {len(row) for row in rows} != {len(rows[0])} or not content.endswith(b"\n"):
            raise ValueError("rows of several lengths, or cut")
    elif kind == ".html":
        if not content.rstrip().endswith(b"</html>"):
            raise ValueError("cut")
    elif kind == ".npy":
        np.load(io.BytesIO(content), allow_pickle=False)
    elif kind == ".ckpt":
        torch.load(io.BytesIO(content), weights_only=True)
    elif kind in (".png", ".webp", ".jpg"):
        with Image.open(io.BytesIO(content)) as image:
            image.load()
