"""Bare forward and backward passes, the baseline that training steps are compared with.

The passes leave out masks, losses, logging, optimiser and bookkeeping.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import unit
from anomaly_clip.methods import CLIPADA

__all__ = ["clip_ada_parts"]


def clip_ada_parts(method: CLIPADA) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None]]:
    """Return one function for the frozen part of CLIP-ADA and one for the trained part.

    The frozen part is open_clip's image tower up to ``feature_layer``, run without gradients.
    The trained part is the forward and backward pass of two linear layers, one block, and the text
    tower over one prompt.
    """
    clip, device = method.backbone.model, method.device
    visual, layer = clip.visual, method.feature_layer
    width, dim = visual.conv1.out_channels, visual.output_dim
    heads = nn.ModuleList(nn.Linear(width, dim, device=device) for _ in range(2))
    norm = nn.LayerNorm(width, elementwise_affine=False)
    block = copy.deepcopy(visual.transformer.resblocks[layer]).float().requires_grad_(True)
    text_width = clip.token_embedding.weight.shape[1]
    prompt = (0.02 * torch.randn(1, 16, text_width, device=device)).requires_grad_()
    ends = torch.randn(1, 1, text_width, device=device)

    def frozen(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = visual.forward_intermediates(
                pixels, indices=[layer - 1], stop_early=True, intermediates_only=True,
                output_fmt="NLC", output_extra_tokens=True,
            )  # fmt: skip
            prefix = outputs["image_intermediates_prefix"]
            patches = outputs["image_intermediates"]
            return torch.cat([prefix[0], patches[0]], dim=1)

    def trained(tokens: Tensor) -> None:
        with torch.autocast(device.type, enabled=False):
            words = torch.cat([ends, prompt, ends], dim=1) + clip.positional_embedding[:18]
            words = clip.transformer(words, attn_mask=clip.attn_mask[:18, :18])
            text = unit(clip.ln_final(words)[:, -1] @ clip.text_projection)[0]
        tokens = tokens.float()
        coarse = unit(heads[0](norm(tokens[:, 1:]))) @ text
        fine = unit(heads[1](norm(block(tokens)[:, 1:]))) @ text
        (coarse.mean() + fine.mean()).backward()

    return frozen, trained
