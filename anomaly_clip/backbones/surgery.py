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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anomaly_clip.backbones.blocks import weighted_values
from anomaly_clip.backbones.clip import CLIPBackbone, Tokens, Window

__all__ = [
    "NUM_STAGES",
    "BlockOutput",
    "DenseAttention",
    "StageTokens",
    "check_stages",
    "default_layers",
    "dense_path",
    "dual_path",
    "encode_dual_path",
    "encode_layers",
    "stage_ends",
]

StageTokens = Literal["official", "clean"]
DenseAttention = Literal["vv", "qq+kk+vv"]
"""Self-self attention of a dense path: of the values, or the sum of that of all three."""

NUM_STAGES = 4


class BlockOutput(NamedTuple):
    """Outputs of one block, ``(B, P + N, W)`` each, with the tower's ``P`` prefix tokens first."""

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


def default_layers(num_layers: int) -> list[int]:
    """Return the stage ends or, if the layers cannot be divided into stages, the last layer.

    Example:
        >>> from anomaly_clip.backbones.surgery import default_layers
        >>> default_layers(12), default_layers(1)
        ([3, 6, 9, 12], [1])
    """
    return [num_layers] if num_layers % NUM_STAGES else stage_ends(num_layers)


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
        raw_patches: False omits the patches from the original path of the last block, if the image
            embedding is made from the class token alone, because only SDP+ uses them. The path then
            has the shape ``(B, 1, W)`` there, and 12 blocks take 6 % less work.
        window: See :meth:`~anomaly_clip.backbones.clip.CLIPBackbone.embed`.
        mixed: Dtype of the blocks' matrix products, for mixed-precision training; tokens between
            blocks keep the dtype of the weights. Default: everything in the dtype of the weights.

    Raises:
        ValueError: If the blocks are not plain; see :attr:`.CLIPBackbone.blocks`.
    """
    blocks = backbone.blocks
    all_rows = raw_patches or not backbone.pools_class_token
    step = stage_ends(len(blocks))[0]
    original = backbone.embed(images, window)
    surgery = torch.zeros_like(original)
    for index, block in enumerate(blocks):
        rows = slice(None) if all_rows or index + 1 < len(blocks) else slice(1)
        with torch.autocast(original.device.type, mixed, enabled=mixed is not None):
            q, k, v = block.heads(original)
            attended = original[:, rows] + block.attend(q[:, :, rows], k, v)
            values = block.attend(v, v, v).to(original.dtype)
            surgery = values if index % step == 0 else surgery + values
            original = attended + block.mlp_output(attended)
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
    path and the image embedding of the original path, which is that of the class token unless the
    tower pools in another way. At the last stage it is CLIP's own image embedding.

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
    ends = check_stages(stages, backbone.num_layers)

    def encode(images: Tensor) -> list[Tokens]:
        tokens = []
        ended: BlockOutput | None = None  # previous block, if it ended a requested stage
        outputs = dual_path(backbone, images, raw_patches=raw_patches, window=window, mixed=mixed)
        with backbone.out_of_autocast():
            for number, output in enumerate(outputs, start=1):
                if ended is not None:
                    raw = output.attended if stage_tokens == "official" else ended.original
                    tokens.append(_stage_tokens(backbone, raw, ended.surgery))
                ended = output if number in ends else None
            if ended is not None:
                tokens.append(_stage_tokens(backbone, ended.original, ended.surgery))
        return tokens

    key = "dual path", tuple(ends), stage_tokens, raw_patches, window, mixed
    return backbone.replayed(encode, key, images)


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
    layers = backbone.blocks
    original = backbone.embed(images)
    dense = original
    for number, block in enumerate(layers, start=1):
        q, k, v = block.heads(original)
        is_dense = number > len(layers) - blocks
        if is_dense:
            pairs = [v] if attention == "vv" else [q, k, v]
            mixed = sum(weighted_values(same, same, v) for same in pairs)
            dense = dense + block.attention_output(mixed)  # type: ignore[arg-type]
        rows = slice(1) if number == len(layers) else slice(None)
        attended = original[:, rows] + block.attend(q[:, :, rows], k, v)
        original = attended + block.mlp_output(attended)
        if not is_dense:
            dense = original
        yield original, dense


def encode_layers(
    backbone: CLIPBackbone, images: Tensor, layers: Sequence[int], value_blocks: int = 0
) -> list[Tensor]:
    """Return the tokens ``(B, P + N, W)`` of the requested layers, not projected.

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
    if not value_blocks:
        return backbone.encode_layers(images, layers)
    prefix = backbone.num_prefix_tokens

    def encode(images: Tensor) -> list[Tensor]:
        dense: dict[int, Tensor] = {}
        outputs = []
        with backbone.out_of_autocast():
            tokens = backbone.embed(images)
            for number, block in enumerate(backbone.blocks[: layers[-1]], start=1):
                near = [end for end in layers if end - value_blocks < number <= end]
                if near:
                    _, _, values = block.heads(tokens)
                    change = block.attend(values, values, values)
                    for end in near:
                        dense[end] = dense.get(end, tokens) + change
                tokens = block(tokens)
                if number in layers:
                    patches = dense.pop(number)[:, prefix:]
                    outputs.append(torch.cat([tokens[:, :prefix], patches], dim=1))
        return outputs

    return backbone.replayed(encode, ("value path", value_blocks, *layers), images)


def _stage_tokens(backbone: CLIPBackbone, raw: Tensor, surgery: Tensor) -> Tokens:
    patches = surgery[:, backbone.num_prefix_tokens :]
    return Tokens(raw, backbone.embeddings(raw, patches))
