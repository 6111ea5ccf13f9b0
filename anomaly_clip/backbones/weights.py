"""CLIP weights from an open_clip tag, a local file or folder, ``demo``, or untrained (``random``).

Every result depends on the weights, so nothing is guessed in silence. A tag that cannot be
downloaded, a tag that was trained with a different activation and a file that does not fit the
model are errors with a one-line message. Random weights are used only if requested by name.
``demo`` is the small CLIP of this project, trained on generated images (see its card,
``assets/demo_clip.md``).

Four steps: where weights come from (``weight_tags``, ``weight_sources``, ``weight_settings``),
reading of a file (``weight_files``, ``torchscript``, ``state_dicts``), names of the tensors
(``clip_layouts``), and here the model that they are loaded into, with its activation and pixel
normalisation. The activation is that of ``quick_gelu``, or else, in this order: for a tag, that of
open_clip's record; for a file, that of a JSON model configuration that states one, of a JSON file
next to the weights, of the classes in a TorchScript archive, QuickGELU if the file has the numbers
of OpenAI's archives (``input_resolution``, ``context_length``, ``vocab_size``), that of the model
name. The last is an assumption, which is printed.

Importing this module loads open_clip, which takes two seconds. Other modules therefore import this
module inside functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.factory import resize_pos_embed, resize_text_pos_embed

from anomaly_clip.backbones.clip_layouts import (
    TIMM,
    CLIPTensors,
    check_fit,
    model_names,
    open_clip_tensors,
)
from anomaly_clip.backbones.clip_models import (
    ASSETS,
    CLIP,
    build,
    pixels_of_tags,
    read_config,
    resize_tower,
    set_image_size,
    uses_timm,
)
from anomaly_clip.backbones.state_dicts import state_dict_of
from anomaly_clip.backbones.weight_files import WeightFileError, in_one_sentence, read_content
from anomaly_clip.backbones.weight_settings import (
    WeightsSettings,
    settings_next_to,
)
from anomaly_clip.backbones.weight_sources import local_file, looks_like_file
from anomaly_clip.backbones.weight_tags import HUB_TIMEOUT, fetch, other_epoch
from anomaly_clip.progress import say
from anomaly_clip.records import DEMO, RANDOM

__all__ = ["HUB_TIMEOUT", "LoadedCLIP", "activation_by_name", "load_clip"]

OPTION = "backbone.pretrained"
ACTIVATIONS = {True: "QuickGELU", False: "GELU"}
SAVE_CLIP = (
    "save the state dict of the whole CLIP, image and text tower, alone "
    "(torch.save(model.state_dict(), FILE)) and give that file"
)
NOTHING_STATED = "as no open_clip_config.json next to the file states another"
INTERPOLATIONS = {
    "bicubic_antialias": ("bicubic", True),
    "bicubic": ("bicubic", False),
    "bilinear": ("bilinear", False),
}
"""Arguments of torch's interpolation for each value of ``positions``."""


class LoadedCLIP(NamedTuple):
    """An open_clip model with its pixel normalisation."""

    model: CLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    """Name of the weights: ``pretrained``, and the tag that they are of if that is another one."""
    activation: str | None
    """``GELU`` or ``QuickGELU``; None if it is the default: that of the tag's record or, for a
    file, both that of ``auto`` and that of the model name."""
    text_config: dict[str, Any]
    """Configuration of the text tower, which names its tokenizer."""


class _File(NamedTuple):
    """Content of a weights file."""

    path: Path
    tensors: CLIPTensors
    activation: str | None
    notes: list[str]
    """Notes for the user, printed once the weights are loaded."""


