"""Losses on probability maps and class logits: pure functions."""

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
    """Return the two-class focal loss, averaged over pixels (CLIP-AD; docs/methods/sdp_plus.md).

    Args:
        probability: Probability of the abnormal class, ``(B, H, W)`` in [0, 1].
        target: Ground truth, bool or 0 and 1, ``(B, H, W)``.
        gamma: Exponent that reduces the weight of well classified pixels.

    As published, targets are smoothed by 1e-5 and 1e-5 is added to the probability of the true
    class.
    """
    soft = 1e-5
    truth = target.to(probability)
    share = truth * (1 - 2 * soft) + soft  # target probability of the abnormal class
    right = share * probability + (1 - share) * (1 - probability) + soft
    wrong = (1 - right).clamp(min=0)  # rounding may make 1 - right negative
    return -(wrong.pow(gamma) * right.log()).mean()


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Return the smoothed Dice loss, averaged over images (CLIP-AD; docs/methods/sdp_plus.md).

    Args:
        probability: Probability of the abnormal class, ``(B, H, W)`` in [0, 1].
        target: Ground truth, bool or 0 and 1, ``(B, H, W)``.
    """
    truth = target.to(probability).flatten(1)
    predicted = probability.flatten(1)
    overlap = (predicted * truth).sum(dim=1)
    total = predicted.sum(dim=1) + truth.sum(dim=1)
    return torch.mean(1 - (2 * overlap + 1) / (total + 1))


def focal_loss_with_logits(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the two-class focal loss without smoothing, averaged over pixels (for CLIP-ADA).

    Args:
        logits: Logits of the abnormal class, ``(B, H, W)``.
        target: Ground truth, bool or 0 and 1, ``(B, H, W)``.
        gamma: Exponent that reduces the weight of well classified pixels.
    """
    # torchvision's sigmoid_focal_loss agrees to 1e-6, but not bit for bit: fits of earlier versions
    # could not be reproduced with it.
    truth = target.to(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    wrong = -torch.expm1(-entropy)  # 1 - p of the true class, exact where it is small
    return (wrong.pow(gamma) * entropy).mean()


def batch_dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Return the smoothed Dice loss over all pixels of a batch (for CLIP-ADA).

    A Dice loss per image would be nearly constant for an image without abnormal pixels. Summed over
    the batch, the pixels of such an image still contribute.

    Args:
        probability: Probability of the abnormal class, ``(B, H, W)`` in [0, 1].
        target: Ground truth, bool or 0 and 1, ``(B, H, W)``.
    """
    truth = target.to(probability)
    overlap = (probability * truth).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + truth.sum() + 1)


def softmax_focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of mutually exclusive classes, averaged over the batch.

    Args:
        logits: ``(B, K)``.
        target: Class indices, int64 ``(B,)``.
        gamma: Exponent that reduces the weight of well classified samples; 0 gives cross-entropy.
    """
    entropy = F.cross_entropy(logits, target, reduction="none")
    wrong = -torch.expm1(-entropy)  # 1 - p of the true class, exact where it is small
    return (wrong.pow(gamma) * entropy).mean()
