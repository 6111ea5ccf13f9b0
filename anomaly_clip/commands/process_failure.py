"""End of a run in several processes, one of which fails: its cause, said once and last.

The process that fails first leaves its cause in the store by which the processes have found each
other. The others lose their connection to it. Process 0 waits until they have ended and reports the
cause; the others print nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from anomaly_clip.commands.interruption import Interrupted
from anomaly_clip.commands.process_cause import Cause, ProcessFailure, cause_of, cause_of_child
from anomaly_clip.commands.process_watch import PATIENCE, Board, Watch, connected
from anomaly_clip.errors import UserError, reason

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["let_first_process_report", "report_once"]

FIRST_WORD = 3.0
"""Seconds by which the other processes let process 0 report a mistake that all have found."""
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Variables with the rank of a process, in which launchers pass it."""


@contextmanager
def report_once(trainer: Trainer, verb: str, clean_up: Callable[[], None]) -> Iterator[None]:
    """Turn the failure of a process into one report, if there are several processes.

    Args:
        trainer: The trainer, before its run.
        verb: Verb of the command line.
        clean_up: Removes what a failed run leaves; called by process 0 when the others have ended.

    Raises:
        ProcessFailure: If this or another process fails.
        UserError: If the processes cannot return the results of the verb to this one.
    """
    _check_launcher(trainer, verb)
    watch = Watch(trainer, clean_up)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.finish()
        if (cause := cause_of_child(error)) is not None:
            raise ProcessFailure(cause.code, cause, trainer.world_size) from error
        if trainer.world_size == 1 or not connected():
            raise
        failure = _failure(trainer, error, watch, clean_up)
        if failure is None:
            raise
        raise failure from error
    finally:
        watch.finish()


def let_first_process_report() -> bool:
    """Wait until the launcher ends this process, if it is not the first; see ``FIRST_WORD``.

    Processes that have not found each other yet all report the same mistake in a command line.

    Returns:
        Whether the launcher has ended this process because of another one.
    """
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    if not rank.isdecimal() or int(rank) == 0:
        return False
    try:
        time.sleep(FIRST_WORD)
    except Interrupted:
        return True
    return False


def _check_launcher(trainer: Trainer, verb: str) -> None:
    """Check that process 0 is this one, and not a child of it.

    Raises:
        UserError: If a strategy that forks or spawns is to test or predict.
    """
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    if verb != "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            f"{verb} cannot collect its results from processes that Python forks or spawns, as "
            f"with trainer.strategy ddp_fork or ddp_spawn: set trainer.strategy to ddp"
        )


def _failure(
    trainer: Trainer, error: BaseException, watch: Watch, clean_up: Callable[[], None]
) -> ProcessFailure | None:
    """Return how this process ends; None if its error is to be raised as it is."""
    _ignore_launcher()
    rank, world = trainer.global_rank, trainer.world_size
    cause = cause_of(rank, error)
    _tell_torchrun(error, cause)
    if rank > 0:
        return ProcessFailure(*_leave(rank, cause), world)
    board = Board()
    first = cause
    # The store is that of this process or of torchrun's agent, which may have ended.
    with contextlib.suppress(RuntimeError):
        first = _first_cause(board, cause, watch)
        if cause is not None:
            _disconnect()
        if first is not None:
            _wait(lambda: board.num_left >= world - 1 or _all_ended(watch))
    watch.end_others()
    clean_up()
    if first is None and "timed out" not in str(error).lower():
        sentence = "another process has ended without a message, as after SIGKILL or out of memory"
        first = Cause(rank, 1, f"{sentence}: process {rank} lost it ({reason(error)})")
    return None if first is None else ProcessFailure(first.code, first, world)


def _first_cause(board: Board, cause: Cause | None, watch: Watch) -> Cause | None:
    """Return the cause that process 0 reports."""
    first = board.claim(cause)
    if cause is not None and cause.interrupted and first is not None and first.interrupted:
        return cause  # it knows best how to continue
    if first is None:
        causes: list[Cause | None] = []

        def is_there() -> bool:
            causes[:] = [board.claim(None) or watch.killed()]
            return causes[0] is not None

        _wait(is_there, PATIENCE / 4)
        first = causes[0]
    return first


def _leave(rank: int, cause: Cause | None) -> tuple[int, Cause | None]:
    """Leave the cause to process 0; return the exit code, and the cause if it cannot report it."""
    try:
        board = Board()
        first = board.claim(cause)
        board.leave()
    except RuntimeError:  # the store has ended with process 0
        if cause is None:
            sentence = "process 0 has ended without a message, as after SIGKILL"
            cause = Cause(rank, 1, f"{sentence}: process {rank} cannot continue without it")
        return cause.code, cause
    first = cause or first
    return (1 if first is None else first.code), None


def _disconnect() -> None:
    """Close the connections, so that processes that wait for this one notice."""
    import torch.distributed as dist

    if dist.get_backend() == "gloo":  # others would wait here for work in progress
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _wait(until: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.05)


def _all_ended(watch: Watch) -> bool:
    return bool(watch.processes) and all(p.poll() is not None for p in watch.processes)


def _ignore_launcher() -> None:
    """Ignore signals while the failure is handled: launchers end all processes after the first."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _tell_torchrun(error: BaseException, cause: Cause | None) -> None:
    """Add the cause to the summary that torchrun prints of the first process that failed."""
    if cause is None or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    with contextlib.suppress(OSError):
        get_error_handler().record_exception(error)
