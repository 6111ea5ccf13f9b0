"""Causes for which a process of a run in several ends, and how they are reported."""

from __future__ import annotations

import builtins
import signal
import sys
import traceback
from dataclasses import dataclass

from anomaly_clip.commands.interruption import Interrupted
from anomaly_clip.errors import UserError
from anomaly_clip.files import printable

__all__ = [
    "Cause",
    "ProcessFailure",
    "cause_of",
    "cause_of_child",
    "is_lost_connection",
    "killed",
]


@dataclass(frozen=True)
class Cause:
    """Reason why a process ended.

    Args:
        rank: The process.
        code: Its exit code.
        sentence: Message for the user; empty if the error is not a user's mistake.
        trace: Traceback of the error, as Python prints it.
        interrupted: Whether a signal ended the process.
    """

    rank: int
    code: int
    sentence: str
    trace: str = ""
    interrupted: bool = False


class ProcessFailure(Exception):
    """End of a process because it, or another one of the same run, has failed.

    Args:
        code: Exit code.
        cause: What to report; None if another process reports it.
        num_processes: Number of processes of the run.
    """

    def __init__(self, code: int, cause: Cause | None, num_processes: int) -> None:
        super().__init__(cause.sentence or cause.trace if cause is not None else "")
        self.code = code
        self.cause = cause
        self.num_processes = num_processes

    def report(self, with_traceback: bool = False) -> int:
        """Print the cause, and return the exit code.

        Args:
            with_traceback: Whether to print the traceback of a user's mistake, too.
        """
        cause = self.cause
        if cause is not None:
            if cause.trace and (with_traceback or not cause.sentence):
                place = f"process {cause.rank} of {self.num_processes}"
                print(f"{place} failed:\n{cause.trace.rstrip()}", file=sys.stderr)
            if cause.sentence:
                print(f"anomaly_clip: {printable(cause.sentence)}", file=sys.stderr)
            sys.stderr.flush()
        return self.code


def cause_of(rank: int, error: BaseException) -> Cause | None:
    """Describe an error of this process; None if it has only lost another process."""
    if isinstance(error, Interrupted):
        return Cause(rank, 128 + error.number, str(error), interrupted=True)
    if is_lost_connection(error):
        return None
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        return Cause(rank, 2, str(error), trace)
    return Cause(rank, 1, "", trace)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says no more than that another process cannot be reached."""
    import torch.distributed as dist

    lost = isinstance(error, dist.DistError)
    lost = lost or (isinstance(error, RuntimeError) and "gloo" in str(error))
    cause = error.__cause__
    return lost or (
        isinstance(error, UserError) and cause is not None and is_lost_connection(cause)
    )


def cause_of_child(error: BaseException) -> Cause | None:
    """Describe an error that a strategy that forks or spawns has caught in a child of this process.

    torch passes it on as a text that ends with a traceback.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    if isinstance(error, ProcessExitedException) and (error.exit_code or 0) < 0:
        return killed(error.error_index, error.exit_code)
    if not isinstance(error, ProcessRaisedException):
        return None
    trace = str(error).partition("following error:")[2].strip()
    name, _, message = trace.splitlines()[-1].partition(": ")
    kind = getattr(builtins, name, UserError if name.endswith(".UserError") else None)
    mistakes = (ValueError, OSError, ModuleNotFoundError, UserError)
    if isinstance(kind, type) and issubclass(kind, mistakes):
        return Cause(error.error_index, 2, message, trace)
    return Cause(error.error_index, 1, "", trace)


def killed(rank: int, code: int) -> Cause:
    """Describe the end of a process by a signal; ``code`` is the negated number of the signal."""
    name = signal.Signals(-code).name
    way_out = ", a crash of compiled code: set PYTHONFAULTHANDLER=1 to see where"
    if name == "SIGKILL":
        way_out = (
            ", as the system does when memory runs out: if nobody ended it, use fewer processes "
            "(trainer.devices), fewer data.num_workers or a smaller data.batch_size"
        )
    elif name in ("SIGTERM", "SIGINT", "SIGHUP"):
        way_out = ": run the same command again"
    return Cause(rank, 128 - code, f"process {rank} was ended by {name}{way_out}")
