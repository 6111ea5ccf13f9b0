"""Backbones or sets of weights that ``compare`` tests, and their options for ``each``.

A backbone is written ``[LABEL=]NAME[:WEIGHTS] [OPTION=VALUE ...]``, as one argument in quotes. The
name decides the kind: a torchvision CNN, a ViT of timm, or a CLIP model, whose weights are its
``pretrained``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from anomaly_clip.backbones.cnn import IMAGENET, CNNSettings
from anomaly_clip.backbones.towers import BackboneSettings, is_clip, settings_of
from anomaly_clip.backbones.vit import AUTO
from anomaly_clip.errors import UserError
from anomaly_clip.files import safe_name
from anomaly_clip.records import DEMO

__all__ = ["WEIGHTS", "Candidate", "backbones", "resolved", "sets_of_weights"]

WEIGHTS = "--model.backbone.weights"
EXAMPLE = 'resnet18 "vit_small_patch14_dinov2.lvd142m image_size=448 layers=[6,9]" demo:demo'


class Candidate(NamedTuple):
    """One of the backbones that are compared."""

    label: str
    """Name of its column and of its folder."""
    word: str
    """The word on the command line, with the whole path of a file."""
    options: list[str]
    """Options for ``each``."""


def sets_of_weights(words: Sequence[str]) -> list[Candidate]:
    """Return the candidates of ``--weights``, named by the files.

    Raises:
        UserError: If there are fewer than two, or two have the same name.
    """
    listed = [Candidate(Path(word).stem, resolved(word), [WEIGHTS, word]) for word in words]
    if len(listed) < 2:
        raise UserError(
            f"compare --weights {' '.join(words)}: expected two or more, such as imagenet "
            "tab_resnet18.safetensors"
        )
    if name := _duplicate(listed):
        raise UserError(f"compare --weights: two sets of weights are named {name}: rename one file")
    return listed


def backbones(words: Sequence[str]) -> list[Candidate]:
    """Return the candidates of ``--backbones``.

    Raises:
        UserError: If a word is no backbone, there are fewer than two, or two have the same label.
    """
    listed = [_backbone(word) for word in words]
    if len(listed) < 2:
        raise UserError(
            f"compare --backbones {' '.join(words)}: expected two or more, such as {EXAMPLE}"
        )
    if name := _duplicate(listed):
        word = [candidate.word for candidate in listed if candidate.label == name][-1]
        raise UserError(
            f"compare --backbones: two backbones are named {name}: give one of them a label, such "
            f'as "other={word.partition("=")[2]}"'
        )
    return listed


def resolved(word: str) -> str:
    """Return weights with the whole path if they are a file, so that any folder may resume."""
    return str(Path(word).resolve()) if Path(word).is_file() else word


def _backbone(word: str) -> Candidate:
    model, *settings = word.split() or [""]
    label, equals, model = model.rpartition("=")
    name, _, weights = model.partition(":")
    if not name or (equals and not label):
        raise UserError(
            f"compare --backbones: {word!r} names no backbone: write [LABEL=]NAME[:WEIGHTS], such "
            f"as {EXAMPLE}"
        )
    options = ["--model.backbone.name", name, *_weights(name, weights)]
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not (option and equals and value):
            raise UserError(
                f"compare --backbones: {setting!r} in {word!r} is no setting: write OPTION=VALUE "
                f"without spaces, such as image_size=448 or layers=[6,9]"
            )
        options += [f"--model.{option}", value]
    stem = Path(name).stem if name.endswith(".json") else name
    label = label or (f"{stem}-{Path(weights).stem}" if weights else stem)
    if label != safe_name(label):
        raise UserError(
            f"compare --backbones: {label!r} is not fit for the name of a folder: give another "
            f"label, such as {safe_name(label)}={model}"
        )
    label_part = f"{label}={name}" + (f":{resolved(weights)}" if weights else "")
    return Candidate(label, " ".join([label_part, *settings]), options)


def _weights(name: str, weights: str) -> list[str]:
    """Return the option for the weights of a backbone.

    Raises:
        UserError: If there is no such backbone, or a CLIP model has no weights.
    """
    try:
        is_cnn = isinstance(settings_of(BackboneSettings(name)), CNNSettings)
    except ValueError as error:
        if not is_clip(name):
            raise UserError(f"compare --backbones: {error}") from None
    else:
        return [WEIGHTS, weights or (IMAGENET if is_cnn else AUTO)]
    if not weights and name != DEMO:
        raise UserError(
            f"compare --backbones: {name} is a CLIP model: add its weights, such as {name}:openai"
        )
    return ["--model.backbone.pretrained", weights or DEMO]


def _duplicate(listed: Sequence[Candidate]) -> str:
    labels = [candidate.label for candidate in listed]
    return next((name for name in labels if labels.count(name) > 1), "")
