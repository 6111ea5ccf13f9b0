"""An embedding of which some rows are trained: what a step costs then follows what it says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PartEmbedding"]


class PartEmbedding(nn.Module):
    """The embedding of a vocabulary, trained for some tokens and frozen for all others.

    The vocabulary is three quarters of the small CLIP's weights, and a sentence has a dozen words.
    Gradient, clipping, optimiser and exchange between processes of all rows would take longer than
    the rest of a step.

    Args:
        embedding: The whole embedding; its weight is kept, frozen.
        tokens: int64, the ids of the tokens whose rows are trained, in any order.
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
        """Return the rows of token ids ``(...)``, ``(..., W)``."""
        places = self.places[ids]
        trained = F.embedding(places.clamp(min=0), self.rows)
        return torch.where((places >= 0).unsqueeze(-1), trained, F.embedding(ids, self.weight))

    def merged(self) -> Tensor:
        """Return the weight of the whole embedding, the trained rows in their places."""
        weight = self.weight.detach().clone()
        weight[self.tokens.to(weight.device)] = self.rows.detach()
        return weight
