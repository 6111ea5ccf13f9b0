"""Shared code of the verbs that run several experiments one after the other: each and sweep."""

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
"""Prefix of the error line a failed command prints."""


class DryRunCLI(ExperimentCLI):
    """Parses and builds an experiment without running it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def pop_resume(words: Sequence[str], record: str) -> tuple[list[str], Path | None]:
    """Split the arguments into the verb's own and the folder given by ``--resume RUN``.

    Args:
        words: Arguments after ``anomaly_clip``, the verb first.
        record: Name of a file that every run folder of the verb contains.

    Raises:
        UserError: If the folder is not a run of the verb.
    """
    verb, *rest = words
    for at, word in enumerate(rest):
        if word == "--resume" or word.startswith("--resume="):
            value = word.partition("=")[2] or (rest[at + 1] if at + 1 < len(rest) else "")
            del rest[at : at + (1 if "=" in word else 2)]
            folder = Path(value).expanduser()
            if not value or not (folder / record).is_file():
                raise UserError(
                    f"--resume {value}: not the folder of a run of {verb}, which contains {record}"
                )
            return rest, folder
    return rest, None


def forbid_distributed_launch(verb: str) -> None:
    """Check that no launcher has started several copies of this command.

    Raises:
        UserError: If one has, because every copy would run all experiments.
    """
    for variable, launcher in (("WORLD_SIZE", "torchrun"), ("SLURM_NTASKS", "srun")):
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"{verb} starts the processes of each run itself, but {launcher} has started "
                f"{os.environ[variable]} copies of it ({variable}): start it once, without "
                f"{launcher}, and set --trainer.devices"
            )


def run_in_turn(
    jobs: Mapping[str, Callable[[], None]],
    resume: str,
    last: type[Exception] | tuple[type[Exception], ...] = (),
) -> dict[str, str]:
    """Run all jobs, even if some fail; return the reason of each failure by job name.

    Args:
        jobs: Functions by job name.
        resume: Command that resumes the run after an interruption.
        last: Exceptions that stop the remaining jobs as well.
    """
    failed: dict[str, str] = {}
    for number, (name, job) in enumerate(jobs.items(), start=1):
        say(f"[{number}/{len(jobs)}] {name}")
        try:
            job()
        except (KeyboardInterrupt, SystemExit):  # Lightning exits after Ctrl-C
            say(f"resume with: {resume}")
            raise
        except Exception as error:  # the other jobs may still succeed
            failed[name] = str(error) if isinstance(error, UserError) else reason(error)
            say(f"{name} failed: {failed[name]}", style="bold red")
            if isinstance(error, last):
                break
    return failed


def run_verb(words: Sequence[str], several: bool) -> None:
    """Run a verb without printing its table, in a subprocess if it needs several processes."""
    if several:  # Lightning starts the others with the arguments of the current process
        _run_apart([sys.executable, "-m", "anomaly_clip", *words])
        return
    with contextlib.redirect_stdout(io.StringIO()):
        run_experiment(words)


def _run_apart(command: list[str]) -> None:
    """Run a command, forward its messages line by line and discard its table.

    Raises:
        UserError: If it fails, with the last message of the command.
    """
    last = "no message"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in filter(str.strip, process.stderr):
                last = line.rstrip()
                if not last.startswith(ERROR_PREFIX):  # the caller prints the error line
                    say(last)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise UserError(last.removeprefix(ERROR_PREFIX))
