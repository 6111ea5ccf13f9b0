"""Staged dual path of CLIP-AD (arXiv 2311.00453): CLIP's own path and value-value attention.

The attention of every block is evaluated twice with the same weights. The original path is CLIP's
ordinary forward pass. The surgery path is the sum of value-value attention outputs within a stage
(a quarter of the blocks). Value-value attention replaces queries and keys by the values, so that
patches attend to similar patches. Both attentions take the tokens of the original path as input.
The surgery path never changes the original path.

No tensor is changed in place, so the outputs of a block stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, Tokens, Window

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock

__all__ = [
    "BlockOutput",
    "DenseAttention",
    "StageTokens",
    "attend",
    "check_stages",
    "dense_path",
    "dual_path",
    "encode_dual_path",
    "encode_layers",
    "split_heads",
    "stage_ends",
]

StageTokens = Literal["official", "clean"]
DenseAttention = Literal["vv", "qq+kk+vv"]
"""Self-self attention of a dense path: of the values, or the sum of that of all three."""

NUM_STAGES = 4


class BlockOutput(NamedTuple):
    """Outputs of one block, ``(B, 1 + N, W)`` each."""

    original: Tensor
    """Tokens of the original path after the block."""
    surgery: Tensor
    """Sum of the value-value attention outputs since the start of the stage."""
    attended: Tensor
    """Input of the block plus its ordinary attention output, before the MLP."""


def stage_ends(num_layers: int) -> list[int]:
    """Return the 1-based numbers of the last blocks of the four stages.

    Raises:
        ValueError: If the number of layers is not divisible by four.

    Example:
        >>> from anomaly_clip.backbones.surgery import stage_ends
        >>> stage_ends(12)
        [3, 6, 9, 12]
    """
    if num_layers % NUM_STAGES:
        raise ValueError(
            f"the staged dual path needs a multiple of {NUM_STAGES} blocks, but this image tower "
            f"has {num_layers}; choose another model.backbone.name"
        )
    step = num_layers // NUM_STAGES
    return [step * stage for stage in range(1, NUM_STAGES + 1)]


def check_stages(stages: Sequence[int] | None, num_layers: int) -> list[int]:
    """Return the stage ends to use, all four by default.

    Raises:
        ValueError: If they are not ascending stage ends of a tower with ``num_layers`` blocks.
    """
    ends = stage_ends(num_layers)
    stages = ends if stages is None else list(stages)
    if not stages or not set(stages) <= set(ends) or sorted(set(stages)) != stages:
        raise ValueError(
            f"stages {stages}: expected an ascending choice of the stage ends {ends} of an image "
            f"tower with {num_layers} blocks"
        )
    return stages


def dual_path(
    backbone: CLIPBackbone,
    images: Tensor,
    *,
    raw_patches: bool = True,
    window: Window | None = None,
    mixed: torch.dtype | None = None,
) -> Iterator[BlockOutput]:
    """Run the image tower and yield both paths after every block.

    Args:
        backbone: The frozen CLIP.
        images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
        raw_patches: False omits the patches from the original path of the last block, because only
            SDP+ uses them. The path then has the shape ``(B, 1, W)`` there, and 12 blocks take 6 %
            less work.
        window: See :meth:`~anomaly_clip.backbones.clip.CLIPBackbone.embed`.
        mixed: Dtype of the blocks' matrix products, for mixed-precision training; tokens between
            blocks keep the dtype of the weights. Default: everything in the dtype of the weights.
    """
    blocks = backbone.visual.transformer.resblocks
    step = stage_ends(len(blocks))[0]
    original = backbone.embed(images, window)
    surgery = torch.zeros_like(original)
    for index, block in enumerate(blocks):
        rows = slice(None) if raw_patches or index + 1 < len(blocks) else slice(1)
        with torch.autocast(original.device.type, mixed, enabled=mixed is not None):
            q, k, v = split_heads(block, block.ln_1(original))
            attended = original[:, rows] + attend(block, q[:, :, rows], k, v)
            values = attend(block, v, v, v).to(original.dtype)
            surgery = values if index % step == 0 else surgery + values
            original = attended + block.ls_2(block.mlp(block.ln_2(attended)))
        yield BlockOutput(original, surgery, attended)


def encode_dual_path(
    backbone: CLIPBackbone,
    images: Tensor,
    stages: Sequence[int] | None = None,
    stage_tokens: StageTokens = "official",
    *,
    raw_patches: bool = True,
    window: Window | None = None,
    mixed: torch.dtype | None = None,
) -> list[Tokens]:
    """Return the tokens at the end of each requested stage.

    ``raw`` holds the tokens of the original path. ``projected`` holds the patches of the surgery
    path and the class token of the original path, joined before LN_post. At the last stage the
    projected class token is CLIP's own image embedding.

    Args:
        backbone: The frozen CLIP.
        images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
        stages: Stage ends, 1-based and ascending; default: all four.
        stage_tokens: ``official``: the original tokens of a stage include the attention output of
            the following block. The published code does this because its tensors are shared, so
            published results and weights depend on it. ``clean``: the original tokens are the
            output of the last block of the stage.
        raw_patches: False omits the patches from ``raw`` at the last block; see :func:`dual_path`.
        window: See :meth:`~anomaly_clip.backbones.clip.CLIPBackbone.embed`.
        mixed: Dtype of the blocks' matrix products; see :func:`dual_path`.

    Raises:
        ValueError: If the stages are not ascending stage ends of this tower.
    """
    stages = check_stages(stages, backbone.num_layers)
    tokens = []
    ended: BlockOutput | None = None  # previous block, if it ended a requested stage
    outputs = dual_path(backbone, images, raw_patches=raw_patches, window=window, mixed=mixed)
    with backbone.out_of_autocast():
        for number, output in enumerate(outputs, start=1):
            if ended is not None:
                raw = output.attended if stage_tokens == "official" else ended.original
                tokens.append(_stage_tokens(backbone, raw, ended.surgery))
            ended = output if number in stages else None
        if ended is not None:
            tokens.append(_stage_tokens(backbone, ended.original, ended.surgery))
    return tokens


def dense_path(
    backbone: CLIPBackbone, images: Tensor, blocks: int, attention: DenseAttention = "vv"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the image tower and yield the original and the dense path after every block.

    This is DPAM of AnomalyCLIP (arXiv 2310.18961). The dense path starts with the tokens that enter
    the first of its blocks. Each block adds the output of self-self attention, whose input is the
    original path, and no MLP.

    Args:
        backbone: The frozen CLIP.
        images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
        blocks: Number of blocks with a dense path, which are the last ones, at least 1.
        attention: ``vv``: queries and keys are replaced by the values (AnomalyCLIP). ``qq+kk+vv``:
            the sum of the attention weights of queries, keys and values with themselves, times the
            values (Crane).

    Yields:
        Original and dense tokens, ``(B, 1 + N, W)`` each; before the first dense block, both are
        the same. The last original tokens are the class token alone, ``(B, 1, W)``.
    """
    layers = backbone.visual.transformer.resblocks
    original = backbone.embed(images)
    dense = original
    for number, block in enumerate(layers, start=1):
        q, k, v = split_heads(block, block.ln_1(original))
        is_dense = number > len(layers) - blocks
        if is_dense:
            pairs = [v] if attention == "vv" else [q, k, v]
            mixed = sum(_attention(same, same, v) for same in pairs)
            dense = dense + _attention_output(block, mixed)  # type: ignore[arg-type]
        rows = slice(1) if number == len(layers) else slice(None)
        attended = original[:, rows] + attend(block, q[:, :, rows], k, v)
        original = attended + block.ls_2(block.mlp(block.ln_2(attended)))
        if not is_dense:
            dense = original
        yield original, dense


