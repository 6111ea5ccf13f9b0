"""Files with prompts in the format of AnomalyCLIP's and Crane's authors.

A file holds ``{"prompt_learner": {...}}`` with the learnable vectors, and the token embeddings and
ids of the fixed words, which identify the CLIP that the prompts were trained on.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.deep_prompts import WORDS, DeepPrompts
from anomaly_clip.backbones.learnable_prompt import FILLER
from anomaly_clip.backbones.state_dicts import state_dict_of
from anomaly_clip.backbones.weight_files import (
    WeightFileError,
    check_floating,
    listed,
    read_content,
)
from anomaly_clip.backbones.weight_sources import local_file
from anomaly_clip.files import write_bytes

__all__ = ["PROMPTS_KEY", "PromptVectors", "read_prompts", "write_prompts"]

OPTION = "model.prompts_file"
PROMPTS_KEY = "prompt_learner"
"""Key of the prompts in the authors' files."""
SOURCE = "give a file of AnomalyCLIP's or Crane's authors, or the prompts.pth that a fit writes"
CLASSES = ("pos", "neg")  # the authors' names of the normal and the abnormal prompt
DEEP_NAME = re.compile(r"compound_prompts_text\.(\d+)")
PROJECTION_NAME = re.compile(r"compound_prompt_projections\.\d+\.(?:weight|bias)")
PROJECTION_WIDTH = 896  # of the unused layers in AnomalyCLIP's files
SAME = 1e-3
"""Largest difference of token embeddings, which some files store in half precision."""


class PromptVectors(NamedTuple):
    """The learnable vectors of a file."""

    context: Tensor
    """``(2, n_ctx, W)``: normal, abnormal."""
    deep: list[Tensor]
    """Deep prompts ``(t, W)``, for blocks 2, 3, and so on."""
    record: dict[str, str]
    """File and sha256."""


def read_prompts(file: str, backbone: CLIPBackbone) -> PromptVectors:
    """Read prompts in the authors' format, and check that they belong to a CLIP.

    The layers ``compound_prompt_projections`` of AnomalyCLIP's files are not read: nothing uses
    them.

    Args:
        file: A file of any form that :mod:`anomaly_clip.backbones.weight_files` reads, or a folder
            with one.
        backbone: The CLIP.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has a different format, or its prompts were trained on another CLIP.
    """
    path = local_file(file, OPTION, f"; {SOURCE}")
    try:
        content = read_content(path).content
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {path}: not a file that can be read safely ({error.form}); {error.way_out}, "
            f"or {SOURCE}"
        ) from None
    try:
        tensors = state_dict_of(content, (PROMPTS_KEY,)).tensors
        context, deep = _vectors(tensors)
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {path}: expected a dictionary {PROMPTS_KEY} with the tensors ctx_pos, "
            f"ctx_neg and so on, but {error.form}; {error.way_out}"
        ) from None
    _check_words(path, tensors, context.shape[1], backbone)
    record = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return PromptVectors(context, deep, record)


