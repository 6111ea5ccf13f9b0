"""Conditions under which images are scored: scores are comparable only if they are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.file_hashes import pixel_hashes
from anomaly_clip.decisions.calibration import Calibration
from anomaly_clip.errors import UserError
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import without_backbone
from anomaly_clip.progress import number_of

__all__ = ["check_calibration", "check_conditions", "conditions_of", "scoring_conditions"]

SOURCES = ("pretrained", "weights")
"""Settings of a backbone that name where its weights are from; their hash is compared instead."""


def scoring_conditions(
    method: AnomalyMethod,
    image_size: int,
    resize: str,
    bit_depth: int | None,
    precision: str,
    categories: Iterable[str] = (),
) -> dict[str, Any]:
    """Return everything that the scores of a method depend on besides the images.

    Args:
        method: The method, prepared for its categories.
        image_size: Side of the square images, in pixels.
        resize: How images are made square.
        bit_depth: Significant bits of 16-bit images; None if there are none.
        precision: Precision of the trainer.
        categories: The categories, whose names in prompts and reference images are conditions.
    """
    ignored = method.metric_arguments | method.init_only_arguments
    settings = {
        name: value
        for name, value in method.hparams.items()
        if name not in ignored and not name.startswith("_")  # of Lightning's command line
    }
    if isinstance(settings.get("backbone"), Mapping):
        backbone = settings["backbone"]
        settings["backbone"] = {k: v for k, v in backbone.items() if k not in SOURCES}
    categories = list(categories)
    return {
        "backbone_sha256": method.backbone.identity,
        "fitted_sha256": _fitted_sha256(method),
        "settings": json.loads(json.dumps(settings, default=str)),
        "image_size": image_size,
        "resize": resize,
        "bit_depth": bit_depth,
        "precision": precision,
        "references": {
            name: _identities(method.reference_paths.get(name, ()))
            for name in {**dict.fromkeys(categories), **method.reference_paths}
        },
        "words": {name: method.words(name) for name in categories}
        if method.uses_category_names
        else {},
    }


def conditions_of(trainer: Trainer, method: AnomalyMethod, data: AnomalyData) -> dict[str, Any]:
    """Return the conditions of a run: :func:`scoring_conditions` of its trainer and data."""
    return scoring_conditions(
        method,
        method.image_size,
        str(data.resize),
        data.reading.bits_in_use,
        str(trainer.precision),
        data.categories,
    )


def _identities(paths: Iterable[str]) -> list[str]:
    """Return hashes of reference images; the paths of generated ones, which are no files."""
    paths = sorted(paths)
    if all(Path(path).is_file() for path in paths):
        return sorted(pixel_hashes(map(Path, paths)).values())
    return paths


def _fitted_sha256(method: AnomalyMethod) -> str | None:
    """Return the hash of everything that was fitted; None if nothing was."""
    state = without_backbone(method.state_dict())
    if not method.can_be_fitted or not state:
        return None
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


NAMES = {
    "backbone_sha256": "the weights of the backbone",
    "fitted_sha256": "the fitted weights",
}
OPTIONS = {
    "image_size": "model.image_size",
    "resize": "data.resize",
    "bit_depth": "data.bit_depth",
    "precision": "trainer.precision",
}


def check_calibration(method: AnomalyMethod, calibration: Calibration, source: str) -> None:
    """Check that a calibration is of a method, and that the method can be decided by.

    Args:
        method: The method.
        calibration: The calibration.
        source: Where the calibration is from, for messages.

    Raises:
        UserError: If it is not.
    """
    name, num_parts = type(method).__name__, len(method.score_part_names)
    if method.transductive:
        raise UserError(
            f"{source}: {name} scores images by each other, so that no calibration holds for the "
            f"next ones: leave the calibration out"
        )
    if calibration.method != name:
        raise UserError(
            f"{source} is a calibration of {calibration.method}, but the method is {name}: "
            f"calibrate {name}"
        )
    for category, record in calibration.categories.items():
        num_ranges = len(record.part_ranges or ())
        if num_ranges != num_parts:
            raise UserError(
                f"{source} has the ranges of {num_ranges} score parts for {category}, but {name} "
                f"has {num_parts}: calibrate again"
            )


def check_conditions(
    calibrated: Mapping[str, Any], current: Mapping[str, Any], source: str
) -> None:
    """Check that scores are comparable with those of a calibration.

    Args:
        calibrated: Conditions of the calibration; see :func:`scoring_conditions`.
        current: Conditions now.
        source: Where the calibration is from, for messages.

    Raises:
        UserError: If a condition differs; the message names the first.
    """
    for name, value in current.items():
        before = calibrated.get(name)
        if name == "settings" and isinstance(before, Mapping):
            for setting in sorted({*before, *value}):
                if before.get(setting) != value.get(setting):
                    raise _differs(
                        f"model.{setting} is {value.get(setting)}", before.get(setting), source
                    )
        elif name == "words" and isinstance(before, Mapping):
            for category in sorted({*before} & {*value}):
                if before[category] != value[category]:
                    raise _differs(
                        f"the name in prompts of {category} is {value[category]}",
                        before[category],
                        source,
                    )
        elif name == "references":
            _check_references(before if isinstance(before, Mapping) else {}, value, source)
        elif name == "bit_depth" and before != value and None in (before, value):
            raise UserError(
                f"these images have {value or 8} bits per channel, but those of {source} had "
                f"{before or 8}: calibrate again (anomaly_clip calibrate), on images of this camera"
            )
        elif before != value:
            if name in NAMES:
                raise UserError(
                    f"{source} was made with other images or weights: {NAMES[name]} differ: "
                    f"calibrate again (anomaly_clip calibrate), which needs no fit"
                )
            raise _differs(f"{OPTIONS.get(name, name)} is {value}", before, source)


def _check_references(
    calibrated: Mapping[str, Any], current: Mapping[str, list[str]], source: str
) -> None:
    """Check that images are compared with the same reference images as in a calibration.

    A calibration of a single category applies to a folder of another name, too.
    """
    [alone] = calibrated.values() if len(calibrated) == 1 else [[]]
    for category, images in current.items():
        before = calibrated.get(category, alone)
        if images == before:
            continue
        if len(images) != len(before):
            counts = [number_of(len(used), "reference image") for used in (images, before)]
            raise _differs(f"{category} is compared with {counts[0]}", counts[1], source)
        raise UserError(
            f"the reference images of {category} differ from those of {source}: give the same "
            f"folder and data.seed, or calibrate again (anomaly_clip calibrate), which needs no fit"
        )


def _differs(what: str, before: Any, source: str) -> UserError:
    return UserError(
        f"{what}, but {source} was made with {before}: use that, or calibrate again (anomaly_clip "
        f"calibrate), which needs no fit"
    )
