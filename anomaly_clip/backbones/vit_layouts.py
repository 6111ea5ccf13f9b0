"""Names of a vision transformer's tensors: those of timm, of transformers and of official code.

Files of transformers (Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel) are given
the names of the official code of DINOv2 or DINOv3. timm's own conversion then handles these, with
the files of other official programs, and interpolates positional embeddings to the model's grid.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomaly_clip.backbones.state_dicts import check_keys, only_prefix
from anomaly_clip.backbones.weight_files import WeightFileError, check_floating
from anomaly_clip.progress import say

__all__ = ["PREFERRED", "fill_vit"]

PREFERRED = ("teacher", "ema")
"""State dicts to use of several in a file: the teacher of DINO is the trained network."""
UNUSED = (
    *("head.", "head_dist.", "fc.", "classifier.", "attn_pool.", "pooler.", "lm_head."),
    *("mask_token", "local_cls_norm."),
)
"""Prefixes of tensors that no feature depends on."""
NOT_FLOATING = ("relative_position_index", "num_batches_tracked", "bias_mask")
"""Ends of the names of tensors that are counters, indices or masks."""
PATCHES = "patch_embed.proj.weight"
REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
"""Names of the register tokens in timm and in the official code of DINOv2 and of DINOv3."""
ANCHORS = (
    *(PATCHES, "embeddings.patch_embeddings.projection.weight"),
    "embeddings.patch_embeddings.weight",
)
"""Name of the patch embedding in timm and official code, in DINOv2 and DINOv3 of transformers."""

FROM_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""Patterns and replacements, applied in this order: names of transformers to official ones."""


def fill_vit(
    model: Any, state: Mapping[str, Tensor], architecture: str, source: str, *, is_other: bool
) -> None:
    """Load a state dict in any layout into a model of timm.

    Args:
        model: The model, without a classifier.
        state: Tensors of a weights file.
        architecture: Name of the model.
        source: Option and file, for messages.
        is_other: Whether to print which tensors belong to other networks.

    Raises:
        ValueError: If the tensors do not fit the model, belong to several networks, or are
            quantised, sparse or not finite.
    """
    network = _network(state, source, is_other)
    floating = {k: v for k, v in network.items() if v.ndim and not k.endswith(NOT_FLOATING)}
    try:
        check_floating(floating)
    except WeightFileError as error:
        raise ValueError(f"{source}: {error.form}; {error.way_out}") from None
    # CPUs cannot interpolate in half precision.
    tensors = {**network, **{key: value.float() for key, value in floating.items()}}
    tensors = _without_zero_biases(_official(tensors), model, architecture, source)
    _check_patches(tensors, model, architecture, source)
    converted = _by_timm(tensors, model, architecture)
    given = {k: v for k, v in converted.items() if not k.startswith(UNUSED)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(UNUSED)}
    counters = [key for key in expected if key.endswith(NOT_FLOATING)]
    check_keys(given, expected, source, architecture, optional=counters)
    model.load_state_dict(given, strict=False)


