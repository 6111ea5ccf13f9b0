"""Interrupted runs of ``each``, ``sweep`` and ``compare`` continue inside the fit in progress."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import write_mvtec
from lightning.pytorch import Callback
from torchvision.models import squeezenet1_1

from anomaly_clip.cli import main
from anomaly_clip.commands.continued_fit import _join_logs, _step_to_continue
from anomaly_clip.commands.sweep_file import ARGS

LAST = "checkpoints/last.ckpt"
CALLBACKS = "--trainer.callbacks"


class Once(Callback):
    """Send SIGTERM to this process in one step of a fit, unless it was sent before.

    Args:
        at: Number of the step.
        file: File that marks the signal as sent.
    """

    def __init__(self, at: int, file: str) -> None:
        self.at, self.file = at, Path(file)

    def on_train_batch_start(self, *_: object) -> None:
        self.at -= 1
        if self.at == 0 and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def options(root: Path, *more: str) -> list[str]:
    line = ["--model.backbone.name", "squeezenet1_1", "--model.layers", "[features.4.cat]"]
    line += ["--model.image_size", "64", "--data", "MVTecAD", "--data.root", str(root)]
    line += ["--data.categories", "[bottle]", "--data.num_workers", "0", "--data.batch_size", "1"]
    line += ["--trainer.accelerator", "cpu", "--output.page=false"]
    return [*line, "--trainer.enable_model_summary=false", *more]


def simplenet(root: Path, *more: str) -> list[str]:
    return ["--model", "SimpleNet", *options(root), "--trainer.max_epochs=3", *more]


def once(at: int) -> list[str]:
    file = Path("sent").resolve()
    more = [f"{CALLBACKS}.at={at}", f"{CALLBACKS}.file={file}"]
    return [f"{CALLBACKS}+=test_continued_fit.Once", *more]


RANDOM = ["--model.backbone.weights", "random"]


def assert_equal(first: Any, second: Any, place: str = "") -> None:
    """Assert that two checkpoints are equal to the bit."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key, value in first.items():
            assert_equal(value, second[key], f"{place}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for number, value in enumerate(first):
            assert_equal(value, second[number], f"{place}.{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def assert_same_fit(first: Path, second: Path) -> None:
    a, b = (torch.load(folder / LAST, weights_only=True) for folder in (first, second))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_equal(a[key], b[key], key)


@pytest.mark.parametrize(
    "at",  # within an epoch, and in its last step
    [3, pytest.param(4, marks=pytest.mark.slow)],
)
def test_each_continues_to_the_bit(
    at: int, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = ["--trainer.log_every_n_steps=1"]
    assert main(["each", *simplenet(mvtec_root, *RANDOM, *log, *once(at))]) == 143
    message = "interrupted by SIGTERM: resume with anomaly_clip each --resume runs/SimpleNet/1-each"
    assert capsys.readouterr().err.splitlines()[-1] == f"anomaly_clip: {message}"
    assert main(["each", "--resume", "runs/SimpleNet/1-each"]) == 0
    err = capsys.readouterr().err
    assert f"continuing at step {2 * at}\n" in err  # two optimisers take a step each
    whole = ["fit", *simplenet(mvtec_root, *RANDOM, *log), "--output.folder", "whole"]
    assert main(whole) == 0
    assert_same_fit(Path("runs/SimpleNet/1-each/bottle"), Path("whole"))
    logs = [Path(run) / "logs/fit/metrics.csv" for run in ("runs/SimpleNet/1-each/bottle", "whole")]
    assert logs[0].read_text() == logs[1].read_text()
    assert not list(Path("runs/SimpleNet/1-each/bottle/logs").glob("fit-*"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a data set, and the folder of a fit that was interrupted in its third step."""
    folder = tmp_path_factory.mktemp("interrupted")
    root = write_mvtec(folder)
    file = f"--trainer.callbacks.file={folder / 'sent'}"
    line = ["fit", *simplenet(root, *RANDOM, *once(3)), file, "--output.folder"]
    assert main([*line, str(folder / "bottle")]) == 143
    return root, folder / "bottle"


def change(content: dict[str, Any], case: str) -> None:
    if case == "nan":
        content["state_dict"]["adaptor.bias"][0] = float("nan")
    if case == "weights only":
        del content["optimizer_states"]
    if case == "shape":
        content["state_dict"]["adaptor.bias"] = torch.zeros(3)
    if case == "backbone":
        content["backbone"]["sha256"] = "0" * 64
    if case == "method":
        content["hyper_parameters"]["_class_path"] = "anomaly_clip.methods.RD4AD"
    if case == "setting":
        content["hyper_parameters"]["noise"] = 3.0


REFUSED = {
    "nan": "its adaptor.bias is NaN or infinite",
    "weights only": "it holds no progress of a fit (optimizer_states missing)",
    "shape": "its adaptor.bias is (3,), not",
    "backbone": "the checkpoint was trained with",
    "method": "is a checkpoint of anomaly_clip.methods.RD4AD",
    "setting": "model.noise is",
    "half": "not a checkpoint that can be read safely",
    "byte": "is damaged",
    "category": "it was fitted on bottle",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_or_foreign_checkpoint_is_told_and_not_continued(
    case: str, interrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, fitted = interrupted
    folder = Path(shutil.copytree(fitted, "copy"))
    file = folder / LAST
    content = file.read_bytes()
    if case == "half":
        file.write_bytes(content[: len(content) // 2])
    elif case == "byte":
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        checkpoint = torch.load(file, weights_only=True)
        change(checkpoint, case)
        torch.save(checkpoint, file)
    words = ["fit", *simplenet(root, *RANDOM), "--output.folder", str(folder)]
    category = "metal_nut" if case == "category" else "bottle"
    assert _step_to_continue(words, file, category) is None
    err = capsys.readouterr().err
    assert f"{file} cannot be continued, so the fit starts anew: " in err
    assert REFUSED[case] in err


def test_an_unchanged_checkpoint_is_continued(interrupted: tuple[Path, Path]) -> None:
    root, folder = interrupted
    words = ["fit", *simplenet(root, *RANDOM), "--output.folder", str(folder)]
    assert _step_to_continue(words, folder / LAST, "bottle") == 6


@pytest.mark.slow
def test_a_single_pass_starts_again(mvtec_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    padim = ["--model", "PaDiM", "--model.num_channels=4", *RANDOM, *options(mvtec_root)]
    assert main(["each", *padim, "--output.folder", "run"]) == 0
    for name in (".fitted", ".tested"):
        Path("run/bottle", name).unlink()
    before = torch.load(Path("run/bottle", LAST), weights_only=True)["state_dict"]
    assert main(["each", "--resume", "run"]) == 0
    assert "PaDiM is fitted in a single pass, which starts again\n" in capsys.readouterr().err
    after = torch.load(Path("run/bottle", LAST), weights_only=True)["state_dict"]
    assert_equal(before, after)


@pytest.mark.slow
def test_a_fit_that_was_only_not_marked_as_complete(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["each", *simplenet(mvtec_root, *RANDOM), "--output.folder", "run"]) == 0
    for name in (".fitted", ".tested"):
        Path("run/bottle", name).unlink()
    before = torch.load(Path("run/bottle", LAST), weights_only=True)["state_dict"]
    assert main(["each", "--resume", "run"]) == 0
    err = capsys.readouterr().err
    assert "continuing at step 12\n" in err
    assert "this fit is complete (trainer.max_epochs is 3, and 3 are done)" in err
    assert_equal(before, torch.load(Path("run/bottle", LAST), weights_only=True)["state_dict"])


def write_sweep_of(words: list[str]) -> None:
    """Write a sweep of two learning rates."""
    content = {
        "program": "anomaly_clip",
        "method": "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": {"model.adaptor_lr": {"values": [1e-4, 2e-4]}},
        "command": ["${env}", "anomaly_clip", "fit", *words, ARGS],
    }
    Path("two.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.slow
def test_a_sweep_continues_to_the_bit_from_any_folder(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = simplenet(Path(mvtec_root.name), *RANDOM, "--trainer.log_every_n_steps=1")
    write_sweep_of([*line, *once(4)])
    assert main(["sweep", "two.yaml", "--output.folder", "chosen"]) == 143
    assert capsys.readouterr().err.endswith("resume with anomaly_clip sweep --resume chosen\n")
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")
    assert main(["sweep", "--resume", "../chosen"]) == 0
    assert Path.cwd() == tmp_path / "elsewhere"
    assert capsys.readouterr().err.count("continuing at step 8\n") == 1
    os.chdir("..")
    assert main(["fit", *line, "--output.folder", "whole"]) == 0
    assert_same_fit(Path("chosen/1"), Path("whole"))
    assert {path.name for path in Path("chosen").iterdir()} == {
        *("1", "2", "configs", "sweep.csv", "sweep.json", "sweep.yaml")
    }
    # The same command continues the same sweep, another is refused.
    assert main(["sweep", "two.yaml", "--output.folder", "chosen"]) == 0
    assert capsys.readouterr().err.count("already finished") == 2
    assert main(["sweep", "two.yaml", "--output.folder", "chosen", "--model.noise=1"]) == 2
    assert "--output.folder chosen has another sweep" in capsys.readouterr().err
    os.chdir("elsewhere")
    assert main(["sweep", "../two.yaml", "--output.folder", "../chosen"]) == 2
    os.chdir("..")


@pytest.mark.slow
def test_compare_continues_to_the_bit(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    torch.save(squeezenet1_1(weights=None).state_dict(), "mine.pt")
    line = simplenet(Path(mvtec_root.name))
    command = ["compare", "--weights", "mine.pt", "random", "--pictures", "0", *line]
    assert main([*command, *once(4), "--output.folder", "chosen"]) == 143
    assert capsys.readouterr().err.endswith("resume with anomaly_clip compare --resume chosen\n")
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")
    assert main(["compare", "--resume", "../chosen", "--pictures", "1"]) == 2
    assert "leave out --pictures" in capsys.readouterr().err
    assert main(["compare", "--resume", "../chosen"]) == 0
    assert capsys.readouterr().err.count("continuing at step 8\n") == 1
    os.chdir("..")
    assert not Path("chosen/pictures").exists()
    fit = ["fit", *line, "--model.backbone.weights", "mine.pt", "--output.folder", "whole"]
    assert main(fit) == 0
    assert_same_fit(Path("chosen/mine/bottle"), Path("whole"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("verb", ["each", "compare", "sweep"])
def test_a_dry_run_lists_commands_and_writes_nothing(
    verb: str, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    line = {
        "each": ["each", *simplenet(mvtec_root, *RANDOM)],
        "compare": ["compare", "--weights", "random", "imagenet", *simplenet(mvtec_root)],
        "sweep": ["sweep", "two.yaml"],
    }[verb]
    if verb == "sweep":
        write_sweep_of(simplenet(mvtec_root, *RANDOM))
        before.append(tmp_path / "two.yaml")
    assert main([*line, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (1 if verb == "each" else 2)
    begin = "anomaly_clip each" if verb == "compare" else "anomaly_clip fit"
    assert all(text.startswith(f"{begin} --model SimpleNet ") for text in printed)
    assert sorted(tmp_path.rglob("*")) == sorted(before)


def test_the_help_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = "continues an interrupted run, inside the fit in progress, and skips the"
    for verb in ("each", "compare", "sweep"):
        assert main([verb, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert words in text
        assert f"anomaly_clip {verb} --resume RUN" in text
        for option in ("--output.folder", "--output.root", "--output.name", "--dry-run"):
            assert option in text


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["each", "compare", "sweep"])
def test_other_results_in_a_chosen_folder(
    verb: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {
        "each": ["each", *simplenet(mvtec_root, *RANDOM)],
        "compare": ["compare", "--weights", "random", "imagenet", *simplenet(mvtec_root)],
        "sweep": ["sweep", "two.yaml"],
    }[verb]
    write_sweep_of(simplenet(mvtec_root, *RANDOM))
    name = {"each": "bottle", "compare": "imagenet", "sweep": "2"}[verb]
    Path("chosen", name).mkdir(parents=True)
    assert main([*line, "--output.folder", "chosen"]) == 2
    message = f"--output.folder chosen has {name}, which is not of this {verb}"
    assert message in capsys.readouterr().err
    Path("chosen", name).rmdir()
    for name in ("metrics.json", "checkpoints"):
        Path("chosen", name).touch()
        assert main([*line, "--output.folder", "chosen"]) == 2
        assert f"has {name}, which is not of" in capsys.readouterr().err
        assert [path.name for path in Path("chosen").iterdir()] == [name]
        Path("chosen", name).unlink()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.enable_checkpointing=false"], "enable_checkpointing false writes none"),
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run writes none"),
        (
            [f"{CALLBACKS}+=ModelCheckpoint", f"{CALLBACKS}.dirpath=shared"],
            "shared, the dirpath of a ModelCheckpoint",
        ),
    ],
)
def test_each_needs_a_checkpoint_of_each_category(
    more: list[str], message: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["each", *simplenet(mvtec_root, *RANDOM, *more)]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.yaml"))


@pytest.mark.slow
def test_each_in_a_folder_with_another_run(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["each", *simplenet(mvtec_root, *RANDOM), "--output.folder", "chosen"]
    assert main([*line, *once(1)]) == 143
    assert main([*line, *once(1), "--model.noise=1"]) == 2
    message = "--output.folder chosen has another run of each, whose model.init_args.noise differs"
    assert message in capsys.readouterr().err
    assert main([*line, *once(1)]) == 0
    assert "chosen has this run already, which continues" in capsys.readouterr().err


def test_logs_of_a_fit_in_parts_are_joined(tmp_path: Path) -> None:
    parts = {
        "fit-1": "epoch,step,a\n0,1,1\n0,2,2\n",
        "fit-2": "step,epoch,a,b\n2,0,3,x\n3,1,4,\n",
        "fit": "step,a\n4,5\n",
        "fit-10": "step,a\n4,9\n",
    }
    for name, text in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(text)
    _join_logs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
    joined = "epoch,step,a,b\n0,1,1,\n0,2,3,x\n1,3,4,\n,4,5,\n"
    assert (tmp_path / "fit" / "metrics.csv").read_text() == joined


@pytest.mark.slow
def test_a_fit_that_diverges_in_each_is_not_tested(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.adaptor_lr=1e30", "--model.discriminator_lr=1e30"]
    assert main(["each", *simplenet(mvtec_root, *RANDOM, *more), "--output.folder", "run"]) == 1
    err = capsys.readouterr().err
    assert "failed: bottle: the fit diverged in step" in err
    assert "test SimpleNet" not in err
    kept = Path("run/bottle/checkpoints/finite-step-4.ckpt")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    assert main(["each", "--resume", "run"]) == 1
    assert f"kept from a fit that diverged: {kept}" in capsys.readouterr().err
    assert list(kept.parent.iterdir()) == [kept]


def others_here() -> list[int]:
    """Return the other processes that work in this folder."""
    numbers = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.readlink() == Path.cwd():
                numbers.append(int(link.parent.name))
    return [number for number in numbers if number != os.getpid()]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["each", "compare", "sweep"])
def test_a_signal_ends_all_processes_of_a_run(verb: str, mvtec_root: Path) -> None:
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    epochs = ["--trainer.max_epochs", "100000"]
    line = {
        "each": ["each", *simplenet(mvtec_root, *RANDOM, *ddp, *epochs)],
        "compare": ["compare", "--weights", "random", "mine.pt"],
        "sweep": ["sweep", "two.yaml"],
    }[verb]
    if verb == "compare":
        torch.save(squeezenet1_1(weights=None).state_dict(), "mine.pt")
        line += simplenet(mvtec_root, *ddp, *epochs)
    write_sweep_of(simplenet(mvtec_root, *RANDOM, *ddp, *epochs))
    command = [sys.executable, "-m", "anomaly_clip", *line, "--output.folder", "chosen"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            begun = time.monotonic()
            while not list(Path("chosen").rglob("last.ckpt")):
                assert time.monotonic() < begun + 120
                assert process.poll() is None
                time.sleep(0.1)
            assert len(others_here()) == 3  # the command, and two processes of the fit
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            left = others_here()
        finally:
            for number in others_here():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
    assert (process.returncode, left) == (143, [])
    resume = f"resume with anomaly_clip {verb} --resume chosen"
    assert err.splitlines()[-1] == f"anomaly_clip: interrupted by SIGTERM: {resume}"
