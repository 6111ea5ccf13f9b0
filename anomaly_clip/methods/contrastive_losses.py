"""Losses of the small CLIP's training, on images and patches of scenes with and without defects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "masked_mean",
    "multi_positive",
    "paired_patch_loss",
    "patch_loss",
    "squared_effect_size",
]

ABNORMAL_WEIGHT = 4.0  # of a patch on a defect


def multi_positive(logits: Tensor, fits: Tensor) -> Tensor:
    """Return CLIP's loss where several sentences may fit a picture and several pictures a sentence.

    Args:
        logits: ``(I, J)`` of pictures and sentences.
        fits: bool ``(I, J)``; each picture and each sentence has at least one.

    Returns:
        The mean over both directions of the negative mean log-probability of what fits. With one
        positive each it is CLIP's.
    """

    def one_way(logits: Tensor, fits: Tensor) -> Tensor:
        log_probability = logits.log_softmax(dim=1)
        return -((log_probability * fits).sum(1) / fits.sum(1)).mean()

    return 0.5 * (one_way(logits, fits) + one_way(logits.T, fits.T))


def patch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the weighted cross-entropy of patches ``(2n, N)``; those with -1 do not count."""
    weights = torch.where(targets > 0, ABNORMAL_WEIGHT, 1.0) * (targets >= 0)
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none")
    return (losses * weights).sum() / weights.sum()


def paired_patch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the softplus loss of patches ``(2n, N)`` on a defect against the normal twin's.

    Where defects are likely, on objects and not on the ground, both twins' patches read higher;
    that says nothing here.
    """
    on = (targets[1::2] > 0).float()
    return (F.softplus(logits[0::2] - logits[1::2]) * on).sum() / on.sum().clamp(min=1)


def squared_effect_size(normal: Tensor, defective: Tensor, spread: Tensor | None = None) -> Tensor:
    """Return the mean squared effect size by which directions tell two groups apart.

    Args:
        normal: What the directions read on the one group, ``(n, R)``.
        defective: The same on the other group, pair by pair.
        spread: ``(n, N, R)``, readings whose variance inside a picture is the measure; default:
            that of both groups together.
    """
    if spread is None:
        variance = torch.cat([normal, defective]).var(dim=0)
    else:
        variance = (spread - spread.mean(dim=1, keepdim=True)).flatten(0, 1).var(dim=0)
    return ((defective - normal).mean(dim=0).square() / (variance + 1e-6)).mean()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``(n, N, R)`` over the patches in ``(n, N)``; 0 without any."""
    weights = mask.float().unsqueeze(-1)  # (n, N, 1)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
