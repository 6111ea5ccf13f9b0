from __future__ import annotations

import errno
import os
import re

import pytest
import torch

from anomaly_clip.cli import main
from anomaly_clip.errors import UserError, shortened, user_errors
from anomaly_clip.exhaustion import explain_exhaustion
from anomaly_clip.images import evenly_spaced

WORKER = "DataLoader worker (pid(s) 12) exited unexpectedly"
BUS = (
    "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit."
)
CASES: list[tuple[BaseException, str]] = [
    (MemoryError(), "memory is not sufficient: lower data.batch_size"),
    (MemoryError("Unable to allocate 7 GiB"), "7 GiB"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower data.batch"),
    (
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        r"memory .*Cannot allocate",
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "memory of the GPU"),
    (RuntimeError(WORKER), "ended from outside .* set data.num_workers to 0"),
    (RuntimeError(BUS), r"/dev/shm\) is not sufficient .* set data.num_workers to 0"),
    (RuntimeError("unable to write to file </torch_1_2_3>"), r"/dev/shm\) is not sufficient"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size"),
]


@pytest.mark.parametrize(("error", "message"), CASES)
def test_exhaustion_is_explained_with_a_way_out(error: BaseException, message: str) -> None:
    explanation = explain_exhaustion(error)
    assert explanation is not None
    assert re.search(message, explanation)
    assert len(explanation) < 500


def test_other_errors_are_not_explained() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("a")):
        assert explain_exhaustion(error) is None


def test_an_error_of_a_users_code_keeps_its_traceback() -> None:
    with pytest.raises(MemoryError), user_errors():
        raise MemoryError  # in this file, which is not of the package


def test_an_allocation_that_fails_is_one_sentence() -> None:
    with pytest.raises(UserError, match="memory is not sufficient"), user_errors():
        evenly_spaced(1 << 58, 1 << 58)


def test_long_messages_keep_their_ends() -> None:
    assert shortened("a" * 600) == "a" * 600
    cut = shortened("option: got " + "x" * 5000 + ": write less")
    assert cut.startswith("option: got x")
    assert cut.endswith("x: write less")
    assert len(cut) <= 600


def test_a_long_value_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--model", "x" * 10_000]) == 2
    assert len(capsys.readouterr().err) < 650
