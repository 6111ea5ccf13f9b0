"""Names of timm's models and tags of their weights: the records, the cached files, the download.

A record is what timm states about published weights: their place, image size and pixel
normalisation. timm's own loader is not used, because it may unpickle files, which could run code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_deprecated_models

from anomaly_clip.backbones.vit import AUTO, vit_names
from anomaly_clip.backbones.weight_sources import looks_like_file
from anomaly_clip.backbones.weight_tags import (
    cached_by_address,
    cached_in_hub,
    expected_hash,
    why_no_download,
)
from anomaly_clip.errors import reason, suggest
from anomaly_clip.records import DEMO, RANDOM

__all__ = ["OPTION", "PLAIN_VITS", "ViTChoice", "choose", "fetch_tag", "tags_of"]

OPTION = "backbone.weights"
IMAGENET = "imagenet"
PLAIN_VITS = "a plain ViT, such as vit_small_patch14_dinov2 or vit_small_patch16_dinov3"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights files of timm's repositories in the model hub, the preferred one first."""
MAX_SHOWN = 8


class ViTChoice(NamedTuple):
    """A model of timm with the source of its weights."""

    architecture: str
    """Name of the model, without a tag."""
    tag: str
    """Tag whose record is used; empty if timm has none."""
    record: Any
    """timm's record of the tag: image size, pixel normalisation, place of the weights."""
    source: str
    """The tag, the file, or ``random``."""
    is_tag: bool
    """True if the weights are those of the tag."""


def choose(name: str, weights: str) -> ViTChoice:
    """Return the model and the source of its weights that two options select.

    Args:
        name: A model of timm, with or without a tag.
        weights: ``auto``, a tag, a file, or ``random``.

    Raises:
        ValueError: If timm has no such model or tag, or name and weights contradict each other.
    """
    architecture, _, tag = str(name).partition(".")
    _check_name(str(name), architecture)
    if weights in (None, "", "None", "null"):
        raise ValueError(
            f"{OPTION} of {name} is empty; give '{AUTO}', a tag, a weights file, or '{RANDOM}' for "
            f"untrained weights"
        )
    records = _records(architecture)
    tags = tags_of(architecture)
    if tag and tag not in records:
        raise ValueError(
            f"backbone.name {name}: {architecture} has no tag {tag} ({_listed(tags)}); give one of "
            f"them, or leave it out"
        )
    default = tag or (tags[0] if tags else next(iter(records), ""))
    if weights == AUTO and default not in tags:
        raise ValueError(
            f"{OPTION} {AUTO}: no weights of {name} are published ({_listed(tags)}); give a "
            f"weights file (--model.backbone.weights FILE), or '{RANDOM}' for untrained weights"
        )
    source = default if weights == AUTO else str(weights)
    if source == RANDOM or (source not in tags and _is_file(source)):
        record = records.get(default) or PretrainedCfg()
        return ViTChoice(architecture, default, record, source, False)
    if source not in tags:
        is_cnn = source == IMAGENET
        problem = (
            f"is for CNNs, not for {architecture}" if is_cnn else f"is no tag of {architecture}"
        )
        raise ValueError(
            f"{OPTION} {source} {problem} ({_listed(tags)}); give '{AUTO}', one of the tags, a "
            f"weights file, or '{RANDOM}'"
        )
    if tag and source != tag:
        raise ValueError(
            f"{OPTION} {source} contradicts the tag in backbone.name {name}; leave one of the two "
            f"out"
        )
    return ViTChoice(architecture, source, records[source], source, True)


def tags_of(architecture: str) -> list[str]:
    """Return the tags of a model's published weights, timm's default first.

    Args:
        architecture: A model of timm, without a tag.

    Example:
        >>> from anomaly_clip.backbones.vit_tags import tags_of
        >>> tags_of("vit_small_patch14_dinov2")
        ['lvd142m']
    """
    records = _records(architecture)
    default = timm.get_pretrained_cfg(architecture)
    first = default.tag if default is not None else None
    tags = [tag for tag, record in records.items() if tag and record.has_weights]
    return sorted(tags, key=lambda tag: tag != first)


def fetch_tag(choice: ViTChoice) -> Path:
    """Return the local weights file of a tag; download it if it is not cached.

    Searched are the model hub's cache and torch's folder of downloads, into which the official
    programs of DINO and DINOv2 download.

    Raises:
        FileNotFoundError: If the file is neither cached nor downloadable.
    """
    from huggingface_hub import constants

    record = choice.record
    repository, _, revision = str(record.hf_hub_id or "").partition("@")
    names = _file_names(record.hf_hub_filename)
    address = record.url if isinstance(record.url, str) else ""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    cached = cached_in_hub(repository, names, revision or None)
    cached = cached or cached_by_address(address, folder)
    if cached is not None:
        return cached
    why = why_no_download(f"{constants.ENDPOINT}/{repository}" if repository else address)
    if why is None:
        try:
            if repository:
                return _download(repository, names, revision or None)
            file = folder / address.rpartition("/")[2]
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(file), expected_hash(address))
        except Exception as error:  # every download library has its own exceptions
            why = reason(error)
        else:
            return file
    places = f"{constants.HF_HUB_CACHE} or {folder}" if repository else str(folder)
    raise FileNotFoundError(
        f"{OPTION} {choice.source} of {choice.architecture} is not in {places} and cannot be "
        f"downloaded ({why}); copy that cache from a machine with network access, give a weights "
        f"file (--model.backbone.weights FILE), or try the pipeline with the bundled small CLIP "
        f"(--model.backbone.name {DEMO} --model.backbone.pretrained {DEMO}) or with untrained "
        f"weights ('{RANDOM}')"
    )


def _check_name(name: str, architecture: str) -> None:
    if not name:
        raise ValueError(f"backbone.name is empty; use {PLAIN_VITS}, or a CNN, such as resnet18")
    if not timm.is_model(architecture):
        last = architecture.replace("\\", "/").rpartition("/")[2]
        hint = suggest(last.lower(), vit_names()) or f"use {PLAIN_VITS}"
        raise ValueError(f"backbone.name {name}: timm has no such model; {hint}")
    renamed: dict[str, str | None] = get_deprecated_models()
    if architecture in renamed:
        way_out = renamed[architecture] or PLAIN_VITS
        raise ValueError(f"backbone.name {name} is an earlier name of timm; use {way_out}")


def _records(architecture: str) -> dict[str, Any]:
    """Return timm's records of a model by tag."""
    records = get_arch_pretrained_cfgs(architecture)
    return {name.partition(".")[2]: record for name, record in records.items()}


def _is_file(value: str) -> bool:
    return looks_like_file(value) or Path(value).exists()


def _listed(tags: Sequence[str]) -> str:
    more = f" and {len(tags) - MAX_SHOWN} more" if len(tags) > MAX_SHOWN else ""
    return f"tags: {', '.join(tags[:MAX_SHOWN]) or 'none'}{more}"


def _file_names(stated: str | None) -> list[str]:
    """Return the names of a tag's file in its repository, safetensors first, as timm prefers it."""
    if not stated:
        return list(HUB_FILES)
    stem, _, suffix = stated.rpartition(".")
    safe = f"{stem.replace('pytorch_model', 'model')}.safetensors"
    return [stated] if suffix == "safetensors" else [safe, stated]


def _download(repository: str, names: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names[:-1]:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, names[-1], revision=revision))
