"""Learning rate schedules (linear warm-up, cosine decay), and the training length they need."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule

__all__ = ["half_cosine", "total_epochs", "total_steps", "warmup_cosine"]


def total_steps(module: LightningModule, alternative: str = "") -> int:
    """Return the number of optimiser steps of the training.

    Args:
        module: A module attached to a trainer.
        alternative: Appended to the error message, for modules that allow another remedy.

    Raises:
        ValueError: If the number of steps is unlimited.
    """
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise _endless(module, alternative)
    return int(steps)


def total_epochs(module: LightningModule, alternative: str = "") -> int:
    """Return the number of epochs of the training; see :func:`total_steps` for the arguments.

    Raises:
        ValueError: If the number of epochs is unlimited.
    """
    epochs = module.trainer.max_epochs
    if epochs is None or epochs < 1:
        raise _endless(module, alternative)
    return epochs


def half_cosine(angle: float, last: float = 0.0) -> float:
    """Return the learning rate factor of a half cosine: 1 at angle 0, ``last`` at angle pi."""
    return last + (1 - last) * 0.5 * (1 + math.cos(angle))


def warmup_cosine(step: int, warmup: int, total: int, last: float = 0.0) -> float:
    """Return the learning rate factor: linear warm-up to 1, then half a cosine down to ``last``.

    Args:
        step: Step index, from 0; the factor is constant beyond ``total``.
        warmup: Number of warm-up steps; 0 disables the warm-up.
        total: Number of steps, including the warm-up.
        last: Final factor.

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
        f"{type(module).__name__} decays its learning rate until the end of the training, but "
        f"trainer.max_epochs {module.trainer.max_epochs} sets no end: set trainer.max_epochs to 1 "
        f"or more{alternative}"
    )
