"""Image towers of open_clip's models: its own ViTs, and ViTs and FastViTs of timm.

A CLIP compares texts with one embedding per image, which a head makes from the tokens of the last
layer: final norm, pooling, projection. The pooling differs: the class token (CLIP, MobileCLIP-B),
an average (MobileCLIP-S), or attention of a learnt query (SigLIP, PE-Core). One rule gives patches
an embedding in the same space: that which the head gives for the patch alone. For a class token and
an average this is the projection of the patch. For attention, a single token has the weight 1, so
that its value is projected, as MaskCLIP (arXiv 2112.01071) does in CLIP's last block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.blocks import PlainBlock, is_plain

if TYPE_CHECKING:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

__all__ = ["ImageTower", "OpenCLIPTower", "PatchWindow", "image_tower", "unsupported_tower"]

POOLS = ("token", "avg", "map")
PatchWindow = tuple[int, int, int]
"""Top row, left column and side of a square part of the patch grid."""


class ImageTower(ABC):
    """One interface to the image towers of both libraries."""

    width: int
    """Width of the tokens, ``W``."""
    embed_dim: int
    """Dimension of the space that images and texts share, ``D``."""
    grid_size: tuple[int, int]
    patch_size: int
    """Side of a patch in pixels."""
    num_layers: int
    num_prefix_tokens: int
    """Number of tokens before the patches, ``P``: class token and registers."""
    pools_class_token: bool
    """True if the image embedding is made from the first token alone."""
    reason_not_plain: str | None
    """Reason why the tower has no plain blocks; None if it has."""

    @abstractmethod
    def embed(self, pixels: Tensor, window: PatchWindow | None = None) -> Tensor:
        """Return the input of the first block ``(B, P + N, W)``.

        Args:
            pixels: ``(B, 3, S, S)``, normalised.
            window: Part of the patch grid whose positions are used, for images of its size.
        """

    @abstractmethod
    def layers(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Return the outputs ``(B, P + N, W)`` of layers, given by ascending numbers from 1 on."""

    @abstractmethod
    def blocks(self) -> list[PlainBlock]:
        """Return the blocks, of a tower that has plain ones."""

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to tokens ``(..., W)``."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Return the embedding ``(..., D)`` that the head gives each token ``(..., W)`` alone."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Return the image embedding ``(B, D)`` of the tokens ``(B, P + N, W)`` of a layer."""

    def embeddings(self, tokens: Tensor, patches: Tensor | None = None) -> Tensor:
        """Return the image embedding and then those of the patches, ``(B, 1 + N, D)``.

        Args:
            tokens: Tokens of a layer ``(B, P + N, W)``.
            patches: Patches ``(B, N, W)`` in place of those among the tokens.
        """
        if self.pools_class_token:  # one product for all
            if patches is None and self.num_prefix_tokens == 1:
                return self.project(tokens)
            patches = tokens[:, self.num_prefix_tokens :] if patches is None else patches
            return self.project(torch.cat([tokens[:, :1], patches], dim=1))
        patches = tokens[:, self.num_prefix_tokens :] if patches is None else patches
        return torch.cat([self.pool(tokens).unsqueeze(1), self.project(patches)], dim=1)


class OpenCLIPTower(ImageTower):
    """A plain ViT of open_clip: class token, LN_post and a projection without bias."""

    pools_class_token = True
    num_prefix_tokens = 1
    reason_not_plain = None

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual = visual
        height, width = visual.patch_size
        assert height == width, "open_clip's plain ViTs are square"
        self.patch_size = int(height)
        self.width, self.embed_dim = visual.conv1.out_channels, visual.output_dim
        self.grid_size = visual.grid_size
        self.num_layers = len(visual.transformer.resblocks)

    def embed(self, pixels: Tensor, window: PatchWindow | None = None) -> Tensor:
        """Return the sum of token embeddings and positional embeddings, after LN_pre."""
        visual = self.visual
        patches = visual.conv1(pixels).flatten(2).mT  # (B, N, W)
        first = visual.class_embedding.expand(len(patches), 1, -1)  # (B, 1, W)
        tokens = torch.cat([first, patches], dim=1) + self._positions(window)
        return visual.ln_pre(tokens)

    def _positions(self, window: PatchWindow | None) -> Tensor:
        """Return the positional embeddings ``(1 + N, W)`` of the class token and of a window."""
        positions = self.visual.positional_embedding
        if window is None:
            return positions
        rows, columns = (slice(start, start + window[2]) for start in window[:2])
        grid = positions[1:].unflatten(0, self.visual.grid_size)[rows, columns]  # (h, w, W)
        return torch.cat([positions[:1], grid.flatten(0, 1)])  # (1 + h * w, W)

    def layers(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Return the outputs of blocks; see the base class."""
        return _outputs(self.embed(pixels), self.visual.transformer.resblocks, numbers)

    def blocks(self) -> list[PlainBlock]:
        """Return the blocks; see the base class."""
        return [PlainBlock.of(block) for block in self.visual.transformer.resblocks]

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply LN_post."""
        return self.visual.ln_post(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        """Apply LN_post and the projection."""
        return self.visual.ln_post(tokens) @ self.visual.proj

    def pool(self, tokens: Tensor) -> Tensor:
        """Project the class token."""
        return self.project(tokens[:, 0])


class TimmTower(ImageTower):
    """A ViT of timm, with or without class token, with absolute or rotary positions."""

    def __init__(self, visual: TimmModel) -> None:
        self.visual = visual
        trunk: Any = visual.trunk
        self.trunk = trunk
        self.width, self.embed_dim = trunk.embed_dim, _output_dim(visual)
        self.grid_size = trunk.patch_embed.grid_size
        self.patch_size = int(trunk.patch_embed.feat_ratio(as_scalar=True))
        self.num_layers = len(trunk.blocks)
        self.num_prefix_tokens = trunk.num_prefix_tokens
        self.pools_class_token = trunk.attn_pool is None and trunk.global_pool == "token"
        self.reason_not_plain = None
        if not all(map(is_plain, trunk.blocks)):
            rotary = getattr(trunk, "rope", None) is not None
            self.reason_not_plain = "rotary positions" if rotary else "blocks of another kind"

    def embed(self, pixels: Tensor, window: PatchWindow | None = None) -> Tensor:
        """Return the tokens before the first block, with absolute positions if there are any."""
        assert window is None, "check_learnable_text refuses the methods with windows of positions"
        trunk = self.trunk
        tokens = trunk._pos_embed(trunk.patch_embed(pixels))
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # with rotary positions
        result: Tensor = trunk.norm_pre(tokens)
        return result

    def layers(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Return the outputs of blocks; see the base class."""
        if self.reason_not_plain is None:
            return _outputs(self.embed(pixels), self.trunk.blocks, numbers)
        prefix = self.num_prefix_tokens
        outputs = self.trunk.forward_intermediates(
            pixels,
            indices=[number - 1 for number in numbers],
            return_prefix_tokens=prefix > 0,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if not prefix:
            return list(outputs)
        return [torch.cat([first, patches], dim=1) for patches, first in outputs]

    def blocks(self) -> list[PlainBlock]:
        """Return the blocks; see the base class."""
        return [PlainBlock.of(block) for block in self.trunk.blocks]

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm, which an average pool applies after pooling."""
        result: Tensor = self.trunk.fc_norm(self.trunk.norm(tokens))
        return result

    def project(self, tokens: Tensor) -> Tensor:
        """Apply norms, the value path of an attention pool, and projections."""
        trunk = self.trunk
        tokens = trunk.norm(tokens)
        if trunk.attn_pool is not None:
            tokens = _value_path(trunk.attn_pool, tokens)
        result: Tensor = self.visual.head(trunk.head(trunk.fc_norm(tokens)))
        return result

    def pool(self, tokens: Tensor) -> Tensor:
        """Apply the head to all tokens."""
        trunk = self.trunk
        result: Tensor = self.visual.head(trunk.forward_head(trunk.norm(tokens)))
        return result


class FastViTTower(ImageTower):
    """A FastViT of timm (MobileCLIP-S), whose tokens are the positions of its last feature map."""

    num_layers = 1
    num_prefix_tokens = 0
    pools_class_token = False
    reason_not_plain = "convolutions between its attention layers"

    def __init__(self, visual: TimmModel) -> None:
        self.visual = visual
        trunk: Any = visual.trunk
        self.trunk = trunk
        self.width, self.embed_dim = trunk.num_features, _output_dim(visual)
        self.patch_size = int(trunk.feature_info[-1]["reduction"])
        height, width = visual.image_size
        self.grid_size = height // self.patch_size, width // self.patch_size

    def embed(self, pixels: Tensor, window: PatchWindow | None = None) -> Tensor:
        """Not possible: a FastViT has no token before its last layer."""
        raise AssertionError("CLIPBackbone.blocks refuses the methods that read these tokens")

    def layers(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Return the last feature map, as tokens; see the base class."""
        features: Tensor = self.trunk.forward_features(pixels)  # (B, W, h, w)
        return [features.flatten(2).mT] * len(numbers)

    def blocks(self) -> list[PlainBlock]:
        """Not possible; see ``reason_not_plain``."""
        raise AssertionError("CLIPBackbone.blocks refuses the methods that read these blocks")

    def norm(self, tokens: Tensor) -> Tensor:
        """Return the tokens, as the norm of a FastViT is within its convolutions."""
        return tokens

    def project(self, tokens: Tensor) -> Tensor:
        """Apply the projections."""
        result: Tensor = self.visual.head(self.trunk.head.fc(tokens))
        return result

    def pool(self, tokens: Tensor) -> Tensor:
        """Project the average."""
        return self.project(tokens.mean(dim=1))


def _outputs(tokens: Tensor, blocks: nn.Module, numbers: Sequence[int]) -> list[Tensor]:
    """Return the tokens after some of the blocks, given by ascending numbers from 1 on."""
    outputs = []
    for number, block in enumerate(blocks[: numbers[-1]], start=1):  # type: ignore[index]
        tokens = block(tokens)
        if number in numbers:
            outputs.append(tokens)
    return outputs


def _output_dim(visual: TimmModel) -> int:
    linear = [layer for layer in visual.head.modules() if isinstance(layer, nn.Linear)]
    trunk: Any = visual.trunk
    return linear[-1].out_features if linear else int(trunk.num_classes or trunk.num_features)


def _value_path(pool: Any, tokens: Tensor) -> Tensor:
    """Return what an ``AttentionPoolLatent`` gives for each token ``(..., W)`` alone."""
    width = tokens.shape[-1]
    bias = None if pool.kv.bias is None else pool.kv.bias[width:]
    tokens = pool.proj(F.linear(tokens, pool.kv.weight[width:], bias))
    if pool.mlp is None:
        return tokens
    result: Tensor = tokens + pool.mlp(pool.norm(tokens))
    return result


def image_tower(visual: nn.Module) -> ImageTower:
    """Return the interface to an image tower of open_clip.

    Args:
        visual: open_clip's plain ``VisionTransformer``, or a ``TimmModel``; see
            :func:`unsupported_tower`.
    """
    from open_clip.timm_model import TimmModel  # slow to import
    from timm.models.fastvit import FastVit

    if not isinstance(visual, TimmModel):
        return OpenCLIPTower(visual)
    return FastViTTower(visual) if isinstance(visual.trunk, FastVit) else TimmTower(visual)


def unsupported_tower(visual: nn.Module) -> str | None:
    """Return the reason why an image tower is not supported; None if it is."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    from timm.models.eva import Eva
    from timm.models.fastvit import FastVit
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    if isinstance(visual, VisionTransformer):
        plain = (
            visual.pool_type == "tok"
            and visual.attn_pool is None
            and not visual.final_ln_after_pool
            and type(visual.transformer.resblocks[0]) is ResidualAttentionBlock
        )
        return None if plain else "its image tower is a ViT with another head or other blocks"
    if not isinstance(visual, TimmModel):
        return "its image tower is no ViT"
    trunk: Any = visual.trunk
    if isinstance(trunk, FastVit):
        is_average = trunk.head.global_pool.pool_type == "avg" and len(visual.head) == 0
        return None if is_average else "its FastViT has another head"
    if type(trunk) not in (TimmViT, Eva):
        return f"its image tower {type(trunk).__name__} is neither a ViT nor a FastViT of timm"
    if trunk.global_pool not in POOLS or len(set(trunk.patch_embed.patch_size)) > 1:
        return f"its image tower has the pooling {trunk.global_pool!r}"
    pool: Any = trunk.attn_pool
    if pool is not None and (pool.latent_len != 1 or pool.pos_embed is not None):
        return "its attention pool has several queries, or positions"
    return None
