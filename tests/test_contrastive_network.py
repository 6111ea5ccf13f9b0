from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import SMALL_CLIP

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods.contrastive_network import PartEmbedding, scale_values


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SMALL_CLIP))
    return path


def test_scaling_the_values_keeps_clips_output(tiny: Path) -> None:
    torch.manual_seed(0)
    backbone = CLIPBackbone(str(tiny), "random")
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        before = backbone(images)[0].projected
        scale_values(backbone, 2.0)
        after = backbone(images)[0].projected
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_only_the_given_rows_are_trained() -> None:
    plain = torch.nn.Embedding(9, 4)
    part = PartEmbedding(torch.nn.Embedding.from_pretrained(plain.weight), torch.tensor([[7, 2]]))
    ids = torch.tensor([[0, 2, 7, 7], [8, 2, 1, 0]])
    weights = torch.arange(4.0).expand(2, 4, 4)
    for embedding in (plain, part):
        assert torch.equal(embedding(ids), plain.weight[ids])
        (embedding(ids) * weights).sum().backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(part.rows.grad, plain.weight.grad[[2, 7]])
    assert part.weight.grad is None
    assert torch.equal(part.merged(), plain.weight)
    with torch.no_grad():
        part.rows.add_(1)
    changed = (part.merged() != plain.weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [2, 7]
