"""End of a run in several processes, one of which fails: its cause, said once and last.

The process that fails first leaves its cause in the store by which the processes have found each
other. The others lose their connection to it. Process 0 waits until they have ended and reports the
cause; the others print nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from anomaly_clip.commands.interruption import Interrupted
from anomaly_clip.errors import UserError, reason
from anomaly_clip.files import printable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["ProcessFailure", "let_first_process_report", "report_once"]

PATIENCE = 10.0
"""Seconds that process 0 waits for the others to end, and they for process 0."""
FIRST_WORD = 3.0
"""Seconds by which the other processes let process 0 report a mistake that all have found."""
FIRST, LEFT = "first", "left"


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
                print(f"anomaly_clip: {place} failed:\n{cause.trace.rstrip()}", file=sys.stderr)
            if cause.sentence:
                print(f"anomaly_clip: {printable(cause.sentence)}", file=sys.stderr)
            sys.stderr.flush()
        return self.code


@contextmanager
def report_once(trainer: Trainer, clean_up: Callable[[], None]) -> Iterator[None]:
    """Turn the failure of a process into one report, if there are several processes.

    Args:
        trainer: The trainer, before its run.
        clean_up: Removes what a failed run leaves; called by process 0 when the others have ended.

    Raises:
        ProcessFailure: If this or another process fails.
    """
    watch = _Watch(trainer, clean_up)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.finish()
        if trainer.world_size == 1 or not _connected():
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


RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Variables with the rank of a process, in which launchers pass it."""


# -- the processes of a run ------------------------------------------------------------------------


def _connected() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Board:
    """Messages between the processes, in the store that process 0 or the launcher keeps.

    Unlike a collective, it does not wait for a process that has ended.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
        self.store: Any = dist.PrefixStore("anomaly_clip", store)  # type: ignore[attr-defined]

    def claim(self, cause: Cause | None) -> Cause | None:
        """Leave a cause unless there is one already; return the one that is there.

        Raises:
            RuntimeError: If the store cannot be reached, because its process has ended.
        """
        if cause is not None:
            self.store.compare_set(FIRST, "", json.dumps(asdict(cause)))
        if not self.store.check([FIRST]):
            return None
        return Cause(**json.loads(self.store.get(FIRST)))

    def leave(self) -> None:
        self.store.add(LEFT, 1)

    @property
    def num_left(self) -> int:
        return int(self.store.add(LEFT, 0))


class _Watch(threading.Thread):
    """Watch the processes that Lightning has started, in place of Lightning's own observer.

    That one kills process 0 within five seconds after another process has failed: with a gap in
    which nothing is cleaned up, and no cause is reported.
    """

    def __init__(self, trainer: Trainer, clean_up: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="process-watch")
        self.trainer = trainer
        self.clean_up = clean_up
        self.processes: list[subprocess.Popen[bytes]] = []
        self._done = threading.Event()

    def start(self) -> None:
        """Start the thread if Lightning starts the other processes."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

        launcher = self.trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return
        if isinstance(launcher.cluster_environment, LightningEnvironment) and (
            not launcher.cluster_environment.creates_processes_externally
        ):
            self._launcher = launcher
            super().start()

    def finish(self) -> None:
        """Stop watching: the run is done, or its failure has been noticed."""
        self._done.set()

    def run(self) -> None:
        """Wait until a process fails, then for process 0 to notice; end it if it does not."""
        while len(self._launcher.procs) < self._launcher.num_processes - 1:
            if self._done.wait(0.1):
                return
        self.processes = list(self._launcher.procs)
        if self._done.wait(1):  # Lightning's observer begins in this time, with the list of before
            return
        theirs, self._launcher.procs = self._launcher.procs, list(self.processes)
        theirs.clear()  # it stops when it has nothing to observe
        while not self._done.wait(0.2):
            failed = [(n, p) for n, p in enumerate(self.processes, 1) if p.poll()]
            if failed and not self._done.wait(PATIENCE):
                self._end_stuck(*failed[0])

    def _end_stuck(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """End process 0, which waits for one that has failed, and will not notice."""
        causes: list[Cause] = []

        def read() -> None:
            if _connected() and (cause := _Board().claim(None)) is not None:
                causes.append(cause)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(2)  # the store may be in use by the process that is stuck
        self.end_others()
        self.clean_up()
        code = process.returncode
        cause = causes[0] if causes else _killed(rank, code) if code < 0 else None
        code = 128 - code if code < 0 else code
        os._exit(ProcessFailure(code, cause, len(self.processes) + 1).report())

    def end_others(self) -> None:
        """Kill the processes that have not ended by themselves."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def killed(self) -> Cause | None:
        """Return the cause of the first process that a signal has ended, if any."""
        codes = [(rank, process.poll()) for rank, process in enumerate(self.processes, 1)]
        return next((_killed(rank, code) for rank, code in codes if code and code < 0), None)


def _killed(rank: int, code: int) -> Cause:
    name = signal.Signals(-code).name
    why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return Cause(
        rank,
        128 - code,
        f"process {rank} was ended by {name}{why}: if nobody ended it, use fewer processes "
        f"(trainer.devices), fewer data.num_workers or a smaller data.batch_size",
    )


# -- the failure -----------------------------------------------------------------------------------


def _failure(
    trainer: Trainer, error: BaseException, watch: _Watch, clean_up: Callable[[], None]
) -> ProcessFailure | None:
    """Return how this process ends; None if its error is to be raised as it is."""
    _ignore_launcher()
    rank, world = trainer.global_rank, trainer.world_size
    cause = _cause(rank, error)
    _tell_torchrun(error, cause)
    if rank > 0:
        return ProcessFailure(*_leave(rank, cause), world)
    board = _Board()
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


def _cause(rank: int, error: BaseException) -> Cause | None:
    """Describe an error of this process; None if it has only lost another process."""
    if isinstance(error, Interrupted):
        return Cause(rank, 128 + error.number, str(error), interrupted=True)
    if _is_lost_connection(error):
        return None
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        return Cause(rank, 2, str(error), trace)
    return Cause(rank, 1, "", trace)


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says no more than that another process cannot be reached."""
    import torch.distributed as dist

    lost = isinstance(error, dist.DistError)
    lost = lost or (isinstance(error, RuntimeError) and "gloo" in str(error))
    cause = error.__cause__
    return lost or (
        isinstance(error, UserError) and cause is not None and _is_lost_connection(cause)
    )


def _first_cause(board: _Board, cause: Cause | None, watch: _Watch) -> Cause | None:
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
        board = _Board()
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


def _all_ended(watch: _Watch) -> bool:
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
