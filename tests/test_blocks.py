"""Tests of plain transformer blocks, of open_clip and of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import vision_transformer
from timm_clips import PLAIN, backbone_of
from torch.testing import assert_close

from anomaly_clip.backbones.blocks import is_plain
from anomaly_clip.backbones.clip import CLIPBackbone


@pytest.mark.parametrize("kind", ["clip", *PLAIN])
@torch.no_grad()
def test_the_parts_of_a_block_add_up_to_its_output(
    kind: str, tiny_clip: CLIPBackbone, tmp_path: Path
) -> None:
    backbone = tiny_clip if kind == "clip" else backbone_of(tmp_path, kind)
    tokens = torch.randn(2, 7, backbone.width, generator=torch.Generator().manual_seed(1))
    for block in backbone.blocks:
        q, k, v = block.heads(tokens)
        attended = tokens + block.attend(q, k, v)
        assert_close(attended + block.mlp_output(attended), block(tokens), atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(block.first_joint(tokens, 3), (q[:, :, :3], k, v), strict=True):
            assert_close(block.per_head(ours), theirs, atol=1e-5, rtol=1e-4)


def test_blocks_with_more_parts_are_not_plain() -> None:
    sizes: dict[str, Any] = {"dim": 12, "num_heads": 2}
    assert is_plain(vision_transformer.Block(**sizes))
    assert is_plain(vision_transformer.Block(**sizes, init_values=0.1, qkv_bias=True))
    assert not is_plain(vision_transformer.Block(**sizes, qk_norm=True))
    assert not is_plain(vision_transformer.Block(**sizes, scale_attn_norm=True))
    assert not is_plain(vision_transformer.ResPostBlock(**sizes))
    assert not is_plain(torch.nn.Identity())
