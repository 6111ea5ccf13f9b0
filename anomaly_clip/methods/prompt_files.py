"""Files with prompts in the format of AnomalyCLIP's and Crane's authors.

A file holds ``{"prompt_learner": {...}}`` with the learnable vectors, and the token embeddings and
ids of the fixed words, which identify the CLIP that the prompts were trained on.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.deep_prompts import MOST_FIXED, WORDS, DeepPrompts
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
from anomaly_clip.methods.linear_layers import LAYER_NAME
from anomaly_clip.progress import say

__all__ = ["PROMPTS_KEY", "PromptVectors", "read_prompts", "write_prompts"]

OPTION = "model.prompts_file"
PROMPTS_KEY = "prompt_learner"
"""Key of the prompts in the authors' files."""
SOURCE = "give a file of AnomalyCLIP's or Crane's authors, or the prompts.pth that a fit writes"
CLASSES = ("pos", "neg")  # the authors' names of the normal and the abnormal prompt
ANCHOR = re.compile(r"(|.*\.)ctx_pos")
"""Name of the normal prompt's vectors, after the prefixes of wrappers."""
DEEP_NAME = re.compile(r"compound_prompts_text\.(\d+)")
PROJECTION_NAME = re.compile(r"compound_prompt_projections\.\d+\.(?:weight|bias)")
PROJECTION_WIDTH = 896  # of the unused layers in AnomalyCLIP's files
SAME = 1e-3
"""Largest difference of token embeddings, besides :data:`ROUNDING`."""
ROUNDING = 2**-8  # of bfloat16, in which files or the text tower may be


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

    The dictionary of the prompts may be bare, below the authors' key or those of
    :func:`~anomaly_clip.backbones.state_dicts.state_dict_of`, and its names may share a prefix.
    Tensors outside the prefix are not used, and named. The layers ``compound_prompt_projections``
    of AnomalyCLIP's files are not read either, because nothing uses them.

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
        state = state_dict_of(content, (PROMPTS_KEY,))
        prefix = _prefix(state.tensors)
        tensors = {
            key.removeprefix(prefix): value
            for key, value in state.tensors.items()
            if key.startswith(prefix)
        }
        context, deep = _vectors(tensors)
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {path}: expected a dictionary {PROMPTS_KEY} with the tensors ctx_pos, "
            f"ctx_neg and so on, but {error.form}; {error.way_out}"
        ) from None
    _check_tower(path, context, deep, backbone)
    _check_words(path, tensors, context.shape[1], backbone)
    if state.others:
        say(f"{OPTION} {path}: {state.container} is used, {', '.join(state.others)} not")
    if unused := [key for key in state.tensors if not key.startswith(prefix)]:
        say(f"{OPTION} {path}: tensors outside the prompts are not used: {listed(unused)}")
    record = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return PromptVectors(context, deep, record)


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return what precedes the names of the prompts: empty, or the prefixes of wrappers.

    Raises:
        WeightFileError: If there are no prompts, or several pairs of them.
    """
    matches = (ANCHOR.fullmatch(key) for key in tensors)
    prefixes = [match[1] for match in matches if match]
    if len(prefixes) > 1:
        raise WeightFileError(
            f"it contains {len(prefixes)} pairs of prompts, "
            f"{' and '.join(map(repr, prefixes[:3]))}",
            f"save one of them under {PROMPTS_KEY} and give that file",
        )
    if not prefixes and any(LAYER_NAME.fullmatch(key) for key in tensors):
        raise WeightFileError(
            f"it contains the linear layers of SDPPlus or APRILGAN ({listed(list(tensors))})",
            f"give it as model.linear_layers of that method, or {SOURCE}",
        )
    return prefixes[0] if prefixes else ""


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
    for name in (f"tokenized_prompts_{c}" for c in CLASSES):
        if tensors[name].layout != torch.strided or tensors[name].is_meta:
            raise WeightFileError(f"{name} has no plain values", SOURCE)
    shape = contexts[0].shape
    if len(shape) != 4 or tuple(shape[:2]) != (1, 1) or contexts[1].shape != shape:
        shapes = f"{tuple(shape)} and {tuple(contexts[1].shape)}"
        raise WeightFileError(f"ctx_pos and ctx_neg have the shapes {shapes}", SOURCE)
    if not shape[2]:
        raise WeightFileError(f"ctx_pos has the shape {tuple(shape)}, no vectors", SOURCE)
    for number, rows in enumerate(deep):
        fits = rows.ndim == 2 and rows.shape == deep[0].shape and rows.shape[1] == shape[-1]
        if not fits or not 1 <= len(rows) <= shape[2]:
            name = f"compound_prompts_text.{number}"
            raise WeightFileError(
                f"{name} has the shape {tuple(rows.shape)}, with ctx_pos {tuple(shape)}", SOURCE
            )
    return torch.cat([part[0] for part in contexts]).float(), [rows.float() for rows in deep]


def _check_tower(
    path: Path, context: Tensor, deep: Sequence[Tensor], backbone: CLIPBackbone
) -> None:
    """Check that the sizes of prompts are possible in the text tower of a CLIP.

    Raises:
        ValueError: If they are not.
    """
    name = backbone.settings.name
    width = backbone.model.token_embedding.weight.shape[1]
    way_out = "use the CLIP that the prompts were trained on"
    if context.shape[-1] != width:
        raise ValueError(
            f"{OPTION} {path}: its vectors have {context.shape[-1]} channels, but the text tower "
            f"of {name} has {width}; {way_out}"
        )
    depth, blocks = len(deep) + 1, backbone.num_text_layers
    if depth > blocks:
        raise ValueError(
            f"{OPTION} {path}: its vectors are for {depth} blocks, but the text tower of {name} "
            f"has {blocks}; {way_out}"
        )
    room = backbone.model.context_length - MOST_FIXED
    if context.shape[1] > room:
        raise ValueError(
            f"{OPTION} {path}: it has {context.shape[1]} vectors for each prompt, but the text "
            f"tower of {name} has room for {room}; {way_out}"
        )


def _check_words(
    path: Path, tensors: Mapping[str, Tensor], n_ctx: int, backbone: CLIPBackbone
) -> None:
    """Check that the words of a file, and their embeddings, are those of a CLIP.

    Raises:
        ValueError: If they are not.
    """
    name = backbone.settings.name
    ids = _ids(backbone, n_ctx)
    embedded = _embedded(backbone, ids).cpu()
    for row, c in enumerate(CLASSES):
        theirs, ours = tensors[f"tokenized_prompts_{c}"], ids[row]
        # Ids of a file in half precision are rounded.
        if theirs.numel() != len(ours) or not torch.equal(theirs.flatten(), ours.to(theirs.dtype)):
            raise ValueError(
                f"{OPTION} {path}: tokenized_prompts_{c} are not the tokens of {n_ctx} vectors and "
                f"{WORDS[row]!r} in {name}; {SOURCE}"
            )
        parts = {"prefix": embedded[row, :1], "suffix": embedded[row, 1 + n_ctx :]}
        for part, expected in parts.items():
            values = tensors[f"token_{part}_{c}"]
            if values.numel() != expected.numel() or not torch.allclose(
                values.float().view_as(expected), expected, atol=SAME, rtol=ROUNDING
            ):
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
        state[f"ctx_{c}"] = prompts.shallow.context.detach().float().cpu()[None, None, row]
    for row, c in enumerate(CLASSES):
        state[f"token_prefix_{c}"] = embedded[None, None, row, :1]
        state[f"token_suffix_{c}"] = embedded[None, None, row, 1 + n_ctx :]
    for row, c in enumerate(CLASSES):
        state[f"tokenized_prompts_{c}"] = ids[None, None, row].int()
    for number, rows in enumerate(prompts.deep):
        state[f"compound_prompts_text.{number}"] = rows.detach().float().cpu()
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
