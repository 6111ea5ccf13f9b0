"""Object-agnostic prompts of AnomalyCLIP (arXiv 2310.18961): learnable vectors at two depths.

The normal prompt reads "object", the abnormal one "damaged object", never the name of a category.
Learnable vectors precede these words (:class:`.LearnablePrompt`). In the first blocks of the text
tower, further vectors, the deep prompts, replace what the block before made of the first tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.backbones.learnable_prompt import LearnablePrompt, LearnablePromptSettings
from anomaly_clip.errors import check_at_least

__all__ = ["MOST_FIXED", "WORDS", "DeepPrompts", "DeepPromptsSettings"]

WORDS = ["object.", "damaged object."]
"""Fixed words of the normal and of the abnormal prompt, after the vectors."""
MOST_FIXED = 5  # tokens of the longer prompt besides its vectors: <start> damaged object . <end>
PUBLISHED_DEPTH, PUBLISHED_BLOCKS = 9, 12  # of the text tower of ViT-L-14-336


@dataclass(frozen=True)
class DeepPromptsSettings:
    """Settings of the learnable prompts of AnomalyCLIP; see docs/methods/anomalyclip.md.

    Args:
        n_ctx: Number of learnable vectors in front of the words.
        depth: Number of blocks of the text tower with learnable vectors, the first one included; 1:
            no deep prompts. Default: 9 of 12 blocks (published), and the same share of others.
        deep_ctx: Number of vectors of a deep prompt.
        init_std: Standard deviation of the random initial vectors.
        round_deep: Round deep prompts to half precision, as the official code does by accident.
    """

    n_ctx: int = 12
    depth: int | None = None
    deep_ctx: int = 4
    init_std: float = 0.02
    round_deep: bool = False

    def __post_init__(self) -> None:
        check_at_least("model.prompt.n_ctx", self.n_ctx, 1)
        check_at_least("model.prompt.deep_ctx", self.deep_ctx, 1)
        check_at_least("model.prompt.init_std", self.init_std, 0)
        if self.depth is not None:
            check_at_least("model.prompt.depth", self.depth, 1)
        if self.deep_ctx > self.n_ctx:
            raise ValueError(
                f"model.prompt.deep_ctx {self.deep_ctx} is above model.prompt.n_ctx {self.n_ctx}, "
                f"so that deep prompts would replace the words: choose at most {self.n_ctx}"
            )

    @classmethod
    def of(cls, settings: DeepPromptsSettings | Mapping[str, Any]) -> DeepPromptsSettings:
        """Return settings, which checkpoints store as plain dictionaries."""
        return settings if isinstance(settings, cls) else cls(**settings)  # type: ignore[arg-type]


class DeepPrompts(nn.Module):
    """The normal and the abnormal prompt of AnomalyCLIP for the text tower of a CLIP.

    Args:
        backbone: CLIP whose text tower encodes the prompts; this module does not store it.
        settings: Numbers of vectors.
        seed: Seed of the initial vectors.

    Raises:
        ValueError: If the text tower has fewer blocks than ``depth``, or too few tokens.
    """

    def __init__(self, backbone: CLIPBackbone, settings: DeepPromptsSettings, seed: int) -> None:
        super().__init__()
        blocks = backbone.num_text_layers
        depth = settings.depth
        if depth is None:
            depth = max(1, round(PUBLISHED_DEPTH * blocks / PUBLISHED_BLOCKS))
        if depth > blocks:
            raise ValueError(
                f"model.prompt.depth {depth} is above {blocks}, the number of blocks in the text "
                f"tower of {backbone.settings.name}: choose at most {blocks}"
            )
        room = backbone.model.context_length - MOST_FIXED
        if settings.n_ctx > room:
            raise ValueError(
                f"model.prompt.n_ctx {settings.n_ctx} is above {room}, the number of vectors that "
                f"the text tower of {backbone.settings.name} has room for: choose at most {room}"
            )
        self.settings = settings
        self.shallow = LearnablePrompt(
            backbone,
            LearnablePromptSettings(
                n_ctx=settings.n_ctx, n_prompts=2, suffix=WORDS, init_std=settings.init_std
            ),
            seed,
        )
        width = self.shallow.context.shape[-1]
        draws = np.random.default_rng([seed, 1])
        shape = depth - 1, settings.deep_ctx, width
        vectors = torch.from_numpy(draws.standard_normal(shape) * settings.init_std).float()
        device = self.shallow.context.device
        self.deep = nn.ParameterList(nn.Parameter(rows.to(device)) for rows in vectors)

    @torch.no_grad()
    def load(self, context: Tensor, deep: Sequence[Tensor]) -> None:
        """Take vectors from elsewhere.

        Args:
            context: ``(2, n_ctx, W)``: normal, abnormal.
            deep: ``(t, W)`` for each deep prompt.
        """
        self.shallow.context.copy_(context)
        for parameter, vectors in zip(self.deep, deep, strict=True):
            parameter.copy_(vectors)

    def forward(self, backbone: CLIPBackbone) -> Tensor:
        """Return the unit-length text features ``(2, D)``, normal and abnormal, in float32."""
        deep = list(self.deep)
        if self.settings.round_deep:
            deep = [vectors.half().to(vectors.dtype) for vectors in deep]
        shallow = self.shallow
        with backbone.out_of_autocast():
            return unit(backbone.encode_embedded(shallow.embedded(), shallow.last, deep))
