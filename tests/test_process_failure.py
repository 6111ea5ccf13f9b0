"""A run in several processes ends with the cause of the first process that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from ddp_checks import Failing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from anomaly_clip.cli import main
from anomaly_clip.commands import process_failure, process_watch
from anomaly_clip.commands.interruption import Interrupted
from anomaly_clip.commands.process_cause import Cause, ProcessFailure
from anomaly_clip.commands.process_failure import let_first_process_report, report_once
from anomaly_clip.errors import UserError
from anomaly_clip.testing.processes import run_command

CONNECTION = "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:12203."


def words(root: Path, runs: Path, rank: int, how: str, processes: int = 2) -> list[str]:
    line = ["fit", "--model", "SimpleNet", "--model.backbone.name", "squeezenet1_1"]
    line += ["--model.layers", "[features.4.cat]", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "64", "--data", "MVTecAD", "--data.root", str(root)]
    line += ["--data.num_workers", "0", "--data.batch_size", "1", "--data.categories", "[bottle]"]
    line += ["--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--output.page=false"]
    line += ["--trainer.devices", str(processes), "--trainer.enable_checkpointing=false"]
    line += ["--trainer.callbacks+=ddp_checks.Failing", f"--trainer.callbacks.rank={rank}"]
    return [*line, f"--trainer.callbacks.how={how}", f"--output.root={runs}"]


def is_quiet(err: str) -> bool:
    return not any(word in err for word in ("gloo", "closed by peer", "reset by peer"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "code", "last"),
    [
        (1, "RuntimeError", 1, "RuntimeError: the cause"),
        (0, "RuntimeError", 1, "RuntimeError: the cause"),
        (1, "ValueError", 1, "ValueError: the cause"),  # in code outside the package
        (1, "UserError", 2, "anomaly_clip: the cause"),
        (1, "NaN", 2, "correct these files, or leave them out"),
        (
            0,
            "OSError",
            2,
            "runs/scores.csv: No space left on device: free space there, or choose another folder",
        ),
    ],
)
def test_the_cause_is_reported_once(
    mvtec_root: Path, tmp_path: Path, rank: int, how: str, code: int, last: str
) -> None:
    done = run_command(words(mvtec_root, tmp_path / "runs", rank, how), 2)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].endswith(last)
    assert (f"process {rank} of 2 failed:\n" in done.stderr) == (code == 1)
    assert done.stderr.count("Traceback") == (code == 1)
    assert is_quiet(done.stderr)
    assert not list((tmp_path / "runs").rglob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_an_image_that_only_one_process_reads(mvtec_root: Path, tmp_path: Path, place: int) -> None:
    image = mvtec_root / "bottle" / "train" / "good" / f"00{place}.png"
    image.write_bytes(image.read_bytes()[:200])
    done = run_command(words(mvtec_root, tmp_path / "runs", 2, "no process"), 2)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"anomaly_clip: {image}: ")
    assert done.stderr.count("anomaly_clip: ") == 1
    assert is_quiet(done.stderr)
    assert not list((tmp_path / "runs").rglob("*.yaml"))


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(mvtec_root: Path, tmp_path: Path) -> None:
    """Of three, process 2; another launcher than Lightning's knows how it ended."""
    done = run_command(words(mvtec_root, tmp_path / "runs", 1, "SIGKILL"), 2)
    assert done.stderr.splitlines()[-1].startswith(
        "anomaly_clip: another process has ended without a message"
    )
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "last"),
    [
        ("SIGKILL", 137, "process 1 was ended by SIGKILL, as the system does when memory runs out"),
        ("UserError", 2, "the cause"),
    ],
)
def test_processes_that_lightning_starts(
    mvtec_root: Path, tmp_path: Path, how: str, code: int, last: str
) -> None:
    line = words(mvtec_root, tmp_path / "runs", 1, how)
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "anomaly_clip", *line]
    done = subprocess.run(
        command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(f"anomaly_clip: {last}")
    assert is_quiet(done.stderr)
    assert not list((tmp_path / "runs").rglob("*.yaml"))


# -- one process ---------------------------------------------------------------------------------


class Board:
    """Stand-in for the store of two processes."""

    def __init__(self, causes: list[Cause | None], reachable: bool = True) -> None:
        self.causes = causes
        self.reachable = reachable
        self.num_left = 1

    def claim(self, cause: Cause | None) -> Cause | None:
        if not self.reachable:
            raise RuntimeError("broken pipe")
        self.causes.append(cause)
        return next((c for c in self.causes if c is not None), None)

    def leave(self) -> None:
        pass


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that ends a process with an error, while the board has some causes."""
    monkeypatch.setattr(process_failure, "PATIENCE", 0.2)
    monkeypatch.setattr(process_failure, "connected", lambda: True)
    monkeypatch.setattr(process_failure, "_disconnect", lambda: None)

    def end(rank: int, error: BaseException, board: Board) -> ProcessFailure:
        monkeypatch.setattr(process_failure, "Board", lambda: board)
        trainer = SimpleNamespace(
            global_rank=rank, world_size=2, strategy=SimpleNamespace(launcher=None)
        )
        cleaned: list[bool] = []
        before = signal.getsignal(signal.SIGTERM)
        try:
            with (
                pytest.raises(ProcessFailure) as caught,
                report_once(trainer, "fit", lambda: cleaned.append(True)),  # type: ignore[arg-type]
            ):
                raise error
        finally:
            signal.signal(signal.SIGTERM, before)
        assert len(cleaned) == (rank == 0)
        return caught.value

    return end


LOST = RuntimeError(CONNECTION)
MISTAKE = Cause(1, 2, "there is no such file")
SIGNAL = Cause(1, 143, "interrupted by SIGTERM: there", interrupted=True)


@pytest.mark.parametrize(
    ("rank", "error", "on_board", "code", "sentence"),
    [
        (0, LOST, MISTAKE, 2, "there is no such file"),
        (0, dist.DistBackendError("NCCL"), MISTAKE, 2, "there is no such file"),
        (0, UserError("set it"), None, 2, "set it"),
        (0, UserError("set it"), MISTAKE, 2, "there is no such file"),
        (0, Interrupted(15, "here"), SIGNAL, 143, "interrupted by SIGTERM: here"),
        # torchrun interrupts all processes after the first has failed.
        (0, Interrupted(15, "here"), MISTAKE, 2, "there is no such file"),
        (0, LOST, SIGNAL, 143, "interrupted by SIGTERM: there"),
        (0, LOST, None, 1, "another process has ended without a message"),
        (1, UserError("set it"), None, 2, None),
        (1, LOST, MISTAKE, 2, None),
    ],
)
def test_words_of_each_process(
    two: Any,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    error: BaseException,
    on_board: Cause | None,
    code: int,
    sentence: str | None,
) -> None:
    failure = two(rank, error, Board([on_board]))
    assert failure.report() == code
    err = capsys.readouterr().err
    assert err.startswith(f"anomaly_clip: {sentence}") if sentence else not err


def test_a_process_without_the_first_one_reports_itself(
    two: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board([], reachable=False)
    assert two(1, UserError("set it"), board).report() == 2
    assert two(1, LOST, board).report() == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "anomaly_clip: set it"
    assert second.startswith("anomaly_clip: process 0 has ended without a message")


def test_an_error_of_other_code_keeps_its_traceback(
    two: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = two(0, ZeroDivisionError("of other code"), Board([]))
    assert failure.report() == 1
    err = capsys.readouterr().err.splitlines()
    assert err[:2] == [
        "process 0 of 2 failed:",
        "Traceback (most recent call last):",
    ]
    assert err[-1] == "ZeroDivisionError: of other code"
    assert two(0, UserError("set it"), Board([])).report(with_traceback=True) == 2
    err = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in err
    assert err[-1] == "anomaly_clip: set it"


def test_a_network_that_is_too_slow_keeps_its_error(two: Any) -> None:
    with pytest.raises(RuntimeError, match="Timed out"):
        two(0, RuntimeError("gloo: Timed out waiting 1800000ms for recv"), Board([]))


def test_one_process_is_left_alone() -> None:
    trainer: Any = SimpleNamespace(world_size=1, strategy=SimpleNamespace(launcher=None))
    with pytest.raises(ZeroDivisionError), report_once(trainer, "fit", lambda: None):
        raise ZeroDivisionError


def spawned(last: str) -> ProcessRaisedException:
    text = "\n\n-- Process 1 terminated with the following error:\n"
    trace = f"Traceback (most recent call last):\n  File x\n{last}\n"
    return ProcessRaisedException(text + trace, 1, 2345)


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (spawned("ValueError: set it"), 2, "anomaly_clip: set it"),
        (spawned("FileNotFoundError: x"), 2, "anomaly_clip: x"),
        (spawned("anomaly_clip.errors.UserError: set it"), 2, "anomaly_clip: set it"),
        (spawned("torch.OutOfMemoryError: full"), 1, "torch.OutOfMemoryError: full"),
        (spawned("AssertionError"), 1, "AssertionError"),
        (
            ProcessExitedException("", 1, 2345, -11, "SIGSEGV"),
            139,
            "anomaly_clip: process 1 was ended by SIGSEGV, a crash of compiled code: set "
            "PYTHONFAULTHANDLER=1 to see where",
        ),
    ],
)
def test_processes_that_python_forks(
    error: Exception, code: int, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=None))
    with pytest.raises(ProcessFailure) as caught, report_once(trainer, "fit", lambda: None):
        raise error
    assert caught.value.report() == code
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == last
    assert ("Traceback" in err) == (code == 1)


def test_forked_processes_only_fit(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["test", "--config", "sdp", "--data.root", str(mvtec_root), "--data.num_workers", "0"]
    line += ["--model.backbone.pretrained=demo", "--model.backbone.name=demo"]
    line += ["--model.stages=null", "--trainer.accelerator=cpu", f"--output.root={tmp_path / 'r'}"]
    line += ["--trainer.strategy=ddp_fork", "--trainer.devices=2"]
    assert main(line) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("as with trainer.strategy ddp_fork or ddp_spawn: set trainer.strategy to ddp")
    )
    assert not list((tmp_path / "r").rglob("*.yaml"))


def test_the_first_process_is_ended_if_it_waits_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    cleaned: list[bool] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(process_watch, "connected", lambda: False)
    trainer: Any = SimpleNamespace()
    watch = process_watch.Watch(trainer, lambda: cleaned.append(True))
    dead = subprocess.Popen(["sh", "-c", "kill -9 $$"])
    alive = subprocess.Popen(["sleep", "60"])
    dead.wait()
    watch.processes = [dead, alive]
    watch._end_stuck(1, dead)
    assert (codes, cleaned) == ([137], [True])
    assert alive.poll() is not None
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err


def test_the_others_let_the_first_process_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They report a mistake in the command line only if the launcher has not ended them."""
    monkeypatch.setattr(process_failure, "FIRST_WORD", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err

    def ended(seconds: float) -> None:
        raise Interrupted(15)

    monkeypatch.setattr("time.sleep", ended)
    assert let_first_process_report()
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    assert not capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert not let_first_process_report()


def test_the_board_keeps_the_first_cause() -> None:
    board = process_watch.Board.__new__(process_watch.Board)
    board.store = dist.HashStore()  # type: ignore[attr-defined]
    assert board.claim(None) is None
    assert board.claim(MISTAKE) == MISTAKE
    assert board.claim(Cause(0, 1, "", "Traceback")) == MISTAKE
    board.leave()
    board.leave()
    assert board.num_left == 2


def test_the_summary_of_torchrun_names_the_cause(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    two(1, UserError("set it"), Board([]))
    assert "set it" in json.dumps(json.loads((tmp_path / "error.json").read_text()))


def test_failing_counts_batches() -> None:
    failing = Failing(1, "ValueError")
    failing.on_test_batch_start(SimpleNamespace(global_rank=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the cause"):
        failing.on_test_batch_start(SimpleNamespace(global_rank=1))  # type: ignore[arg-type]
