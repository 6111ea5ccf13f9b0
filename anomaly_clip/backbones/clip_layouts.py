"""Names of the tensors of a CLIP: wrappers removed, other layouts converted to open_clip's.

Layouts are recognised by the name of one tensor of the image tower, and whatever precedes it in all
names is a wrapper's prefix: ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.``
(Lightning) and so on, in any order. Three layouts are read: that of open_clip's CLIP, which is
OpenAI's; that of its CustomTextCLIP, in which the text tower is below ``text.``; and that of
transformers' CLIPModel, whose attention has queries, keys and values apart and whose projections
are transposed. A CLIP with an image tower of timm has one of the first two, and is recognised by a
tensor of the text tower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn

from anomaly_clip.backbones.weight_files import WeightFileError, check_floating

__all__ = ["TIMM", "CLIPTensors", "check_fit", "model_names", "open_clip_tensors"]

OPEN_CLIP = "visual.conv1.weight"
TRANSFORMERS = "vision_model.embeddings.patch_embedding.weight"
TIMM = "timm"
"""Layout of a CLIP with an image tower of timm."""
TRUNK = re.compile(r"(^|\.)visual\.trunk\.")
TEXT_ANCHORS = ("text.token_embedding.weight", "token_embedding.weight")
"""Tensor of such a CLIP, in open_clip's CustomTextCLIP and CLIP."""
OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's archives hold as tensors."""
NOT_WEIGHTS = OPENAI_NUMBERS | {"attn_mask"}
POSITIONS = ("positional_embedding", "visual.positional_embedding")
BATCH_COUNT = ".num_batches_tracked"
"""Counter of a BatchNorm, the only integer among the weights."""
MAX_EXAMPLES = 3

TRANSFORMERS_NAMES = (
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", OPEN_CLIP),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # spelt like this in transformers
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"visual_projection\.weight", "visual.proj"),
)
"""Starts of names in transformers, and their names in open_clip."""
TRANSFORMERS_PARTS = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Names within a block."""
TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
QUERY = re.compile(r"(.+\.)self_attn\.([qkv])_proj\.(weight|bias)")

LOOKS = (
    (r"(^|\.)visual\.trunk\.", "an image tower without a text tower"),
    (r"(^|\.)visual\.(attnpool|layer1)\.", "a CLIP with a ResNet image tower"),
    (r"(^|\.)vision_model\.", "a model of transformers that is no CLIPModel"),
    (r"(^|\.)lora_", "LoRA adapters without the model that they belong to"),
    (r"(^|\.)prompt_learner\.", "learned prompts without a CLIP"),
    (r"(^|\.)blocks\.0\.", "a ViT of timm or DINO, without a text tower"),
    (r"(^|\.)layer1\.0\.", "a ResNet without a text tower"),
    (r"(^|\.)conv1\.weight$", "an image tower without a text tower"),
    (r"^(module\.)?(fc\.)?\d+\.(weight|bias)$", "single linear layers"),
)
"""Names in files that hold no CLIP, and what such a file looks like."""


class CLIPTensors(NamedTuple):
    """Tensors of a CLIP, named as in open_clip."""

    state: dict[str, Tensor]
    layout: str | None
    """``open_clip``, ``CustomTextCLIP``, ``transformers``, ``timm``, or None if it is not
    recognised."""
    is_openai: bool
    """True if the numbers of OpenAI's archives are among the tensors."""
    unused: tuple[str, ...]
    """Names of tensors that lie outside the CLIP, as a wrapper adds them."""


