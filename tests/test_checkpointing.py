"""Checkpoints: written next to their target, saved every so many steps, resumed to the bit."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_picture
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader

from anomaly_clip.cli import main
from anomaly_clip.recording.checkpoint_io import (
    AtomicCheckpointIO,
    remove_leftovers,
    save_atomically,
)
from anomaly_clip.recording.checkpointing import LastCheckpoint
from anomaly_clip.records import LoaderNeeds

LAST = "checkpoints/last.ckpt"
SMALL, LARGE = {"a": torch.ones(10)}, {"a": torch.ones(100_000)}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes beyond a size fail, as on a full disk; the kernel sends a signal, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def save(content: dict[str, Any], file: str = "a/last.ckpt") -> None:
    AtomicCheckpointIO().save_checkpoint(content, file)


def load(file: str | Path = "a/last.ckpt") -> Any:
    return torch.load(file, weights_only=True)


def names(folder: str = "a") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# -- one file ------------------------------------------------------------------------------------


def test_a_save_needs_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkstemp", "mkdtemp", "mktemp", "gettempdir"):
        monkeypatch.setattr(f"tempfile.{name}", lambda *_, **__: 1 / 0)
    save(SMALL)
    save(LARGE)
    save(SMALL, f"file://{Path.cwd()}/b.ckpt")
    assert load()["a"].equal(LARGE["a"])
    assert load("b.ckpt")["a"].equal(SMALL["a"])
    assert names() == ["last.ckpt"]


def test_a_full_disk_keeps_the_earlier_checkpoint() -> None:
    with file_size_limit(100_000):
        save(SMALL)
        with pytest.raises(OSError, match=r"^a/last\.ckpt: File too large: this .*free space") as e:
            save(LARGE)
        with pytest.raises(OSError, match=r"^b/last\.ckpt"):
            save(LARGE, "b/last.ckpt")
    assert e.value.errno == errno.EFBIG
    assert load()["a"].equal(SMALL["a"])
    assert (names("a"), names("b")) == (["last.ckpt"], [])


def test_other_errors_are_those_of_the_system(tmp_path: Path) -> None:
    Path("a").touch()
    with pytest.raises(FileExistsError):
        save(SMALL)
    with pytest.raises(TypeError):
        AtomicCheckpointIO().save_checkpoint(SMALL, "b.ckpt", storage_options={})


def test_links_are_replaced_and_their_targets_kept() -> None:
    save(SMALL, "a/step.ckpt")
    Path("a/last.ckpt").symlink_to("step.ckpt")
    save(LARGE)
    assert not Path("a/last.ckpt").is_symlink()
    assert load("a/step.ckpt")["a"].equal(SMALL["a"])


def test_leftovers_of_killed_saves_are_removed() -> None:
    save(SMALL)
    dead, living, other = (
        Path(f"a/.{name}.tmp.ckpt") for name in ("last.0123abcd", "last.89abcdef", "b.01234567")
    )
    for path in (dead, living, other):
        path.touch()
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(SMALL)
        assert names() == [other.name, living.name, "last.ckpt"]
        remove_leftovers(Path("a"))
        assert names() == [living.name, "last.ckpt"]
    remove_leftovers(Path("a"), "last.ckpt")
    remove_leftovers(Path("none"))
    assert names() == ["last.ckpt"]


@pytest.mark.slow
def test_sigkill_inside_saves_loses_nothing() -> None:
    large = {"a": torch.ones(2_000_000)}
    for number in range(15):
        child = os.fork()
        if child == 0:
            while True:
                save({"number": number, **large})
        while not Path("a/last.ckpt").exists():
            time.sleep(0.01)
        time.sleep(0.01 + 0.003 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert load()["a"].equal(large["a"])
        assert len(names()) <= 2
    save(SMALL)
    assert names() == ["last.ckpt"]


class Own(TorchCheckpointIO):
    """Writer of a user."""


def trainer_with(*plugins: Any) -> Trainer:
    trainer = Trainer(accelerator="cpu", logger=False, plugins=list(plugins))
    save_atomically(trainer)
    return trainer


def test_writers_of_a_user_are_kept() -> None:
    assert type(trainer_with().strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(trainer_with(Own()).strategy.checkpoint_io) is Own
    for inner, expected in ((None, AtomicCheckpointIO), (Own(), Own)):
        asynchronous = trainer_with(AsyncCheckpointIO(inner)).strategy.checkpoint_io
        assert isinstance(asynchronous, AsyncCheckpointIO)
        assert type(asynchronous.checkpoint_io) is expected


# -- fits ----------------------------------------------------------------------------------------


@pytest.fixture
def root(mvtec_root: Path) -> Path:
    """Return a data set with four training images, thus four batches an epoch."""
    for number in (2, 3):
        save_picture(mvtec_root / "bottle" / "train" / "good" / f"00{number}.png", size=40 + number)
    return mvtec_root


class Kept(Callback):
    """Copy the latest checkpoint at the start of each step."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        file = Path(str(trainer.checkpoint_callback.dirpath), "last.ckpt")  # type: ignore[union-attr]
        if file.exists():
            Path("kept").mkdir(exist_ok=True)
            shutil.copy(file, f"kept/{load(file)['global_step']}.ckpt")


