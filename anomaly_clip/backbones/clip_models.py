"""Models of open_clip: their configurations, and their modules with untrained weights.

Supported are open_clip's own ViTs with CLIP's head and text tower, and models with an image tower
of timm: ViTs (SigLIP, SigLIP2, MobileCLIP-B and -L, PE-Core) and FastViTs (MobileCLIP-S).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from anomaly_clip.backbones.clip_towers import image_tower, unsupported_tower
from anomaly_clip.backbones.frozen import check_settings
from anomaly_clip.backbones.weight_settings import check_sizes, quick_gelu_of, three_numbers
from anomaly_clip.documents import load_json
from anomaly_clip.errors import reason, suggest
from anomaly_clip.exhaustion import explain_exhaustion
from anomaly_clip.records import DEMO

__all__ = [
    "ASSETS",
    "CLIP",
    "build",
    "check_clip_settings",
    "pixels_of_tags",
    "read_config",
    "resize_tower",
    "set_image_size",
    "uses_timm",
]

ASSETS = Path(str(resources.files("anomaly_clip") / "assets"))
CLIP: TypeAlias = "open_clip.CLIP | open_clip.CustomTextCLIP"


def read_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's configuration and its preprocessing settings."""
    preprocessing: dict[str, Any] = {}
    if name == DEMO or name.endswith(".json"):
        path = ASSETS / "demo_clip.json" if name == DEMO else Path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"backbone.name {name}: there is no such file; give an existing JSON model "
                f"configuration or an open_clip model name"
            )
        try:
            config = load_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"backbone.name {name}: not a JSON model configuration ({error}); give one in "
                f"open_clip's format"
            ) from None
        try:
            if "model_cfg" in config:  # the format in which open_clip publishes models
                preprocessing = config.get("preprocess_cfg") or {}
                config = config["model_cfg"]
            quick_gelu_of(config)
            for key in ("mean", "std"):
                three_numbers(key, preprocessing.get(key) or None)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"backbone.name {name}: the model configuration cannot be used ({error}); correct "
                f"the file"
            ) from None
    else:
        registered = open_clip.get_model_config(name)
        if registered is None:
            check_texts(name)
            hint = suggest(name, open_clip.list_models()) or "use a ViT, such as ViT-B-16"
            raise ValueError(f"backbone.name {name}: open_clip has no such model; {hint}")
        config = deepcopy(registered)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise ValueError(
            f"backbone.name {name}: the configuration lacks {sorted(missing)}; add them, as in "
            f"open_clip's model configurations"
        )
    if name.endswith(".json"):
        try:
            check_sizes(config)
        except ValueError as error:
            raise ValueError(
                f"backbone.name {name}: the model configuration cannot be used ({error}); correct "
                f"the file"
            ) from None
    return config, preprocessing


def check_texts(name: str) -> None:
    """Check that a model is not one of torchvision or timm, which have no texts.

    Args:
        name: Name of a model; one that does not exist passes.

    Raises:
        ValueError: If it is.
    """
    import timm
    from torchvision import models

    is_cnn = name in models.list_models(module=models)
    if is_cnn or timm.is_model(name.partition(".")[0]):
        kind = "CNN of torchvision" if is_cnn else "model of timm"
        raise ValueError(
            f"backbone.name {name} is a {kind}, but this method needs a CLIP model, which has "
            f"texts: give one with model.backbone.pretrained, such as demo, or choose a method on "
            f"features, such as PatchCore"
        )


def check_clip_settings(settings: Any) -> None:
    """Check that settings in a mapping are those of a CLIP model.

    Raises:
        ValueError: If they are those of another kind of backbone, or no settings.
    """
    ready = getattr(settings, "settings", settings)  # of a backbone
    name = settings.get("name") if isinstance(settings, Mapping) else getattr(ready, "name", None)
    if name is not None:
        check_texts(str(name))
    if not isinstance(settings, Mapping) and name is not None:
        raise ValueError(
            f"backbone {type(settings).__name__}: the settings of {name} are those of CNNs and "
            f"ViTs, but this method needs a CLIP model: give CLIPSettings"
        )
    check_settings(settings, "pretrained")


def set_image_size(config: dict[str, Any], image_size: int, name: str) -> None:
    """Set the image size in the configuration of a plain ViT; see :func:`check_multiple`."""
    check_multiple(image_size, config["vision_cfg"].get("patch_size", 16), name)
    config["vision_cfg"]["image_size"] = image_size


