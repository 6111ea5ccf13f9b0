from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import Golden
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from anomaly_clip.losses import (
    batch_dice_loss,
    dice_loss,
    focal_loss,
    focal_loss_with_logits,
    softmax_focal_loss,
)


@pytest.mark.golden
def test_golden_losses(golden: Callable[[str], Golden]) -> None:
    arrays = golden("clip_ad")
    probability, target = arrays.inputs["loss.prob"][:, 1], arrays.inputs["loss.target"]
    for name, loss in (("focal", focal_loss), ("dice", dice_loss)):
        expected = arrays.expected[f"loss.{name}"].reshape(())
        assert_close(loss(probability, target), expected, atol=1e-5, rtol=0)


def test_right_predictions_cost_little_and_wrong_ones_much() -> None:
    target = torch.zeros(2, 4, 4, dtype=torch.bool)
    target[:, :2] = True
    right, wrong = target.float(), 1 - target.float()
    for loss in (focal_loss, dice_loss):
        assert loss(right, target) < 1e-3
        assert loss(wrong, target) > 0.5


def test_by_hand() -> None:
    probability, target = torch.full((1, 1, 2), 0.25), torch.tensor([[[True, False]]])
    assert dice_loss(probability, target).item() == pytest.approx(1 - (2 * 0.25 + 1) / (1.5 + 1))
    by_hand = (0.75**2 * 1.3862944 + 0.25**2 * 0.2876821) / 2
    assert focal_loss(probability, target).item() == pytest.approx(by_hand, rel=1e-3)


def test_images_count_equally_in_dice() -> None:
    probability = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    target = probability > 0.7
    alone = [dice_loss(probability[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert_close(dice_loss(probability, target), torch.stack(alone).mean())


def test_extremes_have_finite_gradients() -> None:
    probability = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    target = torch.tensor([[[True, False]]])
    (focal_loss(probability, target) + dice_loss(probability, target)).backward()
    assert probability.grad is not None
    assert torch.isfinite(probability.grad).all()


def test_the_focal_loss_equals_torchvisions() -> None:
    logits = 5 * torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    target = logits + torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)) > 0
    for gamma in (0.0, 2.0):
        theirs = sigmoid_focal_loss(logits, target.float(), alpha=-1, gamma=gamma, reduction="mean")
        assert_close(focal_loss_with_logits(logits, target, gamma), theirs, atol=1e-6, rtol=1e-5)


def test_dice_of_a_batch_by_hand() -> None:
    probability = torch.tensor([[[0.5, 1.0]], [[0.0, 0.25]]])
    target = torch.tensor([[[False, True]], [[False, False]]])
    expected = 1 - (2 * 1.0 + 1) / (1.75 + 1 + 1)
    assert batch_dice_loss(probability, target).item() == pytest.approx(expected)


def test_the_focal_loss_of_classes() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 1, 1, 2])
    assert_close(softmax_focal_loss(logits, target, 0.0), F.cross_entropy(logits, target))
    right = logits.softmax(1).gather(1, target[:, None])[:, 0]
    expected = (-((1 - right) ** 2) * right.log()).mean()
    assert_close(softmax_focal_loss(logits, target, 2.0), expected)
