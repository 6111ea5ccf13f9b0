"""Signals that end a command: exit codes, the way to continue, and the last step of a fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from anomaly_clip.cli import main
from anomaly_clip.commands import interruption
from anomaly_clip.commands.interruption import (
    Interrupted,
    advise,
    defer_signals,
    handle_signals,
    stop_if_interrupted,
    take_signals,
)

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


class Signal(Callback):
    """Send a signal to this process in a hook."""

    def __init__(self, name: str, hook: str, at: int = 1) -> None:
        self.name = name
        self.hook = hook
        self.at = at

    def _count(self, hook: str) -> None:
        if hook == self.hook:
            self.at -= 1
            if self.at == 0:
                os.kill(os.getpid(), signal.Signals[self.name])

    def on_train_batch_start(self, *_: object) -> None:
        self._count("train")

    def on_validation_batch_start(self, *_: object) -> None:
        self._count("validation")

    def on_test_batch_start(self, *_: object) -> None:
        self._count("test")

    def on_predict_batch_start(self, *_: object) -> None:
        self._count("predict")

    def on_train_end(self, *_: object) -> None:
        self._count("end")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(root: Path, method: str, *more: str) -> list[str]:
    line = ["--model", method, "--model.backbone.name", "squeezenet1_1", "--model.layers"]
    line += ["[features.4.cat]", "--model.backbone.weights", "random", "--model.image_size", "64"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.categories", "[bottle]"]
    line += ["--data.num_workers", "0", "--data.batch_size", "1", "--trainer.accelerator", "cpu"]
    return [*line, "--output.page=false", "--trainer.enable_model_summary=false", *more]


def sent(name: str, hook: str, at: int = 1) -> list[str]:
    return [
        *("--trainer.callbacks+=test_interruption.Signal", f"--trainer.callbacks.name={name}"),
        *(f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.at={at}"),
    ]


@pytest.mark.parametrize(
    "name",
    [n if n == "SIGTERM" else pytest.param(n, marks=pytest.mark.slow) for n in CODES],
)
def test_a_fit_ends_with_its_last_step_and_goes_on(
    name: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--trainer.max_epochs=3")]
    assert main([*fit, *sent(name, "train", 3)]) == CODES[name]  # 2 steps per epoch
    by = "" if name == "SIGINT" else f" by {name}"
    file = "runs/SimpleNet/1-fit/checkpoints/last.ckpt"
    advice = f"continue with the same command and --ckpt_path {file}"
    assert capsys.readouterr().err.splitlines()[-1] == f"anomaly_clip: interrupted{by}: {advice}"
    # Two optimisers take a step each.
    assert torch.load(file, weights_only=True)["global_step"] == 2 * 3
    assert main([*fit, "--ckpt_path", file]) == 0
    after = torch.load("runs/SimpleNet/2-fit/checkpoints/last.ckpt", weights_only=True)
    assert (after["epoch"], after["global_step"] > 2 * 3) == (3, True)


@pytest.mark.slow
def test_a_fit_ends_within_a_validation(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--trainer.max_epochs=2")]
    fit += ["--data.val_split", "test"]
    assert main([*fit, *sent("SIGTERM", "validation", 4)]) == 143  # the first two are the check
    assert "continue with the same command" in capsys.readouterr().err
    assert main([*fit, "--ckpt_path", "runs/SimpleNet/1-fit/checkpoints/last.ckpt"]) == 0


def test_a_second_signal_stops_at_once(mvtec_root: Path) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--trainer.max_epochs=3")]
    line = [*fit, *sent("SIGTERM", "train"), *sent("SIGTERM", "train")]
    assert main(line) == 143
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_complete_fit_says_so(mvtec_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--trainer.max_steps=1")]
    assert main([*fit, *sent("SIGTERM", "train")]) == 143
    assert "runs/SimpleNet/1-fit/checkpoints/last.ckpt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
@pytest.mark.parametrize("name", CODES)
def test_a_single_pass_leaves_nothing(
    verb: str, name: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padim = words(mvtec_root, "PaDiM", "--model.num_channels=4")
    hook, more = "train", []
    if verb != "fit":
        assert main(["fit", *padim, "--output.folder", "fitted"]) == 0
        hook, more = verb, ["--ckpt_path", "fitted/checkpoints/last.ckpt"]
    assert main([verb, *padim, *more, *sent(name, hook)]) == CODES[name]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("anomaly_clip: interrupted")
    assert last.endswith(": run the same command again")
    assert not list(Path().glob("runs/PaDiM/*"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("hook", ["train", "test"])
def test_each_is_resumed(hook: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    padim = words(mvtec_root, "PaDiM", "--model.num_channels=4")
    assert main(["each", *padim, *sent("SIGTERM", hook)]) == 143
    message = "interrupted by SIGTERM: resume with anomaly_clip each --resume runs/PaDiM/1-each"
    assert capsys.readouterr().err.splitlines()[-1] == f"anomaly_clip: {message}"


def test_compare_is_resumed(mvtec_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    padim = words(mvtec_root, "PaDiM", "--model.num_channels=4")
    at = padim.index("--model.backbone.weights")
    del padim[at : at + 2]
    Path("other.safetensors").touch()
    compare = ["compare", "--weights", "random", "imagenet", *padim, *sent("SIGTERM", "test")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomaly_clip.commands.compare._check_buildable", lambda *_: None)
        assert main(compare) == 143
    message = "resume with anomaly_clip compare --resume runs/compare/1-compare"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_another_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "anomaly_clip.commands.configs.config_names", lambda: os.kill(os.getpid(), signal.SIGHUP)
    )
    assert main(["configs"]) == 129
    message = "anomaly_clip: interrupted by SIGHUP: run the same command again\n"
    assert capsys.readouterr().err == message


def test_a_command_ends_with_143() -> None:
    code = "import os, signal, sys, anomaly_clip.cli as c, anomaly_clip.commands.configs as f;"
    code += "f.config_names = lambda: os.kill(os.getpid(), signal.SIGTERM);"
    code += "sys.exit(c.main(['configs']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr.startswith("anomaly_clip: interrupted by SIGTERM")


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handle_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_deferred_signal() -> None:
    with handle_signals():
        defer_signals(True)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # not the second of its kind
        defer_signals(False)
        with pytest.raises(Interrupted) as caught, advise(lambda: "continue"):
            stop_if_interrupted()
    assert (caught.value.code, str(caught.value)) == (130, "interrupted: continue")
    stop_if_interrupted()


def test_a_launcher_repeats_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("anomaly_clip.commands.interruption.time.monotonic", lambda: now[0])
    with handle_signals():
        take_signals()
        defer_signals(True)
        os.kill(os.getpid(), signal.SIGHUP)
        now[0] = 11.9
        os.kill(os.getpid(), signal.SIGHUP)
        now[0] = 12
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGHUP)


def test_an_inner_advice_is_kept_or_replaced() -> None:
    def end(outer: Callable[[], str] | None) -> str:
        with pytest.raises(Interrupted) as caught, advise(outer), advise(lambda: "inner"):
            raise KeyboardInterrupt
        return caught.value.advice

    assert (end(None), end(lambda: "outer")) == ("inner", "outer")


def test_other_exits_are_kept() -> None:
    with pytest.raises(SystemExit, match="3"), advise():
        raise SystemExit(3)


def test_a_child_process_dies_of_the_signal() -> None:
    with handle_signals():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert not interruption._receivers
