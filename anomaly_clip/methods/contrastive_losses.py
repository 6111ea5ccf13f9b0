"""Losses of the small CLIP on images and patches of scenes with and without a defect."""

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

ABNORMAL_WEIGHT = 4.0  # weight of a patch on a defect


def multi_positive(logits: Tensor, fits: Tensor) -> Tensor:
    """Return CLIP's loss, generalised to several matches per image and per caption.

    Args:
        logits: ``(I, J)``, images in rows, captions in columns.
        fits: bool ``(I, J)``, true for matching pairs; each image and caption has at least one.

    Returns:
        The negative mean log-probability of the matches, averaged over both directions. If every
        image and every caption has exactly one match, this equals CLIP's loss.
    """

    def one_way(logits: Tensor, fits: Tensor) -> Tensor:
        log_probability = logits.log_softmax(dim=1)
        return -((log_probability * fits).sum(1) / fits.sum(1)).mean()

    return 0.5 * (one_way(logits, fits) + one_way(logits.T, fits.T))


def patch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the weighted cross-entropy of patches ``(2n, N)``; targets of -1 are ignored."""
    weights = torch.where(targets > 0, ABNORMAL_WEIGHT, 1.0) * (targets >= 0)
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none")
    return (losses * weights).sum() / weights.sum()


def paired_patch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the softplus loss of defective patches ``(2n, N)`` against the paired normal ones.

    Scoring the patches of both images higher where defects are likely (on objects rather than on
    the background) does not lower this loss.
    """
    on = (targets[1::2] > 0).float()
    return (F.softplus(logits[0::2] - logits[1::2]) * on).sum() / on.sum().clamp(min=1)


def squared_effect_size(normal: Tensor, defective: Tensor, spread: Tensor | None = None) -> Tensor:
    """Return the squared effect size of two groups, averaged over the projection directions.

    Args:
        normal: Projections of the normal group on the ``R`` directions, ``(n, R)``.
        defective: Projections of the defective group, ``(n, R)``, in the same order of pairs.
        spread: Patch projections ``(n, N, R)``, whose variance within an image normalises the
            effect. Default: the variance of both groups together.
    """
    if spread is None:
        variance = torch.cat([normal, defective]).var(dim=0)
    else:
        variance = (spread - spread.mean(dim=1, keepdim=True)).flatten(0, 1).var(dim=0)
    return ((defective - normal).mean(dim=0).square() / (variance + 1e-6)).mean()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values ``(n, N, R)`` over the patches in mask ``(n, N)``.

    The mean is 0 for an empty mask.
    """
    weights = mask.float().unsqueeze(-1)  # (n, N, 1)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
