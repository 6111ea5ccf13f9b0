"""Time, memory and outputs of programs, each in a process of its own, in rounds that take turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.errors import check_above, check_at_least

if TYPE_CHECKING:
    from anomaly_clip.exporting.parity import Difference

__all__ = ["Choice", "Program", "Timing", "available_cores", "choose", "measure"]

MODULE = "anomaly_clip.exporting.timed_process"
"""Module that each process runs."""
ROUNDS = 5
"""Rounds in which all rows take turns, so that other work on the machine slows all down alike."""
FLOAT32_BOUND = 1e-5
"""Largest difference of maps, as a fraction of their range, of a row that needs no calibration."""
MAX_REASON = 300

Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Program:
    """Program that a row of the table runs.

    Args:
        runtime: ``torch`` (the method itself), ``torch_export``, ``onnxruntime`` or ``openvino``.
        precision: Precision of its weights, such as ``float32``.
        job: Further content of the process's job; see ``timed_process``.
        bytes: Size of its files; None without files.
        error: Reason why it cannot run; None if it can.
    """

    runtime: str
    precision: str
    job: Mapping[str, Any] = field(default_factory=dict)
    bytes: int | None = None
    error: str | None = None


@dataclass
class Timing:
    """A program with a batch size, and what was measured.

    Args:
        program: The program.
        batch_size: Images per batch.
        times: Wall seconds of each batch, in all rounds.
        processor: Processor seconds of each batch, summed over its threads.
        start: Seconds from the start of the process to the scores of its first image.
        memory: Highest resident size of the process in bytes; None if the system does not tell.
        outputs: Outputs of the images that are compared; empty after an error.
        error: Reason why nothing was measured; None otherwise.
    """

    program: Program
    batch_size: int
    times: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    start: float | None = None
    memory: int | None = None
    outputs: Outputs = field(default_factory=dict)
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Median of the wall seconds of an image."""
        return statistics.median(self.times) / self.batch_size

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the wall seconds of an image."""
        low, high = np.quantile(self.times, (0.25, 0.75)) / self.batch_size
        return float(low), float(high)

    @property
    def name(self) -> str:
        """Runtime, precision unless it is float32, and batch size."""
        precision = self.program.precision
        kind = "" if precision == "float32" else f" {precision}"
        return f"{self.program.runtime}{kind}, batch {self.batch_size}"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(
    programs: Sequence[Program],
    batch_sizes: Sequence[int],
    images: NDArray[np.uint8],
    *,
    threads: int,
    seconds: float,
    rounds: int = ROUNDS,
    watch: Callable[[Sequence[Timing], str], Iterable[Timing]] = lambda rows, title: rows,
) -> list[Timing]:
    """Measure each program with each batch size; a program that fails is a row with its reason.

    The processes exist at the same time, and one of them works at a time. They end with this
    process, whatever ends it.

    Args:
        programs: The programs.
        batch_sizes: Images per batch.
        images: uint8 ``(N, 3, S, S)``: outputs are those of all N, timed batches go through them.
        threads: Threads of each program.
        seconds: Measured seconds of each row; at least one batch per round is measured.
        rounds: Rounds in which the rows take turns.
        watch: Wraps the rows of each step, given its title, to show the progress.

    Raises:
        ValueError: If a number is too small.
        OSError: If no process can be started, or the disk is full.
    """
    for size in batch_sizes:
        check_at_least("--batch_sizes", size, 1)
    check_at_least("--threads", threads, 1)
    check_above("--seconds", seconds, 0)
    rows = [Timing(program, size) for program in programs for size in batch_sizes]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        np.save(folder / "images.npy", images)
        processes: dict[int, _Process] = {}
        for number, row in enumerate(watch(rows, "starting")):
            if row.program.error is not None:
                row.error = row.program.error
                continue
            job = {
                **row.program.job,
                "runtime": row.program.runtime,
                "batch_size": row.batch_size,
                "threads": threads,
                "images": str(folder / "images.npy"),
                "outputs": str(folder / f"outputs-{number}.npz"),
            }
            process = stack.enter_context(_Process(row, job, folder / f"{number}.txt"))
            if process.ask("outputs") is not None:
                with np.load(job["outputs"]) as outputs:
                    row.outputs = dict(outputs)
                processes[id(row)] = process
        for number in range(rounds):
            title = f"round {number + 1} of {rounds}"
            for row in watch([row for row in rows if row.error is None], title):
                answer = processes[id(row)].ask(f"run {seconds / rounds}")
                if answer is not None:
                    row.times += answer["times"]
                    row.processor += answer["processor"]
        for row in rows:
            answer = None if row.error is not None else processes[id(row)].ask("memory")
            row.memory = None if answer is None else answer["memory"]
    return rows


class _Process:
    """A process of ``timed_process``, and the row that it measures.

    Args:
        row: The row; gets the start, and the reason of a failure.
        job: The first line for the process.
        log: File for what libraries print.
    """

    def __init__(self, row: Timing, job: Mapping[str, Any], log: Path) -> None:
        self._row = row
        self._log = log
        begin = time.perf_counter()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(  # noqa: S603 - this program, without a shell
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=_environment(job["threads"], log.parent),
                text=True,
                encoding="utf-8",
            )
        try:
            if self.ask(json.dumps(job)) is not None:
                row.start = time.perf_counter() - begin
        except BaseException:  # a signal, before the block that ends the process
            self._end()
            raise

    def __enter__(self) -> _Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def ask(self, line: str) -> dict[str, Any] | None:
        """Return the answer to a line; None if there is none, with the reason in the row."""
        if self._row.error is not None:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        content: dict[str, Any] = json.loads(answer) if answer.endswith("\n") else self._death()
        self._row.error = content.get("error")
        if self._row.error is None:
            return content
        self._end()  # its memory is that of other rows
        return None

    def _death(self) -> dict[str, Any]:
        """Return the reason why the process has ended without an answer."""
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            why = ": the memory has probably run out" if name == "SIGKILL" else ""
            return {"error": f"its process was ended by {name}{why}"}
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = f": {lines[-1][:MAX_REASON]}" if lines else ""
        return {"error": f"its process ended with exit code {code}{last}"}

    def _end(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._process.wait()


def _environment(threads: int, folder: Path) -> dict[str, str]:
    """Return the variables of a process, which keeps what libraries leave behind in a folder.

    Libraries that count cores use the threads as well.
    """
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **numbers, "PYTHONPATH": path, "TMPDIR": str(folder)}


@dataclass(frozen=True)
class Choice:
    """The row to choose, and the reason in a sentence.

    Args:
        row: The row; None if there is none.
        sentence: The reason.
    """

    row: Timing | None
    sentence: str


def choose(
    rows: Sequence[Timing], differences: Sequence[Difference | None], reference: str
) -> Choice:
    """Choose the fastest row whose decisions are those of the reference.

    Without a calibration there are no decisions, so the maps (or scores, if there are none) must be
    equal but for the rounding of float32.

    Args:
        rows: The rows; those with an error are passed over.
        differences: Their differences from the reference.
        reference: Description of the reference.
    """
    measured = [row for row in rows if row.error is None]
    if not measured:
        return Choice(None, "Choose none: no row could be measured.")
    pairs = list(zip(rows, differences, strict=True))
    equal = [row for row, difference in pairs if row.error is None and _is_equal(difference)]
    decided = any(d is not None and d.flips is not None for d in differences)
    if not equal:
        what = "no decision flips" if decided else f"maps differ by at most {FLOAT32_BOUND:g}"
        return Choice(None, f"Choose none: there is no row in which {what}.")
    best = min(equal, key=lambda row: row.seconds)
    text = f"Choose {best.name}: {1000 * best.seconds:.3g} ms an image"
    for row in measured:
        if row.program.runtime == "torch" != best.program.runtime and (
            row.batch_size == best.batch_size
        ):
            text += f", {row.seconds / best.seconds:.2g} times as fast as {row.name}"
    why = "no decision flips" if decided else "its maps are equal but for rounding"
    text += f", and {why} compared with {reference}"
    near = [
        row.name
        for row in equal
        if row.program is not best.program and row.quartiles[0] <= best.quartiles[1]
    ]
    text += f"; as fast within the spread: {' and '.join(near)}" if near else ""
    return Choice(best, f"{text}.")


def _is_equal(difference: Difference | None) -> bool:
    if difference is None:
        return False
    if difference.flips is not None:
        return difference.flips == 0
    values = (difference.anomaly_map, difference.image_score)
    return next(value for value in values if value is not None) <= FLOAT32_BOUND