def load_clip(
    name: str,
    pretrained: str,
    image_size: int | None = None,
    quick_gelu: str = "auto",
    positions: str = "bicubic_antialias",
) -> LoadedCLIP:
    """Build an open_clip model and load its weights.

    Args:
        name: An open_clip model name, the path of a JSON model configuration, or ``demo`` for the
            architecture of the small CLIP that comes with the project.
        pretrained: An open_clip tag (downloaded on first use), the path of a file with weights or
            of a folder with one (forms: docs/weights.md), ``demo`` for the weights that come with
            the project, or ``random``.
        image_size: Side of the input in pixels; positional embeddings are interpolated to it.
            Default: the image size of the model.
        quick_gelu: Activation: ``true`` for QuickGELU, ``false`` for GELU, ``auto`` as described at
            the top of this module.
        positions: Interpolation of positional embeddings: ``bicubic_antialias``, ``bicubic`` or
            ``bilinear``.

    Raises:
        FileNotFoundError: If a file is missing, or the weights of a tag are neither cached nor
            downloadable.
        ValueError: If the model is unknown or not supported, or the weights do not fit it.
    """
    if pretrained in (None, "", "None", "null"):
        raise ValueError(
            f"backbone.pretrained of {name} is empty; give an open_clip tag, a weights file, "
            f"'{DEMO}', or '{RANDOM}' for untrained weights"
        )
    with in_one_sentence(f"{OPTION} {pretrained} of backbone.name {name}"):
        return _load_clip(name, pretrained, image_size, quick_gelu, positions)


def _load_clip(
    name: str, pretrained: str, image_size: int | None, quick_gelu: str, positions: str
) -> LoadedCLIP:
    config, preprocessing = read_config(name)
    is_timm = uses_timm(config)
    if is_timm:
        _check_timm_options(name, quick_gelu, positions)
    elif image_size is not None:
        set_image_size(config, image_size, name)
    by_name = bool(config.get("quick_gelu", False))
    source = pretrained
    file: _File | None = None
    tag: dict[str, Any] | None = None
    if pretrained == DEMO:
        if name != DEMO:
            raise ValueError(
                f"backbone.pretrained {DEMO} has an architecture of its own, not that of {name}; "
                f"omit backbone.name, or set it to {DEMO}"
            )
        file = _read_file(ASSETS / "demo_clip.safetensors")
    elif pretrained != RANDOM:
        if not looks_like_file(pretrained):
            tag = _pretrained_tag(name, pretrained, by_name, quick_gelu)
        if tag is None:
            file = _read_file(local_file(pretrained, OPTION))
            preprocessing = _settle(file, name, config, preprocessing, quick_gelu)
    # For a file, the activations of the model name and of the file, which may differ.
    defaults = {by_name, bool(config.get("quick_gelu", False))}
    if tag is not None:
        defaults = {bool(tag.get("quick_gelu", False))}
    if quick_gelu != "auto":
        config["quick_gelu"] = quick_gelu == "true"
    model = build(name, config)  # before a download, as it refuses models that are not supported
    if tag is not None:
        path, from_hub = fetch(name, pretrained, tag)
        if from_hub and (other := other_epoch(pretrained, tag)):
            source = f"{pretrained} (weights of {other})"
            _warn_of_other_epoch(name, pretrained, other, tag)
        file, preprocessing = _read_file(path), tag
    if file is not None:
        _fill(model, file, name, positions)
        file.notes.extend(_notes_on_positions(file, model, image_size))
        for note in file.notes:
            say(f"{OPTION} {file.path}: {note}")
    elif is_timm:
        preprocessing = {**pixels_of_tags(name), **preprocessing}
    if is_timm:
        resize_tower(model, image_size, name)
    activation = bool(config.get("quick_gelu", False))
    return LoadedCLIP(
        model,
        tuple(preprocessing.get("mean") or OPENAI_DATASET_MEAN),
        tuple(preprocessing.get("std") or OPENAI_DATASET_STD),
        source,
        None if defaults == {activation} else ACTIVATIONS[activation],
        config["text_cfg"],
    )


def _check_timm_options(name: str, quick_gelu: str, positions: str) -> None:
    """Check the options that a model with an image tower of timm does not have.

    Raises:
        ValueError: If one is set.
    """
    if quick_gelu == "true":
        raise ValueError(
            f"backbone.quick_gelu true: the image tower of {name} is timm's, which has the "
            f"activation of its weights; leave backbone.quick_gelu out"
        )
    if positions != "bicubic_antialias":
        raise ValueError(
            f"backbone.positions {positions}: the image tower of {name} is timm's, which "
            f"interpolates positions as bicubic_antialias; set backbone.positions to that"
        )


