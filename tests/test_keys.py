"""Keys rank like the scores, and both counting functions agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anomaly_clip.metrics.keys import (
    BFLOAT16,
    FINE,
    FLOAT16,
    count_keys,
    count_with_opencv,
    defect_weights,
    key_edges,
    key_order,
    key_values,
    score_keys,
    with_one_zero,
)


def test_keys_of_a_few_scores_by_hand() -> None:
    scores = torch.tensor([0.0, 1.0, -1.0, 2.0])
    assert score_keys(scores, FLOAT16).tolist() == [0, 0x3C00, 0xBC00, 0x4000]
    assert score_keys(scores, BFLOAT16).tolist() == [0, 0x3F80, 0xBF80, 0x4000]
    # The lower half of the fine keys is for negative scores. Between 0 and 1 lie 44 binary
    # exponents with 2^13 keys each.
    assert score_keys(scores, FINE)[0] == 1 << 19
    assert score_keys(scores, FINE)[1] == (1 << 19) + (44 << 13)


@pytest.mark.parametrize(("kind", "num_keys"), [(FLOAT16, 1 << 16), (FINE, 1 << 20)])
def test_keys_in_their_order_rank_as_scores(kind: int, num_keys: int) -> None:
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0)).half().float()
    place = np.empty(num_keys, np.int64)
    place[key_order(num_keys)] = np.arange(num_keys)
    ranks = place[score_keys(scores, kind).numpy()]
    order = scores.argsort().numpy()
    assert (np.diff(ranks[order]) >= 0).all()
    assert len(np.unique(ranks)) == len(scores.unique())


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16, FINE])
def test_values_of_keys_are_the_scores(kind: int) -> None:
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float16
    scores = torch.tensor([-3.5, -0.001, 0.0, 0.25, 7.0]).to(dtype)
    keys = score_keys(scores, kind).numpy().astype(np.int64)
    assert key_values(keys, kind).tolist() == scores.double().tolist()


@pytest.mark.parametrize("kind", [FLOAT16, FINE])
def test_every_score_lies_between_the_edges_of_its_key(kind: int) -> None:
    scores = torch.randn(200, generator=torch.Generator().manual_seed(1))
    low, high = key_edges(score_keys(scores, kind).numpy().astype(np.int64), kind)
    values = scores.double().numpy()
    assert ((low <= values) & (values <= high)).all()
    assert (high - low <= 2e-3 * np.abs(values) + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_counting_functions_agree(dtype: torch.dtype) -> None:
    maps = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    masks = torch.zeros(3, 5, 4, dtype=torch.bool)
    masks[0, :2, :2] = masks[2, 4, 3] = True
    plain = count_keys(maps, masks, FLOAT16, 1 << 16)
    fast = count_with_opencv(maps, masks, FLOAT16, 1 << 16)
    for ours, theirs in zip(plain, fast, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    counts, positives, regions = plain
    assert int(counts.sum()) == 60
    assert positives is not None
    assert int(positives.sum()) == 5
    assert regions is not None
    assert float(regions.sum()) == 2.0  # the weights of a region sum to 1
    assert count_keys(maps, torch.zeros_like(masks), FLOAT16, 1 << 16)[1:] == (None, None)


def test_both_zeros_share_a_key() -> None:
    histogram = np.zeros(1 << 16, np.int64)
    histogram[[0, 0x8000, 5]] = 2, 3, 7
    folded = with_one_zero(histogram, fine=False)
    assert (folded[0], folded[0x8000], folded[5]) == (5, 0, 7)
    assert with_one_zero(histogram, fine=True) is histogram


def test_weights_of_defect_pixels() -> None:
    masks = np.zeros((2, 3, 3), bool)
    masks[1, 0, :2] = masks[1, 2, 2] = True
    weights = defect_weights(masks)
    assert weights is not None
    assert weights.tolist() == [0.5, 0.5, 1.0]
    assert defect_weights(masks[:1]) is None
