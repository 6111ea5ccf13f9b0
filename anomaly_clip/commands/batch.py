"""Shared code of ``each`` and ``sweep``, which run several experiments one after the other."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anomaly_clip.commands.experiment import UNREADABLE, ExperimentCLI, run_experiment
from anomaly_clip.commands.interruption import advise
from anomaly_clip.errors import UserError, reason
from anomaly_clip.files import printable
from anomaly_clip.progress import say

__all__ = ["DryRunCLI", "forbid_distributed_launch", "pop_resume", "run_in_turn", "run_verb"]

ERROR_PREFIX = "anomaly_clip: "
"""Prefix of the error line a failed command prints."""
TRACEBACK = "Traceback (most recent call last)"
"""First line that Python prints of an exception that nobody handles."""


class DryRunCLI(ExperimentCLI):
    """Command line that parses and builds an experiment without running it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


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
            folder = Path(value).expanduser()
            if not value or not (folder / record).is_file():
                raise UserError(
                    f"--resume {value}: expected a run folder of {verb}, which contains {record}"
                )
            return rest, folder
    return rest, None


def forbid_distributed_launch(verb: str) -> None:
    """Check that no launcher has started several copies of this command.

    Raises:
        UserError: If there are several copies, because each would run all experiments.
    """
    for variable, launcher in (("WORLD_SIZE", "torchrun"), ("SLURM_NTASKS", "srun")):
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"anomaly_clip {verb} starts the processes of every run itself, but {launcher} has "
                f"started {os.environ[variable]} copies of the command ({variable}): start the "
                f"command once, without {launcher}, and set --trainer.devices"
            )


def run_in_turn(
    jobs: Mapping[str, Callable[[], None]],
    resume: str,
    last: type[Exception] | tuple[type[Exception], ...] = (),
) -> dict[str, str]:
    """Run all jobs, even if some fail; return the reasons of failures by job name.

    Args:
        jobs: Functions by job name.
        resume: Command that resumes the run after an interruption.
        last: Exceptions after which the remaining jobs are skipped.

    Raises:
        Interrupted: After a signal; the message contains ``resume``.
    """
    failed: dict[str, str] = {}
    for number, (name, job) in enumerate(jobs.items(), start=1):
        say(f"[{number}/{len(jobs)}] {printable(name)}")
        try:
            with advise(lambda: f"resume with {resume}"):
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
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in filter(str.strip, process.stderr):
                last = line.rstrip()
                crashed = crashed or last.startswith(TRACEBACK)
                if not last.startswith(ERROR_PREFIX):  # the caller prints the error line
                    say(last)
        except BaseException:
            process.kill()
            raise
    # Python itself exits with 1, too, after an exception that nobody handles.
    if process.returncode != 0 and (process.returncode != UNREADABLE or crashed):
        raise UserError(last.removeprefix(ERROR_PREFIX))
    return process.returncode
