"""Processes of one run of ``each``: the first prepares and joins, all fit and test a share.

They exchange files, so that none waits for ever for one that has ended:

    ROOT/.each-<job>.json      of process 0: the run, as soon as it is prepared
    RUN/.processes/<n>.json    of process n: that it runs, and in the end which categories failed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from anomaly_clip.commands.experiment import RUNS, option_value
from anomaly_clip.commands.heartbeat import SILENCE, Heartbeat, Pulse, State
from anomaly_clip.commands.launch import Launch
from anomaly_clip.errors import UserError
from anomaly_clip.files import printable
from anomaly_clip.progress import say

__all__ = ["Plan", "announced", "announcement", "only_run", "process_file", "wait_for_others"]

PROCESSES = ".processes"
FIRST_SIGN = 300.0
"""Seconds within which process 0 must have begun."""
LOOK = 0.2
"""Seconds between two looks at a file."""
A_DAY = 86400.0


@dataclass(frozen=True)
class Plan:
    """A run of ``each``, as process 0 has prepared it.

    Args:
        folder: The run's folder.
        directory: Directory to which the folder and names in the configuration are relative.
        categories: All categories.
        several: Whether the fit and the test of a category need several processes.
        is_fitted: False for a zero-shot method.
        is_tested: False if there is nothing to test on.
        root: Folder of the data set.
    """

    folder: str
    directory: str
    categories: list[str]
    several: bool
    is_fitted: bool
    is_tested: bool
    root: str


def process_file(folder: Path, rank: int) -> Path:
    """Return the file of a process in the folder of a run."""
    return folder / PROCESSES / f"{rank}.json"


def announcement_file(words: Sequence[str], launch: Launch) -> Path:
    """Return the file of process 0 that the others look for: it follows from their arguments."""
    chosen = option_value(words, "--resume") or option_value(words, "--output.folder")
    root = option_value(words, "--output.root") or RUNS
    place = Path(chosen).expanduser().parent if chosen else Path(root).expanduser()
    job = hashlib.sha256(launch.job.encode()).hexdigest()[:16]
    return place / f".each-{job}.json"


@contextmanager
def announcement(words: Sequence[str], launch: Launch | None) -> Iterator[Callable[[Plan], None]]:
    """Yield the function by which process 0 announces the run; it does nothing without others.

    Args:
        words: Arguments of the command, which all processes have.
        launch: Place of process 0; None if it is alone.

    Raises:
        UserError: If the announcement cannot be written.
    """
    if launch is None:
        yield lambda plan: None
        return
    file = Path(os.path.abspath(announcement_file(words, launch)))
    missing = [folder for folder in file.parents if not os.path.lexists(folder)]
    for old in [file, *file.parent.glob(".each-*.json")]:
        with contextlib.suppress(OSError):
            if old == file or time.time() - old.stat().st_mtime > A_DAY:
                old.unlink()
    is_announced = False

    def announce(plan: Plan) -> None:
        nonlocal is_announced
        heartbeat.tell(plan=json.dumps(asdict(plan)))  # names need not be UTF-8
        is_announced = True

    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            heartbeat = stack.enter_context(Heartbeat(file))
        except OSError as error:
            raise UserError(
                f"{file}: cannot be created ({error.strerror}), by which the processes find each "
                f"other: choose another --output.folder or --output.root"
            ) from None
        try:
            yield announce
        except BaseException:
            # torchrun ends the others; tasks of srun need to know.
            if not is_announced and launch.is_unique:
                heartbeat.end()
            raise


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def announced(words: Sequence[str], launch: Launch) -> Plan | None:
    """Wait until process 0 has prepared the run; return its announcement, None if it has failed.

    Raises:
        UserError: If process 0 has not begun, or has ended without a message.
    """
    file = announcement_file(words, launch)
    pulse, started, has_begun = Pulse(file), time.monotonic(), False
    while True:
        state = pulse.look()
        if state == State.ALIVE and "plan" in pulse.content:
            return Plan(**json.loads(pulse.content["plan"]))
        if state == State.ENDED or (has_begun and state == State.ABSENT):
            return None
        if has_begun and state == State.GONE:
            raise UserError(
                f"process 0 of {launch.size} has ended without a message, as after SIGKILL or out "
                f"of memory, before it had prepared the run: run the same command again"
            )
        if not has_begun and time.monotonic() - started > FIRST_SIGN:
            raise UserError(
                f"process 0 of {launch.size} has not begun, or has ended, as {file} is missing: "
                f"start all processes at the same time, in a folder that all of them see"
            )
        has_begun = has_begun or state == State.ALIVE
        time.sleep(LOOK)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Ensure that no other command runs the categories of a folder at the same time.

    Args:
        folder: The run's folder.

    Raises:
        UserError: If one does.
    """
    for file in sorted((folder / PROCESSES).glob("*.json")):
        _check_ended(folder, file)
        file.unlink(missing_ok=True)
    file = process_file(folder, 0)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_ended, folder)
        try:
            stack.enter_context(Heartbeat(file))
        except FileExistsError:  # another command has begun at the same moment
            raise _is_running(folder, "another command") from None
        yield


