from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import Golden
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.surgery import (
    StageTokens,
    check_stages,
    dual_path,
    encode_dual_path,
    encode_layers,
    stage_ends,
)


@pytest.mark.golden
def test_golden_blocks(golden: Callable[[str], Golden], golden_clip: CLIPBackbone) -> None:
    arrays = golden("clip_ad")
    outputs = list(dual_path(golden_clip, arrays.inputs["image"]))
    assert len(arrays.named("block.")) == 2 * len(outputs)
    for number, output in enumerate(outputs, start=1):
        expected = arrays.named(f"block.{number}.")
        assert_close(output.original, expected["ori"], atol=1e-3, rtol=0)
        assert_close(output.surgery, expected["surgery"], atol=1e-3, rtol=0)


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "prefix"), [("official", "encode."), ("clean", "encode_clean.")])
def test_golden_stages(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, kind: StageTokens, prefix: str
) -> None:
    arrays = golden("clip_ad")
    stages, expected = arrays.meta["features_list"], arrays.named(prefix)
    tokens = encode_dual_path(golden_clip, arrays.inputs["image"], stages, kind)
    assert len(expected) == 2 * len(tokens)
    for stage, token in zip(stages, tokens, strict=True):
        assert_close(token.raw, expected[f"ori.{stage}"], atol=1e-3, rtol=0)
        assert_close(token.projected, expected[f"surgery.{stage}"], atol=1e-3, rtol=0)


def test_the_two_kinds_of_tokens_differ_where_they_should(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    official = encode_dual_path(tiny_clip, images, stage_tokens="official")
    clean = encode_dual_path(tiny_clip, images, stage_tokens="clean")
    for ours, other in zip(official[:-1], clean[:-1], strict=True):
        assert not torch.allclose(ours.raw, other.raw, atol=1e-3)
        assert_close(ours.projected[:, 1:], other.projected[:, 1:])
    assert torch.equal(official[-1].raw, clean[-1].raw)


def test_the_last_class_token_is_clips_image_embedding(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    tokens = encode_dual_path(tiny_clip, images)
    expected = tiny_clip.model.encode_image(images)
    assert_close(tokens[-1].projected[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_value_attention_by_hand(tiny_clip: CLIPBackbone) -> None:
    """With one block per stage, the first stage is the value-value attention of block 1."""
    images = torch.randn(1, 3, 32, 32)
    block = tiny_clip.visual.transformer.resblocks[0]
    embedded = block.ln_1(tiny_clip.embed(images))[0]  # (17, 24)
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    values = (embedded @ weight[48:].T + bias[48:]).reshape(17, 2, 12)
    heads = []
    for head in range(2):
        v = values[:, head]
        heads.append((v @ v.T / 12**0.5).softmax(dim=-1) @ v)
    expected = block.attn.out_proj(torch.cat(heads, dim=1))
    assert_close(next(dual_path(tiny_clip, images)).surgery[0], expected, atol=1e-5, rtol=1e-4)


def test_returned_tensors_are_never_changed(tiny_clip: CLIPBackbone) -> None:
    copies = []
    for output in dual_path(tiny_clip, torch.randn(1, 3, 32, 32)):
        copies.append((output, [part.clone() for part in output]))
    for output, kept in copies:
        assert all(torch.equal(a, b) for a, b in zip(output, kept, strict=True))


def test_selected_stages_equal_those_of_all_stages(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(1, 3, 32, 32)
    whole = encode_dual_path(tiny_clip, images)
    part = encode_dual_path(tiny_clip, images, [1, 3])
    assert torch.equal(part[0].projected, whole[0].projected)
    assert torch.equal(part[1].raw, whole[2].raw)


@pytest.mark.parametrize("kind", ["official", "clean"])
def test_leaving_out_raw_patches_changes_nothing_else(
    tiny_clip: CLIPBackbone, kind: StageTokens
) -> None:
    images = torch.randn(2, 3, 32, 32)
    whole = encode_dual_path(tiny_clip, images, stage_tokens=kind)
    short = encode_dual_path(tiny_clip, images, stage_tokens=kind, raw_patches=False)
    for full, other in zip(whole, short, strict=True):
        assert_close(full.projected, other.projected)
    assert short[-1].raw.shape == (2, 1, 24)
    assert_close(short[-1].raw, whole[-1].raw[:, :1])
    assert_close(short[0].raw, whole[0].raw)


def test_autocast_does_not_reach_the_frozen_weights(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(1, 3, 32, 32)
    expected = encode_dual_path(tiny_clip, images)[-1].projected
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_dual_path(tiny_clip, images)[-1].projected, expected)


def test_stages() -> None:
    assert stage_ends(24) == [6, 12, 18, 24]
    assert check_stages(None, 12) == [3, 6, 9, 12]
    assert check_stages([6, 12], 12) == [6, 12]
    with pytest.raises(ValueError, match="multiple of 4 blocks"):
        stage_ends(10)


@pytest.mark.parametrize("stages", [[], [1], [6, 3], [3, 3], [3, 15]])
def test_invalid_stages(stages: list[int]) -> None:
    with pytest.raises(ValueError, match=r"stage ends \[3, 6, 9, 12\]"):
        check_stages(stages, 12)


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=draws).byte()


@torch.no_grad()
def test_layers_are_the_outputs_of_blocks_counted_from_one(tiny_clip: CLIPBackbone) -> None:
    images = noise(2)
    pixels = tiny_clip.prepare(images)
    expected = tiny_clip.visual.forward_intermediates(
        pixels, indices=[1, 2], output_fmt="NLC", output_extra_tokens=True
    )
    for tokens, patches, first in zip(
        encode_layers(tiny_clip, images, [2, 3]),
        expected["image_intermediates"],
        expected["image_intermediates_prefix"],
        strict=True,
    ):
        assert_close(tokens, torch.cat([first, patches], dim=1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_value_value_patches_by_hand(tiny_clip: CLIPBackbone) -> None:
    images = noise(2)
    first, second, third = encode_layers(tiny_clip, images, [1, 2, 3])
    dense = first
    blocks = tiny_clip.blocks[1:3]
    for block, tokens in zip(blocks, (first, second), strict=True):
        _, _, values = block.heads(tokens)
        dense = dense + block.attend(values, values, values)
    (layer,) = encode_layers(tiny_clip, images, [3], value_blocks=2)
    assert_close(layer[:, 1:], dense[:, 1:], atol=1e-6, rtol=0)
    assert_close(layer[:, 0], third[:, 0], atol=1e-6, rtol=0)
    again = encode_layers(tiny_clip, images, [2, 3], value_blocks=2)
    assert_close(again[1], layer, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="layer 1 has fewer than 2 blocks"):
        encode_layers(tiny_clip, images, [1], value_blocks=2)
