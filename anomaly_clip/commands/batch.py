"""Shared code of ``each``, ``compare`` and ``sweep``, which run several experiments in turn."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from anomaly_clip.commands.experiment import UNREADABLE, ExperimentCLI, run_experiment
from anomaly_clip.commands.interruption import PARENT, advise
from anomaly_clip.commands.launch import launch_of
from anomaly_clip.errors import UserError, reason
from anomaly_clip.files import printable
from anomaly_clip.progress import muted, say
from anomaly_clip.records import HasLoaderNeeds, LoaderNeeds
from anomaly_clip.results.folder import METRICS_FILE, PREDICT_FILE, find_run

__all__ = [
    "DryRunCLI",
    "check_directory",
    "check_new_folder",
    "first_difference",
    "forbid_distributed_launch",
    "pop_flag",
    "pop_resume",
    "run_in_turn",
    "run_verb",
    "working_in",
]

ERROR_PREFIX = "anomaly_clip: "
"""Prefix of the error line a failed command prints."""
PATIENCE = 60.0
"""Seconds that the processes of an interrupted run have to save their last step."""
TRACEBACK = "Traceback (most recent call last)"
"""First line that Python prints of an exception that nobody handles."""


class DryRunCLI(ExperimentCLI):
    """Command line that parses and builds an experiment without running it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def needs(self) -> LoaderNeeds:
        """Requirements of the method."""
        return self.model.loader_needs if isinstance(self.model, HasLoaderNeeds) else LoaderNeeds()

    def compare_with(self, checkpoint: Path) -> None:
        """Check that a checkpoint comes from a fit of this experiment.

        Raises:
            UserError: If its method or the settings of its method differ.
        """
        self.config[self.config.subcommand]["ckpt_path"] = str(checkpoint)
        self._parse_ckpt_path()


def pop_resume(words: Sequence[str], record: str) -> tuple[list[str], Path | None]:
    """Return the arguments without the verb and ``--resume RUN``, and the folder RUN if given.

    Args:
        words: Arguments after ``anomaly_clip``, the verb first.
        record: Name of a file that every run folder of the verb contains.

    Raises:
        UserError: If RUN is not a run folder of the verb.
    """
    verb, *rest = words
    for at, word in enumerate(rest):
        if word == "--resume" or word.startswith("--resume="):
            value = word.partition("=")[2] or (rest[at + 1] if at + 1 < len(rest) else "")
            del rest[at : at + (1 if "=" in word else 2)]
            folder = find_run(Path(value).expanduser())
            if not value or not (folder / record).is_file():
                raise UserError(
                    f"--resume {value}: expected a run folder of {verb}, which contains {record}"
                )
            return rest, folder
    return rest, None


