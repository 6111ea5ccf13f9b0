"""Progress of Lightning's loops and of real commands, as bars or log lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from standing_clock import StandingClock
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomaly_clip import callbacks, progress
from anomaly_clip.callbacks import (
    BatchNormStatistics,
    DataWaitMonitor,
    PlainProgress,
    TerminalProgress,
    progress_of_loops,
)
from anomaly_clip.cli import main
from anomaly_clip.progress import track

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*isinstance.treespec, LeafSpec.*",
    "ignore:.*have no `val_dataloader`.*",
    "ignore:You defined a `validation_step` but have no.*",
)


class Slow(LightningModule):
    """Module whose training batches take four seconds each, and all other batches six."""

    def __init__(self, clock: StandingClock) -> None:
        super().__init__()
        self.clock = clock
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.clock.now += 4
        loss = (self.weight - 1).square().sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.clock.now += 6
        self.log_dict({"val/image_auroc": 0.75, "val/image_ap": 0.5})

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.clock.now += 6

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.clock.now += 6
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def loader(count: int = 4) -> DataLoader[Tensor]:
    return DataLoader(list(torch.arange(float(count))), num_workers=0)  # type: ignore[arg-type]


@pytest.fixture
def trainer(clock: StandingClock) -> Callable[..., Trainer]:
    def build(**options: Any) -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[PlainProgress(clock)],
            **options,
        )

    return build


def progress_lines(capsys: Capture) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if re.match(r"\w+ing: ", line)]


def test_progress_lines_of_a_fit(
    clock: StandingClock, trainer: Callable[..., Trainer], capsys: Capture
) -> None:
    trainer(max_epochs=5).fit(Slow(clock), loader())
    assert progress_lines(capsys) == [
        "fitting: epoch 1 of 5, batch 3 of 4, 0.25 per second, 1 min 8 s left, train/loss 1",
        "fitting: epoch 3 of 5, batch 3 of 4, 0.25 per second, 36 s left, train/loss 1",
        "fitting: epoch 5 of 5, batch 3 of 4, 0.25 per second, 4 s left, train/loss 1",
        "fitting: 20 batches in 1 min 20 s",
    ]


def test_a_validation_is_part_of_the_progress_of_its_fit(
    clock: StandingClock, trainer: Callable[..., Trainer], capsys: Capture
) -> None:
    trainer(max_epochs=2).fit(Slow(clock), loader(), loader(6))
    # The sanity check before the fit took 12 s and is not reported. After it, training batches
    # take 4 s and validation batches 6 s.
    assert progress_lines(capsys) == [
        "fitting: epoch 1 of 2, batch 3 of 4, 0.25 per second, 20 s left, train/loss 1",
        "fitting: epoch 1 of 2, batch 4 of 4, 0.087 per second, 46 s left, validating batch 5 of 6",
        "fitting: epoch 2 of 2, batch 4 of 4, 0.1 per second, validating batch 2 of 6",
        "fitting: 8 batches in 1 min 44 s",
    ]


def test_a_line_shows_the_metrics_of_the_last_validation(
    clock: StandingClock, trainer: Callable[..., Trainer], chatty: None, capsys: Capture
) -> None:
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(Slow(clock), loader(1), loader(1))
    first, _, second, *_ = progress_lines(capsys)
    assert first.endswith("4 s left, train/loss 1")
    assert second.endswith("train/loss 1, val/image_auroc 0.75")


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"max_steps": 9}, "step 3 of 9, epoch 1, 0.25 per second, 24 s left"),
        (
            {"max_steps": 9, "max_epochs": 1},
            "epoch 1 of 1, batch 3 of 4, 0.25 per second, 4 s left",
        ),
        ({"max_steps": 9, "max_epochs": 99}, "step 3 of 9, epoch 1, 0.25 per second, 24 s left"),
        (
            {"max_epochs": 2, "limit_train_batches": 3},
            "epoch 1 of 2, batch 3 of 3, 0.25 per second, 12 s left",
        ),
        (
            {"max_steps": 4, "accumulate_grad_batches": 2},
            "step 1 of 4, epoch 1, 0.0833 per second, 36 s left",
        ),
    ],
)
def test_a_line_counts_what_ends_the_fit_first(
    options: dict[str, Any],
    first: str,
    clock: StandingClock,
    trainer: Callable[..., Trainer],
    capsys: Capture,
) -> None:
    trainer(**options).fit(Slow(clock), loader())
    assert progress_lines(capsys)[0] == f"fitting: {first}, train/loss 1"


def test_a_fit_without_end_has_no_time_left(
    clock: StandingClock, trainer: Callable[..., Trainer], capsys: Capture
) -> None:
    class Ending(Slow):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    trainer(max_epochs=-1).fit(Ending(clock), loader())
    assert progress_lines(capsys) == [
        "fitting: epoch 1, batch 3 of 4, 0.25 per second, train/loss 1",
        "fitting: 8 batches in 32 s",
    ]


@pytest.mark.parametrize(
    ("verb", "title"),
    [("validate", "validating"), ("test", "testing"), ("predict", "predicting")],
)
def test_progress_lines_of_the_other_loops(
    verb: str,
    title: str,
    clock: StandingClock,
    trainer: Callable[..., Trainer],
    capsys: Capture,
) -> None:
    getattr(trainer(), verb)(Slow(clock), loader(4))
    assert progress_lines(capsys) == [
        f"{title}: batch 2 of 4, 0.167 per second, 12 s left",
        f"{title}: 4 batches in 24 s",
    ]
    # Several loaders form one loop; limits apply to each.
    limits = {f"limit_{'val' if verb == 'validate' else verb}_batches": 3}
    getattr(trainer(**limits), verb)(Slow(clock), [loader(9), loader(9)])
    assert progress_lines(capsys)[0] == f"{title}: batch 2 of 6, 0.167 per second, 24 s left"
    getattr(trainer(), verb)(Slow(clock), loader(1))
    assert progress_lines(capsys) == []


def test_other_processes_write_no_progress(
    clock: StandingClock, chatty: None, capsys: Capture
) -> None:
    bar = PlainProgress(clock)
    bar.disable()  # as Lightning does on all ranks except 0
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=[bar],
    )
    trainer.fit(Slow(clock), loader(), loader())
    trainer.test(Slow(clock), loader())
    assert progress_lines(capsys) == []


def test_bars_are_shown_only_if_standard_error_is_a_terminal(
    terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(progress_of_loops(), TerminalProgress)
    monkeypatch.delenv("FORCE_COLOR")
    assert isinstance(progress_of_loops(), PlainProgress)


def patchcore(verb: str, root: Path, runs: Path, *more: str) -> list[str]:
    words = [verb, "--model", "PatchCore", "--model.backbone.weights", "random"]
    words += ["--model.image_size", "32", "--model.coreset", "0.5"]
    words += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    words += ["--data.batch_size", "1", "--trainer.accelerator", "cpu"]
    return [*words, "--data.categories", "[bottle]", "--output.folder", str(runs), *more]


def in_order(lines: list[str], *parts: str) -> bool:
    """Return whether the lines contain these parts in this order."""
    rest = iter(lines)
    return all(any(part in line for line in rest) for part in parts)


def test_fit_test_and_predict_log_their_progress(
    mvtec_root: Path, tmp_path: Path, chatty: None, capsys: Capture
) -> None:
    assert main(patchcore("fit", mvtec_root, tmp_path / "run")) == 0
    fit = capsys.readouterr()
    assert "fitting" not in fit.out
    lines = fit.err.splitlines()
    assert in_order(
        lines,
        "comparing files: ",
        "fitting: epoch 1 of 1, batch 1 of 2, ",
        "fitting: epoch 1 of 1, batch 2 of 2, ",
        "choosing patches: 1 of 16, ",
        "choosing patches: 16 in 0 s",
        "fitting: 2 batches in ",
    )
    assert sum(line.startswith("choosing patches: 16") for line in lines) == 1
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    more = ["--ckpt_path", checkpoint, "--output.maps", "true"]
    for verb, title in (("test", "testing"), ("predict", "predicting")):
        assert main(patchcore(verb, mvtec_root, tmp_path / verb, *more)) == 0
        out = capsys.readouterr()
        assert title not in out.out
        assert in_order(
            out.err.splitlines(),
            f"{title}: batch 1 of 4, ",
            f"{title}: batch 3 of 4, ",
            f"{title}: 4 batches in ",
            "drawing maps: 1 of 4, ",
            "drawing maps: 4 in ",
            str(tmp_path / verb),
        )


def test_a_short_command_writes_no_progress(
    mvtec_root: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(patchcore("fit", mvtec_root, tmp_path / "run")) == 0
    assert progress_lines(capsys) == []


def test_disabled_bars_are_not_replaced_by_lines(
    mvtec_root: Path, tmp_path: Path, chatty: None, capsys: Capture
) -> None:
    silent = ["--trainer.enable_progress_bar", "false"]
    assert main(patchcore("fit", mvtec_root, tmp_path / "run", *silent)) == 0
    assert "choosing patches" not in (err := capsys.readouterr().err)
    assert "fitting: " not in err
    # The next command shows its progress again.
    assert main(patchcore("fit", mvtec_root, tmp_path / "again")) == 0
    assert "choosing patches" in capsys.readouterr().err


def test_a_configured_bar_replaces_ours(
    mvtec_root: Path, tmp_path: Path, chatty: None, capsys: Capture
) -> None:
    configured = ["--trainer.callbacks", "TQDMProgressBar", "--trainer.callbacks.refresh_rate", "0"]
    assert main(patchcore("fit", mvtec_root, tmp_path / "run", *configured)) == 0
    assert "fitting: " not in capsys.readouterr().err


def test_on_a_terminal_steps_are_shown_among_lightnings_bars(
    mvtec_root: Path, tmp_path: Path, terminal: None, capsys: Capture
) -> None:
    assert main(patchcore("fit", mvtec_root, tmp_path / "run")) == 0
    err = capsys.readouterr().err
    assert "Epoch 0" in err
    assert "choosing patches" in err
    assert "fitting: " not in err
    # Bars and steps share a display: the cursor is shown as often as it is hidden.
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h")
    during = err[err.index("Epoch 0") : err.index("choosing patches")]
    assert "\x1b[?25l" not in during
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    more = ["--ckpt_path", checkpoint, "--output.maps", "true"]
    assert main(patchcore("test", mvtec_root, tmp_path / "test", *more)) == 0
    out = capsys.readouterr()
    assert "Testing" in out.err
    assert "Testing" not in out.out
    assert re.search(r"\d+/4.*•.*it/s", out.err)  # rate and time left
    # The bars disappear before the table and everything after it.
    assert "Testing" not in out.err[out.err.index("drawing maps") :]


def test_bars_do_not_need_a_display_of_lightning(terminal: None, capsys: Capture) -> None:
    bars = TerminalProgress()
    assert bars.display() is None
    progress.show_below(bars.display)
    assert list(track(range(2), "alone")) == [0, 1]
    assert "alone" in capsys.readouterr().err


def test_a_configured_bar_and_a_step_do_not_collide(
    mvtec_root: Path, tmp_path: Path, terminal: None, capsys: Capture
) -> None:
    configured = ["--trainer.callbacks", "RichProgressBar", "--trainer.callbacks.leave", "true"]
    assert main(patchcore("fit", mvtec_root, tmp_path / "run", *configured)) == 0
    out = capsys.readouterr()
    assert "Epoch 0" in out.out + out.err
    assert "choosing patches" in out.err


def test_the_share_of_waiting_is_summed_over_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are given by start and end. The first batch of an epoch does not count."""
    epochs = [[(5, 6), (8, 9), (12, 18), (19, 20)], [(100, 101), (102, 105)]]
    ticks = iter([float(tick) for epoch in epochs for batch in epoch for tick in batch])
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    logged: list[float] = []
    module: Any = SimpleNamespace(log=lambda name, value, sync_dist: logged.append(value))
    trainer: Any = None
    monitor = DataWaitMonitor()
    for epoch in epochs:
        monitor.on_train_epoch_start(trainer, module)
        assert monitor.share == 0
        for _ in epoch:
            monitor.on_train_batch_start()
            monitor.on_train_batch_end()
        monitor.on_train_epoch_end(trainer, module)
    waited, worked = (8 - 6) + (12 - 9) + (19 - 18), 1 + 6 + 1
    assert logged == pytest.approx([waited / (waited + worked), 1 / (1 + 3)])


