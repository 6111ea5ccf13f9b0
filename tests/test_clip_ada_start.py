"""Options of CLIP-ADA: heads initialised from CLIP, and the class token in the image score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.backbones.learnable_prompt import LearnablePromptSettings
from anomaly_clip.backbones.surgery import encode_layers
from anomaly_clip.methods import CLIPADA
from anomaly_clip.methods.clip_ada import LossSettings
from anomaly_clip.methods.clip_ada_refinement import RefinementSettings


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def tiny(clip: CLIPBackbone, **options: Any) -> CLIPADA:
    return CLIPADA(clip, **{"feature_layer": 2, **options})


@torch.no_grad()
def test_projections_start_from_clips_own(tiny_clip: CLIPBackbone, images: Tensor) -> None:
    last = tiny_clip.num_layers
    method = tiny(tiny_clip, feature_layer=last - 1, taps=[last - 1, last], head_init="clip")
    tokens = encode_layers(tiny_clip, images, [last - 1, last])
    for head, layer in zip(method.heads, tokens, strict=True):
        assert_close(head(layer[:, 1:]), unit(tiny_clip.project(layer[:, 1:])), atol=1e-5, rtol=0)
    # With a constant guide map, the refinement pass equals CLIP's last layer.
    assert method.refinement is not None
    flat = torch.full((*tokens[0].shape[:1], tokens[0].shape[1] - 1), 0.5)
    refined = method.refinement(tiny_clip, tokens[0], flat)
    assert_close(refined, unit(tiny_clip.project(tokens[1][:, 1:])), atol=1e-5, rtol=0)
    other = tiny(tiny_clip, feature_layer=last - 1).state_dict()["heads.0.linear.weight"]
    assert not other.equal(method.state_dict()["heads.0.linear.weight"])


@torch.no_grad()
@pytest.mark.parametrize("n_prompts", [1, 2])
def test_the_class_token_is_compared_like_a_patch(
    tiny_clip: CLIPBackbone, images: Tensor, n_prompts: int
) -> None:
    method = tiny(tiny_clip, class_token=True, prompt=LearnablePromptSettings(n_prompts=n_prompts))
    method.class_bias.fill_(0.3)
    text = method.direction()
    embedding = F.normalize(tiny_clip.model.encode_image(tiny_clip.prepare(images)), dim=-1)
    expected = embedding @ text / 0.07 + 0.3
    encoded = method.encode(images, text)
    assert encoded.image is not None
    assert_close(encoded.image, expected, atol=1e-4, rtol=0)
    plain = tiny(tiny_clip, prompt=LearnablePromptSettings(n_prompts=n_prompts))
    assert plain.encode(images, text).image is None
    scores = method.score(images, ["a", "a"])
    highest = scores["anomaly_map"].flatten(1).amax(1)
    assert_close(scores["image_score"], ((highest.logit() + expected) / 2).sigmoid())


@torch.no_grad()
def test_patches_are_the_same_with_and_without_the_class_token(
    tiny_clip: CLIPBackbone, images: Tensor
) -> None:
    last = tiny_clip.num_layers
    for options in ({}, {"dense": "vv"}, {"feature_layer": last, "refine": NONE}):
        without = tiny(tiny_clip, **options)
        with_token = tiny(tiny_clip, class_token=True, **options)
        with_token.load_state_dict(without.state_dict(), strict=False)
        both = (method.encode(images, without.direction()) for method in (without, with_token))
        first, second = (encoded.coarse for encoded in both)
        assert_close(first, second, atol=1e-6, rtol=0)


NONE = RefinementSettings("none")


def test_the_class_token_loss_reaches_the_prompt_and_the_bias(
    tiny_clip: CLIPBackbone, images: Tensor
) -> None:
    method = tiny(tiny_clip, class_token=True, loss=LossSettings(class_token=2.0))
    label = torch.tensor([True, False])
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    encoded = method.encode(images, method.direction())
    assert encoded.image is not None
    terms = method.losses(encoded, mask, label)
    expected = 2 * F.binary_cross_entropy(encoded.image.sigmoid(), label.float())
    assert_close(terms["class_token"], expected, atol=1e-5, rtol=1e-5)
    terms["class_token"].backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"prompt.context", "class_bias"}