def pop_flag(words: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """Return the arguments without a flag, and whether it was among them."""
    return [word for word in words if word != flag], flag in words


@contextlib.contextmanager
def working_in(directory: str | None, folder: Path) -> Iterator[Path]:
    """Work in the directory in which a run was started: its options may name files relative to it.

    Args:
        directory: That directory; None if it is unknown, as in runs of 0.1.0.
        folder: The run's folder.

    Yields:
        The run's folder, absolute if the directory is not the current one.

    Raises:
        UserError: If the directory does not exist any more.
    """
    before = Path.cwd()
    if directory is None or Path(directory) == before:
        yield folder
        return
    if not Path(directory).is_dir():
        raise UserError(
            f"--resume {folder}: the run was started in {directory}, which does not exist any "
            f"more, and its options may name files relative to it: restore that folder, or start "
            f"a new run"
        )
    folder = Path(os.path.abspath(folder))  # without ".."
    os.chdir(directory)
    try:
        yield folder
    finally:
        os.chdir(before)


def check_new_folder(verb: str, folder: Path, parts: Iterable[str]) -> None:
    """Check that a folder that the user has chosen for a new run holds no other results.

    Args:
        verb: The verb.
        folder: The folder, which need not exist.
        parts: Names of the folders and files that the run writes in it.

    Raises:
        UserError: If one of them, results of a test, or checkpoints of a single fit exist.
    """
    for name in (*parts, METRICS_FILE, PREDICT_FILE, "checkpoints"):
        if (folder / name).exists():
            raise UserError(
                f"--output.folder {folder} has {name}, which is not of this {verb}: choose another "
                f"folder"
            )


def check_directory(folder: Path, directory: str | None) -> None:
    """Check that an unfinished run in a chosen folder was started in the current directory.

    Args:
        folder: The run's folder.
        directory: Working directory of its start; None if it is unknown.

    Raises:
        UserError: If it was not: relative file names would refer to other files.
    """
    if directory is not None and Path(directory) != Path.cwd():
        raise UserError(
            f"--output.folder {folder} has a run that was started in {directory}: continue it with "
            f"--resume {folder}, or choose another folder"
        )


def first_difference(before: object, now: object, place: str = "") -> str | None:
    """Return the first key whose values differ in two configurations; None if there is none.

    Keys that only one of them has are ignored: they belong to another version.

    Example:
        >>> from anomaly_clip.commands.batch import first_difference
        >>> first_difference({"model": {"lr": 1, "k": 2}}, {"model": {"lr": 3}})
        'model.lr'
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in (key for key in before if key in now):
            difference = first_difference(before[key], now[key], f"{place}.{key}".lstrip("."))
            if difference is not None:
                return difference
        return None
    return None if before == now else place


def forbid_distributed_launch(verb: str) -> None:
    """Check that no launcher has started several copies of this command.

    Raises:
        UserError: If there are several copies, because each would run all experiments.
    """
    launch = launch_of(os.environ)
    if launch is not None:
        raise UserError(
            f"anomaly_clip {verb} starts the processes of every run itself, but {launch.launcher} "
            f"has started {launch.size} copies of the command ({launch.variable}): start the "
            f"command once, without {launch.launcher}, and set --trainer.devices"
        )


def run_in_turn(
    jobs: Mapping[str, Callable[[], None]],
    resume: str,
    last: type[Exception] | tuple[type[Exception], ...] = (),
    among: Sequence[str] | None = None,
    quiet: bool = False,
) -> dict[str, str]:
    """Run all jobs, even if some fail; return the reasons of failures by job name.

    Args:
        jobs: Functions by job name.
        resume: Command that resumes the run after an interruption.
        last: Exceptions after which the remaining jobs are skipped.
        among: Names of all jobs, if this process runs only some of them.
        quiet: Whether to print only names and failures.

    Raises:
        Interrupted: After a signal; the message contains ``resume``.
    """
    failed: dict[str, str] = {}
    names = list(jobs if among is None else among)
    for name, job in jobs.items():
        say(f"[{names.index(name) + 1}/{len(names)}] {printable(name)}")
        try:
            with (
                advise(lambda: f"resume with {resume}"),
                muted() if quiet else contextlib.nullcontext(),
            ):
                job()
        except Exception as error:  # the other jobs may still succeed
            failed[name] = str(error) if isinstance(error, UserError) else reason(error)
            say(f"{printable(name)} failed: {failed[name]}", style="bold red")
            if isinstance(error, last):
                break
    return failed


def run_verb(words: Sequence[str], several: bool) -> int:
    """Run a verb without printing its table, in a subprocess if it needs several processes.

    Returns:
        0, or 1 if some images could not be read.
    """
    if several:  # Lightning starts the other processes with the arguments of the current one
        return _run_apart([sys.executable, "-m", "anomaly_clip", *words])
    with contextlib.redirect_stdout(io.StringIO()):
        return run_experiment(words)


def _run_apart(command: list[str]) -> int:
    """Run a command, forward its messages line by line and discard its table.

    Returns:
        0, or 1 if some images could not be read.

    Raises:
        UserError: If the command fails. The message is the last line that the command wrote.
    """
    last, crashed = "no message", False
    # A session of its own, so that all processes of the run can be ended at once.
    with subprocess.Popen(  # noqa: S603 - this program, without a shell
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **_search_path(), PARENT: str(os.getpid())},
    ) as process:
        assert process.stderr is not None
        try:
            for line in filter(str.strip, process.stderr):
                last = line.rstrip()
                crashed = crashed or last.startswith(TRACEBACK)
                if not last.startswith(ERROR_PREFIX):  # the caller prints the error line
                    say(last)
        except BaseException:
            _end_session(process)
            raise
    # Python itself exits with 1, too, after an exception that nobody handles.
    if process.returncode != 0 and (process.returncode != UNREADABLE or crashed):
        raise UserError(last.removeprefix(ERROR_PREFIX))
    return process.returncode


def _search_path() -> dict[str, str]:
    """Return the setting with which ``python -m`` does not search the working folder first.

    A ``torch.py`` there would replace the library, although it does not in this process.
    """
    is_searched = not {"", str(Path.cwd())}.isdisjoint(sys.path)
    return {} if is_searched else {"PYTHONSAFEPATH": "1"}  # Python 3.10 ignores it


def _end_session(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started: they may save first, but not for ever."""
    try:
        _signal_session(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=PATIENCE)  # read the rest, or the process could block
    finally:  # also after a second signal
        _signal_session(process, getattr(signal, "SIGKILL", signal.SIGTERM))


def _signal_session(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
