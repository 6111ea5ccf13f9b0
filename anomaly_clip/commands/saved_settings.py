"""Settings of a backbone in a checkpoint, compared with the current ones.

Checkpoints of earlier versions lack the options that were added later. Their values are the
defaults, except for the activation: version 0.1.0 took it from the model name alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from jsonargparse import Namespace

from anomaly_clip.backbones.clip import CLIPSettings, from_checkpoint
from anomaly_clip.backbones.towers import BackboneSettings, settings_of

__all__ = ["are_equal", "comparable", "take_activation"]

SOURCE = ("pretrained", "weights")
"""Settings that may differ, as the weights are those of the checkpoint or are compared by hash."""
HASHED = ("quick_gelu", "positions")
"""Settings whose effect is part of the hash of a frozen backbone."""


def comparable(settings: Any, name: str, is_hashed: bool) -> Any:
    """Return the settings that must be those of the checkpoint, with all options.

    Args:
        settings: Value of an argument of a method.
        name: Name of the argument; values other than those of ``backbone`` and ``text`` are
            returned as they are.
        is_hashed: Whether the checkpoint contains a hash of the frozen backbone.
    """
    if name not in ("backbone", "text") or not isinstance(settings, Mapping):
        return settings
    is_clip, is_other = (
        _is_clip(settings),
        set(settings) <= set(BackboneSettings.__dataclass_fields__),
    )
    if name == "text":
        settings = asdict(CLIPSettings(**settings)) if is_clip else settings
    elif is_clip or is_other:
        with suppress(ValueError, TypeError):  # settings that are refused with a reason later
            settings = asdict(settings_of(settings))
    if name == "text":
        return settings
    left_out = (*SOURCE, *(HASHED if is_hashed else ()))
    return {key: value for key, value in settings.items() if key not in left_out}


def are_equal(saved: Any, current: Any) -> bool:
    """Return whether settings are equal; lists of a checkpoint may be tuples in the code."""
    saved, current = (json.dumps(each, default=str, sort_keys=True) for each in (saved, current))
    return bool(saved == current)


def take_activation(arguments: Any, name: str, saved: Any) -> None:
    """Set the activation of version 0.1.0 if the checkpoint is of that version.

    Args:
        arguments: Current arguments of the method, which are changed.
        name: Name of the argument.
        saved: Value of the argument in the checkpoint.
    """
    current = arguments[name]
    if not _is_clip(saved) or "quick_gelu" in saved or not _is_clip(current):
        return
    if current["quick_gelu"] == "auto":
        weights = {key: current[key] for key in ("name", "pretrained")}
        current["quick_gelu"] = from_checkpoint(weights)["quick_gelu"]


def _is_clip(settings: Any) -> bool:
    """Return whether settings are those of a CLIP, as plain values."""
    if not isinstance(settings, Mapping | Namespace):
        return False
    options = set(settings.keys())
    return "pretrained" in options and options <= set(CLIPSettings.__dataclass_fields__)
