"""Tests of image towers of timm: tokens, image embeddings and patch embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm_clips import KINDS, PLAIN, backbone_of, disturb
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.surgery import dual_path, encode_dual_path, encode_layers

REAL = (
    ("ViT-B-16-SigLIP2", 32, [6, 12]),
    ("PE-Core-T-16-384", 64, [3, 12]),
    ("MobileCLIP-B", 32, [3, 12]),
    ("MobileCLIP2-S0", 64, [1]),
    ("EVA02-B-16", 32, [6, 12]),
    ("ViTamin-S", 32, [7, 14]),
)
"""Models of open_clip with an image size that keeps the test short, and layers."""


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> CLIPBackbone:
    torch.manual_seed(0)
    backbone = backbone_of(tmp_path, request.param)
    disturb(backbone)
    return backbone


def noise(backbone: CLIPBackbone, count: int = 2) -> Tensor:
    shape = (count, 3, backbone.image_size, backbone.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()


@torch.no_grad()
def check_tokens(backbone: CLIPBackbone, layers: list[int]) -> None:
    """Compare with timm's intermediates, with open_clip's embedding, and with its head by hand."""
    images = noise(backbone)
    pixels = backbone.prepare(images)
    prefix, count = backbone.num_prefix_tokens, backbone.grid_size[0] * backbone.grid_size[1]
    assert backbone.grid_size == (backbone.image_size // backbone.patch_size,) * 2
    tokens = backbone(images, layers)
    for layer in tokens:
        assert layer.raw.shape == (2, prefix + count, backbone.width)
        assert layer.projected.shape == (2, 1 + count, backbone.embed_dim)
    embedding = backbone.model.encode_image(pixels)
    assert_close(tokens[-1].projected[:, 0], embedding, atol=1e-5, rtol=1e-5)
    trunk = backbone.visual.trunk
    if hasattr(trunk, "blocks"):
        theirs = trunk.forward_intermediates(
            pixels,
            indices=[layer - 1 for layer in layers],
            output_fmt="NLC",
            intermediates_only=True,
        )
    else:
        theirs = [trunk.forward_features(pixels).flatten(2).mT]
    for ours, expected in zip(tokens, theirs, strict=True):
        assert_close(ours.raw[:, prefix:], expected, atol=1e-5, rtol=1e-5)
    # One patch alone: the head gets a sequence, or a feature map, of this one token.
    patch = tokens[-1].raw[:, prefix + 1]
    alone = patch[:, :, None, None]
    if hasattr(trunk, "blocks"):
        alone = trunk.norm(patch).unsqueeze(1)
        if trunk.attn_pool is None:  # the pool leaves out prefix tokens, or takes the first one
            first = alone[:, :0] if trunk.global_pool == "token" else alone.expand(-1, prefix, -1)
            alone = torch.cat([first, alone], dim=1)
    by_hand = backbone.visual.head(trunk.forward_head(alone))
    assert_close(tokens[-1].projected[:, 2], by_hand, atol=1e-5, rtol=1e-4)
    assert_close(backbone.embeddings(tokens[-1].raw), tokens[-1].projected)


def test_tokens_of_small_towers(backbone: CLIPBackbone) -> None:
    check_tokens(backbone, [1] if backbone.num_layers == 1 else [1, 3, 4])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "layers"), REAL)
def test_tokens_of_real_architectures(name: str, side: int, layers: list[int]) -> None:
    backbone = CLIPBackbone(name, "random", image_size=side)
    disturb(backbone)
    check_tokens(backbone, layers)


@pytest.mark.parametrize("kind", ["pe_core", "mobileclip_s"])  # with and without a causal mask
@torch.no_grad()
def test_the_text_embedding_is_that_of_open_clip(kind: str, tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, kind)
    prompts = ["a photo of a cup", "bad"]
    expected = backbone.model.encode_text(backbone.tokenize(prompts))
    assert_close(backbone.encode_text(prompts), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", [64, 128])
@torch.no_grad()
def test_another_image_size(side: int, backbone: CLIPBackbone) -> None:
    old = dict(backbone.visual.named_parameters())
    other = CLIPBackbone(backbone.settings.name, "random", image_size=side)
    assert other.image_size == side
    disturb(other)
    check_tokens(other, [other.num_layers])
    changed = {
        name for name, weight in other.visual.named_parameters() if weight.shape != old[name].shape
    }
    assert changed <= {"trunk.pos_embed"}


def test_an_image_size_between_patches_is_refused(backbone: CLIPBackbone) -> None:
    with pytest.raises(ValueError, match="image_size 61 is not a multiple of the patch size"):
        CLIPBackbone(backbone.settings.name, "random", image_size=61)


def test_options_of_open_clips_towers_are_refused(tmp_path: Path) -> None:
    name = backbone_of(tmp_path, "siglip").settings.name
    with pytest.raises(ValueError, match="timm's, which interpolates positions as bicubic_anti"):
        CLIPBackbone(name, "random", positions="bilinear")
    with pytest.raises(ValueError, match=r"leave backbone.quick_gelu out"):
        CLIPBackbone(name, "random", quick_gelu=True)


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_the_original_path_of_the_dual_path_is_the_forward_pass(kind: str, tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, kind)
    disturb(backbone)
    images, prefix = noise(backbone), backbone.num_prefix_tokens
    whole = encode_dual_path(backbone, images, stage_tokens="clean")
    plain = backbone(images, [1, 2, 3, 4])
    for ours, expected in zip(whole, plain, strict=True):
        assert_close(ours.raw, expected.raw, atol=1e-5, rtol=1e-4)
        assert_close(ours.projected[:, 0], expected.projected[:, 0], atol=1e-5, rtol=1e-4)
    short = encode_dual_path(backbone, images, stage_tokens="clean", raw_patches=False)
    assert_close([t.projected for t in short], [t.projected for t in whole])
    surgery = next(dual_path(backbone, images)).surgery[:, prefix:]
    assert_close(whole[0].projected[:, 1:], backbone.project(surgery))
    assert_close(encode_layers(backbone, images, [2, 4]), [plain[1].raw, plain[3].raw])
    (dense,) = encode_layers(backbone, images, [4], value_blocks=2)
    assert_close(dense[:, :prefix], plain[3].raw[:, :prefix], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(dense[:, prefix:], plain[3].raw[:, prefix:])


@pytest.mark.parametrize(
    ("kind", "reason"), [("pe_core", "rotary positions"), ("mobileclip_s", "convolutions")]
)
def test_blocks_that_are_not_plain_are_refused(kind: str, reason: str, tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, kind)
    with pytest.raises(ValueError, match=f"plain transformer blocks, but this one has {reason}.*;"):
        _ = backbone.blocks


@torch.no_grad()
def test_half_precision_is_that_of_the_image_tower(backbone: CLIPBackbone) -> None:
    images = noise(backbone)
    expected = backbone(images)[-1].projected
    backbone.cast(torch.bfloat16)
    given = backbone(images)[-1].projected
    assert given.dtype == torch.bfloat16
    assert_close(given.float(), expected, atol=0.1, rtol=0.1)
