"""Tests of methods on CLIP models with image towers of timm, and of what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MEAN, WORDS
from timm_clips import KINDS, PLAIN, backbone_of, disturb, write_tokenizer
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.exporting.graph import DetectorGraph, trace
from anomaly_clip.exporting.parity import check_difference, compare
from anomaly_clip.maps import patches_to_map
from anomaly_clip.methods import APRILGAN, CLIPADA, SDP, AnomalyCLIP, MuSc, SDPPlus, WinCLIP
from anomaly_clip.methods.contrastive import Contrastive
from anomaly_clip.methods.winclip import embed_windows, window_patches

Make = Callable[[str], CLIPBackbone]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that builds a small model of a kind."""

    def build(kind: str) -> CLIPBackbone:
        torch.manual_seed(0)
        tokenizer = write_tokenizer(tmp_path / "tokenizer") if kind == "siglip" else None
        return backbone_of(tmp_path, kind, tokenizer)

    return build


def noise(backbone: CLIPBackbone, count: int = 3) -> Tensor:
    shape = (count, 3, backbone.image_size, backbone.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_plain_zero_shot_is_the_cosine_with_the_abnormal_text(kind: str, make: Make) -> None:
    backbone = make(kind)
    method = SDP(
        backbone,
        WORDS,
        MEAN,
        stages=[backbone.num_layers],
        paths="original",
        feature_surgery=False,
        sigma=0.0,
    )
    images, text = noise(backbone), method.text("cup")
    scores = method.score(images, ["cup"] * 3)
    vectors = unit(backbone.model.encode_image(backbone.prepare(images)))
    expected = (100 * vectors @ text).softmax(dim=-1)[:, 1]
    assert_close(scores["image_score"], expected, atol=1e-4, rtol=1e-3)
    patches = unit(backbone(images)[0].projected[:, 1:]) @ text[:, 1]
    side = backbone.image_size
    assert_close(scores["anomaly_map"], patches_to_map(patches, (side, side)))


@pytest.mark.parametrize("kind", PLAIN)
def test_value_value_attention_runs_without_a_class_token(kind: str, make: Make) -> None:
    backbone = make(kind)
    images = noise(backbone)
    surgery, original = (
        SDP(backbone, WORDS, MEAN, paths=paths).score(images, ["cup"] * 3)
        for paths in ("surgery", "original")
    )
    assert_close(surgery["image_score"], original["image_score"], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(surgery["anomaly_map"], original["anomaly_map"])


@pytest.mark.parametrize("kind", ["pe_core", "mobileclip_s"])
@pytest.mark.parametrize("method", [SDP, SDPPlus, WinCLIP])
def test_blocks_that_are_not_plain_are_refused(kind: str, method: type[Any], make: Make) -> None:
    with pytest.raises(ValueError, match=r"plain transformer blocks, but this one has .*; use me"):
        method(make(kind), WORDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (AnomalyCLIP, "AnomalyCLIP"),
        (CLIPADA, "CLIP-ADA"),
        (Contrastive, "contrastive training"),
    ],
)
def test_methods_that_train_within_clip_are_refused(
    kind: str, method: type[Any], name: str, make: Make
) -> None:
    options = {"feature_layer": 1} if method is CLIPADA else {}
    message = rf"{name} trains within CLIP's original architecture .*; choose a model such as ViT"
    with pytest.raises(ValueError, match=message):
        method(make(kind), **options)


def test_layers_of_a_tower_without_stages(make: Make) -> None:
    fastvit = make("mobileclip_s")
    assert SDP(fastvit, WORDS, paths="original").stages == [1]
    with pytest.raises(ValueError, match=r"layers \[3\]: expected ascending numbers between 1 and"):
        SDP(fastvit, WORDS, paths="original", stages=[3])
    assert SDP(make("pe_core"), WORDS, paths="original").stages == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_windows_equal_the_plain_image_tower(kind: str, make: Make) -> None:
    backbone = make(kind)
    tokens, prefix = backbone.embed(noise(backbone, 2)), backbone.num_prefix_tokens
    members = window_patches(4, 2)
    [ours] = embed_windows(backbone, tokens, [members])
    for number, patches in enumerate(members):
        window = torch.cat([tokens[:, :prefix], tokens[:, patches + prefix]], dim=1)
        trunk = backbone.visual.trunk
        expected = backbone.visual.head(trunk.forward_head(trunk.norm(trunk.blocks(window))))
        assert_close(ours[:, number], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_winclip_with_references(kind: str, make: Make) -> None:
    backbone = make(kind)
    method = WinCLIP(backbone, WORDS)
    images, text = noise(backbone), method.text("cup").unsqueeze(0)
    memory = method.remember(images[:1])
    grid = method.association_grid(method.embed(images), [memory])
    assert_close(grid[0], torch.zeros(16), atol=1e-5, rtol=0)  # the reference itself
    assert (grid[1:] > 1e-4).all()
    image = method.embed(images).image
    assert_close(image, backbone.model.encode_image(backbone.prepare(images)), atol=1e-5, rtol=1e-4)
    assert_close(method.embed(images, with_patches=False).image, image, atol=1e-5, rtol=1e-4)
    few, zero = (method.score_with_text(images, text, m) for m in ([memory], None))
    assert (few["anomaly_map"][0] < zero["anomaly_map"][0]).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_april_gan_reads_the_patches_of_any_tower(kind: str, make: Make) -> None:
    backbone = make(kind)
    layers = [1] if backbone.num_layers == 1 else [2, 4]
    method = APRILGAN(backbone, WORDS, layers=layers)
    images = noise(backbone)
    tokens = method.tokens(images, scoring=True)
    expected = backbone(images, layers)
    for layer, of_layer in zip(layers, expected, strict=True):
        assert_close(tokens[f"raw.{layer}"], of_layer.raw[:, backbone.num_prefix_tokens :])
    assert_close(tokens["image"], expected[-1].projected[:, 0], atol=1e-5, rtol=1e-4)
    text = method.text("cup").unsqueeze(0)
    few = method.score_with_text(images, text, [method.remember(images[:1])])
    zero = method.score_with_text(images, text)
    assert_close(few["anomaly_map"][0], zero["anomaly_map"][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_sdp_plus_reads_the_patches_of_plain_towers(kind: str, make: Make) -> None:
    method = SDPPlus(make(kind), WORDS, MEAN)
    images = noise(method.backbone)
    assert method.tokens(images, scoring=False)["raw.4"].shape == (3, 16, 24)
    assert method.score(images, ["cup"] * 3)["anomaly_map"].shape == (3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_musc_compares_the_patches_of_any_tower(kind: str, make: Make) -> None:
    backbone = make(kind)
    method = MuSc(backbone)
    assert method.layers == ([1] if kind == "mobileclip_s" else [1, 2, 3, 4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("siglip", SDP, {"rvs": MEAN}),
        ("siglip", WinCLIP, {}),
        ("pe_core", SDP, {"rvs": MEAN, "paths": "original", "stages": [4]}),
        ("mobileclip_s", SDP, {"rvs": MEAN, "paths": "original"}),
    ],
)
def test_graphs_of_any_batch_size(
    kind: str, method: type[Any], options: dict[str, Any], make: Make
) -> None:
    backbone = make(kind)
    disturb(backbone, 0.2)  # so that maps differ from a constant
    module = method(backbone, WORDS, **options).eval()
    images = noise(module.backbone, 4)
    graph = DetectorGraph(module, "cup")
    with torch.no_grad():
        expected = dict(
            zip(("image_score", "anomaly_map", "score_parts"), graph(images), strict=False)
        )
    program = trace(graph).module()

    def run(batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            outputs = zip(graph.names, program(torch.from_numpy(batch)), strict=True)
            return {name: value.numpy() for name, value in outputs}

    arrays = {name: value.numpy() for name, value in expected.items()}
    check_difference(compare(arrays, run, images.numpy(), (1, 4)), "the graph")
