"""Effects of calls from Python on the process, and their errors."""

from __future__ import annotations

import logging
import os
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rich
import torch
from lightning.pytorch import seed_everything

import anomaly_clip.progress as progress
from anomaly_clip.errors import UserError
from anomaly_clip.python_calls import in_python, unchanged_process


def test_random_numbers_warnings_and_logging_are_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    monkeypatch.setattr(progress, "_silent", False)
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level, list(warnings.filters), rich.get_console().stderr
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)

    def disturb() -> None:
        with unchanged_process():
            seed_everything(3, workers=True)
            logger.setLevel(logging.DEBUG)
            warnings.simplefilter("always")
            rich.reconfigure(stderr=True)
            assert progress._silent
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert (logger.level, list(warnings.filters), rich.get_console().stderr) == before
    assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert "PL_SEED_WORKERS" not in os.environ
    assert not progress._silent
    with unchanged_process(silent=False):
        assert not progress._silent


def test_threads_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once would restore the logging and the random numbers of each other."""
    monkeypatch.setattr(progress, "_silent", False)
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    inside: list[int] = []

    def call(number: int) -> None:
        with unchanged_process():
            inside.append(number)
            time.sleep(0.01)
            with unchanged_process():  # a fit ends with a load
                inside.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert len(inside) == 8
    assert inside[::2] == inside[1::2]
    assert logger.level == before
    assert not progress._silent


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("--ckpt_path a.ckpt: broken"), "a.ckpt: broken"),
        (ValueError("model.sigma must be 0 or more"), "model.sigma must be 0 or more"),
        (FileNotFoundError(2, "no such file", "a.pt"), "no such file"),
        (UserError("set --data.normal all"), r"set --data.normal all \(from Python: as keyword"),
    ],
)
def test_a_users_mistake_is_a_value_error(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the package raised it: errors of other code stay what they are.
    monkeypatch.setattr("anomaly_clip.errors._is_users_file", lambda file: False)
    with pytest.raises(ValueError, match=message), in_python():
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), in_python():
        raise RuntimeError("a bug")
