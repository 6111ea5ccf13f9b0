"""Anomaly region refinement: a second pass, led by where the first map suspects a defect.

Of the paper (CLIP-ADA, arXiv 2403.09493) it is only known that the coarse map serves as an
attention map that leads from coarse to fine. The wiring of all modes is our choice (section 2.5 of
the specification).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.backbones.surgery import attend, split_heads
from anomaly_clip.errors import check_at_least, check_choice

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock

__all__ = ["DenseHead", "RefinementSettings", "RegionRefinement", "biased_block"]


MODES = ("bias", "multiply", "reencode", "none")


@dataclass(frozen=True)
class RefinementSettings:
    """Settings of the refinement pass.

    Args:
        mode: bias: a copy of CLIP's next blocks, trained, whose attention prefers the candidate
            region. multiply: patches are scaled by the coarse map, behind the norm that would undo
            it; no block. reencode: CLIP's own remaining blocks, frozen, with that preference. none:
            no refinement (ablation).
        blocks: Of bias: how many blocks are copied.
        steps: How often it is done; each time the map before is the one that leads.
        detach: Whether the coarse map leads without being changed by the fine one's loss.
        beta_init: Of bias and reencode: what the map is multiplied by, at the start.
        gamma_init: Of multiply: the same.
        fuse: mean: the final map is the mean of the first and the last; fine: the last.
    """

    mode: Literal["bias", "multiply", "reencode", "none"] = "bias"
    blocks: int = 1
    steps: int = 1
    detach: bool = True
    beta_init: float = 4.0
    gamma_init: float = 1.0
    fuse: Literal["mean", "fine"] = "mean"

    def __post_init__(self) -> None:
        check_choice("model.refine.mode", self.mode, MODES)
        check_choice("model.refine.fuse", self.fuse, ("mean", "fine"))
        check_at_least("model.refine.blocks", self.blocks, 1)
        check_at_least("model.refine.steps", self.steps, 1)


class DenseHead(nn.Module):
    """LayerNorm without parameters, a linear layer into the texts' space, unit length (Psi)."""

    def __init__(self, width: int, dim: int, pre_norm: bool = True) -> None:
        super().__init__()
        # The residual stream has a few channels of very large magnitude.
        self.norm = nn.LayerNorm(width, elementwise_affine=False) if pre_norm else nn.Identity()
        self.linear = nn.Linear(width, dim)

    @torch.no_grad()
    def start_from(self, backbone: CLIPBackbone) -> None:
        """Start as the projection that CLIP ends with, the weights of its last norm included."""
        visual = backbone.visual
        projection = visual.proj.detach().float()  # (W, D)
        weight, bias = visual.ln_post.weight.detach().float(), visual.ln_post.bias.detach().float()
        self.linear.weight.copy_((weight.unsqueeze(1) * projection).T)  # (D, W)
        self.linear.bias.copy_(bias @ projection)

    def forward(self, patches: Tensor, scale: Tensor | None = None) -> Tensor:
        """Turn patches ``(B, N, W)`` into ``(B, N, D)``, float32.

        Args:
            patches: As a layer left them.
            scale: ``(B, N)``, by which patches are multiplied behind the norm, which would undo it.
        """
        normed = self.norm(patches.float())
        return unit(self.linear(normed if scale is None else normed * scale.unsqueeze(-1)))


class RegionRefinement(nn.Module):
    """A second pass over the tokens of one layer, led by a map.

    Args:
        backbone: Whose blocks are copied, or used.
        layer: Whose tokens are refined, 1-based.
        settings: How.
        pre_norm: As for :class:`DenseHead`.

    Raises:
        ValueError: If too few blocks follow the layer.
    """

    def __init__(
        self, backbone: CLIPBackbone, layer: int, settings: RefinementSettings, pre_norm: bool
    ) -> None:
        super().__init__()
        self.settings = settings
        self.layer = layer
        visual = backbone.visual
        width, dim = visual.conv1.out_channels, visual.output_dim
        mode = settings.mode
        available = backbone.num_layers - layer
        needed = {"bias": settings.blocks, "reencode": 1}.get(mode, 0)
        if available < needed:
            raise ValueError(
                f"model.refine.mode {mode} takes {needed} blocks behind model.feature_layer "
                f"{layer}, but {backbone.settings.name} has {available}"
            )
        if mode in ("bias", "multiply"):
            self.head = DenseHead(width, dim, pre_norm)
        if mode == "multiply":
            self.gamma = nn.Parameter(torch.tensor(float(settings.gamma_init)))
        else:
            self.beta = nn.Parameter(torch.tensor(float(settings.beta_init)))
        if mode == "bias":
            following = visual.transformer.resblocks[layer : layer + settings.blocks]
            self.blocks = copy.deepcopy(following).float().requires_grad_(True)
            self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, backbone: CLIPBackbone, tokens: Tensor, leading: Tensor) -> Tensor:
        """Return the patches' features after the refinement, unit length ``(B, N, D)``.

        Args:
            backbone: The frozen CLIP.
            tokens: ``(B, 1 + N, W)`` of the layer, class token first.
            leading: The map that leads, ``(B, N)`` in [0, 1].
        """
        if self.settings.detach:
            leading = leading.detach()
        mode = self.settings.mode
        if mode == "multiply":
            return self.head(tokens[:, 1:], 1 + self.gamma * leading)
        centred = leading - leading.mean(dim=1, keepdim=True)  # a flat map changes nothing
        bias = torch.cat(
            [torch.zeros_like(centred[:, :1]), self.beta * centred], dim=1
        )  # (B, 1 + N)
        if mode == "bias":
            shifted = tokens[:, 1:].float() + leading.unsqueeze(-1) * self.shift
            seen = torch.cat([tokens[:, :1].float(), shifted], dim=1)
            for block in self.blocks:
                seen = biased_block(block, seen, bias)
            return self.head(seen[:, 1:])
        with backbone.out_of_autocast():
            for block in backbone.visual.transformer.resblocks[self.layer :]:
                tokens = biased_block(block, tokens, bias)
            return unit(backbone.project(tokens[:, 1:]))


def biased_block(block: ResidualAttentionBlock, tokens: Tensor, bias: Tensor) -> Tensor:
    """Run a block of the image tower with a bias on the keys.

    Args:
        block: open_clip's residual attention block.
        tokens: ``(B, 1 + N, W)``.
        bias: ``(B, 1 + N)``, added to the attention logits of every query and head.
    """
    q, k, v = split_heads(block, block.ln_1(tokens))
    attended = tokens + attend(block, q, k, v, bias)
    return attended + block.ls_2(block.mlp(block.ln_2(attended)))