def _vectors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the learnable vectors; see :class:`PromptVectors`.

    Raises:
        WeightFileError: If tensors are missing or unexpected, or have other shapes.
    """
    expected = [f"{name}_{c}" for name in ("ctx", "token_prefix", "token_suffix") for c in CLASSES]
    expected += [f"tokenized_prompts_{c}" for c in CLASSES]
    numbers = sorted(int(match[1]) for key in tensors if (match := DEEP_NAME.fullmatch(key)))
    expected += [f"compound_prompts_text.{number}" for number in range(len(numbers))]
    missing = [key for key in expected if key not in tensors]
    others = [k for k in tensors if k not in expected and not PROJECTION_NAME.fullmatch(k)]
    if missing:
        raise WeightFileError(f"{missing[0]} is missing from {listed(list(tensors))}", SOURCE)
    if others:
        raise WeightFileError(f"it also contains {listed(others)}", SOURCE)
    contexts = [tensors[f"ctx_{c}"] for c in CLASSES]
    deep = [tensors[f"compound_prompts_text.{number}"] for number in range(len(numbers))]
    check_floating({name: tensors[name] for name in expected if "tokenized" not in name})
    shape = contexts[0].shape
    if len(shape) != 4 or tuple(shape[:2]) != (1, 1) or contexts[1].shape != shape:
        shapes = f"{tuple(shape)} and {tuple(contexts[1].shape)}"
        raise WeightFileError(f"ctx_pos and ctx_neg have the shapes {shapes}", SOURCE)
    for number, rows in enumerate(deep):
        if rows.ndim != 2 or rows.shape != deep[0].shape or rows.shape[1] != shape[-1]:
            name = f"compound_prompts_text.{number}"
            raise WeightFileError(f"{name} has the shape {tuple(rows.shape)}", SOURCE)
    return torch.cat([part[0] for part in contexts]).float(), [rows.float() for rows in deep]


def _check_words(
    path: Path, tensors: Mapping[str, Tensor], n_ctx: int, backbone: CLIPBackbone
) -> None:
    """Check that the words of a file, and their embeddings, are those of a CLIP.

    Raises:
        ValueError: If they are not.
    """
    name = backbone.settings.name
    width = backbone.model.token_embedding.weight.shape[1]
    given = tensors["ctx_pos"].shape[-1]
    if given != width:
        raise ValueError(
            f"{OPTION} {path}: its vectors have {given} channels, but the text tower of {name} has "
            f"{width}; use the CLIP that the prompts were trained on"
        )
    ids = _ids(backbone, n_ctx)
    embedded = _embedded(backbone, ids)
    for row, c in enumerate(CLASSES):
        theirs = tensors[f"tokenized_prompts_{c}"].flatten()
        if theirs.tolist() != ids[row].tolist():
            raise ValueError(
                f"{OPTION} {path}: tokenized_prompts_{c} are not the tokens of {n_ctx} vectors and "
                f"{WORDS[row]!r} in {name}; {SOURCE}"
            )
        ours = {"prefix": embedded[row, :1], "suffix": embedded[row, 1 + n_ctx :]}
        for part, expected in ours.items():
            values = tensors[f"token_{part}_{c}"].float()
            expected = expected[None, None].cpu()
            if values.shape != expected.shape or not (values - expected).abs().max() <= SAME:
                raise ValueError(
                    f"{OPTION} {path}: the prompts were trained on another CLIP than {name} with "
                    f"weights {backbone.settings.pretrained} (token_{part}_{c} differs from its "
                    f"token embeddings): use the backbone that they were trained on"
                )


def write_prompts(
    prompts: DeepPrompts, backbone: CLIPBackbone, file: Path, projections: bool = False
) -> None:
    """Write prompts in the authors' format, atomically.

    Args:
        prompts: The prompts.
        backbone: The CLIP that they were trained on.
        file: The file.
        projections: Add the unused layers, with zeros, without which the official code of
            AnomalyCLIP does not load a file. That of Crane does not load a file with them.
    """
    n_ctx = prompts.settings.n_ctx
    ids = _ids(backbone, n_ctx)
    embedded = _embedded(backbone, ids).cpu()
    state: dict[str, Tensor] = {}
    for row, c in enumerate(CLASSES):
        state[f"ctx_{c}"] = prompts.shallow.context.detach().cpu()[None, None, row]
    for number, rows in enumerate(prompts.deep):
        state[f"compound_prompts_text.{number}"] = rows.detach().cpu()
    for row, c in enumerate(CLASSES):
        state[f"token_prefix_{c}"] = embedded[None, None, row, :1]
        state[f"token_suffix_{c}"] = embedded[None, None, row, 1 + n_ctx :]
        state[f"tokenized_prompts_{c}"] = ids[None, None, row].int()
    if projections:
        width = embedded.shape[-1]
        for number in range(len(prompts.deep)):
            name = f"compound_prompt_projections.{number}"
            state[f"{name}.weight"] = torch.zeros(PROJECTION_WIDTH, width)
            state[f"{name}.bias"] = torch.zeros(PROJECTION_WIDTH)
    content = io.BytesIO()
    torch.save({PROMPTS_KEY: {key: value.clone() for key, value in state.items()}}, content)
    write_bytes(file, content.getbuffer())


def _ids(backbone: CLIPBackbone, n_ctx: int) -> Tensor:
    """Return the ids of both prompts, ``(2, context length)``, with placeholders for vectors."""
    return backbone.tokenize([f"{' '.join([FILLER] * n_ctx)} {words}" for words in WORDS])


def _embedded(backbone: CLIPBackbone, ids: Tensor) -> Tensor:
    embedding = backbone.model.token_embedding
    with torch.no_grad():
        return embedding(ids.to(embedding.weight.device)).float()
