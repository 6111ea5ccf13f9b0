"""Loading of a timm ViT: the model at an image size, its pixel normalisation, and its weights.

Four steps: name and tag (``vit_tags``), the model, reading of a file (``weight_files``), and the
names of its tensors (``vit_layouts``). A model is supported if it returns one token per patch of a
regular grid after each of its blocks, which is tried.
"""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from anomaly_clip.backbones.cnn import read_state
from anomaly_clip.backbones.vit import AUTO
from anomaly_clip.backbones.vit_layouts import PREFERRED, fill_vit
from anomaly_clip.backbones.vit_tags import OPTION, PLAIN_VITS, choose, fetch_tag, tags_of
from anomaly_clip.backbones.weight_files import in_one_sentence
from anomaly_clip.backbones.weight_settings import pixels_next_to
from anomaly_clip.backbones.weight_sources import local_file
from anomaly_clip.exhaustion import explain_exhaustion
from anomaly_clip.progress import say
from anomaly_clip.records import RANDOM

__all__ = ["LoadedViT", "ViTSummary", "load_vit", "summary_of"]

Size = int | tuple[int, int]
OTHERS = f", a tag, '{AUTO}' or '{RANDOM}'"


class LoadedViT(NamedTuple):
    """A timm ViT with its pixel normalisation."""

    model: Any
    name: str
    """Name of the architecture; with a tag if that is not the source of the weights."""
    weights: str
    """The tag, the file, or ``random``."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ViTSummary(NamedTuple):
    """Numbers of a timm ViT, for the help."""

    num_blocks: int
    width: int
    stride: int
    image_size: int
    num_prefix_tokens: int
    tags: list[str]
    """Tags of the published weights, the default first."""


def load_vit(name: str, weights: str, image_size: Size | None = None) -> LoadedViT:
    """Build a timm ViT and load its weights.

    Args:
        name: A timm ViT, with or without a tag.
        weights: ``auto``, a tag, a file, or ``random``.
        image_size: Side, or height and width, of the input in pixels; None uses that of the
            weights.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If timm has no such ViT, the weights do not fit it, or the image size is no
            multiple of the patch size.
    """
    choice = choose(name, weights)
    record = choice.record
    mean, std = tuple(record.mean), tuple(record.std)
    tagged = f"{choice.architecture}.{choice.tag}" if choice.tag else choice.architecture
    with in_one_sentence(f"{OPTION} {choice.source} of backbone.name {name}"):
        model = _build(tagged, image_size)
        if choice.source != RANDOM:
            path = fetch_tag(choice) if choice.is_tag else local_file(choice.source, OPTION, OTHERS)
            subject = f"{OPTION} {choice.source}"
            state = read_state(path, OTHERS, PREFERRED)
            fill_vit(model, state, choice.architecture, subject, is_other=not choice.is_tag)
            stated = None if choice.is_tag else pixels_next_to(path)
            mean, std = stated or (mean, std)
            if not choice.is_tag and stated is None:
                say(
                    f"{subject}: the pixel normalisation of {tagged} is assumed, as no config.json "
                    f"or preprocessor_config.json next to the file states another"
                )
    is_stated = "." in name and not choice.is_tag
    return LoadedViT(model, tagged if is_stated else choice.architecture, choice.source, mean, std)


def summary_of(name: str) -> ViTSummary:
    """Return the numbers of a timm ViT; the model is built without memory for its weights.

    Args:
        name: A timm ViT, with or without a tag.

    Raises:
        ValueError: If timm has no such ViT.
    """
    choice = choose(name, RANDOM)
    tagged = f"{choice.architecture}.{choice.tag}".rstrip(".")
    with in_one_sentence(f"backbone.name {name}"):
        try:
            with torch.device("meta"):
                model = _create(tagged, None)
                _check_plain(model, choice.architecture)
        except (NotImplementedError, RuntimeError):  # of earlier timm, which computes with values
            model = _build(tagged, None)
    return ViTSummary(
        len(model.blocks),
        int(model.embed_dim),
        _stride(model, choice.architecture),
        int(model.patch_embed.img_size[0]),
        int(model.num_prefix_tokens),
        tags_of(choice.architecture),
    )


def _build(name: str, image_size: Size | None) -> Any:
    """Return an untrained model, after checking its kind and the image size."""
    architecture = name.partition(".")[0]
    # Untrained weights depend only on the run's seed; their initialisation does not affect later
    # random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        try:
            model = _create(name, image_size)
        except (
            Exception
        ) as error:  # of a size that does not fit, or of other arguments than a ViT's
            if isinstance(error, MemoryError) or explain_exhaustion(error) is not None:
                raise
            model = _create(name, None)
            _check_size(image_size, _stride(model, architecture), architecture)
            _check_plain(model, architecture)
            raise
    _check_size(image_size, _stride(model, architecture), architecture)
    _check_plain(model, architecture)
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None  # no feature depends on it, and some files lack it
    return model


def _create(name: str, image_size: Size | None) -> Any:
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm's own code
        return timm.create_model(name, pretrained=False, num_classes=0, **size).eval()


def _check_size(image_size: Size | None, stride: int, architecture: str) -> None:
    sides = () if image_size is None else image_size
    for side in (sides,) if isinstance(sides, int) else sides:
        if side < stride or side % stride:
            lower = side // stride * stride
            near = f"{lower} or {lower + stride}" if lower else str(stride)
            raise ValueError(
                f"model.image_size {side} is not a multiple of {stride}, the patch size of "
                f"{architecture}; use {near}"
            )


def _check_plain(model: Any, architecture: str) -> None:
    """Check that a model returns one token per patch of its grid after a block, by trying it.

    Raises:
        ValueError: If it does not.
    """
    try:
        height, width = model.patch_embed.img_size
        rows, columns = model.patch_embed.grid_size
        count, channels = int(model.num_prefix_tokens), int(model.embed_dim)
        with torch.no_grad():
            output: Any = model.forward_intermediates(
                torch.zeros(1, 3, height, width),
                indices=[0],
                return_prefix_tokens=count > 0,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )[0]
        patches, prefix = output if count else (output, torch.zeros(1, 0, channels))
        shapes = tuple(patches.shape), tuple(prefix.shape)
        is_plain = shapes == ((1, rows * columns, channels), (1, count, channels))
        is_plain &= isinstance(model.norm, nn.Module) and len(model.blocks) > 0
    except Exception as error:  # of models with other attributes, arguments or outputs
        if isinstance(error, MemoryError) or explain_exhaustion(error) is not None:
            raise
        is_plain = False
    if not is_plain:
        raise _refusal(model, architecture)


def _stride(model: Any, architecture: str) -> int:
    try:
        return int(model.patch_embed.feat_ratio())
    except (AttributeError, TypeError):
        raise _refusal(model, architecture) from None


def _refusal(model: nn.Module, architecture: str) -> ValueError:
    from torchvision import models

    cnns = [n for n in models.list_models(module=models) if not n.startswith(("vit", "swin"))]
    near = get_close_matches(architecture, cnns, n=1, cutoff=0.7)
    return ValueError(
        f"backbone.name {architecture} is not supported: the blocks of timm's "
        f"{type(model).__name__} do not return one token per patch of a single grid; use "
        f"{PLAIN_VITS}, or a CNN of torchvision, such as {near[0] if near else 'resnet18'}"
    )
