"""Process that runs a single program, for :mod:`anomaly_clip.exporting.timing`.

    python -m anomaly_clip.exporting.timed_process < commands

The first line of the standard input is the job, as JSON. Each further line is a command:
``outputs`` (write the outputs of all images), ``run SECONDS`` (time batches), or ``memory``. The
process answers each line with a line of JSON. It ends with its input, and so does not outlive its
parent. It imports torch for the runtimes of torch only: memory and start are those of a user of the
runtime.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["answer", "main", "peak_memory"]

Run = Callable[[NDArray[np.uint8]], Mapping[str, NDArray[Any]]]
"""Returns the outputs of uint8 images ``(B, 3, S, S)``."""

STATUS = Path("/proc/self/status")


def main() -> int:
    """Answer the lines of the standard input until it ends, and return an exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process after Ctrl-C
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print where they like
    try:
        answer(sys.stdin, lines)
    except BrokenPipeError:  # the parent has ended
        return 1
    return 0


def answer(commands: TextIO, lines: TextIO, open_program: Callable[..., Run] | None = None) -> None:
    """Answer the lines of a stream until it ends.

    Args:
        commands: The job and the commands; see the module.
        lines: Where the answers go.
        open_program: Replaces the loading of the job's program.
    """

    def reply(**content: Any) -> None:
        lines.write(json.dumps(content) + "\n")
        lines.flush()

    try:
        job = json.loads(commands.readline())
        images = np.load(job["images"])
        run = (open_program or _open_program)(job)
        run(images[:1])
        reply(ready=True)
        batches = _batches(images, job["batch_size"])
        for line in commands:
            verb, *values = line.split()
            if verb == "outputs":
                _write_outputs(run, images, job["batch_size"], Path(job["outputs"]))
                reply(written=True)
            elif verb == "run":
                wall, processor = _timed(run, batches, float(values[0]))
                reply(times=wall, processor=processor)
            else:
                reply(memory=peak_memory())
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:  # a row of the table with its reason
        reply(error=_reason(error))


def peak_memory() -> int | None:
    """Return the highest resident size of this process in bytes; None if the system has none.

    ``getrusage`` would also count the parent's memory at the time of ``fork``.
    """
    try:
        text = STATUS.read_text(encoding="utf-8")
    except OSError:
        return _highest_size()
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else _highest_size()


def _highest_size() -> int | None:
    try:
        import resource
    except ImportError:  # on Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        return f"out of memory ({kind})"
    if not lines:
        return kind
    return lines[0][:300] if isinstance(error, ValueError) else f"{kind}: {lines[0]}"[:300]


def _batches(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield batches of images for ever, from the first to the last and again."""
    start = 0
    while True:
        places = np.arange(start, start + size) % len(images)
        yield np.ascontiguousarray(images[places])
        start = (start + size) % len(images)


def _timed(
    run: Run, batches: Iterator[NDArray[np.uint8]], seconds: float
) -> tuple[list[float], list[float]]:
    """Return wall and processor seconds of each batch, of at least one, until the time is over."""
    wall: list[float] = []
    processor: list[float] = []
    while sum(wall) < seconds or not wall:
        batch = next(batches)
        start, used = time.perf_counter(), time.process_time()
        run(batch)
        processor.append(time.process_time() - used)
        wall.append(time.perf_counter() - start)
    return wall, processor


def _write_outputs(run: Run, images: NDArray[np.uint8], size: int, file: Path) -> None:
    """Write the outputs of all images, in batches of the size that is timed."""
    count = -(-len(images) // size)
    batches = _batches(images, size)
    outputs = [run(next(batches)) for _ in range(count)]
    together = {
        name: np.concatenate([np.asarray(output[name]) for output in outputs])[: len(images)]
        for name in outputs[0]
    }
    np.savez(file, allow_pickle=False, **together)


def _open_program(job: Mapping[str, Any]) -> Run:
    if job["runtime"] == "torch":
        return _open_method(job)
    from anomaly_clip.runtime.detector import open_session

    session = open_session(Path(job["file"]), job["session"], job["threads"], job["precision"])
    return session.run


def _open_method(job: Mapping[str, Any]) -> Run:
    """Load a method, and return what ``predict`` does with a batch on the CPU."""
    import torch

    from anomaly_clip.exporting.graph import OUTPUTS

    torch.set_num_threads(job["threads"])
    module, _, name = job["loader"].partition(":")
    method = getattr(importlib.import_module(module), name)(job["source"])
    plugin = method.trainer.precision_plugin

    def run(images: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        categories = [job["category"]] * len(images)
        with torch.inference_mode(), plugin.predict_step_context():
            scores: Mapping[str, Any] = method.score(torch.from_numpy(images), categories)
        return {name: scores[name].float().numpy() for name in OUTPUTS if name in scores}

    return run


if __name__ == "__main__":
    sys.exit(main())
