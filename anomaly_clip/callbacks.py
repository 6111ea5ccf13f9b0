"""Callbacks: progress of Lightning's loops, time waiting for data, statistics of BatchNorm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import Progress
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomaly_clip.progress import Clock, LogProgress, counted, say, sees_bars, show_below

__all__ = [
    "BatchNormStatistics",
    "DataWaitMonitor",
    "PlainProgress",
    "TerminalProgress",
    "progress_of_loops",
]

LINE_METRICS = ("loss", "auroc", "accuracy")
"""Suffixes of the validation metrics that a log line shows."""


def progress_of_loops() -> ProgressBar:
    """Return the progress callback for a trainer: bars if standard error can show them."""
    return TerminalProgress() if sees_bars() else PlainProgress()


class TerminalProgress(RichProgressBar):
    """Lightning's bars on standard error, including the bars of steps inside its loops."""

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the bars of :func:`anomaly_clip.progress.track` in this display."""
        super().setup(trainer, pl_module, stage)
        show_below(self.display)

    def display(self) -> Progress | None:
        """Return the display on the screen, or None if there is none."""
        shown = self.progress is not None and self.progress.live.is_started
        return self.progress if shown else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the display."""
        self._stop_progress()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the display, unless the training continues."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._stop_progress()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the display: the table comes next."""
        super().on_test_end(trainer, pl_module)
        self._stop_progress()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the display."""
        super().on_predict_end(trainer, pl_module)
        self._stop_progress()


class PlainProgress(ProgressBar):
    """Occasional log lines, for non-interactive output; none for loops of less than ten seconds.

    Validations during a fit are part of the progress of the fit.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        super().__init__()
        self._enabled = True
        self._clock = clock
        self._lines = LogProgress("", clock)
        self._batches = 0
        """Number of batches done since the start of the loop."""
        self._first_batch = self._first_step = 0
        """Batch and step at the start of the fit: not 0 if it was resumed."""
        self._batch = self._validated = 0
        """Number of batches done in the current epoch, and in its validation."""

    def disable(self) -> None:
        """Stop writing lines; Lightning calls this on all processes except the first."""
        self._enabled = False

    def enable(self) -> None:
        """Write lines again."""
        self._enabled = True

    def _begin(self, title: str) -> None:
        self._lines, self._batches = LogProgress(title, self._clock), 0

    def _end(self) -> None:
        if self._enabled and self._batches:
            self._lines.end(f"{self._batches:,} {'batch' if self._batches == 1 else 'batches'}")

    # -- fit -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the progress of the fit."""
        self._begin("fitting")
        self._first_batch = trainer.fit_loop.total_batch_idx + 1
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a line if one is due, with the last loss and the last metrics."""
        self._batches += 1
        self._batch = batch_idx + 1
        if self._enabled and self._lines.due:
            self._log_fit(trainer, last_metrics(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last line."""
        self._end()

    def _log_fit(self, trainer: Trainer, more: Iterator[str]) -> None:
        """Write a line that counts steps or batches, whichever will end the fit first."""
        epoch, batches = trainer.current_epoch + 1, trainer.num_training_batches
        epochs = None if trainer.max_epochs == -1 else trainer.max_epochs
        where = f"epoch {counted(epoch, epochs)}"
        total = None if epochs is None else epochs * batches - self._first_batch
        done = self._batches
        if trainer.max_steps > 0:
            step = trainer.global_step
            steps, all_steps = step - self._first_step, trainer.max_steps - self._first_step
            if total is None or steps * total >= all_steps * done:
                where = f"step {counted(step, trainer.max_steps)}, epoch {epoch:,}"
                self._lines.log(steps, all_steps, where, more)
                return
        where += f", batch {counted(self._batch, batches)}"
        self._lines.log(done, total, where, more)

    # -- validate, test, predict -----------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the progress of the validation."""
        self._validated = 0
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin("validating")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write a line if one is due, except in the sanity check before a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluated(trainer.num_val_batches)
        elif not trainer.sanity_checking:
            self._validated += 1
            if self._enabled and self._lines.due:
                place = counted(self._validated, sum(trainer.num_val_batches))
                self._log_fit(trainer, iter([f"validating batch {place}"]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last line."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._end()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the progress of the test."""
        self._begin("testing")

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write a line if one is due."""
        self._evaluated(trainer.num_test_batches)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last line."""
        self._end()

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the progress of the prediction."""
        self._begin("predicting")

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write a line if one is due."""
        self._evaluated(trainer.num_predict_batches)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last line."""
        self._end()

    def _evaluated(self, batches: list[int | float]) -> None:
        """Count a batch and write a line if one is due; several loaders run one after the other."""
        self._batches += 1
        total = sum(batches)
        if self._enabled and self._lines.due and self._batches != total:
            where = f"batch {counted(self._batches, total)}"
            self._lines.log(self._batches, total, where)


def last_metrics(trainer: Trainer) -> Iterator[str]:
    """Yield the last loss and the last validation metrics, each with its name."""
    logged = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    shown = {k: v for k, v in logged.items() if k.endswith(LINE_METRICS)}
    for name, value in {**trainer.progress_bar_metrics, **shown}.items():
        yield f"{name} {value:.4g}"


class DataWaitMonitor(Callback):
    """Log the fraction of the training time spent waiting for batches, as ``train/waiting``.

    The first batch of an epoch is ignored, since the data loader workers start before it.
    """

    def __init__(self) -> None:
        self.waited = self.worked = 0.0
        self._begun = self._ended = 0.0

    @property
    def share(self) -> float:
        """Fraction of this epoch's time spent waiting so far; 0 before the second batch."""
        total = self.waited + self.worked
        return self.waited / total if total else 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the times."""
        self.waited = self.worked = self._ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Add the time since the last step to the waiting time."""
        self._begun = time.perf_counter()
        if self._ended:
            self.waited += self._begun - self._ended

    def on_train_batch_end(self, *_: Any) -> None:
        """Add the time of the step to the working time."""
        now = time.perf_counter()
        if self._ended:
            self.worked += now - self._begun
        self._ended = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the fraction for the whole epoch."""
        pl_module.log("train/waiting", self.share, sync_dist=True)


class BatchNormStatistics(Callback):
    """Tell which images the statistics of BatchNorm come from, if several processes train.

    Args:
        synchronised: Whether the trainer computes them over the images of all processes.
    """

    def __init__(self, synchronised: bool = False) -> None:
        self.synchronised = synchronised

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that torch can synchronise the processes.

        Raises:
            ValueError: If they use the CPU.
        """
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self.synchronised and trainer.world_size > 1 and on_cpu:
            raise ValueError(
                "trainer.sync_batchnorm true needs GPUs, got CPUs: set it to false, so that each "
                "process uses the statistics of its own images"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line if each process has statistics of its own.

        Layers of frozen backbones are in evaluation mode, and do not count.
        """
        layers = (m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training)
        separate = any(not isinstance(layer, nn.SyncBatchNorm) for layer in layers)
        if separate and trainer.world_size > 1:
            on_cpu = pl_module.device.type == "cpu"
            way_out = "" if on_cpu else "; --trainer.sync_batchnorm true uses those of all images"
            say(
                f"BatchNorm: each of the {trainer.world_size} processes uses the statistics of its "
                f"own images, so the weights differ from those of a fit in one process{way_out}"
            )
