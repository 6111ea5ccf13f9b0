"""Files of one small vision transformer in the layouts of other libraries and official programs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.layers.norm import LayerNorm
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import Tensor

WIDTH, HEADS, DEPTH = 32, 2, 3

__all__ = ["randomised", "to_hub_dinov2", "to_hub_dinov3", "to_transformers"]


def _small(**options: Any) -> dict[str, Any]:
    sizes = {"img_size": 56, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return {**sizes, "patch_size": 14, "init_values": 1e-5, **options}


@register_model
def vit_form_dinov2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DINOv2 in small: class token with a position, LayerScale."""
    return _create_vision_transformer("vit_form_dinov2", pretrained, **{**_small(), **kwargs})


@register_model
def vit_form_reg4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DINOv2 with registers in small."""
    options = _small(reg_tokens=4, no_embed_class=True)
    return _create_vision_transformer("vit_form_reg4", pretrained, **{**options, **kwargs})


@register_model
def vit_form_swiglu(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DINOv2-G with registers in small: SwiGLU."""
    swiglu = {"mlp_ratio": 5.5, "mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    options = _small(reg_tokens=4, no_embed_class=True, **swiglu)
    return _create_vision_transformer("vit_form_swiglu", pretrained, **{**options, **kwargs})


def _dinov3(**options: Any) -> dict[str, Any]:
    rotary = {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100}
    rotary |= {"use_abs_pos_emb": False, "rope_rotate_half": True, "num_reg_tokens": 4}
    sizes = _small(patch_size=16, img_size=64, embed_dim=32)
    norm = {"norm_layer": partial(LayerNorm, eps=1e-5), "use_fc_norm": False}
    return {**sizes, "dynamic_img_size": True, **rotary, **norm, **options}


def _create_eva(name: str, options: dict[str, Any]) -> Eva:
    options.pop("pretrained_cfg", None)
    options.pop("pretrained_cfg_overlay", None)
    options.pop("cache_dir", None)
    return Eva(**options)


@register_model
def vit_form_dinov3(pretrained: bool = False, **kwargs: Any) -> Eva:
    """DINOv3 in small, without biases of the attention."""
    return _create_eva("vit_form_dinov3", {**_dinov3(qkv_bias=False), **kwargs})


@register_model
def vit_form_dinov3_qkvb(pretrained: bool = False, **kwargs: Any) -> Eva:
    """DINOv3 in small."""
    return _create_eva("vit_form_dinov3_qkvb", {**_dinov3(qkv_bias=True), **kwargs})


@register_model
def vit_form_dinov3_plus(pretrained: bool = False, **kwargs: Any) -> Eva:
    """DINOv3-S+ in small: SwiGLU."""
    swiglu = {"swiglu_mlp": True, "swiglu_align_to": 8, "mlp_ratio": 4.0}
    return _create_eva("vit_form_dinov3_plus", {**_dinov3(qkv_bias=False, **swiglu), **kwargs})


def randomised(model: torch.nn.Module) -> Any:
    """Give all parameters random values, as some are initialised with zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def to_hub_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of timm with the names of DINOv2's official code."""
    out = {key: value.clone() for key, value in state.items()}
    out["mask_token"] = torch.zeros(1, WIDTH)
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        position = torch.full((1, 1, WIDTH), 0.25)  # any: timm adds it to the class token
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], dim=1)
        out["cls_token"] = out["cls_token"] - position
    is_gated = out["blocks.0.mlp.fc1.weight"].shape[0] != out["blocks.0.mlp.fc2.weight"].shape[1]
    if is_gated:
        out = {
            k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in out.items()
        }
    return out


def to_hub_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of timm with the names of DINOv3's official code."""
    out: dict[str, Tensor] = {"mask_token": torch.zeros(1, WIDTH)}
    out["rope_embed.periods"] = torch.ones(4)
    for key, value in state.items():
        name = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
        name = name.replace("gamma_2", "ls2.gamma").replace("mlp.fc1_g", "mlp.w1")
        name = name.replace("mlp.fc1_x", "mlp.w2")
        if "mlp.w1" in name or "mlp.w2" in name:
            pass
        elif f"{key.partition('.mlp.')[0]}.mlp.fc1_g.weight" in state:
            name = name.replace("mlp.fc2", "mlp.w3")
        if not name.endswith(("q_bias", "v_bias")):
            out[name] = value.clone()
    for block in range(DEPTH):
        start = f"blocks.{block}.attn."
        zeros = torch.zeros(WIDTH)
        query, value = (state.get(f"{start}{part}_bias", zeros) for part in "qv")
        out[f"{start}qkv.bias"] = torch.cat([query, torch.ones(WIDTH), value])  # keys are masked
        mask = torch.ones(3 * WIDTH)
        mask[WIDTH : 2 * WIDTH] = float("nan")
        out[f"{start}qkv.bias_mask"] = mask
    return out


def to_transformers(hub: dict[str, Tensor], *, is_v3: bool, is_old: bool) -> dict[str, Tensor]:
    """Return a state dict of official code with the names of transformers.

    Args:
        hub: What the two functions above return.
        is_v3: Whether it is DINOv3.
        is_old: Whether to use the names before version 5, as in published files.
    """
    out: dict[str, Tensor] = {}
    tokens = {"register_tokens", "storage_tokens", "cls_token", "mask_token"}
    projection = "patch_embeddings." if is_v3 else "patch_embeddings.projection."
    layer = ("layer." if is_old else "model.layer.") if is_v3 else "encoder.layer."
    for key, value in hub.items():
        if key in tokens:
            out[f"embeddings.{key.replace('storage', 'register')}"] = value
        elif key == "pos_embed":
            out["embeddings.position_embeddings"] = value
        elif key.startswith("patch_embed.proj."):
            out[f"embeddings.{projection}{key.rpartition('.')[2]}"] = value
        elif key.startswith("norm."):
            out[key if is_v3 else key.replace("norm.", "layernorm.")] = value
        elif key.startswith("blocks.") and not key.endswith("bias_mask"):
            _, number, name = key.split(".", 2)
            for new, part in _block(name, value, is_v3, is_old).items():
                out[f"{layer}{number}.{new}"] = part
    return out


def _block(name: str, value: Tensor, is_v3: bool, is_old: bool) -> dict[str, Tensor]:
    kind = name.rpartition(".")[2]
    if name.startswith("attn.qkv."):
        parts = dict(zip(("query", "key", "value"), value.chunk(3), strict=True))
        if is_v3 and kind == "bias":
            del parts["key"]
        if is_old and not is_v3:
            return {f"attention.attention.{k}.{kind}": v for k, v in parts.items()}
        return {f"attention.{k[0]}_proj.{kind}": v for k, v in parts.items()}
    if name.startswith("attn.proj."):
        new = "attention.output.dense" if is_old and not is_v3 else "attention.o_proj"
        return {f"{new}.{kind}": value}
    if name.startswith("ls"):
        return {f"layer_scale{name[2]}.lambda1": value}
    if name.startswith("mlp.w12."):
        gate, up = value.chunk(2)
        if is_old:
            return {f"mlp.weights_in.{kind}": value}
        return {f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up}
    gated = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    plain = {"fc1": "up_proj", "fc2": "down_proj"} if is_v3 else {}
    if is_old and not is_v3:
        gated = {"w3": "weights_out"}
    for short, long in {**gated, **plain}.items():
        if name.startswith(f"mlp.{short}."):
            return {f"mlp.{long}.{kind}": value}
    return {name: value}
