"""The command line in processes of its own, forked from that of the tests.

A new Python would import torch and Lightning anew, six seconds of a processor each. Several
processes find each other as those that a cluster's launcher starts (variables MASTER_ADDR,
MASTER_PORT and LOCAL_RANK); Lightning's own launcher is tested in test_each.py.
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

FAILED = 70
"""Exit code of an error that is not the user's."""


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    """That of the first process; another one if that succeeded and another process did not."""
    stderr: str
    """Of all processes."""


def run_command(
    words: Sequence[str],
    processes: int = 1,
    variables: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> Done:
    """Run ``anomaly_clip`` with words, in several processes that work together.

    Args:
        words: Verb and options; with several processes ``--trainer.devices`` among them.
        processes: How many.
        variables: Of the environment, beside those of the tests.
        seconds: How long it may take.
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
            own = {**shared, "LOCAL_RANK": str(rank)} if processes > 1 else shared
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
            if child == 0:
                _run_and_exit(words, own, rank, Path(folder) / str(rank))
            children.append(child)
        codes = _wait(children, time.monotonic() + seconds)
        texts = [(Path(folder) / str(rank)).read_text() for rank in range(processes)]
    return Done(next((code for code in codes if code != 0), 0), "".join(texts))


def _run_and_exit(
    words: Sequence[str], variables: Mapping[str, str], rank: int, file: Path
) -> NoReturn:
    """Be a process of its own: nothing of the tests is seen any more."""
    code = FAILED
    try:
        with file.open("w", buffering=1) as stream, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = nowhere, stream
            os.environ.update(variables)
            warnings.resetwarnings()  # those of the tests are errors
            torch.set_num_threads(1)  # threads do not survive a fork
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
            try:
                code = main(words)
            except BaseException:
                traceback.print_exc(file=stream)
    finally:
        os._exit(code)


def _wait(children: Sequence[int], end: float) -> list[int]:
    """Return the exit codes of processes; those that take too long are ended."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > end or any(code != 0 for code in codes.values()):
            # The others of a process that failed would wait for it.
            _end([child for child in children if child not in codes], codes)
        time.sleep(0.02)
    return [codes[child] for child in children]


def _end(children: Sequence[int], codes: dict[int, int]) -> None:
    time.sleep(2)  # they may fail for the same reason, with a message of their own
    for child in children:
        found, status = os.waitpid(child, os.WNOHANG)
        if not found:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        codes[child] = os.waitstatus_to_exitcode(status)
