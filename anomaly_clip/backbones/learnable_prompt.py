"""Learnable prompts: trained vectors in place of token embeddings.

A prompt has the form of CoOp (arXiv 2109.01134): start token, optional fixed prefix, learnable
context, optional fixed suffix, end token. The text tower stays frozen; gradients flow through it to
the context only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.errors import check_at_least

__all__ = ["FILLER", "LearnablePrompt", "LearnablePromptSettings"]

FILLER = "X"
"""Placeholder for a learnable vector: one token in the vocabulary of CLIP."""


@dataclass(frozen=True)
class LearnablePromptSettings:
    """Settings of the learnable prompts of CLIP-ADA (arXiv 2403.09493); see docs/howto/prompts.md.

    Args:
        n_ctx: Number of learnable vectors per prompt (CoOp: 16).
        n_prompts: Number of prompts: 1 (abnormal) or 2 (normal and abnormal).
        suffix: Fixed text after the vectors, such as `` damaged object.``; for two prompts, one
            text for both or a list of two texts, normal first.
        init_text: Phrase whose token embeddings initialise the first vectors; for two prompts, one
            phrase for both or a list of two, normal first. Default: all vectors are initialised at
            random.
        init_std: Standard deviation of randomly initialised vectors.
        prefix: Fixed text before the vectors, such as ``a photo of a``; for two prompts, one text
            for both or a list of two texts, normal first.
    """

    n_ctx: int = 16
    n_prompts: int = 1
    suffix: str | list[str] = ""
    init_text: str | list[str] | None = None
    init_std: float = 0.02
    prefix: str | list[str] = ""

    def __post_init__(self) -> None:
        check_at_least("model.prompt.n_ctx", self.n_ctx, 1)
        if self.n_prompts not in (1, 2):
            raise ValueError(f"model.prompt.n_prompts must be 1 or 2, got {self.n_prompts}")
        check_at_least("model.prompt.init_std", self.init_std, 0)
        for name in ("prefix", "suffix", "init_text"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.n_prompts:
                raise ValueError(
                    f"model.prompt.{name}: {len(value)} texts for {self.n_prompts} prompts; give "
                    f"one text, or as many as model.prompt.n_prompts"
                )
            texts = value if isinstance(value, list) else [value or ""]
            odd = [text for text in texts if "{" in text or "}" in text or text == "null"]
            if odd:
                raise ValueError(
                    f"model.prompt.{name}: {odd[0]!r} would be part of the prompt literally; give "
                    f"plain words, or '' for none (the vectors take the place of a category)"
                )


class LearnablePrompt(nn.Module):
    """One or two learnable prompts for the text tower of a CLIP.

    Args:
        backbone: CLIP whose text tower encodes the prompts; this module does not store it.
        settings: Number, length and initialisation of the prompts.
        seed: Seed of the randomly initialised vectors.

    Raises:
        ValueError: If a prompt does not fit into the text tower, or its fixed text contains special
            tokens.
    """

    template: Tensor
    """Token embeddings ``(n_prompts, L, W)``, with placeholders for the vectors."""
    last: Tensor
    """Position of the end token of each prompt."""

    def __init__(
        self, backbone: CLIPBackbone, settings: LearnablePromptSettings, seed: int
    ) -> None:
        super().__init__()
        self.settings = settings
        count, n_ctx = settings.n_prompts, settings.n_ctx
        placeholders = " ".join([FILLER] * n_ctx)
        prefixes, suffixes = (_per_prompt(t, count) for t in (settings.prefix, settings.suffix))
        texts = [f"{a} {placeholders} {b}".strip() for a, b in zip(prefixes, suffixes, strict=True)]
        before, after = (
            [len(_tokens_of(backbone, text)) for text in texts] for texts in (prefixes, suffixes)
        )
        fixed = [sum(lengths) for lengths in zip(before, after, strict=True)]
        room = backbone.model.context_length - 2
        if n_ctx + max(fixed) > room:
            raise ValueError(
                f"model.prompt: {n_ctx} vectors and {max(fixed)} tokens of prefix and suffix do "
                f"not fit into the {room} tokens of the text tower; reduce model.prompt.n_ctx, or "
                f"shorten model.prompt.prefix or model.prompt.suffix"
            )
        ids = backbone.tokenize(texts)
        last = ids.argmax(dim=-1)
        if last.tolist() != [1 + n_ctx + length for length in fixed]:
            raise ValueError(
                f"model.prompt.prefix {settings.prefix!r} and model.prompt.suffix "
                f"{settings.suffix!r} must be plain words; leave out special tokens of CLIP"
            )
        self.starts = [1 + length for length in before]
        embedding = backbone.model.token_embedding
        device = embedding.weight.device
        with torch.no_grad():
            embedded = embedding(ids[:, : int(last.max()) + 1].to(device)).float()
        draws = np.random.default_rng(seed).standard_normal((count, n_ctx, embedded.shape[-1]))
        context = torch.from_numpy(draws * settings.init_std).float().to(device)
        for row, phrase in enumerate(_per_prompt(settings.init_text or "", count)):
            start = _tokens_of(backbone, phrase)
            if len(start) > n_ctx:
                raise ValueError(
                    f"model.prompt.init_text {phrase!r} has {len(start)} tokens, more than "
                    f"model.prompt.n_ctx {n_ctx}; shorten the text or raise n_ctx"
                )
            with torch.no_grad():
                context[row, : len(start)] = embedding(start.to(device)).float()
        self.context = nn.Parameter(context)
        # These buffers come from the frozen CLIP, so checkpoints need not store them.
        self.register_buffer("template", embedded.clone(), persistent=False)
        self.register_buffer("last", last.to(device), persistent=False)

    def embedded(self) -> Tensor:
        """Return the embedded tokens ``(n_prompts, L, W)`` with the vectors in place."""
        n_ctx = self.settings.n_ctx
        parts = zip(self.template, self.starts, self.context, strict=True)
        return torch.stack(
            [torch.cat([row[:at], context, row[at + n_ctx :]]) for row, at, context in parts]
        )

    def forward(self, backbone: CLIPBackbone) -> Tensor:
        """Return the unit-length text features of the prompts, ``(n_prompts, D)`` in float32."""
        with backbone.out_of_autocast():
            return unit(backbone.encode_embedded(self.embedded(), self.last))


def _per_prompt(value: str | Sequence[str], count: int) -> list[str]:
    return [value] * count if isinstance(value, str) else list(value)


def _tokens_of(backbone: CLIPBackbone, text: str) -> Tensor:
    """Return the token ids of a text, without start and end token."""
    ids = backbone.tokenize([text])[0]
    return ids[1 : int(ids.argmax())]
