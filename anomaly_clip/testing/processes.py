"""Run the command line in processes that are forked from the current one.

A new Python process would spend seconds on importing torch and Lightning. Several processes
cooperate like those that a cluster's launcher starts (MASTER_ADDR, MASTER_PORT and LOCAL_RANK).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from anomaly_clip.cli import main

__all__ = ["Done", "can_fork", "run_command"]

FAILED = 70
"""Exit code of a process in which the command raised an exception."""
OTHERS = 15.0
"""Seconds within which the other processes must end after one has failed."""


class Done(NamedTuple):
    """Result of a finished command."""

    returncode: int
    """Exit code of the first process that failed; 0 if all succeeded."""
    stderr: str
    """Standard error of all processes."""


# After torch.export, the first backward pass of a process starts threads, which forked processes
# lack. A backward pass before starts none, once and for all.
torch.zeros(1, requires_grad=True).sum().backward()


def can_fork() -> bool:
    """Return whether this system can fork processes."""
    return hasattr(os, "fork")


def run_command(
    words: Sequence[str],
    processes: int = 1,
    variables: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> Done:
    """Run ``anomaly_clip`` in one or several cooperating processes.

    Args:
        words: Verb and options; with several processes they must include ``--trainer.devices``.
        processes: Number of processes.
        variables: Environment variables to set in addition to the current ones.
        seconds: Time limit, after which the processes are killed.
    """
    shared = dict(variables or {})
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    with TemporaryDirectory() as folder:
        children = []
        for rank in range(processes):
            environment = {**shared, "LOCAL_RANK": str(rank)} if processes > 1 else shared
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
            if child == 0:
                _run_and_exit(words, environment, rank, Path(folder) / str(rank))
            children.append(child)
        codes = _wait(children, time.monotonic() + seconds)
        texts = [(Path(folder) / str(rank)).read_text() for rank in range(processes)]
    return Done(next((code for code in codes if code != 0), 0), "".join(texts))


def _run_and_exit(
    words: Sequence[str], variables: Mapping[str, str], rank: int, file: Path
) -> NoReturn:
    """Run the command in this forked process, isolated from its parent, and exit."""
    code = FAILED
    try:
        with file.open("w", buffering=1) as stream, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = nowhere, stream
            os.environ.update(variables)
            warnings.resetwarnings()  # the parent may turn warnings into errors
            torch.set_num_threads(1)  # threads do not survive a fork
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
            try:
                code = main(words)
            except BaseException:
                traceback.print_exc(file=stream)
    finally:
        os._exit(code)


def _wait(children: Sequence[int], end: float) -> list[int]:
    """Return the exit codes of processes; kill those that exceed the time limit."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
        if any(code != 0 for code in codes.values()):
            # The others report the failure, or would wait for ever for the process that failed.
            end = min(end, time.monotonic() + OTHERS)
        if time.monotonic() > end:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.02)
    return [codes[child] for child in children]