def words(root: Path, *more: str) -> list[str]:
    """Return the options of a fit of four batches an epoch, with two optimiser steps each."""
    line = ["--model=SimpleNet", "--model.backbone.name=squeezenet1_1"]
    line += ["--model.layers=[features.4.cat]", "--model.backbone.weights=random"]
    line += ["--model.image_size=64", "--data=MVTecAD", "--data.root", str(root)]
    line += ["--data.categories=[bottle]"]
    line += ["--data.batch_size=1", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    return [*line, "--output.page=false", "--trainer.enable_model_summary=false", *more]


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths of values that differ."""
    if isinstance(a, Tensor):
        return [] if a.equal(b) else [path]
    if isinstance(a, dict):
        return [p for key in a for p in differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        pairs = enumerate(zip(a, b, strict=True))
        return [p for i, (x, y) in pairs for p in differing(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def state(folder: str) -> dict[str, Any]:
    content = load(Path(folder, LAST))
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
    return {part: content[part] for part in parts}


VALIDATED = ["--data.val_split=test", "--trainer.val_check_interval=2"]


@pytest.mark.parametrize(
    ("more", "saved", "resumed"),
    [
        (["2", "--trainer.max_steps=12"], [2, 4, 6, 8, 10], 8),  # the end of an epoch
        pytest.param(
            *(["2", "--trainer.max_epochs=2"], [2, 4, 6, 8, 10, 12, 14], 6), marks=pytest.mark.slow
        ),
        pytest.param(*(["5", "--trainer.max_epochs=2"], [6, 10], 10), marks=pytest.mark.slow),
        pytest.param(
            *(["4", "--trainer.max_epochs=2", *VALIDATED], [4, 8, 12], 4), marks=pytest.mark.slow
        ),
    ],
    ids=["end of an epoch", "every step", "rarely", "after a validation"],
)
def test_a_fit_resumes_to_the_bit_from_any_save(
    more: list[str], saved: list[int], resumed: int, root: Path
) -> None:
    fit = ["fit", *words(root, "--output.checkpoint_every_n_steps", *more)]
    whole = ["--output.folder=whole", "--trainer.callbacks+=test_checkpointing.Kept"]
    assert main([*fit, *whole]) == 0
    assert sorted(int(file.stem) for file in Path("kept").iterdir()) == saved
    again = ["--output.folder=again", f"--ckpt_path=kept/{resumed}.ckpt"]
    assert main([*fit, *again]) == 0
    assert differing(state("whole"), state("again")) == []


@pytest.mark.parametrize(
    ("every", "saves"), [(None, [4, 8, 12]), (3, [3, 6, 9, 12]), (5, [5, 10]), (100, [])]
)
@pytest.mark.parametrize("whole_epochs", [False, True])
def test_the_steps_of_saves(
    every: int | None, saves: list[int], whole_epochs: bool, tmp_path: Path
) -> None:
    if whole_epochs and every is not None:  # at the first end of an epoch that is not earlier
        saves = [4, 8, 12] if every == 3 else [8, 12] if every == 5 else []
    module = Counting(whole_epochs)
    trainer = module.trained(LastCheckpoint(every), max_epochs=3)
    assert module.saves == saves
    assert trainer.checkpoint_callback.state_key == ModelCheckpoint().state_key  # type: ignore[union-attr]


def test_slow_steps_are_saved_after_five_minutes() -> None:
    module, ticks = Counting(), itertools.count(step=140)  # each look at the clock takes 140 s
    module.trained(LastCheckpoint(100, clock=lambda: float(next(ticks))), max_epochs=3)
    assert module.saves == [3, 6, 9, 12]


def test_gradients_are_accumulated_before_a_save() -> None:
    module = Counting()
    module.trained(LastCheckpoint(1), max_epochs=2, accumulate_grad_batches=3)
    assert (module.saves, module.batches) == ([1, 2, 3, 4], [3, 4, 7, 8])


def test_a_number_of_steps_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\.checkpoint_every_n_steps must be 1 or more, got 0"):
        LastCheckpoint(0)


class Counting(LightningModule):
    """Module of four batches an epoch that records its saves."""

    def __init__(self, whole_epochs: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.loader_needs = LoaderNeeds(whole_epochs=whole_epochs)
        self.saves: list[int] = []
        self.batches: list[int] = []
        self.batch = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batch += 1
        return self.weight.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saves.append(checkpoint["global_step"])
        self.batches.append(self.batch)

    def trained(self, callback: Callback, **options: Any) -> Trainer:
        options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", callbacks=[callback], **options)
        trainer.fit(self, DataLoader(torch.zeros(4, 1), batch_size=1))  # type: ignore[arg-type]
        return trainer


def test_a_full_disk_ends_a_fit_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = [
        "fit",
        *words(root, "--trainer.max_epochs=1", "--output.checkpoint_every_n_steps=2"),
    ]
    with file_size_limit(100_000):
        assert main(fit) == 2
    file = f"runs/SimpleNet/1-fit/{LAST}"
    message = f"anomaly_clip: {file}: File too large: this checkpoint is not saved, and"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not Path("runs/SimpleNet/1-fit").exists()


@pytest.mark.slow
def test_leftovers_are_removed_by_the_next_fit(root: Path) -> None:
    fit = ["fit", *words(root, "--trainer.max_epochs=1")]
    assert main([*fit, "--output.folder=a"]) == 0
    for name in ("b", "a"):
        Path(name, "checkpoints").mkdir(parents=True, exist_ok=True)
        Path(name, "checkpoints/.best.0123abcd.tmp.ckpt").touch()
    assert main([*fit, "--output.folder=b", "--ckpt_path=a", "--trainer.max_epochs=2"]) == 0
    assert names("a/checkpoints") == names("b/checkpoints") == ["last.ckpt"]


def test_the_option_has_no_effect_on_a_callback_of_the_user(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(root, "--trainer.max_epochs=1", "--output.checkpoint_every_n_steps=2")
    assert main(["fit", *line, "--trainer.callbacks+=ModelCheckpoint"]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "output.checkpoint_every_n_steps has no effect, as trainer.callbacks has a" in printed
    assert len(names("runs/SimpleNet/1-fit/checkpoints")) == 2  # of the callback, and the last step
