from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.surgery import encode_layers
from anomaly_clip.methods.clip_ada_refinement import (
    DenseHead,
    RefinementSettings,
    RegionRefinement,
    biased_block,
)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def attention_by_hand(block: Any, tokens: Tensor, key_bias: Tensor) -> Tensor:
    """Return the attention output, computed head by head, with a bias on the keys."""
    attention = block.attn
    normed = block.ln_1(tokens)
    width = tokens.shape[-1]
    q, k, v = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).split(width, dim=-1)
    head = width // attention.num_heads
    parts = []
    for start in range(0, width, head):
        cut = slice(start, start + head)
        logits = q[..., cut] @ k[..., cut].mT / head**0.5 + key_bias[:, None]
        parts.append(logits.softmax(-1) @ v[..., cut])
    return attention.out_proj(torch.cat(parts, dim=-1))


@torch.no_grad()
def test_a_biased_block_is_attention_with_a_key_bias(
    tiny_clip: CLIPBackbone, images: Tensor
) -> None:
    block = tiny_clip.visual.transformer.resblocks[2]
    (tokens,) = encode_layers(tiny_clip, images, [2])
    bias = torch.randn(tokens.shape[:2], generator=torch.Generator().manual_seed(1))
    attended = tokens + attention_by_hand(block, tokens, bias)
    expected = attended + block.mlp(block.ln_2(attended))
    plain = tiny_clip.blocks[2]
    assert_close(biased_block(plain, tokens, bias), expected, atol=1e-5, rtol=0)
    nothing = torch.zeros_like(bias)
    assert_close(biased_block(plain, tokens, nothing), block(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_bias_moves_attention_to_its_keys(tiny_clip: CLIPBackbone, images: Tensor) -> None:
    block = tiny_clip.blocks[2]
    (tokens,) = encode_layers(tiny_clip, images, [2])
    bias = torch.full(tokens.shape[:2], -1e4)
    bias[:, 5] = 0  # all attention goes to token 5
    changed = tokens.clone()
    changed[:, 7] += 1
    plain, shifted = (biased_block(block, inputs, bias) for inputs in (tokens, changed))
    assert_close(plain[:, 6], shifted[:, 6], atol=1e-6, rtol=0)
    assert not torch.allclose(plain[:, 7], shifted[:, 7], atol=1e-3)


@torch.no_grad()
def test_a_flat_map_equals_the_plain_next_block(tiny_clip: CLIPBackbone, images: Tensor) -> None:
    (tokens,) = encode_layers(tiny_clip, images, [2])
    refinement = RegionRefinement(tiny_clip, 2, RefinementSettings(), pre_norm=True)
    guide = torch.full((2, 16), 0.3)
    expected = refinement.head(tiny_clip.visual.transformer.resblocks[2](tokens)[:, 1:])
    assert_close(refinement(tiny_clip, tokens, guide), expected, atol=1e-5, rtol=0)
    guide[:, :4] = 0.9
    assert not torch.allclose(refinement(tiny_clip, tokens, guide), expected, atol=1e-3)


@torch.no_grad()
def test_several_blocks_run_in_sequence(tiny_clip: CLIPBackbone, images: Tensor) -> None:
    first, last = encode_layers(tiny_clip, images, [2, 4])
    refinement = RegionRefinement(tiny_clip, 2, RefinementSettings(blocks=2), pre_norm=True)
    features = refinement(tiny_clip, first, torch.full((2, 16), 0.5))
    assert_close(features, refinement.head(last[:, 1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pre_norm", [True, False])
@torch.no_grad()
def test_multiply_scales_patches(tiny_clip: CLIPBackbone, images: Tensor, pre_norm: bool) -> None:
    (tokens,) = encode_layers(tiny_clip, images, [2])
    settings = RefinementSettings("multiply", gamma_init=0.5)
    guide = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    refinement = RegionRefinement(tiny_clip, 2, settings, pre_norm=pre_norm)
    patches = tokens[:, 1:]
    normed = F.layer_norm(patches, patches.shape[-1:]) if pre_norm else patches
    scaled = normed * (1 + 0.5 * guide[..., None])
    expected = F.normalize(refinement.head.linear(scaled), dim=-1)
    assert_close(refinement(tiny_clip, tokens, guide), expected, atol=1e-6, rtol=0)
    assert {name for name, _ in refinement.named_parameters()} == {
        "gamma",
        "head.linear.weight",
        "head.linear.bias",
    }


@torch.no_grad()
def test_reencode_with_a_flat_map_is_clip(tiny_clip: CLIPBackbone, images: Tensor) -> None:
    (tokens,) = encode_layers(tiny_clip, images, [2])
    settings = RefinementSettings("reencode")
    refinement = RegionRefinement(tiny_clip, 2, settings, pre_norm=True)
    features = refinement(tiny_clip, tokens, torch.full((2, 16), 0.5))
    expected = F.normalize(tiny_clip(images)[0].projected[:, 1:], dim=-1)
    assert_close(features, expected, atol=1e-5, rtol=0)
    assert [name for name, _ in refinement.named_parameters()] == ["beta"]


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("mode", ["bias", "multiply", "reencode"])
def test_the_guide_map_gets_gradients_only_without_detach(
    tiny_clip: CLIPBackbone, images: Tensor, mode: str, detach: bool
) -> None:
    (tokens,) = encode_layers(tiny_clip, images, [2])
    settings = RefinementSettings(mode, detach=detach)  # type: ignore[arg-type]
    refinement = RegionRefinement(tiny_clip, 2, settings, pre_norm=False)
    guide = torch.rand(2, 16).requires_grad_()
    refinement(tiny_clip, tokens, guide)[..., 0].sum().backward()
    assert (guide.grad is None) == detach
    assert all(parameter.grad is not None for parameter in refinement.parameters())
    assert all(parameter.grad is None for parameter in tiny_clip.parameters())


def test_the_trained_block_is_a_copy_of_the_frozen_one(tiny_clip: CLIPBackbone) -> None:
    refinement = RegionRefinement(tiny_clip, 2, RefinementSettings(), pre_norm=True)
    copied, frozen = refinement.blocks[0], tiny_clip.visual.transformer.resblocks[2]
    assert_close(copied.state_dict(), frozen.state_dict(), atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in copied.parameters())
    with torch.no_grad():
        copied.ln_1.weight += 1
    assert not torch.equal(copied.ln_1.weight, frozen.ln_1.weight)


def test_a_head_without_norm_is_the_literal_linear_form() -> None:
    torch.manual_seed(0)
    head, patches = DenseHead(6, 4, pre_norm=False), torch.randn(2, 3, 6)
    assert_close(head(patches), F.normalize(head.linear(patches), dim=-1))
    normed = DenseHead(6, 4)
    assert_close(normed(patches), normed(7 * patches + 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (4, {}, "needs 1 blocks after model.feature_layer 4, but .* has 0"),
        (3, {"blocks": 2}, "needs 2 blocks after model.feature_layer 3"),
        (4, {"mode": "reencode"}, "model.refine.mode reencode needs 1 blocks"),
        (2, {"steps": 0}, "model.refine.steps must be 1 or more, got 0"),
        (2, {"blocks": 0}, "model.refine.blocks must be 1 or more, got 0"),
    ],
)
def test_invalid_settings_are_named(
    tiny_clip: CLIPBackbone, layer: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RegionRefinement(tiny_clip, layer, RefinementSettings(**options), pre_norm=True)  # type: ignore[arg-type]


def test_unknown_choices_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"model\.refine\.mode must be one of bias, .*, got Bias"):
        RefinementSettings("Bias")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.refine\.fuse must be one of mean, fine"):
        RefinementSettings(fuse="median")  # type: ignore[arg-type]
