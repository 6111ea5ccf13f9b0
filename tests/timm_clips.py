"""Small CLIP models with image towers of timm, with random weights, and a small tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from timm.models import eva, fastvit, register_model, vision_transformer

from anomaly_clip.backbones.clip import CLIPBackbone

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
SIGLIP_TEXT: dict[str, Any] = {
    **{"context_length": 16, "vocab_size": 64, "width": 8, "heads": 2, "layers": 2},
    **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
KINDS = ("siglip", "mobileclip_b", "average", "pe_core", "mobileclip_s")
"""An attention pool, a class token, an average, rotary positions and a FastViT."""
PLAIN = KINDS[:3]


def small(kind: type[Any], defaults: dict[str, Any], given: dict[str, Any]) -> Any:
    """Build a module from its defaults and from those arguments of timm that it takes."""
    given = {k: v for k, v in given.items() if not k.startswith("pretrained") and k != "cache_dir"}
    model = kind(**{**defaults, **given})
    model.default_cfg = {}
    return model


@register_model
def small_vit_siglip(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return a ViT like those of SigLIP: no class token, attention pool."""
    return small(vision_transformer.VisionTransformer, {**SIZES, "class_token": False}, kwargs)


@register_model
def small_vit_token(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return a ViT like that of MobileCLIP-B, with layer scale and a register."""
    options = {**SIZES, "reg_tokens": 1, "init_values": 0.1, "qkv_bias": False}
    return small(vision_transformer.VisionTransformer, options, kwargs)


@register_model
def small_vit_average(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return a ViT whose head averages the patches, behind a class token that it leaves out."""
    return small(vision_transformer.VisionTransformer, {**SIZES, "global_pool": "avg"}, kwargs)


@register_model
def small_pe_core(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return a ViT like those of PE-Core: class token, rotary positions, attention pool."""
    options = {
        **SIZES,
        **{"attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True},
        **{"ref_feat_shape": (4, 4), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"},
        **{"attn_pool_num_heads": 2, "attn_pool_mlp_ratio": 4.0, "use_fc_norm": False},
    }
    return small(eva.Eva, options, kwargs)


@register_model
def small_fastvit(pretrained: bool = False, **kwargs: Any) -> Any:
    """Return a FastViT like those of MobileCLIP-S: its last stage has attention."""
    options = {
        **{"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 32), "mlp_ratios": (2, 2, 2, 2)},
        **{"se_downsamples": (False, False, True, True), "downsamples": (False, True, True, True)},
        **{"pos_embs": (None, None, None, None), "lkc_use_act": True},
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
    }
    return small(fastvit.FastVit, options, kwargs)


TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"timm_model_name": "small_vit_siglip", "timm_pool": "map", "timm_proj": "none"},
    "mobileclip_b": {
        "timm_model_name": "small_vit_token",
        "timm_pool": "token",
        "timm_proj": None,
    },
    "average": {"timm_model_name": "small_vit_average", "timm_pool": "avg"},
    "pe_core": {"timm_model_name": "small_pe_core", "timm_pool": "map", "timm_proj": None},
    "mobileclip_s": {"timm_model_name": "small_fastvit", "timm_pool": "avg", "timm_proj": None},
}


def config_of(kind: str, tokenizer: str | None = None) -> dict[str, Any]:
    """Return the configuration of a small model of a kind.

    Args:
        kind: One of :data:`KINDS`.
        tokenizer: Folder of the tokenizer of ``siglip``.
    """
    size = 64 if kind == "mobileclip_s" else 32
    text: dict[str, Any] = {**CLIP_TEXT, "no_causal_mask": kind == "mobileclip_s"}
    if kind == "siglip":
        text = {**SIGLIP_TEXT, "hf_tokenizer_name": tokenizer or "nobody/no-such-tokenizer"}
    return {
        "embed_dim": 24 if kind == "siglip" else 12,
        "custom_text": True,
        "vision_cfg": {**TOWERS[kind], "image_size": size},
        "text_cfg": text,
    }


def write_config(folder: Path, kind: str, tokenizer: str | None = None) -> str:
    """Write the configuration of a small model; return its path."""
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(config_of(kind, tokenizer)))
    return str(path)


def backbone_of(folder: Path, kind: str, tokenizer: str | None = None) -> CLIPBackbone:
    """Return a small model of a kind with random weights; its folder gets its configuration."""
    return CLIPBackbone(write_config(folder, kind, tokenizer), "random")


@torch.no_grad()
def disturb(backbone: CLIPBackbone, size: float = 0.02) -> None:
    """Add noise to all weights of the image tower; norms and biases start with ones and zeros."""
    draws = torch.Generator().manual_seed(2)
    for weight in backbone.visual.parameters():
        weight += size * torch.randn(weight.shape, generator=draws)


def write_tokenizer(folder: Path) -> str:
    """Write a tokenizer of a few words, with the end and padding of SigLIP; return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "an", "the", "photo", "of", "good", "bad", "damaged", "perfect"]
    words += ["with", "flaw", "cup", "bottle"]
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {f"▁{word}": number for number, word in enumerate(words, start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    fast.save_pretrained(folder)
    return str(folder)
