"""The plain form of ``benchmarks/musc.py`` gives the scores of the package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from anomaly_clip.methods.mutual_scoring import aggregate, mutual_scores, rescore


@pytest.fixture(scope="module")
def plain() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield import_module("musc")


@pytest.mark.parametrize("r", [1, 3, 5])
def test_features_and_mutual_scores(
    plain: ModuleType, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "WIDTH", 8)
    grids = torch.randn(9, 8, 4, 4, generator=torch.Generator().manual_seed(r))
    features = plain.plain_features(grids, r)
    assert_close(aggregate(grids, r), features, atol=1e-6, rtol=0)
    scores = plain.plain_mutual_scores(features)
    for room in (0, 1 << 40):  # row blocks, and all pairs
        assert_close(mutual_scores(features, room=room), scores, atol=1e-5, rtol=0)


def test_rescoring(plain: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(7, generator=generator)
    vectors = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator) + 1, dim=1)
    assert_close(rescore(raw, vectors, plain.K_LIST), plain.plain_rescore(raw, vectors))
