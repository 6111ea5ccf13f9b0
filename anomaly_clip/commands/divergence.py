"""Callback that ends a fit whose loss, features, weights or fitted values are not finite."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.commands.divergence_message import (
    WatchedStep,
    failure_of_step,
    listed,
    way_out,
)
from anomaly_clip.commands.finite_tensors import (
    buffers,
    frozen_prefixes,
    has_no_nan,
    not_finite,
    optimizer_state,
    running_statistics,
)
from anomaly_clip.commands.interruption import Interrupted
from anomaly_clip.commands.last_step import FINITE, last_checkpoint
from anomaly_clip.errors import Diverged
from anomaly_clip.progress import say
from anomaly_clip.records import needs_of

__all__ = ["FiniteValues"]

WATCHED = ("loss", "features")
"""Outputs of a training step that must be finite."""
BETWEEN = 50
"""Steps between two comparisons of several processes, or two looks at a slow device."""
SKIPPED = 20
"""Consecutive steps that a scaler of gradients may skip: it starts at 2 ** 16 and halves itself."""


class FiniteValues(Callback):
    """Stop a fit with NaN or infinite values, before it saves them.

    Each training step's ``loss`` and ``features`` are checked; on a GPU without waiting for them,
    a few steps later. Weights, buffers and the optimiser's state are checked before every
    checkpoint, before every validation and at the end. Several processes stop together. Under a
    scaler of gradients (precision 16-mixed), single steps may have an infinite loss: the scaler
    skips them.

    ``last.ckpt`` of a diverged fit, which is finite, becomes ``finite-step-<n>.ckpt``.
    """

    def __init__(self) -> None:
        self._waiting: deque[WatchedStep] = deque()
        self._failure: str | None = None
        self._not_finite_in_a_row = 0
        self._any_finite = False
        self._infinite_buffers: set[str] = set()
        self._saved = False
        self._single_pass = False

    # -- hooks -----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the initial or restored weights.

        Raises:
            Diverged: If one is not finite.
        """
        self.__init__()  # type: ignore[misc]
        self._single_pass = needs_of(trainer).single_pass
        self._infinite_buffers = {
            name for name in not_finite(buffers(pl_module)) if has_no_nan(pl_module, name)
        }
        tensors = dict(pl_module.named_parameters()) | dict(running_statistics(pl_module))
        wrong = not_finite(tensors)
        if wrong:
            path = trainer.ckpt_path
            raise Diverged(
                f"{type(pl_module).__name__} cannot be fitted: its {listed(wrong, 'weights')} are "
                f"NaN or infinite before the first step: "
                + (
                    "give weights of a training that did not diverge"
                    if path is None
                    else f"--ckpt_path {path} comes from a fit that diverged; give another one"
                )
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Check the outputs of a step, or of earlier ones that the device has finished.

        Raises:
            Diverged: If a value is not finite.
        """
        values = _watched_values(trainer, pl_module, outputs)
        if values:
            self._watch(trainer, values, batch, batch_idx)
        compares = trainer.world_size > 1 and (batch_idx + 1) % BETWEEN == 0
        if trainer.world_size == 1 or compares:
            self._agree(trainer)
        self._check_weights_only(trainer, pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the outputs of all steps, before a single pass computes its result from them.

        Raises:
            Diverged: If a value is not finite.
        """
        self._drain(trainer)
        self._agree(trainer)
        self._check_weights_only(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything before images are scored during a fit.

        Raises:
            Diverged: If a value is not finite.
        """
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check everything before it is saved.

        Raises:
            Diverged: If a value is not finite.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer, pl_module)
            self._saved = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything at the end of the fit.

        Raises:
            Diverged: If a value is not finite.
        """
        self._check(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Rename ``last.ckpt`` if a method has found out itself that its fit diverged."""
        self._waiting.clear()
        if self._failure is not None or isinstance(exception, (Interrupted, KeyboardInterrupt)):
            return
        if trainer.state.fn == TrainerFn.FITTING and isinstance(exception, Diverged):
            kept = self._keep_finite(trainer)
            if kept is not None:
                say(f"the last finite state of the fit is kept as {kept}")

    # -- checks ----------------------------------------------------------------------------------

    def _watch(self, trainer: Trainer, values: dict[str, Tensor], batch: Any, index: int) -> None:
        """Start the check of a step's values, and read those of earlier steps that are done."""
        if all(_is_finite_number(value) for value in values.values()):  # the usual case on a CPU
            self._any_finite, self._not_finite_in_a_row = True, 0
            return
        flags = [torch.stack(value.aminmax()).isfinite().all() for value in values.values()]
        finite = flags[0] if len(flags) == 1 else torch.stack(flags).all()
        place = f"step {trainer.global_step}"
        if self._single_pass or not trainer.global_step:
            place = f"batch {index + 1}"
        is_first = not self._any_finite and not self._waiting and not self._not_finite_in_a_row
        step = WatchedStep(place, is_first, batch, values, finite, None)
        if finite.device.type == "cpu":
            self._read(trainer, step)
        elif finite.device.type == "cuda":
            copied = finite.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(finite.device))
            self._waiting.append(step._replace(finite=copied, done=done))
            while self._waiting and _is_done(self._waiting[0]):
                self._read(trainer, self._waiting.popleft())
        else:
            self._waiting.append(step)
            if len(self._waiting) >= BETWEEN:
                self._drain(trainer)

    def _drain(self, trainer: Trainer) -> None:
        """Wait for the checks of all steps."""
        while self._waiting:
            step = self._waiting.popleft()
            if step.done is not None:
                step.done.synchronize()
            self._read(trainer, step)

    def _read(self, trainer: Trainer, step: WatchedStep) -> None:
        """Record the failure of a step, if it is one."""
        if bool(step.finite):
            self._any_finite, self._not_finite_in_a_row = True, 0
            return
        self._not_finite_in_a_row += 1
        if _has_scaler(trainer) and self._not_finite_in_a_row < SKIPPED:
            return
        if self._failure is None:
            self._failure = failure_of_step(trainer, step)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the outputs of all steps, and every value that a checkpoint would hold.

        Raises:
            Diverged: If a value is not finite.
        """
        self._drain(trainer)
        if self._failure is None:
            wrong = self._wrong_values(trainer, module)
            place = f"after step {trainer.global_step}" if trainer.global_step else "after its pass"
            if wrong:
                self._failure = (
                    f"the fit diverged: {listed(wrong, 'values')} are NaN or infinite {place}: "
                    f"{way_out(trainer, False)}"
                )
            elif self._not_finite_in_a_row and not self._any_finite:
                self._failure = (
                    f"the fit diverged: the loss of none of its steps was finite {place}: "
                    f"{way_out(trainer, True)}"
                )
        self._agree(trainer)

    def _check_weights_only(
        self, trainer: Trainer, module: LightningModule, step: int | None = None
    ) -> None:
        """Check everything if a checkpoint follows for which ``on_save_checkpoint`` is not called.

        Raises:
            Diverged: If a value is not finite.
        """
        if any(_saves_weights_only(callback, step) for callback in trainer.checkpoint_callbacks):
            self._check(trainer, module)
            self._saved = True

    def _wrong_values(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """Return the names of weights, buffers and optimiser states that are not finite."""
        frozen = frozen_prefixes(module)
        tensors = {
            name: tensor
            for name, tensor in [*module.named_parameters(), *buffers(module).items()]
            if not name.startswith(frozen) or tensor.requires_grad
        }
        wrong = [
            name
            for name in not_finite(tensors)
            if name not in self._infinite_buffers or not has_no_nan(module, name)
        ]
        return wrong or not_finite(optimizer_state(trainer, module))

    def _agree(self, trainer: Trainer) -> None:
        """Stop if a process has found a value that is not finite; all processes stop together.

        Raises:
            Diverged: If one has.
        """
        failure = self._failure
        if trainer.world_size > 1:
            failed = failure is not None
            if not trainer.strategy.reduce_boolean_decision(failed, all=False):
                return
            messages: list[str | None] = [None] * trainer.world_size
            torch.distributed.all_gather_object(messages, failure)
            failure = next(message for message in messages if message is not None)
        if failure is not None:
            self._failure = failure
            kept = trainer.strategy.broadcast(self._keep_finite(trainer))
            more = "" if kept is None else f"; the last finite state is kept as {kept}"
            raise Diverged(failure + more)

    def _keep_finite(self, trainer: Trainer) -> Path | None:
        """Rename ``last.ckpt`` of this fit, and return its new path; None without one.

        Process 0 does so: after it, the others would not find the file.
        """
        file = last_checkpoint(trainer)
        if file is None or not trainer.is_global_zero or not file.is_file():
            return None
        resumed = trainer.ckpt_path
        is_resumed = resumed is not None and Path(resumed).resolve() == file.resolve()
        if not (self._saved or is_resumed):  # left by another fit in the same folder
            return None
        kept = file.with_name(FINITE.replace("*", str(_step_of(file))))
        os.replace(file, kept)
        return kept


def _watched_values(trainer: Trainer, module: LightningModule, outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a step to check; without any, losses that it has logged."""
    if isinstance(outputs, Tensor):
        outputs = {"loss": outputs}
    values: dict[str, Any] = dict(outputs) if isinstance(outputs, Mapping) else {}
    values = {name: values[name] for name in WATCHED if name in values}
    if not values and not module.automatic_optimization:
        logged = trainer.callback_metrics
        values = {name: value for name, value in logged.items() if name.endswith("train/loss")}
    return {
        name: value.detach()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }


def _is_finite_number(value: Tensor) -> bool:
    return value.ndim == 0 and value.device.type == "cpu" and math.isfinite(value.item())


def _is_done(step: WatchedStep) -> bool:
    return step.done is None or step.done.query()


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _saves_weights_only(callback: object, step: int | None = None) -> bool:
    """Return whether a callback may save now without calling ``on_save_checkpoint``."""
    if not isinstance(callback, ModelCheckpoint) or not callback.save_weights_only:
        return False
    every = callback._every_n_train_steps
    return step is None or (every > 0 and step % every == 0)


def _step_of(file: Path) -> int:
    """Return the step of a checkpoint that this fit has written."""
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return int(content["global_step"])
