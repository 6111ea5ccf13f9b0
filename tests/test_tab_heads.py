from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from anomaly_clip.methods.tab_heads import (
    BatchDraws,
    ProjectionHead,
    alignment_logits,
    make_head,
    mean_cosine,
)


def test_mean_cosine() -> None:
    rows = torch.tensor([[2.0, 0], [0, 1], [3, 3]])
    assert mean_cosine(rows) == pytest.approx((0 + 0.5**0.5 + 0.5**0.5) / 3)


def test_a_head_is_created_where_widths_differ() -> None:
    clip = ("clip", 16)
    assert isinstance(make_head("auto", ("resnet", 16), clip), nn.Identity)
    assert isinstance(make_head("none", ("resnet", 16), clip), nn.Identity)
    assert isinstance(make_head("linear", ("resnet", 16), clip), nn.Linear)
    head = make_head("auto", ("resnet", 512), clip)
    assert isinstance(head, ProjectionHead)
    assert sum(p.numel() for p in head.parameters()) == 513 * 16 + 17 * 16 + 32
    assert head(torch.randn(2, 512)).shape == (2, 16)


def test_different_widths_without_a_head_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"but resnet has 512 channels and clip has 16: set model\.head"
    ):
        make_head("none", ("resnet", 512), ("clip", 16))


def test_a_projection_drops_half_and_doubles_the_rest() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(8, 2000)
    features = torch.randn(1, 8)
    with torch.no_grad():
        projected = head.project(features)
        kept = torch.from_numpy(np.random.default_rng(3).random((1, 2000)) >= 0.5)
        expected = head.norm(2 * kept * head.block(projected) + projected)
        assert_close(head(features, BatchDraws([3])), expected)
        assert_close(head(features), head.norm(head.block(projected) + projected))


def test_processes_share_the_random_numbers_of_a_batch() -> None:
    whole = BatchDraws([3, 1]).random((6, 2))
    for rank in range(3):
        drawn = BatchDraws([3, 1], num_processes=3, rank=rank).random((2, 2))
        np.testing.assert_array_equal(drawn, whole[rank::3])


def test_logits_are_scaled_cosines() -> None:
    features, texts = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = alignment_logits(features, texts, torch.tensor(10.0))
    assert_close(logits, torch.tensor([[6.0, 8.0]]))
