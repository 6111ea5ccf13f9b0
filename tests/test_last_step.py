"""The last step of an interrupted fit: one for all processes, saved, and resumed to the bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_checkpointing import differing, root, state, words

from anomaly_clip.cli import main
from anomaly_clip.commands.interruption import handle_signals, received_signal, take_signals
from anomaly_clip.commands.last_step import _stop_together
from anomaly_clip.testing.processes import run_command

LAST = "checkpoints/last.ckpt"
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
__all__ = ["root"]  # a fixture


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sent(name: str, at: int, rank: int = 0) -> list[str]:
    return [
        *("--trainer.callbacks+=signal_callbacks.Interrupting", f"--trainer.callbacks.name={name}"),
        *(f"--trainer.callbacks.at={at}", f"--trainer.callbacks.rank={rank}"),
    ]


# Four batches of two steps each in an epoch; the fourth is at its end.
@pytest.mark.parametrize(
    ("limit", "at"),
    [
        ("--trainer.max_steps=12", 4),
        pytest.param("--trainer.max_steps=12", 3, marks=pytest.mark.slow),
        pytest.param("--trainer.max_epochs=2", 4, marks=pytest.mark.slow),
        pytest.param("--trainer.max_epochs=2", 6, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_fit_equals_an_uninterrupted_one(limit: str, at: int, root: Path) -> None:
    fit = ["fit", *words(root, limit)]
    assert main([*fit, "--output.folder=whole"]) == 0
    assert main([*fit, "--output.folder=cut", *sent("SIGTERM", at)]) == 143
    assert torch.load(f"cut/{LAST}", weights_only=True)["global_step"] == 2 * at
    assert main([*fit, "--output.folder=again", "--ckpt_path=cut"]) == 0
    assert differing(state("whole"), state("again")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at", "rank"), [("SIGTERM", 1, 0), ("SIGTERM", 2, 1), ("SIGHUP", 3, 1)]
)
def test_several_processes_save_the_same_step(name: str, at: int, rank: int, root: Path) -> None:
    fit = ["fit", *words(root, "--trainer.max_epochs=3", "--trainer.devices=2")]  # 2 batches each
    assert run_command([*fit, "--output.folder=whole"], 2).returncode == 0
    cut = run_command([*fit, "--output.folder=cut", *sent(name, at, rank)], 2)
    assert cut.returncode == CODES[name]
    assert [line for line in cut.stderr.splitlines() if "interrupted" in line] == [
        f"anomaly_clip: interrupted by {name}: continue with the same command and --ckpt_path "
        f"cut/{LAST}"
    ]
    assert torch.load(f"cut/{LAST}", weights_only=True)["global_step"] == 2 * at
    again = run_command([*fit, "--output.folder=again", "--ckpt_path=cut"], 2)
    assert again.returncode == 0, again.stderr
    assert differing(state("whole"), state("again")) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_test_in_several_processes_stops(rank: int, root: Path) -> None:
    assert main(["fit", *words(root, "--trainer.max_epochs=1", "--output.folder=fitted")]) == 0
    line = ["test", *words(root, "--trainer.devices=2", "--ckpt_path=fitted")]
    done = run_command([*line, "--output.folder=tested", *sent("SIGTERM", 1, rank)], 2)
    assert done.returncode == 143
    assert done.stderr.count("interrupted by SIGTERM: run the same command again") == 1
    assert not list(Path("tested").glob("*.json"))


def trainer_of(ready: int = 3) -> Any:
    loop = SimpleNamespace(_accumulated_batches_reached=lambda: ready % 3 == 0)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, fit_loop=SimpleNamespace(epoch_loop=loop))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the signal of the other processes."""

    def receive(number: int) -> None:
        def reduce(tensor: torch.Tensor, op: object) -> None:
            assert op == torch.distributed.ReduceOp.MAX
            tensor.clamp_(min=number)

        monkeypatch.setattr("torch.distributed.all_reduce", reduce)

    return receive


def test_a_signal_of_another_process_stops_this_one(others: Callable[[int], None]) -> None:
    with handle_signals():
        others(0)
        _stop_together(trainer_of())
        others(signal.SIGHUP)
        _stop_together(trainer_of(ready=4))  # gradients are accumulated
        assert received_signal() is None
        with pytest.raises(SIGTERMException):
            _stop_together(trainer_of())
        assert received_signal() == signal.SIGHUP
        others(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            _stop_together(trainer_of())
        assert received_signal() == signal.SIGHUP


def test_signals_are_taken_from_other_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handle_signals():
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: None)
        take_signals()
        assert signal.getsignal(signal.SIGTERM) is ours
    take_signals()
    assert signal.getsignal(signal.SIGTERM) is before
