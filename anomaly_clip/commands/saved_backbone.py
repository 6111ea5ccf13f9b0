"""Backbone in the hyper-parameters of a checkpoint, with the settings that a user replaces."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.towers import BackboneSettings, settings_of
from anomaly_clip.errors import UserError

__all__ = ["changed_backbone", "weights_option"]


def changed_backbone(
    kind: type[Any],
    content: Mapping[str, Any],
    backbone: Mapping[str, Any] | None,
    path: Path,
) -> dict[str, Any]:
    """Return the argument ``backbone`` of a checkpoint's class if it differs from the saved one.

    A backbone of another kind than the default of the class is given as settings of its kind, as
    Lightning would read a mapping as settings of the default's kind.

    Args:
        kind: Class of the method.
        content: Content of the checkpoint.
        backbone: Settings that replace the saved ones; None keeps all.
        path: File of the checkpoint, for messages.

    Raises:
        UserError: If there is no such setting, or the saved settings are those of no backbone.
    """
    saved = content.get("hyper_parameters", {}).get("backbone")
    settings = dict(saved) if isinstance(saved, Mapping) else {}
    if backbone is not None:
        _check_names(backbone, content)
        settings |= backbone
    parameter = inspect.signature(kind.__init__).parameters.get("backbone")
    default = None if parameter is None else parameter.default
    if is_dataclass(default) and not {field.name for field in fields(default)}.issuperset(settings):
        try:
            return {"backbone": settings_of(settings)}
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: the backbone of the checkpoint does not fit {kind.__name__} ({error}): "
                f"give one that fit has written"
            ) from None
    return {} if backbone is None else {"backbone": settings}


def _check_names(backbone: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Check the names of settings that replace those of a checkpoint's backbone.

    Raises:
        UserError: If there is no such setting.
    """
    names = [
        field.name for field in fields(CLIPSettings if _has_clip(content) else BackboneSettings)
    ]
    for name in backbone:
        if name not in names:
            raise UserError(f"backbone {name}: no such setting; there are {', '.join(names)}")


def weights_option(content: Mapping[str, Any]) -> str:
    """Return the name of the option for the weights of a checkpoint's backbone."""
    return "pretrained" if _has_clip(content) else "weights"


def _has_clip(content: Mapping[str, Any]) -> bool:
    backbone = content.get("hyper_parameters", {}).get("backbone")
    return isinstance(backbone, Mapping) and "pretrained" in backbone
