"""Anomaly region refinement: a second pass, guided by the coarse map.

The available descriptions of CLIP-ADA (arXiv 2403.09493) only state that the coarse map serves as
an attention map, from coarse to fine. The wiring of all modes is our choice (reasons in
docs/methods/clip_ada.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.blocks import PlainBlock
from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.errors import check_at_least, check_choice

__all__ = ["DenseHead", "RefinementSettings", "RegionRefinement", "biased_block"]


MODES = ("bias", "multiply", "reencode", "none")


@dataclass(frozen=True)
class RefinementSettings:
    """Settings of the refinement pass.

    Args:
        mode: bias: a trained copy of CLIP's next blocks with an attention bias towards the
            candidate region. multiply: no block; patches are scaled by the coarse map, after the
            norm because the norm would undo the scaling. reencode: CLIP's own remaining blocks,
            frozen, with the same attention bias. none: no refinement (ablation).
        blocks: Number of copied blocks (mode bias).
        steps: Number of refinement passes, each guided by the map of the previous one.
        detach: Stop the gradient of the refined map's loss at the guiding map.
        beta_init: Initial factor of the guiding map in the attention bias (modes bias, reencode).
        gamma_init: Initial factor of the guiding map in the scaling (mode multiply).
        fuse: mean: the final map is the mean of the coarse map and the last refined map. fine: the
            final map is the last refined map.
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
    """Projection Psi: LayerNorm without parameters, linear layer to text space, unit length."""

    def __init__(self, width: int, dim: int, pre_norm: bool = True) -> None:
        super().__init__()
        # The residual stream has a few channels of very large magnitude.
        self.norm = nn.LayerNorm(width, elementwise_affine=False) if pre_norm else nn.Identity()
        self.linear = nn.Linear(width, dim)

    @torch.no_grad()
    def start_from(self, backbone: CLIPBackbone) -> None:
        """Copy CLIP's final projection, including the weights of its last LayerNorm."""
        visual = backbone.visual
        projection = visual.proj.detach().float()  # (W, D)
        weight, bias = visual.ln_post.weight.detach().float(), visual.ln_post.bias.detach().float()
        self.linear.weight.copy_((weight.unsqueeze(1) * projection).T)  # (D, W)
        self.linear.bias.copy_(bias @ projection)

    def forward(self, patches: Tensor, scale: Tensor | None = None) -> Tensor:
        """Project patches ``(B, N, W)`` to ``(B, N, D)``, float32.

        Args:
            patches: Patches as a layer returns them.
            scale: Factors ``(B, N)``, applied after the norm because the norm would undo them.
        """
        normed = self.norm(patches.float())
        return unit(self.linear(normed if scale is None else normed * scale.unsqueeze(-1)))


class RegionRefinement(nn.Module):
    """A second pass over the tokens of one layer, guided by a map.

    Args:
        backbone: The CLIP that provides the blocks.
        layer: Layer whose tokens are refined, 1-based.
        settings: Settings of the pass.
        pre_norm: See :class:`DenseHead`.

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
        width, dim = backbone.width, backbone.embed_dim
        mode = settings.mode
        available = backbone.num_layers - layer
        needed = {"bias": settings.blocks, "reencode": 1}.get(mode, 0)
        if available < needed:
            raise ValueError(
                f"model.refine.mode {mode} needs {needed} blocks after model.feature_layer "
                f"{layer}, but {backbone.settings.name} has {available}: choose an earlier layer "
                f"or mode multiply"
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

    def forward(self, backbone: CLIPBackbone, tokens: Tensor, guide: Tensor) -> Tensor:
        """Return the refined patch features, unit length ``(B, N, D)``.

        Args:
            backbone: The frozen CLIP.
            tokens: Tokens ``(B, 1 + N, W)`` of the layer, class token first.
            guide: Map that guides the pass, ``(B, N)`` in [0, 1].
        """
        if self.settings.detach:
            guide = guide.detach()
        mode = self.settings.mode
        if mode == "multiply":
            return self.head(tokens[:, 1:], 1 + self.gamma * guide)
        centred = guide - guide.mean(dim=1, keepdim=True)  # a constant map adds no bias
        bias = torch.cat(
            [torch.zeros_like(centred[:, :1]), self.beta * centred], dim=1
        )  # (B, 1 + N)
        if mode == "bias":
            shifted = tokens[:, 1:].float() + guide.unsqueeze(-1) * self.shift
            refined = torch.cat([tokens[:, :1].float(), shifted], dim=1)
            for block in self.blocks:
                refined = biased_block(PlainBlock.of(block), refined, bias)
            return self.head(refined[:, 1:])
        with backbone.out_of_autocast():
            for block in backbone.blocks[self.layer :]:
                tokens = biased_block(block, tokens, bias)
            return unit(backbone.project(tokens[:, 1:]))


def biased_block(block: PlainBlock, tokens: Tensor, bias: Tensor) -> Tensor:
    """Run a block of the image tower with an attention bias on the keys.

    Args:
        block: The block.
        tokens: ``(B, 1 + N, W)``.
        bias: ``(B, 1 + N)``, added to the attention logits of every query and head.
    """
    q, k, v = block.heads(tokens)
    attended = tokens + block.attend(q, k, v, bias)
    return attended + block.mlp_output(attended)