def encode_layers(
    backbone: CLIPBackbone, images: Tensor, layers: Sequence[int], value_blocks: int = 0
) -> list[Tensor]:
    """Return the tokens ``(B, 1 + N, W)`` of the requested layers, not projected.

    Args:
        backbone: The frozen CLIP.
        images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
        layers: 1-based layer numbers, ascending.
        value_blocks: Number of blocks, ending at each layer, that use value-value attention for the
            patches. The attention outputs, without MLPs, are added to the tokens before the first
            of these blocks. The class token is the ordinary one. 0: ordinary patches.

    Raises:
        ValueError: If a layer does not exist, or its number is below ``value_blocks``.
    """
    layers = backbone.check_layers(layers)
    if value_blocks > layers[0]:
        raise ValueError(
            f"layer {layers[0]} has fewer than {value_blocks} blocks for value-value attention; "
            f"choose a higher layer or fewer value blocks"
        )
    dense: dict[int, Tensor] = {}
    outputs = []
    with backbone.out_of_autocast():
        tokens = backbone.embed(images)
        blocks = backbone.visual.transformer.resblocks[: layers[-1]]
        for number, block in enumerate(blocks, start=1):
            near = [end for end in layers if end - value_blocks < number <= end]
            if near:
                _, _, values = split_heads(block, block.ln_1(tokens))
                change = attend(block, values, values, values)
                for end in near:
                    dense[end] = dense.get(end, tokens) + change
            tokens = block(tokens)
            if number in layers:
                patches = dense.pop(number, tokens)[:, 1:]
                outputs.append(torch.cat([tokens[:, :1], patches], dim=1))
    return outputs


def _stage_tokens(backbone: CLIPBackbone, raw: Tensor, surgery: Tensor) -> Tokens:
    mixed = torch.cat([raw[:, :1], surgery[:, 1:]], dim=1)
    return Tokens(raw, backbone.project(mixed))


def split_heads(block: ResidualAttentionBlock, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, ``(B, heads, 1 + N, d)`` each."""
    attention = block.attn
    mixed = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    mixed = mixed.unflatten(-1, (3, attention.num_heads, -1))  # (B, 1 + N, 3, heads, d)
    q, k, v = mixed.permute(2, 0, 3, 1, 4)
    return q, k, v


def attend(
    block: ResidualAttentionBlock, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the attention output ``(B, 1 + N, W)`` that a block adds to its input.

    Args:
        block: Block whose output projection is used.
        q: Queries ``(B, heads, 1 + N, d)``.
        k: Keys of the same shape.
        v: Values of the same shape.
        bias: Bias ``(B, 1 + N)`` per key, added to the logits of every query; default: none.
    """
    return _attention_output(block, _attention(q, k, v, bias))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the weighted values ``(B, heads, 1 + N, d)``; see :func:`attend`."""
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


def _attention_output(block: ResidualAttentionBlock, attended: Tensor) -> Tensor:
    """Project weighted values ``(B, heads, 1 + N, d)`` to ``(B, 1 + N, W)``."""
    return block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
