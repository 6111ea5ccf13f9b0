from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import TINY_CLIP, Golden
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings

PROMPTS = ["a photo of a bottle.", "a photo of a damaged metal nut for visual inspection.", "a"]


@pytest.mark.golden
def test_golden_embedding(golden: Callable[[str], Golden], golden_clip: CLIPBackbone) -> None:
    arrays = golden("clip_ad")
    embedded = golden_clip.embed(arrays.inputs["image"])
    assert_close(embedded, arrays.expected["embed"], atol=1e-4, rtol=0)


def test_layers_agree_with_open_clip(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    tokens = tiny_clip(images, [2, 4])
    theirs = tiny_clip.visual.forward_intermediates(
        images, indices=[1, 3], output_fmt="NLC", output_extra_tokens=True
    )
    patches, first = theirs["image_intermediates"], theirs["image_intermediates_prefix"]
    for ours, patch, class_token in zip(tokens, patches, first, strict=True):
        assert_close(ours.raw[:, 1:], patch)
        assert_close(ours.raw[:, :1], class_token)
    assert_close(tokens[-1].projected[:, 0], tiny_clip.model.encode_image(images))
    assert tokens[0].projected.shape == (2, 17, 12)


def test_uint8_is_normalised_and_floating_is_not(tiny_clip: CLIPBackbone) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(3, 1, 1)
    by_hand = (images / 255 - mean) / std
    assert_close(tiny_clip.prepare(images), by_hand)
    assert torch.equal(tiny_clip.prepare(by_hand), by_hand)


def test_mean_and_std_are_arguments(tiny_clip_config: str) -> None:
    backbone = CLIPBackbone(tiny_clip_config, "random", mean=[0, 0, 0], std=[1, 1, 1])
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert_close(backbone.prepare(images), torch.ones(1, 3, 32, 32))


def test_text_agrees_with_open_clip_at_full_length(tiny_clip: CLIPBackbone) -> None:
    expected = tiny_clip.model.encode_text(tiny_clip.tokenize(PROMPTS))
    assert_close(tiny_clip.encode_text(PROMPTS), expected, atol=1e-6, rtol=1e-5)
    alone = torch.cat([tiny_clip.encode_text([prompt]) for prompt in PROMPTS])
    assert_close(alone, expected, atol=1e-6, rtol=1e-5)


def test_positions_after_the_longest_prompt_are_left_out(
    tiny_clip: CLIPBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    forward = tiny_clip.model.transformer.forward

    def spy(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return forward(tokens, **options)

    monkeypatch.setattr(tiny_clip.model.transformer, "forward", spy)
    tiny_clip.encode_text(["a nut.", "a"])
    assert lengths == [5]  # start, a, nut, full stop, end


def test_frozen_and_in_evaluation_mode_even_if_set_to_training(tiny_clip: CLIPBackbone) -> None:
    tiny_clip.train()
    assert not any(module.training for module in tiny_clip.modules())
    assert not any(parameter.requires_grad for parameter in tiny_clip.parameters())


def test_autocast_does_not_reach_the_frozen_weights(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(1, 3, 32, 32)
    expected = tiny_clip(images)[0].projected
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_clip(images)[0].projected, expected)
        assert tiny_clip.encode_text(PROMPTS).dtype == torch.float32


def test_cast_weights_give_nearly_the_same(tiny_clip_config: str) -> None:
    torch.manual_seed(0)
    backbone = CLIPBackbone(tiny_clip_config, "random")
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = backbone(images)[0].projected
    backbone.cast(torch.bfloat16)
    cast = backbone(images)[0].projected
    assert cast.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(cast.float(), expected, dim=-1)
    assert cosine.min() > 0.999


def test_settings_build_and_pass(tiny_clip: CLIPBackbone, tiny_clip_config: str) -> None:
    assert CLIPBackbone.of(tiny_clip) is tiny_clip
    for settings in (
        CLIPSettings(tiny_clip_config, "random", 48),
        {"name": tiny_clip_config, "pretrained": "random", "image_size": 48},
    ):
        built = CLIPBackbone.of(settings)
        assert built.image_size == 48
        assert built.settings == CLIPSettings(tiny_clip_config, "random", 48)


def test_random_weights_are_on_record(tiny_clip: CLIPBackbone, golden_clip: CLIPBackbone) -> None:
    assert tiny_clip.weights["random"]
    assert tiny_clip.weights["sha256"] is None
    assert not golden_clip.weights["random"]
    assert golden_clip.weights["sha256"] == golden_clip.identity


@pytest.mark.parametrize("layers", [[], [0], [5], [2, 1], [2, 2]])
def test_layers_that_do_not_exist(tiny_clip: CLIPBackbone, layers: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and 4"):
        tiny_clip(torch.zeros(1, 3, 32, 32), layers)


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_shape(tiny_clip: CLIPBackbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 32, 32\)"):
        tiny_clip(torch.zeros(shape))


def test_the_identity_covers_activations_and_heads(tmp_path: Path) -> None:
    """Activations and numbers of heads change features, so caches must distinguish them."""
    vision = TINY_CLIP["vision_cfg"]
    assert isinstance(vision, dict)
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"quick_gelu": True},
        {"vision_cfg": {**vision, "head_width": 6}},
    )
    identities, state = set(), None
    for number, change in enumerate(changes):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({**TINY_CLIP, **change}))
        backbone = CLIPBackbone(str(file), "random")
        state = backbone.model.state_dict() if state is None else state
        backbone.model.load_state_dict(state)
        identities.add(backbone.identity)
    assert len(identities) == 3
