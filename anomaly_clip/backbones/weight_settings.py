"""Settings of a model that JSON files next to its weights state: activation, pixel normalisation.

A weights file contains tensors only. Two formats are read: ``open_clip_config.json`` of open_clip,
and ``config.json`` with ``preprocessor_config.json`` of transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_clip.errors import reason

__all__ = ["WeightsSettings", "settings_next_to"]

OPEN_CLIP_SETTINGS = "open_clip_config.json"
TRANSFORMERS_SETTINGS = "config.json"
TRANSFORMERS_PIXELS = "preprocessor_config.json"


class WeightsSettings(NamedTuple):
    """Settings of a model that a file next to its weights states."""

    file: Path
    quick_gelu: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def settings_next_to(path: Path, layout: str | None = None) -> WeightsSettings | None:
    """Return the settings that a JSON file next to a weights file states; None without such a file.

    For a file of the model hub's cache, these are the files of the same snapshot. Files that cannot
    be read are not used, with a warning.

    Args:
        path: A weights file.
        layout: ``transformers`` if the tensors are named as in transformers, whose settings are
            then read first.
    """
    readers = [(OPEN_CLIP_SETTINGS, _open_clip_settings)]
    readers.insert(0 if layout == "transformers" else 1, (TRANSFORMERS_SETTINGS, _hub_settings))
    folders = list(dict.fromkeys(_folders_of(path)))
    for name, read in readers:
        for folder in folders:
            file = folder / name
            if not file.is_file():
                continue
            try:
                settings = read(file)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                warnings.warn(
                    f"{file} states the activation of {path.name}, but cannot be read "
                    f"({reason(error)}) and is not used: correct or remove it",
                    stacklevel=2,
                )
                continue
            if settings is not None:
                return settings
    return None


def _folders_of(path: Path) -> Iterator[Path]:
    yield path.parent
    blob = path.resolve()
    yield blob.parent
    if blob.parent.name == "blobs":  # snapshots contain links to blobs, which have no suffix
        for link in sorted(blob.parent.parent.glob("snapshots/*/*")):
            if link.resolve() == blob:
                yield link.parent


def _open_clip_settings(file: Path) -> WeightsSettings | None:
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content.get("model_cfg", content)
    pixels = content.get("preprocess_cfg") or {}
    activation = bool(model.get("quick_gelu", False))
    return WeightsSettings(file, activation, *_pixels(pixels.get("mean"), pixels.get("std")))


def _hub_settings(file: Path) -> WeightsSettings | None:
    """Read the settings of transformers' CLIPModel, whose default activation is QuickGELU."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("model_type") != "clip":
        return None
    towers = [  # transformers lets the entries of the older "..._dict" win
        {**(content.get(key) or {}), **(content.get(f"{key}_dict") or {})}
        for key in ("vision_config", "text_config")
    ]
    names = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    if len(names) > 1 or not names <= {"quick_gelu", "gelu"}:
        raise ValueError(f"hidden_act is {' and '.join(sorted(map(str, names)))}")
    pixels: dict[str, Any] = {}
    if (other := file.with_name(TRANSFORMERS_PIXELS)).is_file():
        pixels = json.loads(other.read_text(encoding="utf-8"))
    values = _pixels(pixels.get("image_mean"), pixels.get("image_std"))
    return WeightsSettings(file, names == {"quick_gelu"}, *values)


def _pixels(mean: Any, std: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation per colour; None if they are not stated.

    Raises:
        ValueError: If they are not three numbers each.
    """
    values = []
    for value in (mean, std):
        numbers = None if value is None else tuple(float(number) for number in value)
        if numbers is not None and len(numbers) != 3:
            raise ValueError(f"{len(numbers)} values for pixels of three colours")
        values.append(numbers)
    return values[0], values[1]
