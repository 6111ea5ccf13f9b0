"""Backbones of methods that need a certain kind: a CLIP with texts, a CNN, or a ResNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.backbones.towers import (
    AnyBackbone,
    AnySettings,
    is_cnn,
    is_timm_vit,
    settings_of,
)

__all__ = ["check_resnet", "clip_of", "cnn_settings_of"]

Choice = AnySettings | AnyBackbone | Mapping[str, Any]


def clip_of(backbone: Choice, method: str) -> CLIPBackbone:
    """Return a CLIP backbone for a method that compares images with texts.

    Args:
        backbone: A ready CLIP, or its settings.
        method: Name of the method, for messages.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If it is a CNN or a ViT without texts, or there is no such model.
    """
    name = _name(backbone)
    kind = "CNN" if is_cnn(name) else "ViT" if is_timm_vit(name) else ""
    if not kind and (not isinstance(backbone, Mapping) or "weights" in backbone):
        backbone = backbone if isinstance(backbone, CLIPBackbone) else settings_of(backbone)
        kind = "" if isinstance(backbone, (CLIPBackbone, CLIPSettings)) else "CNN or a ViT"
    if kind:
        raise ValueError(
            f"backbone.name {name} is a {kind}, and {method} needs a CLIP model, which has texts: "
            f"give one with model.backbone.pretrained, such as demo, or choose a method on "
            f"features, such as PatchCore"
        )
    return CLIPBackbone.of(backbone)  # type: ignore[arg-type]  # of no other kind


def cnn_settings_of(backbone: Choice, method: str, reason: str) -> CNNSettings:
    """Return the settings of a CNN for a method that takes no other backbone.

    Args:
        backbone: A ready CNN, or its settings.
        method: Name of the method, for messages.
        reason: Reason why the method takes no transformer, for messages.

    Raises:
        ValueError: If it is a ViT or a CLIP model.
    """
    settings = settings_of(backbone)
    if not isinstance(settings, CNNSettings):
        raise ValueError(
            f"backbone.name {settings.name} is a transformer, and {method} needs a CNN of "
            f"torchvision, as {reason}: choose one, such as resnet18, or a method on features of "
            f"any backbone, such as PatchCore"
        )
    return settings


def check_resnet(name: str, method: str) -> None:
    """Check that a torchvision model is a ResNet.

    Args:
        name: Name of the model; one that does not exist is left to its builder.
        method: Name of the method, for messages.

    Raises:
        ValueError: If it is another model.
    """
    from torchvision import models

    if is_cnn(name) and models.get_model_builder(name).__module__ != "torchvision.models.resnet":
        raise ValueError(
            f"model.backbone.name must be a ResNet for {method}, such as resnet18, got {name}"
        )


def _name(backbone: Choice) -> str:
    if isinstance(backbone, Mapping):
        return str(backbone.get("name", ""))
    settings = getattr(backbone, "settings", backbone)
    return str(settings.name) if hasattr(settings, "name") else ""