class Trained(LightningModule):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("layer", "world_size", "speaks"),
    [
        (nn.BatchNorm2d(2), 2, True),
        (nn.Sequential(nn.BatchNorm1d(2)), 2, True),
        (nn.BatchNorm2d(2), 1, False),
        (nn.BatchNorm2d(2).eval(), 2, False),  # of a frozen backbone
        (nn.LayerNorm(2), 2, False),
    ],
)
def test_several_processes_say_whose_statistics_they_use(
    layer: nn.Module, world_size: int, speaks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(world_size=world_size)
    BatchNormStatistics().on_train_start(trainer, Trained(layer))
    assert (
        "each of the 2 processes uses the statistics of its own" in capsys.readouterr().err
    ) == (speaks)


@pytest.mark.parametrize(
    ("world_size", "device", "refused"), [(2, "cpu", True), (2, "cuda", False), (1, "cpu", False)]
)
def test_statistics_are_not_synchronised_on_the_cpu(
    world_size: int, device: str, refused: bool
) -> None:
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(world_size=world_size, strategy=strategy)
    BatchNormStatistics().setup(trainer, Trained(), "fit")
    with pytest.raises(ValueError, match="needs GPUs") if refused else nullcontext():
        BatchNormStatistics(synchronised=True).setup(trainer, Trained(), "fit")


def test_synchronised_statistics_need_no_remark(capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = SimpleNamespace(world_size=2)
    layers = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)))
    BatchNormStatistics().on_train_start(trainer, Trained(layers))
    assert not capsys.readouterr().err