def _check_ended(folder: Path, file: Path) -> None:
    """Check that the process of a file has ended, which may take ``SILENCE``.

    Raises:
        UserError: If it runs.
    """
    pulse = Pulse(file)
    state = pulse.look()
    if state == State.UNCERTAIN:
        say(f"{folder}: finding out for up to {SILENCE:.0f} s if {pulse.owner} has ended")
    while state == State.UNCERTAIN:
        time.sleep(LOOK)
        state = pulse.look()
    if state == State.ALIVE:
        raise _is_running(folder, pulse.owner)


def _is_running(folder: Path, owner: str) -> UserError:
    return UserError(
        f"{folder}: {owner} runs the categories of this folder now: wait until it ends, or choose "
        f"another --output.folder"
    )


def _remove_ended(folder: Path) -> None:
    """Remove the files of processes that have ended, and their folder if none is left."""
    for file in (folder / PROCESSES).glob("*.json"):
        if Pulse(file).look() in (State.ENDED, State.GONE):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / PROCESSES).rmdir()


def wait_for_others(
    folder: Path, launch: Launch, categories: Sequence[str], is_finished: Callable[[str], bool]
) -> dict[str, str]:
    """Wait until the other processes have ended; return why categories of theirs are unfinished.

    Args:
        folder: The run's folder.
        launch: Place of this process, which is the first.
        categories: All categories.
        is_finished: Returns whether a category is fitted and tested.
    """
    pulses = {rank: Pulse(process_file(folder, rank)) for rank in range(1, launch.size)}
    started, has_told = time.monotonic(), False
    failed: dict[str, str] = {}
    while pulses:
        for rank, pulse in list(pulses.items()):
            state = pulse.look()
            is_late = time.monotonic() - started > SILENCE
            if state in (State.ALIVE, State.UNCERTAIN) or (state == State.ABSENT and not is_late):
                continue
            reasons = json.loads(pulse.content.get("failed", "{}"))
            for name in launch.share(categories, rank):
                if not is_finished(name):
                    failed[name] = reasons.get(name, _reason(state, rank, launch))
            del pulses[rank]
        if not pulses:
            break
        if not has_told:
            names = [n for rank in pulses for n in launch.share(categories, rank)]
            unfinished = [printable(name) for name in names if not is_finished(name)]
            say(f"waiting for the other processes: {', '.join(unfinished)}")
            has_told = True
        time.sleep(LOOK)
    return failed


def _reason(state: State, rank: int, launch: Launch) -> str:
    """Return why a process has left a category unfinished without an error."""
    process = f"process {rank} of {launch.size}"
    if state == State.GONE:
        return f"{process} has ended without a message, as after SIGKILL or out of memory"
    if state == State.ABSENT:
        return f"{process} has not begun"
    return f"{process} was interrupted"
