"""Plain transformer blocks of CLIP's image towers, of open_clip and of timm, behind one interface.

A block is plain if it adds self-attention and then an MLP to its input, each after a norm, and if
queries, keys and values are one linear map of the normed tokens. Value-value attention
(``surgery.py``), the windows of WinCLIP and the refinement of CLIP-ADA evaluate the parts of such a
block apart. Rotary positions, norms of queries and keys, gates and convolutions are more than that,
so their attention cannot be evaluated in this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainBlock", "is_plain", "weighted_values"]


@dataclass(frozen=True)
class PlainBlock:
    """The parts of a plain transformer block; see :func:`is_plain`."""

    module: nn.Module
    norm: nn.Module
    """Norm before the attention."""
    weight: Tensor
    """Weight ``(3 W, W)`` of queries, keys and values."""
    bias: Tensor | None
    """Bias ``(3 W,)`` of queries, keys and values."""
    num_heads: int
    output: nn.Module
    """Output projection of the attention."""
    scale: nn.Module
    """Layer scale of the attention, or the identity."""
    mlp_norm: nn.Module
    mlp: nn.Module
    mlp_scale: nn.Module

    @classmethod
    def of(cls, block: nn.Module) -> PlainBlock:
        """Return the parts of a plain block of open_clip or timm."""
        parts: Any = block
        inner = parts.attn
        if hasattr(inner, "qkv"):  # timm
            joint = (inner.qkv.weight, inner.qkv.bias)
            names = (parts.norm2, parts.mlp, parts.ls2)
            return cls(block, parts.norm1, *joint, inner.num_heads, inner.proj, parts.ls1, *names)
        joint = (inner.in_proj_weight, inner.in_proj_bias)
        names = (parts.ln_2, parts.mlp, parts.ls_2)
        return cls(block, parts.ln_1, *joint, inner.num_heads, inner.out_proj, parts.ls_1, *names)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run the block on tokens ``(B, 1 + N, W)``."""
        result: Tensor = self.module(tokens)
        return result

    def joint(self, tokens: Tensor) -> Tensor:
        """Return queries, keys and values of input tokens, side by side ``(..., 3 W)``."""
        return F.linear(self.norm(tokens), self.weight, self.bias)

    def first_joint(self, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the first rows, and keys and values of all input tokens.

        Args:
            tokens: ``(B, 1 + N, W)``.
            rows: Number of rows with queries.

        Returns:
            ``(B, rows, W)``, and twice ``(B, 1 + N, W)``.
        """
        width = tokens.shape[-1]
        normed = self.norm(tokens)
        biases = (None, None) if self.bias is None else (self.bias[:width], self.bias[width:])
        queries = F.linear(normed[:, :rows], self.weight[:width], biases[0])
        keys, values = F.linear(normed, self.weight[width:], biases[1]).split(width, dim=-1)
        return queries, keys, values

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of input tokens, ``(B, heads, 1 + N, d)`` each."""
        mixed = self.joint(tokens).unflatten(-1, (3, self.num_heads, -1))  # (B, 1 + N, 3, heads, d)
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        return q, k, v

    def per_head(self, rows: Tensor) -> Tensor:
        """Split queries, keys or values ``(B, n, W)`` into ``(B, heads, n, d)``."""
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the attention output ``(B, n, W)`` that the block adds to its input.

        Args:
            q: Queries ``(B, heads, n, d)``.
            k: Keys ``(B, heads, 1 + N, d)``.
            v: Values of the same shape.
            bias: Bias ``(B, 1 + N)`` per key, added to the logits of every query; default: none.
        """
        return self.attention_output(weighted_values(q, k, v, bias))

    def attention_output(self, attended: Tensor) -> Tensor:
        """Project weighted values ``(B, heads, n, d)`` to ``(B, n, W)``."""
        result: Tensor = self.scale(self.output(attended.transpose(1, 2).flatten(2)))
        return result

    def mlp_output(self, attended: Tensor) -> Tensor:
        """Return what the MLP adds to tokens ``(B, n, W)`` after the attention."""
        result: Tensor = self.mlp_scale(self.mlp(self.mlp_norm(attended)))
        return result


def weighted_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the weighted values ``(B, heads, n, d)``; see :meth:`PlainBlock.attend`."""
    if bias is not None:
        bias = bias[:, None, None, :]
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # Here torch's fused kernel takes three times as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            logits = logits if bias is None else logits + bias.to(logits.dtype)
            return logits.softmax(dim=-1) @ v
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask)  # scale 1 / sqrt(d)


def is_plain(block: nn.Module) -> bool:
    """Return whether a block is a plain one of open_clip, or of timm's ``VisionTransformer``."""
    from open_clip.transformer import ResidualAttentionBlock  # slow to import
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    if type(block) is ResidualAttentionBlock:
        return True
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    inner: Any = block.attn
    extras = (inner.q_norm, inner.k_norm, getattr(inner, "norm", None))
    width = inner.qkv.in_features
    return (
        all(extra is None or isinstance(extra, nn.Identity) for extra in extras)
        and getattr(inner, "gate", None) is None
        and inner.qkv.out_features == 3 * width == 3 * inner.num_heads * inner.head_dim
    )