def activation_by_name(name: str, pretrained: str) -> str:
    """Return ``quick_gelu`` for settings of version 0.1.0, which know no such option.

    Version 0.1.0 took the activation of a weights file from the model name alone.

    Args:
        name: As for :func:`load_clip`.
        pretrained: As for :func:`load_clip`.

    Returns:
        ``auto`` if that gives the same activation; else ``true`` or ``false``.
    """
    if pretrained in (DEMO, RANDOM) or not looks_like_file(pretrained):
        return "auto"
    path = Path(pretrained).expanduser()
    settings = settings_next_to(path) if path.is_file() else None
    by_name = bool(read_config(name)[0].get("quick_gelu", False))
    if settings is None or settings.quick_gelu == by_name:
        return "auto"
    return "true" if by_name else "false"


# -- tags ----------------------------------------------------------------------------------------


def _pretrained_tag(name: str, tag: str, by_name: bool, quick_gelu: str) -> dict[str, Any] | None:
    """Return open_clip's record of a tag, or None if the value is a file rather than a tag.

    Args:
        name: Name of the model.
        tag: The tag.
        by_name: Whether the model has QuickGELU.
        quick_gelu: The option, which overrides the record.

    Raises:
        ValueError: If there is no such tag, or it was trained with another activation.
    """
    is_registered = name != DEMO and not name.endswith(".json")
    record: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag) if is_registered else {}
    if not record and Path(tag).exists():
        return None
    if not is_registered:
        model = "the demo architecture" if name == DEMO else "a model from a JSON configuration"
        demo = f"'{DEMO}', " if name == DEMO else ""
        raise ValueError(
            f"backbone.pretrained {tag}: {model} has no tags; give {demo}a weights file or "
            f"'{RANDOM}'"
        )
    if not record:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"backbone.pretrained {tag} is not a tag of {name} (known: {tags}); give one of them, "
            f"a weights file, or '{RANDOM}'"
        )
    trained = bool(record.get("quick_gelu", False))
    if quick_gelu == "auto" and trained != by_name:
        other = name.removesuffix("-quickgelu") + ("-quickgelu" if trained else "")
        use = f"use backbone.name {other}, or set" if other in open_clip.list_models() else "set"
        raise ValueError(
            f"backbone.pretrained {tag} was trained with a different activation from that of "
            f"{name}; {use} backbone.quick_gelu to {str(trained).lower()} (or to "
            f"{str(by_name).lower()} for {ACTIVATIONS[by_name]}, with which some published results "
            f"were computed)"
        )
    return record


def _warn_of_other_epoch(name: str, tag: str, other: str, record: dict[str, Any]) -> None:
    file = str(record.get("url") or "").rpartition("/")[2]
    way_out = f"give the file {file} for those of {tag}, or " if file else ""
    warnings.warn(
        f"backbone.pretrained {tag} of {name}: the model hub has the weights of {other} under this "
        f"tag, and these are used; {way_out}set backbone.pretrained to {other}",
        stacklevel=3,
    )


# -- files ---------------------------------------------------------------------------------------


def _read_file(path: Path) -> _File:
    """Read a weights file, and note what else is in it.

    Raises:
        ValueError: If it cannot be read, or contains several CLIPs.
    """
    try:
        content = read_content(path)
        state = state_dict_of(content.content, way_out=SAVE_CLIP)
        tensors = open_clip_tensors(state.tensors)
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {path}: it cannot be read as weights ({error.form}); {error.way_out}"
        ) from None
    notes = [f"{state.container} is used, {', '.join(state.others)} not"] if state.others else []
    if tensors.unused:
        count = len(tensors.unused)
        more = f" and {count - 1} more" if count > 1 else ""
        notes.append(f"tensors outside the CLIP are not used: {tensors.unused[0]}{more}")
    return _File(path, tensors, content.activation, notes)


