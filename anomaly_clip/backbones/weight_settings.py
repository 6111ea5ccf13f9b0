"""Settings of a model that JSON files next to its weights state: activation, pixel normalisation.

A weights file contains tensors only. For CLIPs, two formats are read: ``open_clip_config.json`` of
open_clip, and ``config.json`` with ``preprocessor_config.json`` of transformers. For ViTs, two are
read as well: ``config.json`` of timm, and ``preprocessor_config.json`` of transformers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_clip.documents import load_json
from anomaly_clip.errors import reason

__all__ = [
    "MAX_PIXEL",
    "WeightsSettings",
    "check_sizes",
    "pixels_next_to",
    "quick_gelu_of",
    "settings_next_to",
    "three_numbers",
]

OPEN_CLIP_SETTINGS = "open_clip_config.json"
TRANSFORMERS_SETTINGS = "config.json"
TRANSFORMERS_PIXELS = "preprocessor_config.json"
SIZES = (
    *("embed_dim", "width", "layers", "heads", "head_width", "patch_size", "image_size"),
    *("context_length", "vocab_size"),
)
LARGEST_SIZE = 10_000_000
VOCABULARY = 49_408
"""Number of tokens of CLIP's tokeniser."""
MAX_PIXEL = 10.0
"""Limit of pixel means and deviations; our choice, as pixels are in [0, 1] and not in [0, 255]."""


class WeightsSettings(NamedTuple):
    """Settings of a model that a file next to its weights states."""

    file: Path
    quick_gelu: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def settings_next_to(path: Path, layout: str | None = None) -> WeightsSettings | None:
    """Return the settings that a JSON file next to a weights file states; None without such a file.

    For a file of the model hub's cache, these are the files of the same snapshot. Files that cannot
    be read, or with impossible values, are not used, with a warning.

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
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                _warn_of_unused(file, path, error)
                continue
            if settings is not None:
                return settings
    return None


def pixels_next_to(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return pixel mean and deviation that a JSON file next to the weights of a ViT states.

    Files that cannot be read, or with impossible values, are not used, with a warning.

    Args:
        path: A weights file.
    """
    for folder in dict.fromkeys(_folders_of(path)):
        for name in (TRANSFORMERS_SETTINGS, TRANSFORMERS_PIXELS):
            file = folder / name
            if not file.is_file():
                continue
            try:
                content = load_json(file.read_text(encoding="utf-8"))
                record = content.get("pretrained_cfg") or {}  # of timm
                mean, std = _pixels(
                    record.get("mean", content.get("image_mean")),
                    record.get("std", content.get("image_std")),
                )
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                _warn_of_unused(file, path, error)
                continue
            if mean is not None and std is not None:
                return mean, std
    return None


def _warn_of_unused(file: Path, weights: Path, error: Exception) -> None:
    warnings.warn(
        f"{file}, next to the weights {weights.name}, cannot be used ({reason(error)}), and none "
        f"of its settings are: correct or remove it",
        stacklevel=3,
    )


def _folders_of(path: Path) -> Iterator[Path]:
    yield path.parent
    blob = path.resolve()
    yield blob.parent
    if blob.parent.name == "blobs":  # snapshots contain links to blobs, which have no suffix
        for link in sorted(blob.parent.parent.glob("snapshots/*/*")):
            if link.resolve() == blob:
                yield link.parent


def check_sizes(config: Mapping[str, Any]) -> None:
    """Check the sizes in a model configuration of open_clip.

    Raises:
        ValueError: If one is not a whole number from 1 to 10,000,000, or a tower is no object.
    """
    for tower in ("", "vision_cfg", "text_cfg"):
        part = config if not tower else config[tower]
        if not isinstance(part, Mapping):
            raise ValueError(f"{tower} is {part!r:.50}, not an object")
        for name in SIZES:
            value = part.get(name, 1)
            # Layers per stage, or height and width, may be a list.
            values = value if isinstance(value, list) and value else [value]
            whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
            if not whole or not all(1 <= v <= LARGEST_SIZE for v in values):
                place = f"{tower}.{name}".removeprefix(".")
                raise ValueError(
                    f"{place} is {value!r:.50}, not a whole number from 1 to {LARGEST_SIZE}"
                )
    image, patch = (config["vision_cfg"].get(name) for name in ("image_size", "patch_size"))
    if isinstance(image, int) and isinstance(patch, int) and image < patch:
        raise ValueError(f"vision_cfg.image_size {image} is less than the patch_size {patch}")
    words = config["text_cfg"].get("vocab_size", VOCABULARY)
    if words < VOCABULARY and not config["text_cfg"].get("hf_tokenizer_name"):
        raise ValueError(f"text_cfg.vocab_size is {words}, but CLIP's tokeniser has {VOCABULARY}")


def _open_clip_settings(file: Path) -> WeightsSettings | None:
    content = load_json(file.read_text(encoding="utf-8"))
    model = content.get("model_cfg", content)
    pixels = content.get("preprocess_cfg") or {}
    values = _pixels(pixels.get("mean"), pixels.get("std"))
    return WeightsSettings(file, quick_gelu_of(model), *values)


def _hub_settings(file: Path) -> WeightsSettings | None:
    """Read the settings of transformers' CLIPModel, whose default activation is QuickGELU."""
    content = load_json(file.read_text(encoding="utf-8"))
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
        pixels = load_json(other.read_text(encoding="utf-8"))
    values = _pixels(pixels.get("image_mean"), pixels.get("image_std"))
    return WeightsSettings(file, names == {"quick_gelu"}, *values)


def _pixels(mean: Any, std: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation per colour; None if they are not stated."""
    return three_numbers("mean", mean), three_numbers("std", std)


def quick_gelu_of(model: Mapping[str, Any]) -> bool:
    """Return whether a model configuration of open_clip states QuickGELU.

    Raises:
        ValueError: If the value is neither true nor false, such as the text ``"false"``.
    """
    value = model.get("quick_gelu", False)
    if value not in (True, False, None):
        raise ValueError(f"quick_gelu is {value!r}, neither true nor false")
    return bool(value)


def three_numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """Return a mean or standard deviation of pixels in [0, 1], per colour; None if not stated.

    Args:
        name: ``mean`` or ``std``.
        values: Content of a JSON file.

    Raises:
        ValueError: If they are not three finite numbers of at most :data:`MAX_PIXEL`, above 0 for
            ``std``.
    """
    if values is None:
        return None
    if not isinstance(values, list):
        raise ValueError(f"{name} is {values!r}, not a list of three numbers")
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} values for pixels of three colours")
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{name} contains {value!r}, not a number")
        if abs(value) > MAX_PIXEL or (name == "std" and value <= 0):
            limits = f"in (0, {MAX_PIXEL:g}]" if name == "std" else f"within {MAX_PIXEL:g} of 0"
            raise ValueError(
                f"{name} contains {value!r}, and must be {limits} for pixels in [0, 1]"
            )
    return tuple(map(float, values))
