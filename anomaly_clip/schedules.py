"""Learning rate schedules: length of the training, linear warm-up and cosine decay."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule

__all__ = ["half_cosine", "total_epochs", "total_steps", "warmup_cosine"]


def total_steps(module: LightningModule, alternative: str = "") -> int:
    """Return the number of optimiser steps of the training.

    Args:
        module: A module attached to a trainer.
        alternative: Appended to the advice of the error, for modules with another way out.

    Raises:
        ValueError: If the training has no end.
    """
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise _endless(module, alternative)
    return int(steps)


def total_epochs(module: LightningModule, alternative: str = "") -> int:
    """Return the number of epochs; see :func:`total_steps` for arguments and errors."""
    epochs = module.trainer.max_epochs
    if epochs is None or epochs < 1:
        raise _endless(module, alternative)
    return epochs


def half_cosine(angle: float, last: float = 0.0) -> float:
    """Return the factor at an angle from 0 (factor 1) to pi (factor ``last``)."""
    return last + (1 - last) * 0.5 * (1 + math.cos(angle))


def warmup_cosine(step: int, warmup: int, total: int, last: float = 0.0) -> float:
    """Return the factor of a step: linear warm-up to 1, then half a cosine down to ``last``.

    Args:
        step: Counted from 0; beyond ``total`` the factor is constant.
        warmup: Number of warm-up steps; 0 for none.
        total: Number of all steps, warm-up included.
        last: Factor at the end.

    Example:
        >>> from anomaly_clip.schedules import warmup_cosine
        >>> [round(warmup_cosine(step, 2, 6, 0.1), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup:
        return (step + 1) / warmup
    return half_cosine(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)), last)


def _endless(module: LightningModule, alternative: str) -> ValueError:
    return ValueError(
        f"{type(module).__name__} decays its learning rate until the end of the training, which "
        f"must be known: give trainer.max_epochs{alternative}"
    )
