"""Calls from Python: their effects on the process, and the errors that they raise."""

from __future__ import annotations

import logging
import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import rich
import torch

import anomaly_clip.progress as progress
from anomaly_clip.errors import UserError, user_errors

__all__ = ["in_python", "unchanged_process"]

LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
_one_at_a_time = threading.RLock()
"""Held by calls that change the process for a while: two of them would undo each other's changes,
and torch.fx, which traces backbones, works in one thread only."""


@contextmanager
def unchanged_process(silent: bool = True) -> Iterator[None]:
    """Run code that seeds, logs and warns, and leave random numbers and logging as they were.

    Other threads wait until it has ended.

    Args:
        silent: Whether to show no progress of long steps.
    """
    with _one_at_a_time:
        is_silent, variables = progress._silent, {n: os.environ.get(n) for n in SEED_VARIABLES}
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        console = dict(vars(rich.get_console()))
        states = random.getstate(), np.random.get_state()
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            _ignore_noise()
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            progress.silence(silent)
            try:
                yield
            finally:
                progress.silence(is_silent)
                vars(rich.get_console()).update(console)
                for name, level in levels.items():
                    logging.getLogger(name).setLevel(level)
                random.setstate(states[0])
                np.random.set_state(states[1])
                for name, value in variables.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


def _ignore_noise() -> None:
    """Ignore warnings of libraries about how this package uses them."""
    for module in ("lightning", "jsonargparse"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")


@contextmanager
def in_python() -> Iterator[None]:
    """Raise the mistakes of a user as ``ValueError``, in the words of Python.

    Raises:
        ValueError: In place of a ``UserError``, or of another error that a user can correct.
    """
    try:
        with user_errors():
            yield
    except UserError as error:
        message = str(error).removeprefix("--ckpt_path ").removeprefix("--config ")
        if "--" in message:
            message += " (from Python: as keyword arguments, such as data={'root': 'photos'})"
        raise ValueError(message) from error.__cause__
