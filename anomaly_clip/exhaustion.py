"""Exhausted memory and lost worker processes, explained in one line with the way out."""

from __future__ import annotations

import errno
import os
import re
import sysconfig
from pathlib import Path

__all__ = ["explain_exhaustion"]

PACKAGE = str(Path(__file__).parent) + os.sep
LIBRARIES = tuple({sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")})
ALLOCATION = re.compile(
    "DefaultCPUAllocator|not enough memory|can't allocate memory|cannot allocate memory|"
    "insufficient memory|failed to allocate",
    re.IGNORECASE,
)
"""Messages of torch, OpenCV and operating systems about memory."""
SHARED_MEMORY = re.compile(r"shared memory|bus error|</?torch_\d|/dev/shm", re.IGNORECASE)
"""Messages about the memory through which the workers of a data loader pass images."""
WORKER = re.compile(r"DataLoader worker \(pid")
MAX_DETAIL = 160


def explain_exhaustion(error: BaseException) -> str | None:
    """Return a sentence with the way out; None for other errors, and for those of a user's code.

    An error in code that is neither of this package nor of an installed library keeps its
    traceback: it shows the place in that code.

    Args:
        error: An exception.
    """
    message = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if _is_in_other_code(error):
        return None
    if WORKER.search(message):
        if SHARED_MEMORY.search(message):
            return _shared_memory(message)
        return (
            f"a worker process of the data loader was ended from outside ({_detail(message)}), as "
            f"when memory runs out: set data.num_workers to 0, or lower it"
        )
    if "OutOfMemoryError" in kinds:
        return (
            f"the memory of the GPU is not sufficient ({_detail(message)}): lower data.batch_size, "
            f"set trainer.precision to 16-mixed, or use a smaller image size"
        )
    is_system = isinstance(error, RuntimeError | OSError) or "error" in kinds  # cv2.error
    if is_system and SHARED_MEMORY.search(message):
        return _shared_memory(message)
    out_of_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if (
        isinstance(error, MemoryError)
        or out_of_memory
        or (is_system and ALLOCATION.search(message))
    ):
        detail = f" ({_detail(message)})" if message else ""
        return (
            f"memory is not sufficient{detail}: lower data.batch_size, set data.num_workers to 0, "
            f"or use smaller images"
        )
    return None


def _shared_memory(message: str) -> str:
    return (
        f"shared memory (/dev/shm) is not sufficient for the workers of the data loader "
        f"({_detail(message)}): set data.num_workers to 0, or enlarge it, in a container with "
        f"--shm-size"
    )


def _detail(message: str) -> str:
    """Return the end of a message of a worker, or the first sentence of another."""
    last = message.rpartition("Error: ")[2] if "Original Traceback" in message else message
    first = re.split(r"(?<=[a-z])\. ", last)[0].rstrip(" .")
    return first if len(first) <= MAX_DETAIL else f"{first[:MAX_DETAIL]} ..."


def _is_in_other_code(error: BaseException) -> bool:
    """Return whether the innermost frame outside of libraries is not of this package."""
    files = []
    trace = error.__traceback__
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    for file in reversed(files):
        if file.startswith(PACKAGE):
            return False
        if not file.startswith(("<", *LIBRARIES)):
            return True
    return False
