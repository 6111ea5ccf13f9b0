"""Shared parts of the verbs that run several experiments in turn: ``each`` and ``sweep``."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anomaly_clip.commands.experiment import ExperimentCLI, run_experiment
from anomaly_clip.errors import UserError, reason
from anomaly_clip.progress import say

__all__ = ["DryRunCLI", "forbid_distributed_launch", "pop_resume", "run_in_turn", "run_verb"]

ERROR_PREFIX = "anomaly_clip: "
"""Beginning of the last line of a command that fails."""


class DryRunCLI(ExperimentCLI):
    """An experiment that is parsed and built, but not started."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def pop_resume(words: Sequence[str], record: str) -> tuple[list[str], Path | None]:
    """Take the verb and ``--resume RUN`` off the words; return the rest and the folder.

    Args:
        words: Words after ``anomaly_clip``.
        record: A file in the folder of every run of the verb.

    Raises:
        UserError: If there is no such run.
    """
    verb, *rest = words
    for at, word in enumerate(rest):
        if word == "--resume" or word.startswith("--resume="):
            value = word.partition("=")[2] or (rest[at + 1] if at + 1 < len(rest) else "")
            del rest[at : at + (1 if "=" in word else 2)]
            folder = Path(value).expanduser()
            if not value or not (folder / record).is_file():
                raise UserError(f"--resume {value}: expected the folder of a run of {verb}")
            return rest, folder
    return rest, None


def forbid_distributed_launch(verb: str) -> None:
    """Check that no launcher has started several of this command.

    Raises:
        UserError: If one has: each of them would run all.
    """
    for variable, launcher in (("WORLD_SIZE", "torchrun"), ("SLURM_NTASKS", "srun")):
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"{verb} starts the processes of a run itself, and {launcher} has started "
                f"several of it ({variable}): start it once, with --trainer.devices"
            )


def run_in_turn(
    jobs: Mapping[str, Callable[[], None]],
    resume: str,
    last: type[Exception] | tuple[type[Exception], ...] = (),
) -> dict[str, str]:
    """Run all jobs, also after one that fails; return the reason of each failure.

    Args:
        jobs: Functions by the name of their job.
        resume: The command that goes on after an interruption.
        last: Failures after which no other job is run.
    """
    failed: dict[str, str] = {}
    for number, (name, job) in enumerate(jobs.items(), start=1):
        say(f"[{number}/{len(jobs)}] {name}")
        try:
            job()
        except (KeyboardInterrupt, SystemExit):  # Lightning exits after Ctrl-C
            say(f"go on with: {resume}")
            raise
        except Exception as error:  # of one: the others can be well
            failed[name] = str(error) if isinstance(error, UserError) else reason(error)
            say(f"{name} failed: {failed[name]}", style="bold red")
            if isinstance(error, last):
                break
    return failed


def run_verb(words: Sequence[str], several: bool) -> None:
    """Run a verb here, its table kept back; with several processes, in processes of its own."""
    if several:  # Lightning starts the others with this process's words
        _run_apart([sys.executable, "-m", "anomaly_clip", *words])
        return
    with contextlib.redirect_stdout(io.StringIO()):
        run_experiment(words)


def _run_apart(command: list[str]) -> None:
    """Run a command and pass its messages on, line by line; its table is kept back.

    Raises:
        UserError: If it fails, with its last message.
    """
    last = "no message"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in filter(str.strip, process.stderr):
                last = line.rstrip()
                if not last.startswith(ERROR_PREFIX):  # the caller of this function prints it
                    say(last)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise UserError(last.removeprefix(ERROR_PREFIX))
