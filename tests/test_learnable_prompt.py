from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.learnable_prompt import LearnablePrompt, LearnablePromptSettings


def by_open_clip(clip: CLIPBackbone, *texts: str) -> Tensor:
    with torch.no_grad():
        return F.normalize(clip.model.encode_text(clip.tokenize(texts)), dim=-1)


def num_tokens(clip: CLIPBackbone, text: str) -> int:
    return int(clip.tokenize([text])[0].argmax()) - 1


@pytest.mark.parametrize("text", ["a photo of a damaged bottle", "broken", "a. b, c"])
def test_the_embeddings_of_a_text_give_its_features(tiny_clip: CLIPBackbone, text: str) -> None:
    count = num_tokens(tiny_clip, text)
    settings = LearnablePromptSettings(n_ctx=count, init_text=text)
    features = LearnablePrompt(tiny_clip, settings, seed=0)(tiny_clip)
    assert_close(features, by_open_clip(tiny_clip, text), atol=1e-6, rtol=0)


def test_two_prompts_with_suffixes_of_different_length(tiny_clip: CLIPBackbone) -> None:
    settings = LearnablePromptSettings(
        n_ctx=4,
        n_prompts=2,
        suffix=["object.", "damaged object."],
        init_text=["photo of a new", "photo of a used"],
    )
    features = LearnablePrompt(tiny_clip, settings, seed=0)(tiny_clip)
    texts = ("photo of a new object.", "photo of a used damaged object.")
    assert_close(features, by_open_clip(tiny_clip, *texts), atol=1e-6, rtol=0)


def test_sixteen_vectors_stand_between_start_and_end(tiny_clip: CLIPBackbone) -> None:
    prompt = LearnablePrompt(tiny_clip, LearnablePromptSettings(), seed=0)
    width = tiny_clip.model.token_embedding.weight.shape[1]
    assert prompt.context.shape == (1, 16, width)
    assert prompt.last.tolist() == [17]
    start, end = tiny_clip.tokenize([""])[0, :2]
    embedding = tiny_clip.model.token_embedding.weight
    assert prompt.template.shape == (1, 18, width)
    assert_close(prompt.template[0, 0], embedding[start])
    assert_close(prompt.template[0, 17], embedding[end])
    assert list(prompt.state_dict()) == ["context"]


def test_fixed_words_stay_around_the_vectors(tiny_clip: CLIPBackbone) -> None:
    """With the embeddings of words as vectors, the prompt equals the whole text."""
    settings = LearnablePromptSettings(
        n_ctx=2,
        n_prompts=2,
        prefix=["a photo of a", "a close-up"],  # four and three tokens
        suffix=["", "in the dark."],
        init_text=["new bottle", "broken bottle"],
    )
    prompt = LearnablePrompt(tiny_clip, settings, seed=0)
    texts = ("a photo of a new bottle", "a close-up broken bottle in the dark.")
    assert_close(prompt(tiny_clip), by_open_clip(tiny_clip, *texts), atol=1e-6, rtol=0)
    settings = LearnablePromptSettings(n_ctx=2, prefix="a photo of a", suffix="in the dark.")
    prompt = LearnablePrompt(tiny_clip, settings, seed=3)
    plain = LearnablePrompt(tiny_clip, LearnablePromptSettings(n_ctx=2), seed=3)
    assert torch.equal(prompt.context, plain.context)
    embedding = tiny_clip.model.token_embedding.weight
    ids = tiny_clip.tokenize(["a photo of a X X in the dark."])[0, : 1 + 4 + 2 + 4 + 1]
    literal = torch.cat([embedding[ids[:5]], prompt.context[0], embedding[ids[7:]]])[None]
    with torch.no_grad():
        expected = tiny_clip.encode_embedded(literal, torch.tensor([len(ids) - 1]))
    assert_close(prompt(tiny_clip), F.normalize(expected, dim=-1), atol=1e-6, rtol=0)
    assert list(prompt.state_dict()) == ["context"]


def test_only_the_vectors_get_gradients(tiny_clip: CLIPBackbone) -> None:
    settings = LearnablePromptSettings(n_ctx=3, prefix="a photo of a", suffix="object.")
    prompt = LearnablePrompt(tiny_clip, settings, seed=0)
    prompt(tiny_clip)[0, 0].backward()
    assert prompt.context.grad is not None
    assert bool((prompt.context.grad.abs().sum(-1) > 0).all())
    assert all(parameter.grad is None for parameter in tiny_clip.parameters())


def test_the_start_depends_on_the_seed_alone(tiny_clip: CLIPBackbone) -> None:
    settings = LearnablePromptSettings(n_ctx=60)
    first, again, other = (
        LearnablePrompt(tiny_clip, settings, seed).context.detach() for seed in (1, 1, 2)
    )
    assert_close(first, again, atol=0, rtol=0)
    assert not torch.allclose(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.15)
    partly = LearnablePromptSettings(n_ctx=5, init_text="damaged")
    context = LearnablePrompt(tiny_clip, partly, seed=1).context[0]
    token = tiny_clip.tokenize(["damaged"])[0, 1]
    assert_close(context[0], tiny_clip.model.token_embedding.weight[token])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 0}, "model.prompt.n_ctx must be 1 or more, got 0"),
        ({"n_prompts": 3}, "model.prompt.n_prompts must be 1 or 2, got 3"),
        ({"init_std": -1.0}, "model.prompt.init_std must be 0 or more"),
        ({"suffix": ["a", "b"]}, "model.prompt.suffix: 2 texts for 1 prompts"),
        ({"prefix": ["a"], "n_prompts": 2}, "model.prompt.prefix: 1 texts for 2 prompts"),
        ({"n_ctx": 75, "suffix": "object"}, "do not fit into the 75 tokens of the text tower"),
        (
            {"n_ctx": 70, "prefix": "a photo of a", "suffix": "damaged object"},
            "70 vectors and 6 tokens of prefix and suffix do not fit into the 75 tokens",
        ),
        ({"n_ctx": 2, "prefix": "word " * 99}, "2 vectors and 75 tokens of prefix and suffix"),
        ({"prefix": "a <end_of_text>"}, "must be plain words; leave out special tokens"),
        ({"n_ctx": 1, "init_text": "a photo"}, "has 2 tokens, more than model.prompt.n_ctx 1"),
    ],
)
def test_bad_settings_are_named(
    tiny_clip: CLIPBackbone, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LearnablePrompt(tiny_clip, LearnablePromptSettings(**options), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a photo of a {}.", "null", ["a", "{"]])
@pytest.mark.parametrize("name", ["prefix", "suffix", "init_text"])
def test_templates_and_null_are_not_words(name: str, text: Any) -> None:
    with pytest.raises(ValueError, match=f"model.prompt.{name}: .* would be part of the prompt"):
        LearnablePromptSettings(n_prompts=2, **{name: text})
