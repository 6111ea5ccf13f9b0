"""One choice of image tower for all methods on features: a CNN, a ViT without texts, or a CLIP.

The name decides: a torchvision model is a CNN, another model of timm is a ViT. A CLIP model is
chosen by its option ``pretrained``, which the other two do not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, from_checkpoint
from anomaly_clip.backbones.cnn import IMAGENET, MEAN, STD, CNNBackbone, CNNSettings
from anomaly_clip.backbones.frozen import check_settings
from anomaly_clip.backbones.vit import AUTO, ViTBackbone, ViTSettings, is_vit, vit_names
from anomaly_clip.backbones.weight_sources import looks_like_file
from anomaly_clip.errors import suggest
from anomaly_clip.records import DEMO

__all__ = [
    "AnyBackbone",
    "AnySettings",
    "BackboneSettings",
    "is_clip",
    "settings_of",
    "tower_of",
]

CLIP_OPTIONS = ("pretrained", "image_size", "quick_gelu", "positions")
"""Options that only CLIP models have."""


@dataclass(frozen=True)
class BackboneSettings:
    """Choice of a CNN or of a ViT without texts, as plain values that configurations can store.

    Args:
        name: A torchvision CNN (resnet18), or a timm ViT (vit_small_patch14_dinov2), which may end
            with a tag of its weights (vit_small_patch14_dinov2.lvd142m).
        weights: auto (of a CNN: imagenet; of a ViT: the tag in the name, or else timm's default),
            imagenet (torchvision's IMAGENET1K_V1, as in the papers), a tag of timm, a weights file
            (forms: docs/weights.md), or the word random (untrained: the metrics mean nothing). Tags
            and imagenet are downloaded on first use.
        layers: Layers of a CNN whose features are computed; null: those of model.layers.
            --model.backbone.help lists the layers of a model.
        mean: Pixel mean; null: that of the weights.
        std: Pixel standard deviation; null: that of the weights.
    """

    name: str = "resnet18"
    weights: str = AUTO
    layers: list[str] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant", "h": "huge"}
OFFICIAL_NAME = re.compile(
    r"(dino|dinov2|dinov3)[-_](with[-_]registers[-_])?"
    r"(?:vit)?(small|base|large|giant|[sblgh](?=\d))(\d*)(plus)?([-_]reg)?"
)
"""Names such as dinov2_vits14_reg (torch hub) and dinov2-with-registers-small (model hub)."""
DEFAULT_NAMES = (BackboneSettings.name, ViTSettings.name, CLIPSettings.name)
AnySettings = BackboneSettings | CLIPSettings | CNNSettings | ViTSettings
AnyBackbone = CLIPBackbone | CNNBackbone | ViTBackbone


def settings_of(
    backbone: AnySettings | AnyBackbone | Mapping[str, Any],
) -> CNNSettings | ViTSettings | CLIPSettings:
    """Return the settings of a backbone in the class of its kind.

    Args:
        backbone: Settings, or a mapping, as checkpoints have it; or a ready backbone.

    Raises:
        ValueError: If the name or an option is of another kind, or there are no settings.
    """
    if isinstance(backbone, (CNNBackbone, ViTBackbone, CLIPBackbone)):
        return backbone.settings
    if not isinstance(backbone, (BackboneSettings, CLIPSettings, CNNSettings, ViTSettings)):
        return settings_of(_from_mapping(backbone))
    if isinstance(backbone, CLIPSettings):
        # The name is that of another kind if a method's default is no CLIP model.
        is_default = backbone.pretrained == DEMO and backbone.name in DEFAULT_NAMES
        backbone = replace(backbone, name=DEMO) if is_default else backbone
    _check_name(backbone.name, isinstance(backbone, CLIPSettings))
    if isinstance(backbone, BackboneSettings):
        return _resolved(backbone)
    if isinstance(backbone, CNNSettings) and _is_timm(backbone.name):
        weights = AUTO if backbone.weights == IMAGENET else backbone.weights
        return _resolved(BackboneSettings(backbone.name, weights, backbone.layers))
    return backbone


def _from_mapping(given: Any) -> CLIPSettings | BackboneSettings:
    """Return the settings in a mapping, which are those of a CLIP model if it has such options."""
    check_settings(given, "name")
    is_clip = "pretrained" in given or (
        "weights" not in given and not set(given).isdisjoint(CLIP_OPTIONS)
    )
    accepted = [field.name for field in fields(CLIPSettings if is_clip else BackboneSettings)]
    others = [name for name in given if name not in accepted]
    if others:
        kind = "a CLIP model" if is_clip else "a CNN or a ViT, which has weights"
        raise ValueError(
            f"backbone.{others[0]} is no option of {kind}: leave it out (options: "
            f"{', '.join(accepted)})"
        )
    return CLIPSettings(**from_checkpoint(given)) if is_clip else BackboneSettings(**given)


def _check_name(name: str, has_pretrained: bool) -> None:
    """Check that a name is one of the kind that the options of a backbone choose.

    Raises:
        ValueError: If it is one of another kind.
    """
    if not has_pretrained and not _is_cnn(name) and is_clip(name):  # open_clip is slow to import
        raise ValueError(
            f"backbone.name {name} is a CLIP model: give its weights with "
            f"model.backbone.pretrained, and no options of CNNs and ViTs (model.backbone.weights, "
            f"layers, mean, std)"
        )
    if has_pretrained and (_is_cnn(name) or _is_timm(name)):
        kind = "CNN" if _is_cnn(name) else "ViT without texts"
        raise ValueError(
            f"backbone.name {name} is a {kind}: give its weights with model.backbone.weights, its "
            f"image size with model.image_size, and no options of CLIP models "
            f"(model.backbone.pretrained, image_size, quick_gelu, positions)"
        )


def _resolved(settings: BackboneSettings) -> CNNSettings | ViTSettings:
    _check_exists(settings.name)
    if not _is_timm(settings.name):
        weights = IMAGENET if settings.weights == AUTO else settings.weights
        mean, std = settings.mean or list(MEAN), settings.std or list(STD)
        return CNNSettings(settings.name, weights, settings.layers, mean, std)
    if settings.layers is not None:
        raise ValueError(
            f"backbone.layers {settings.layers} is for CNNs, but {settings.name} is a ViT: choose "
            f"blocks with model.layers"
        )
    return ViTSettings(settings.name, settings.weights, settings.mean, settings.std)


def tower_of(
    backbone: AnySettings | AnyBackbone | Mapping[str, Any],
    layers: Sequence[int] | Sequence[str] | None = None,
    image_size: int | None = None,
) -> AnyBackbone:
    """Return a ready backbone as it is, or build one from its settings.

    Args:
        backbone: The choice of the backbone.
        layers: Layers of a CNN that are needed; later ones are not computed.
        image_size: Side of the images in pixels; None uses the size of a ViT's or a CLIP's weights.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If the settings are of no kind, or contradict the image size.
    """
    if isinstance(backbone, (CNNBackbone, ViTBackbone, CLIPBackbone)):
        tower = backbone
    else:
        settings = settings_of(backbone)
        if isinstance(settings, CNNSettings):
            names = settings.layers or (None if layers is None else [str(name) for name in layers])
            return CNNBackbone.of(replace(settings, layers=names))
        if isinstance(settings, ViTSettings):
            return ViTBackbone(**asdict(settings), image_size=image_size)
        tower = CLIPBackbone.of(replace(settings, image_size=settings.image_size or image_size))
    if not isinstance(tower, CNNBackbone) and image_size not in (None, tower.image_size):
        raise ValueError(
            f"model.image_size {image_size} differs from the image size of {tower.settings.name}, "
            f"{tower.image_size}: set both to the same, or leave backbone.image_size out"
        )
    return tower


def _check_exists(name: str) -> None:
    """Check that torchvision or timm has a model of a name.

    Raises:
        ValueError: If neither has.
    """
    if _is_cnn(name) or (name and is_vit(name)):
        return
    if not name or name == "None":
        raise ValueError(
            "backbone.name is empty; use a CNN, such as resnet18, or a ViT, such as "
            "vit_small_patch14_dinov2"
        )
    if looks_like_file(name) and Path(name).expanduser().exists():
        raise ValueError(
            f"backbone.name {name} is a file: give it as model.backbone.weights, and the name of "
            f"its architecture as model.backbone.name"
        )
    typed = name.replace("\\", "/").rpartition("/")[2].partition(".")[0].lower()
    official = _name_in_timm(typed)
    hint = f"use {official}" if official else suggest(typed, {*_cnns(), *vit_names()})
    hint = hint or "use resnet18, for example"
    raise ValueError(f"backbone.name {name}: neither torchvision nor timm has such a model; {hint}")


def _name_in_timm(name: str) -> str | None:
    """Return timm's name of a DINO that official code or the model hub calls otherwise, if any."""
    parts = OFFICIAL_NAME.match(name)
    if parts is None:
        return None
    family, registers, size, patch, plus, more = parts.groups()
    size = SIZES[size[0]] + ("_plus" if plus else "")
    if family == "dinov2":
        name = f"vit_{size}_patch14_{'reg4_' if registers or more else ''}dinov2"
    else:
        rest = "_dinov3" if family == "dinov3" else "_224"
        name = f"vit_{size}_patch{patch or 16}{rest}"
    if not is_vit(name):
        return None
    return name if family != "dino" else f"{name}.dino"


def _cnns() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def _is_cnn(name: str) -> bool:
    return name in _cnns()


def _is_timm(name: str) -> bool:
    return not _is_cnn(name) and is_vit(name)


def is_clip(name: str) -> bool:
    """Return whether a name is that of a CLIP model: one of open_clip, a JSON file, or demo."""
    from open_clip import list_models

    return name == DEMO or name.endswith(".json") or name in list_models()