def open_clip_tensors(tensors: Mapping[str, Tensor]) -> CLIPTensors:
    """Return the tensors of a CLIP, named as in open_clip.

    Args:
        tensors: Tensors as a file names them.

    Raises:
        WeightFileError: If there are several CLIPs, or parts of attention are missing.
    """
    has_trunk = any(TRUNK.search(key) for key in tensors)
    for anchor in TEXT_ANCHORS if has_trunk else (OPEN_CLIP, TRANSFORMERS):
        prefixes = [key.removesuffix(anchor) for key in tensors if f".{key}".endswith(f".{anchor}")]
        if len(prefixes) > 1:
            raise WeightFileError(
                f"it contains {len(prefixes)} CLIPs, {' and '.join(map(repr, prefixes[:3]))}",
                "save the state dict of one and give that file",
            )
        if prefixes:
            break
    else:
        return CLIPTensors(dict(tensors), None, False, ())
    prefix = prefixes[0]
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    unused = tuple(key for key in tensors if not key.startswith(prefix))
    is_openai = bool(OPENAI_NUMBERS & state.keys())
    state = {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    layout = TIMM if has_trunk else "open_clip"
    if anchor == TRANSFORMERS:
        layout, state = "transformers", _from_transformers(state)
    elif "text.token_embedding.weight" in state:
        layout = TIMM if has_trunk else "CustomTextCLIP"
        state = {key.removeprefix("text."): value for key, value in state.items()}
    return CLIPTensors(state, layout, is_openai, unused)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the layout of transformers' CLIPModel; unknown names stay as they are."""
    converted = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith("embeddings.position_ids"):  # a range of integers
            continue
        name = key
        for pattern, other in TRANSFORMERS_NAMES:
            name = re.sub(f"^{pattern}", other, name)
        if match := QUERY.fullmatch(name):
            joined.setdefault(f"{match[1]}attn.in_proj_{match[3]}", {})[match[2]] = value
            continue
        for part, other in TRANSFORMERS_PARTS:
            name = name.replace(part, other)
        converted[name] = value.T if key in TRANSPOSED else value
    for name, parts in joined.items():
        if missing := [part for part in "qkv" if part not in parts]:
            raise WeightFileError(
                f"it looks like transformers' CLIPModel, but {name} lacks {missing[0]}_proj",
                "give the complete model.safetensors or pytorch_model.bin",
            )
        converted[name] = torch.cat([parts[part] for part in "qkv"])
    return converted


def model_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return tensors as a model names them: in a CustomTextCLIP, those of texts below ``text.``.

    Args:
        state: Tensors, named as in open_clip's CLIP.
        model: The model.
    """
    if not hasattr(model, "text"):
        return dict(state)
    others = ("visual.", "logit_")
    return {k if k.startswith(others) else f"text.{k}": v for k, v in state.items()}


def check_fit(state: Mapping[str, Tensor], model: nn.Module, name: str) -> None:
    """Check names, shapes and types of tensors against a model, except numbers of positions.

    Args:
        state: Tensors, named as in open_clip.
        model: The model to load them into.
        name: Name of the model, for messages.

    Raises:
        WeightFileError: If they do not fit.
    """
    expected = {key.removeprefix("text."): value for key, value in model.state_dict().items()}
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and not _same_shape(key, state[key], value)
    ]
    problems = (
        ("Missing key", [key for key in expected if key not in state]),
        ("Unexpected key", [key for key in state if key not in expected]),
        ("Another shape:", shapes),
    )
    for problem, keys in problems:
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WeightFileError(
                f"its tensors do not fit {name} ({problem} {keys[0]}{more})", _advice(state)
            )
    check_floating({k: v for k, v in state.items() if not k.endswith(BATCH_COUNT)})


def _same_shape(key: str, given: Tensor, expected: Tensor) -> bool:
    if key in POSITIONS and given.ndim == 2:  # they are interpolated, those of patches as a square
        num_patches = len(given) - 1  # a class token precedes them
        is_grid = num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches
        fits = len(given) > 0 if key == POSITIONS[0] else is_grid
        return given.shape[1] == expected.shape[1] and fits
    return given.shape == expected.shape or (key == "logit_scale" and given.numel() == 1)


def _advice(state: Mapping[str, Tensor]) -> str:
    """Return the way out for tensors that do not fit: similar models, or what they look like."""
    advice = "set backbone.name to the model that they belong to"
    if similar := _similar_models(state):
        return f"{advice}, such as {' or '.join(similar)}"
    if any(TRUNK.search(key) for key in state) and TEXT_ANCHORS[1] in state:
        return advice
    looks = [text for pattern, text in LOOKS if any(re.search(pattern, key) for key in state)]
    if OPEN_CLIP in state:
        looks = [] if "token_embedding.weight" in state else ["an image tower without a text tower"]
    return f"they look like {looks[0]}: give the weights of a whole CLIP" if looks else advice


def _similar_models(state: Mapping[str, Tensor]) -> list[str]:
    """Return open_clip's models with the widths, depths and patch size of the tensors."""
    measures = _measures(state)
    if measures is None:
        return []
    names = [name for name in open_clip.list_models() if _measures_of(name) == measures]
    return sorted(names, key=lambda name: (len(name), name))[:MAX_EXAMPLES]


def _measures(state: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    keys = (OPEN_CLIP, "visual.proj", "token_embedding.weight")
    if any(key not in state for key in keys):
        return None
    conv, projection, embedding = (state[key] for key in keys)
    if conv.ndim != 4 or projection.ndim != 2 or embedding.ndim != 2:
        return None
    depths = [
        len({key.split(".")[prefix.count(".")] for key in state if key.startswith(prefix)})
        for prefix in ("visual.transformer.resblocks.", "transformer.resblocks.")
    ]
    return conv.shape[0], conv.shape[2], projection.shape[1], embedding.shape[1], *depths


def _measures_of(name: str) -> tuple[int, ...] | None:
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or config.get("custom_text"):
        return None
    return (
        vision.get("width", 768),
        vision.get("patch_size", 16),
        config["embed_dim"],
        text.get("width", 512),
        vision.get("layers", 12),
        text.get("layers", 12),
    )
