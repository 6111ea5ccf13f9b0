"""Losses on probability maps: pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "batch_dice_loss",
    "dice_loss",
    "focal_loss",
    "focal_loss_with_logits",
    "softmax_focal_loss",
]


def focal_loss(probability: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of two classes, mean over all pixels (CLIP-AD, section 6.3).

    Args:
        probability: Of the abnormal class, ``(B, H, W)`` in [0, 1].
        target: Bool or 0 and 1, ``(B, H, W)``.
        gamma: Exponent that takes weight from what is right already.

    As published, targets are softened by 1e-5 and the probability of the true class is raised by
    1e-5.
    """
    soft = 1e-5
    truth = target.to(probability)
    share = truth * (1 - 2 * soft) + soft  # of the abnormal class
    right = share * probability + (1 - share) * (1 - probability) + soft
    wrong = (1 - right).clamp(min=0)  # which rounding may make negative
    return -(wrong.pow(gamma) * right.log()).mean()


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Return one minus the smoothed dice overlap, mean over the images (CLIP-AD, section 6.3).

    Args:
        probability: Of the abnormal class, ``(B, H, W)`` in [0, 1].
        target: Bool or 0 and 1, ``(B, H, W)``.
    """
    truth = target.to(probability).flatten(1)
    predicted = probability.flatten(1)
    overlap = (predicted * truth).sum(dim=1)
    total = predicted.sum(dim=1) + truth.sum(dim=1)
    return torch.mean(1 - (2 * overlap + 1) / (total + 1))


def focal_loss_with_logits(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of two classes, mean over all pixels, no smoothing (CLIP-ADA, 3).

    Args:
        logits: Of the abnormal class, ``(B, H, W)``.
        target: Bool or 0 and 1, ``(B, H, W)``.
        gamma: Exponent that takes weight from what is right already.
    """
    # torchvision's sigmoid_focal_loss gives the same to 1e-6, but not to the bit: fits of earlier
    # versions could not be repeated with it.
    truth = target.to(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    wrong = -torch.expm1(-entropy)  # 1 - p of the true class, exact where it is small
    return (wrong.pow(gamma) * entropy).mean()


def batch_dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Return one minus the smoothed dice overlap of a whole batch (CLIP-ADA, section 3).

    Images without a single abnormal pixel, whose own dice would be nearly constant, thus count with
    the others.

    Args:
        probability: Of the abnormal class, ``(B, H, W)`` in [0, 1].
        target: Bool or 0 and 1, ``(B, H, W)``.
    """
    truth = target.to(probability)
    overlap = (probability * truth).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + truth.sum() + 1)


def softmax_focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of exclusive classes, mean over the batch.

    Args:
        logits: ``(B, K)``.
        target: int64 ``(B,)``.
        gamma: Exponent that takes weight from what is right already; 0 is cross-entropy.
    """
    entropy = F.cross_entropy(logits, target, reduction="none")
    wrong = -torch.expm1(-entropy)  # 1 - p of the true class, exact where it is small
    return (wrong.pow(gamma) * entropy).mean()