def _network(state: Mapping[str, Tensor], source: str, is_other: bool) -> dict[str, Tensor]:
    """Return the tensors of the network with a patch embedding, without its prefix and heads."""
    prefixes = sorted(
        {key.removesuffix(end) for key in state for end in ANCHORS if f".{key}".endswith(f".{end}")}
    )
    # timm's conversion finds the prefixes of layouts without these names.
    prefix = "" if not prefixes or "" in prefixes else only_prefix(prefixes, PREFERRED, source)
    within = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if is_other and len(within) < len(state):
        count = len(state) - len(within)
        say(f"{source}: {prefix.rstrip('.')} is used, {count} other tensors are not")
    # DINOv2 and DINOv3 are trained with blocks in groups: blocks.2.17 is block 17.
    return {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value
        for key, value in within.items()
        if not key.startswith(UNUSED) or key == "mask_token"
    }


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of transformers with the names of official code; others unchanged."""
    if not any(anchor in state for anchor in ANCHORS[1:]):
        return state
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in FROM_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    is_v3 = "pos_embed" not in result
    if is_v3 and "register_tokens" in result:
        result["storage_tokens"] = result.pop("register_tokens")
    # timm recognises the layout of DINOv2 by this tensor, which it then removes.
    result.setdefault("mask_token", torch.zeros(1))
    for block in sorted({m[0] for key in result if (m := re.match(r"blocks\.\d+\.", key))}):
        for kind in ("weight", "bias"):
            _join_attention(result, f"{block}attn.", kind)
            _name_mlp(result, f"{block}mlp.", kind, is_v3)
    return result


def _join_attention(state: dict[str, Tensor], prefix: str, kind: str) -> None:
    parts = [state.pop(f"{prefix}{part}.{kind}", None) for part in "qkv"]
    shape = next((part for part in parts if part is not None), None)
    if shape is not None:  # DINOv3 has no bias of the keys
        whole = [torch.zeros_like(shape) if part is None else part for part in parts]
        state[f"{prefix}qkv.{kind}"] = torch.cat(whole)


def _name_mlp(state: dict[str, Tensor], prefix: str, kind: str, is_v3: bool) -> None:
    gate, up, down = (
        state.pop(f"{prefix}{part}_proj.{kind}", None) for part in ("gate", "up", "down")
    )
    if gate is None:
        named = {"fc1": up, "fc2": down}
    elif is_v3 or up is None:
        named = {"w1": gate, "w2": up, "w3": down}
    else:
        named = {"w12": torch.cat([gate, up]), "w3": down}
    state.update({f"{prefix}{k}.{kind}": v for k, v in named.items() if v is not None})


def _without_zero_biases(
    state: dict[str, Tensor], model: nn.Module, architecture: str, source: str
) -> dict[str, Tensor]:
    """Return a state dict of DINOv3 without biases of the attention if the model has none.

    The official weights of the larger models have biases of zero, which timm's models lack.

    Raises:
        ValueError: If biases that the model lacks are not zero.
    """
    names = {name for name, _ in model.named_parameters()}
    if "storage_tokens" not in state or "blocks.0.attn.q_bias" in names:
        return state
    biases = [key for key in state if key.endswith("attn.qkv.bias")]
    for key in biases:
        query, _, value = state[key].chunk(3)
        if query.any() or value.any():
            with_biases = f"{architecture}_qkvb"
            way_out = with_biases if timm.is_model(with_biases) else "a model that has them"
            raise ValueError(
                f"{source} has biases of the attention ({key}), which {architecture} lacks; set "
                f"backbone.name to {way_out}"
            )
    return {key: value for key, value in state.items() if key not in biases}


def _check_patches(
    state: Mapping[str, Tensor], model: nn.Module, architecture: str, source: str
) -> None:
    """Check the size of patches, which timm would otherwise interpolate, and the register tokens.

    Raises:
        ValueError: If one of the two is not that of the model.
    """
    given = state.get(PATCHES)
    if given is None or given.ndim != 4 or "flexi" in architecture:
        return
    expected = model.state_dict().get(PATCHES)
    if expected is not None and given.shape[2:] != expected.shape[2:]:
        raise ValueError(
            f"{source} has patches of {given.shape[-1]} pixels, not {expected.shape[-1]}; give "
            f"weights of {architecture}, or set backbone.name to the model that they belong to"
        )
    has_registers = not state.keys().isdisjoint(REGISTERS)
    if has_registers != (getattr(model, "reg_token", None) is not None):
        raise ValueError(
            f"{source} has {'' if has_registers else 'no '}register tokens, but {architecture} has "
            f"{'none' if has_registers else 'them'}; give weights of {architecture}, or set "
            f"backbone.name to the model that they belong to"
        )


def _by_timm(state: Mapping[str, Tensor], model: nn.Module, architecture: str) -> dict[str, Tensor]:
    """Apply timm's conversion of official state dicts, with its options for an architecture."""
    # Hybrids have a conversion of their own, next to the function that builds them. Models that
    # others register have that of their class.
    places = (timm.models.model_entrypoint(architecture).__module__, type(model).__module__)
    modules: list[Any] = [sys.modules[place] for place in places]
    module = next((m for m in modules if "checkpoint_filter_fn" in vars(m)), None)
    if module is None:
        return dict(state)
    convert = module.checkpoint_filter_fn
    accepted = inspect.signature(convert).parameters
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in accepted:  # of DeiT III
        options["adapt_layer_scale"] = True
    if "flexi" in architecture or "radio" in architecture:  # as timm does
        options.update(interpolation="bilinear", antialias=False)
    if "radio" in architecture and "align_corners" in accepted:
        corners = getattr(module, "_RADIO_ALIGN_CORNERS", ())
        options["align_corners"] = any(part in architecture for part in corners)
    converted: dict[str, Tensor] = convert(dict(state), model, **options)
    return converted
