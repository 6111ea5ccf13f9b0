"""Messages of a fit with values that are not finite: what, where, the likely cause, the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from anomaly_clip.commands.finite_tensors import not_finite
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.records import needs_of, source_of

__all__ = ["WatchedStep", "failure_of_step", "listed", "way_out"]

SHOWN = 3
"""Images and tensors named in a message."""


class WatchedStep(NamedTuple):
    """Outputs of a training step, whose check may still be running on the device."""

    place: str
    """Step or batch, for messages."""
    is_first: bool
    """True if no step before it was finite."""
    batch: Any
    values: dict[str, Tensor]
    finite: Tensor
    """bool ``()``."""
    done: torch.cuda.Event | None
    """Recorded on a GPU after the check."""


def failure_of_step(trainer: Trainer, step: WatchedStep) -> str:
    """Return the message for a step whose outputs are not finite."""
    wrong = not_finite(step.values)
    shown = [f"{name} is {_value_text(step.values[name])}" for name in wrong]
    parts = {
        name: value
        for name, value in trainer.callback_metrics.items()
        if name.startswith("train/") and name not in ("train/loss", *wrong)
    }
    shown += [f"{name} is {_value_text(parts[name])}" for name in not_finite(parts)[:SHOWN]]
    paths = _paths(step)
    images = f" for {listed(paths, 'images')}" if paths else ""
    return (
        f"the fit diverged in {step.place}: {', '.join(shown)}{images}: "
        f"{_cause(trainer, step) or way_out(trainer, step.is_first)}"
    )


def _value_text(value: Tensor) -> str:
    if value.numel() > 1:
        return "NaN" if bool(value.isnan().any()) else "infinite"
    number = float(value)
    return "NaN" if math.isnan(number) else "infinite" if math.isinf(number) else f"{number:g}"


def _paths(step: WatchedStep) -> list[str]:
    """Return the paths of a step's images; only those that are not finite, if that is known."""
    paths = step.batch.get("path") if isinstance(step.batch, Mapping) else None
    if not isinstance(paths, (list, tuple)):
        return []
    paths = [str(path) for path in paths]
    images = step.batch.get("image")
    for values in (images, step.values.get("features")):
        if isinstance(values, Tensor) and values.is_floating_point() and len(values) == len(paths):
            finite = values.reshape(len(paths), -1).isfinite().all(dim=1).tolist()
            wrong = [path for path, is_finite in zip(paths, finite, strict=True) if not is_finite]
            if wrong:
                return wrong
    return paths


def _cause(trainer: Trainer, step: WatchedStep) -> str | None:
    """Return a cause that can be seen, with its way out; None if there is none."""
    batch = step.batch if isinstance(step.batch, Mapping) else {}
    for key in ("image", "synthetic"):
        values = batch.get(key)
        if isinstance(values, Tensor) and values.is_floating_point() and not_finite({key: values}):
            return "their pixels are NaN or infinite; correct these files, or leave them out"
    module = trainer.lightning_module
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    wrong = not_finite(frozen)
    if wrong:
        weights = module.weights if isinstance(module, EvaluatedModule) else None
        source = "" if weights is None else f" ({source_of(weights)})"
        return (
            f"the frozen weights{source} are NaN or infinite in {listed(wrong, 'tensors')}; give "
            f"other weights"
        )
    return None


def way_out(trainer: Trainer, is_first: bool) -> str:
    """Return the likely cause and what to change.

    Args:
        trainer: The trainer.
        is_first: Whether no step before was finite, so that the learning rate is not the cause.
    """
    half = str(trainer.precision).startswith("16")
    if half:
        return "float16 overflows above 65504; try trainer.precision bf16-mixed or 32-true"
    lower = "" if str(trainer.precision).startswith("32") else ", or set trainer.precision 32-true"
    if needs_of(trainer).single_pass:
        if trainer.lightning_module.hparams.get("bank_type") == "float16":
            lower += ", or model.bank_type float32"
        return f"the features of the backbone are not finite; give other weights{lower}"
    if is_first:
        return (
            f"nothing was learnt before, so the learning rate is not the cause; look at the "
            f"weights and at the settings of the loss{lower}"
        )
    rates = dict(_learning_rates("model", trainer.lightning_module.hparams))
    named = " and ".join(f"{name} (now {rate:g})" for name, rate in rates.items())
    clip = ""
    if trainer.lightning_module.automatic_optimization and trainer.gradient_clip_val is None:
        clip = ", or set trainer.gradient_clip_val 1"
    return f"fit again with a smaller {named or 'learning rate'}{clip}{lower}"


def _learning_rates(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the options of a model that are learning rates, with their values."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _learning_rates(f"{prefix}.{name}", value)
        elif (name == "lr" or name.endswith("_lr")) and isinstance(value, (int, float)):
            yield f"{prefix}.{name}", float(value)


def listed(names: list[str], kind: str) -> str:
    """Return the first names, and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more {kind}" if more > 0 else "")
