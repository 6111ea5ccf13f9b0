"""Refusals of backbones by methods that need a CNN, or a ResNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, settings_of

__all__ = ["check_resnet", "cnn_settings_of"]

Choice = AnySettings | AnyBackbone | Mapping[str, Any]


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
            f"backbone.name {settings.name} is no CNN of torchvision, but {method} needs one, as "
            f"{reason}: choose one, such as resnet18, or a method on features of any backbone, "
            f"such as PatchCore"
        )
    return settings


def check_resnet(backbone: Choice, method: str) -> None:
    """Check that a torchvision model is a ResNet.

    Args:
        backbone: A ready CNN, or its settings; models of other libraries pass.
        method: Name of the method, for messages.

    Raises:
        ValueError: If it is another model.
    """
    from torchvision import models

    name = settings_of(backbone).name
    exists = name in models.list_models(module=models)
    if exists and models.get_model_builder(name).__module__ != "torchvision.models.resnet":
        raise ValueError(
            f"model.backbone.name must be a ResNet for {method}, such as resnet18, got {name}"
        )
