"""Changes to a CLIP before training: scaled attention values, partly frozen token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone

__all__ = ["PartEmbedding", "scale_values"]


@torch.no_grad()
def scale_values(backbone: CLIPBackbone, gain: float) -> None:
    """Multiply the value projections of all blocks and divide the output projections by ``gain``.

    The output of the network does not change.
    """
    width = backbone.width
    for block in backbone.visual.transformer.resblocks:
        block.attn.in_proj_weight[2 * width :] *= gain
        block.attn.in_proj_bias[2 * width :] *= gain
        block.attn.out_proj.weight /= gain


class PartEmbedding(nn.Module):
    """A token embedding trained for some tokens and frozen for all others.

    The embedding holds three quarters of the small CLIP's weights, but a caption has only a dozen
    words. Gradients, clipping, optimiser steps and synchronisation of all rows would take longer
    than the rest of a training step.

    Args:
        embedding: The whole embedding; its weight is frozen in place.
        tokens: Ids of the tokens to train, int64, in any order.
    """

    places: Tensor

    def __init__(self, embedding: nn.Embedding, tokens: Tensor) -> None:
        super().__init__()
        self.weight = embedding.weight.requires_grad_(False)
        self.tokens = tokens.unique()
        self.rows = nn.Parameter(self.weight.detach()[self.tokens].clone())
        places = torch.full((len(self.weight),), -1)
        places[self.tokens] = torch.arange(len(self.tokens))
        self.register_buffer("places", places, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings ``(..., W)`` of token ids ``(...)``."""
        places = self.places[ids]
        trained = F.embedding(places.clamp(min=0), self.rows)
        return torch.where((places >= 0).unsqueeze(-1), trained, F.embedding(ids, self.weight))

    def merged(self) -> Tensor:
        """Return the weight of the whole embedding, with the trained rows inserted."""
        weight = self.weight.detach().clone()
        weight[self.tokens.to(weight.device)] = self.rows.detach()
        return weight
