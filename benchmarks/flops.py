"""Floating-point operations of the image towers, by formula; a multiply-add counts as two.

Only matrix products and convolutions are counted. Norms, softmaxes, activations, the comparison
with text features and the Gaussian blur of the maps are left out: together they stay below 0.5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from anomaly_clip.backbones.clip import CLIPBackbone

__all__ = ["Tower", "plain_flop", "sdp_flop", "sdp_plus_flop", "tower_of", "winclip_flop"]

STAGES = 4


class Tower(NamedTuple):
    """Size of a vision transformer whose MLPs are four times as wide as its tokens."""

    tokens: int
    """Class token and patches."""
    width: int
    blocks: int
    dim: int
    """Channels of the joint image-text space."""
    patch: int
    """Side of a patch in pixels."""


def tower_of(backbone: CLIPBackbone) -> Tower:
    """Return the size of a CLIP's image tower."""
    visual = backbone.visual
    side = backbone.image_size // backbone.patch_size
    return Tower(
        tokens=1 + side * side,
        width=visual.conv1.out_channels,
        blocks=backbone.num_layers,
        dim=visual.output_dim,
        patch=backbone.patch_size,
    )


def embedding_flop(tower: Tower) -> int:
    """Return the operations of the patch embedding."""
    return 2 * (tower.tokens - 1) * tower.width * 3 * tower.patch**2


def block_flop(tokens: int, width: int) -> int:
    """Return the operations of a block: ``24 L D^2 + 4 L^2 D``.

    Per token: queries, keys and values ``6 D^2``, output projection ``2 D^2``, MLP ``16 D^2``. Per
    block: two attention products, ``2 L^2 D`` each.
    """
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def plain_flop(tower: Tower) -> int:
    """Return the operations per image of CLIP's own image encoder."""
    blocks = tower.blocks * block_flop(tower.tokens, tower.width)
    return embedding_flop(tower) + blocks + 2 * tower.width * tower.dim


def sdp_flop(tower: Tower, *, whole_last_block: bool = False) -> int:
    """Return the operations per image of SDP.

    Each block adds value-value attention ``4 L^2 D`` and its output projection ``2 L D^2``. The
    tokens of four stages are projected, ``2 L D E`` each.

    Args:
        tower: The image tower.
        whole_last_block: Also count the original path of the last block for the patch tokens. SDP
            does not use these tokens, so their output projection, MLP and attention are left out
            by default.
    """
    tokens, width = tower.tokens, tower.width
    original = embedding_flop(tower) + tower.blocks * block_flop(tokens, width)
    values = tower.blocks * (4 * tokens**2 * width + 2 * tokens * width**2)
    projected = STAGES * 2 * tokens * width * tower.dim
    patches = (tokens - 1) * (18 * width**2 + 4 * tokens * width)
    return original + values + projected - (0 if whole_last_block else patches)


def sdp_plus_flop(tower: Tower) -> int:
    """Return the operations per image of SDP+: those of SDP and a linear layer per stage."""
    layers = STAGES * 2 * (tower.tokens - 1) * tower.width * tower.dim
    return sdp_flop(tower, whole_last_block=True) + layers


def winclip_flop(tower: Tower, scales: Sequence[int] = (2, 3), *, shared: bool = True) -> int:
    """Return the operations per image of zero-shot WinCLIP.

    Args:
        tower: The image tower.
        scales: Sides of the windows, in patches.
        shared: Compute the queries, keys and values of the first block once for all windows, and
            the last block for the class token only, as this package does. Otherwise the whole tower
            runs over each window.
    """
    side = round((tower.tokens - 1) ** 0.5)
    windows = [(1, tower.tokens), *(((side - k + 1) ** 2, 1 + k * k) for k in scales)]
    total = embedding_flop(tower)
    if shared:
        total += 6 * tower.tokens * tower.width**2
    for count, tokens in windows:
        total += count * _window_flop(tower, tokens, shared)
    return total


def _window_flop(tower: Tower, tokens: int, shared: bool) -> int:
    width, whole = tower.width, block_flop(tokens, tower.width)
    projection = 2 * width * tower.dim
    if not shared:
        return tower.blocks * whole + projection
    first = whole - 6 * tokens * width**2
    keys_and_values = 4 * tokens * width**2
    class_token = 20 * width**2 + 4 * tokens * width  # query, output projection, MLP; attention
    return first + (tower.blocks - 2) * whole + keys_and_values + class_token + projection