def _settle(
    file: _File,
    name: str,
    config: dict[str, Any],
    preprocessing: dict[str, Any],
    quick_gelu: str,
) -> dict[str, Any]:
    """Set the activation of ``auto`` for a file in the configuration, and note what is assumed.

    Returns:
        Settings of the preprocessing: those of the model configuration, or else of a JSON file next
        to the weights.
    """
    settings = settings_next_to(file.path, file.tensors.layout)
    by_name = bool(config.get("quick_gelu", False))
    is_in_config = name.endswith(".json") and "quick_gelu" in config
    is_stated = quick_gelu != "auto" or is_in_config
    statement = None if is_in_config else _stated_activation(file, settings)
    if statement is not None:
        config["quick_gelu"], place = statement
        if quick_gelu == "auto" and config["quick_gelu"] != by_name:
            file.notes.append(
                f"the activation is {ACTIVATIONS[not by_name]} according to {place}, not "
                f"{ACTIVATIONS[by_name]} as in {name} (backbone.quick_gelu overrides this)"
            )
    elif quick_gelu == "auto" and settings is not None and settings.quick_gelu != by_name:
        file.notes.append(
            f"the activation is {ACTIVATIONS[by_name]}, as {name} states, not "
            f"{ACTIVATIONS[not by_name]} as in {settings.file}"
        )
    if settings is not None:
        stated = {"mean": settings.mean, "std": settings.std}
        preprocessing = {**{k: v for k, v in stated.items() if v}, **preprocessing}
    if uses_timm(config):
        preprocessing = {**pixels_of_tags(name), **preprocessing}
        is_stated = True  # timm's towers have the activation of their weights
    is_known = name == DEMO or file.tensors.is_openai or bool(preprocessing.get("mean"))
    pixels = "" if is_known else "CLIP's pixel normalisation"
    if not is_stated and statement is None and name != DEMO:
        activation = f"{ACTIVATIONS[by_name]}, the activation of {name},"
        subject = f"{activation} and {pixels} are" if pixels else f"{activation} is"
        file.notes.append(f"{subject} assumed, {NOTHING_STATED}; backbone.quick_gelu overrides it")
    elif pixels:
        file.notes.append(f"{pixels} is assumed, {NOTHING_STATED}")
    return preprocessing


def _stated_activation(file: _File, settings: WeightsSettings | None) -> tuple[bool, str] | None:
    """Return whether the activation is QuickGELU, and the place that states it, if there is one."""
    if settings is not None:
        return settings.quick_gelu, str(settings.file)
    if file.activation is not None:
        return file.activation == ACTIVATIONS[True], "the classes in the archive"
    if file.tensors.is_openai:
        return True, "its form, that of OpenAI's archives"
    return None


def _fill(model: CLIP, file: _File, name: str, positions: str) -> None:
    """Load the tensors of a file.

    Raises:
        ValueError: If they do not fit the model.
    """
    try:
        check_fit(file.tensors.state, model, name)
    except WeightFileError as error:
        raise ValueError(f"{OPTION} {file.path}: {error.form}; {error.way_out}") from None
    # CPUs cannot interpolate in half precision; some files store the logit scale as a vector.
    state = {key: value.float() for key, value in file.tensors.state.items()}
    state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    interpolation, antialias = INTERPOLATIONS[positions]
    resize_pos_embed(state, model, interpolation, antialias)
    resize_text_pos_embed(state, model)
    model.load_state_dict(model_names(state, model))


def _notes_on_positions(file: _File, model: CLIP, image_size: int | None) -> list[str]:
    """Return notes on positional embeddings that were interpolated without being asked for."""
    notes = []
    given, length = len(file.tensors.state["positional_embedding"]), model.context_length
    if given != length:
        notes.append(
            f"positional embeddings of the text tower are interpolated from {given} to {length} "
            f"positions; a model configuration with context_length {given} keeps them"
        )
    if file.tensors.layout == TIMM:  # timm interpolates only where it is asked to
        return notes
    side = math.isqrt(len(file.tensors.state["visual.positional_embedding"]) - 1)
    grid = model.visual.grid_size[0]
    if image_size is None and side != grid:
        notes.append(
            f"positional embeddings of the image tower are interpolated from {side}x{side} to "
            f"{grid}x{grid} patches; backbone.image_size {side * model.visual.patch_size[0]} keeps "
            f"them, and {grid * model.visual.patch_size[0]} confirms the interpolation"
        )
    return notes