def check_multiple(image_size: int, patch: int, name: str) -> None:
    """Check that an image size is a multiple of the patch size.

    Raises:
        ValueError: If it is not.
    """
    if image_size < patch or image_size % patch:
        raise ValueError(
            f"backbone.image_size {image_size} is not a multiple of the patch size {patch} of "
            f"{name}; use {max(1, round(image_size / patch)) * patch}, for example"
        )


def uses_timm(config: Mapping[str, Any]) -> bool:
    """Return whether the image tower of a configuration is one of timm."""
    return bool(config["vision_cfg"].get("timm_model_name"))


def build(name: str, settings: Mapping[str, Any]) -> CLIP:
    """Build a model; an image tower of timm has the input size of timm's model.

    Args:
        name: Name of the model, for messages.
        settings: Its configuration.

    Raises:
        ValueError: If the model is not supported, or open_clip cannot build it.
    """
    config: dict[str, Any] = deepcopy(dict(settings))
    vision, text = config["vision_cfg"], config["text_cfg"]
    is_custom = bool(config.pop("custom_text", False))
    if "multimodal_cfg" in config:
        raise _unsupported(name, "it is a CoCa")
    if "hf_model_name" in text:
        raise _unsupported(name, "its text tower is one of transformers")
    if uses_timm(config):
        vision["timm_model_pretrained"] = False  # no weights of another training
    elif is_custom:
        raise _unsupported(name, "its text tower is not that of CLIP")
    # Untrained weights depend only on the run's seed, not on earlier random numbers. Their
    # initialisation does not affect later random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        try:
            kind = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
            model = kind(**config)
        except MemoryError:
            raise
        except Exception as error:  # open_clip, timm and torch raise many types
            if explain_exhaustion(error) is not None:
                raise
            cause = reason(error)[:200] or type(error).__name__
            raise ValueError(
                f"backbone.name {name}: open_clip cannot build this configuration ({cause}); "
                f"correct it, or use an open_clip model name"
            ) from None
    why = unsupported_tower(model.visual) or _unsupported_text(model)
    if why is not None:
        raise _unsupported(name, why)
    return model


def _unsupported(name: str, why: str) -> ValueError:
    return ValueError(
        f"backbone.name {name} is not supported, because {why}; use a CLIP with a plain ViT image "
        f"tower, such as ViT-B-16-plus-240 or ViT-L-14-336, or with a ViT or FastViT of timm, such "
        f"as ViT-B-16-SigLIP2, PE-Core-B-16 or MobileCLIP2-S0"
    )


def _unsupported_text(model: Any) -> str | None:
    """Return the reason why a text tower or image size is not supported; None if it is."""
    size = model.visual.image_size
    if isinstance(size, tuple | list) and len(set(size)) > 1:
        return f"its images of {size[0]} x {size[1]} pixels are not square"
    text = getattr(model, "text", None)
    if text is None:
        is_clip = model.text_pool_type == "argmax" and model.attn_mask is not None
        return None if is_clip else "its text tower is not that of CLIP"
    plain = text.pool_type in ("argmax", "last") and text.cls_emb is None and not text.use_pad_mask
    return None if plain else f"its text tower has the pooling {text.pool_type!r} or more tokens"


def resize_tower(model: CLIP, image_size: int | None, name: str) -> None:
    """Set the input size of an image tower of timm, whose positions timm interpolates.

    Args:
        model: The model, with its weights.
        image_size: Side of the input in pixels; None takes that of the configuration.
        name: Name of the model, for messages.

    Raises:
        ValueError: If the side is not a multiple of the patch size.
    """
    visual: Any = model.visual
    embed = getattr(visual.trunk, "patch_embed", None)
    native = visual.image_size if embed is None else embed.img_size  # a FastViT takes all sizes
    if image_size is None:
        image_size = int(visual.image_size[0])
    if (image_size, image_size) == tuple(native):
        return
    check_multiple(image_size, image_tower(visual).patch_size, name)
    visual.set_input_size((image_size, image_size))


def pixels_of_tags(name: str) -> dict[str, Any]:
    """Return the pixel normalisation of open_clip's tags of a model; empty if they differ."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    records = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    default = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    values = {
        tuple(tuple(record.get(key) or default[key]) for key in default) for record in records
    }
    return dict(zip(default, values.pop(), strict=True)) if len(values) == 1 else {}
