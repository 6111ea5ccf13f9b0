from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anomaly_clip.methods.contrastive_losses import (
    multi_positive,
    paired_patch_loss,
    patch_loss,
    squared_effect_size,
)


def test_with_one_match_per_row_the_loss_equals_clips() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)
    clip = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    ours = multi_positive(logits, torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(ours, clip)


def test_two_equal_captions_are_both_matches() -> None:
    fits = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    right = torch.where(fits, 20.0, -20.0)
    assert multi_positive(right, fits).item() == pytest.approx(2 / 3 * np.log(2), abs=1e-4)


def test_hardly_covered_patches_are_ignored() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0]])
    targets = torch.tensor([[0.0, -1.0, 1.0]])
    assert patch_loss(logits, targets).item() == pytest.approx(np.log(2))
    # A defective patch has four times the weight of a normal one.
    sure = patch_loss(torch.tensor([[-50.0, 0.0, 0.0]]), targets)
    assert sure.item() == pytest.approx(0.8 * np.log(2))


def test_pairs_are_compared_on_the_defect() -> None:
    targets = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 1.0]])
    logits = torch.tensor([[5.0, -3.0, 2.0], [-5.0, 3.0, 3.5]])
    expected = np.log1p(np.exp(2.0 - 3.5))
    assert paired_patch_loss(logits, targets).item() == pytest.approx(expected)
    # An offset that both images share does not matter.
    assert paired_patch_loss(logits + 7, targets).item() == pytest.approx(expected, rel=1e-5)
    assert paired_patch_loss(logits, torch.zeros_like(targets)).item() == 0


def test_the_squared_effect_size_does_not_depend_on_the_scale() -> None:
    rng = np.random.default_rng(0)
    normal, defective = rng.normal(0, 2, (500, 3)), rng.normal(1, 2, (500, 3))
    by_hand = np.mean(
        (defective.mean(0) - normal.mean(0)) ** 2
        / np.concatenate([normal, defective]).var(0, ddof=1)
    )
    first, second = torch.from_numpy(normal), torch.from_numpy(defective)
    assert squared_effect_size(first, second).item() == pytest.approx(by_hand, rel=1e-4)
    assert squared_effect_size(10 * first, 10 * second).item() == pytest.approx(by_hand, rel=1e-4)
    assert squared_effect_size(first, first).item() == 0


def test_the_effect_size_uses_the_variance_within_an_image() -> None:
    rng = np.random.default_rng(0)
    normal, defective = rng.normal(0, 2, (5, 3)), rng.normal(1, 2, (5, 3))
    spread = rng.normal(0, 1, (5, 16, 3)) + rng.normal(0, 9, (5, 1, 3))  # images also differ
    inside = np.concatenate([values - values.mean(axis=0) for values in spread])
    difference = defective.mean(axis=0) - normal.mean(axis=0)
    by_hand = np.mean(difference**2 / inside.var(axis=0, ddof=1))
    effect = squared_effect_size(
        *(torch.from_numpy(values) for values in (normal, defective, spread))
    )
    assert effect.item() == pytest.approx(by_hand, rel=1e-4)
