"""Weights of timm's vision transformers: a tag, a local file, or untrained (``random``)."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from anomaly_clip.backbones.cnn import read_state
from anomaly_clip.backbones.weight_files import in_one_sentence
from anomaly_clip.errors import suggest
from anomaly_clip.records import RANDOM

__all__ = ["LoadedViT", "load_vit"]

OPTION = "backbone.weights"
KINDS = "use a plain ViT of timm, such as vit_small_patch14_dinov2 or vit_small_patch16_dinov3"


class LoadedViT(NamedTuple):
    """A timm ViT with its pixel normalisation."""

    model: Any
    name: str
    """Name of the architecture, without a tag."""
    weights: str
    """The tag, the file, or ``random``."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_vit(name: str, weights: str, image_size: int | tuple[int, int] | None = None) -> LoadedViT:
    """Build a timm ViT and load its weights.

    Args:
        name: A timm ViT, with or without a tag.
        weights: ``auto``, a tag, a file, or ``random``.
        image_size: Side of the input in pixels; None uses that of the weights.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If timm has no such ViT, or the weights do not fit it.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = suggest(architecture, timm.list_models()) or KINDS
        raise ValueError(f"backbone.name {name}: timm has no such model; {hint}")
    record: Any = timm.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    record = record or PretrainedCfg()  # of a registered model without weights
    source: str = (tag or record.tag) if weights == "auto" else weights
    with in_one_sentence(f"{OPTION} {source}"):
        model = _build(architecture, image_size)
        if source != RANDOM:
            _fill(model, read_state(source))
    return LoadedViT(model, architecture, source, tuple(record.mean), tuple(record.std))


def _build(name: str, image_size: int | tuple[int, int] | None) -> nn.Module:
    # Untrained weights depend only on the run's seed; their initialisation does not affect later
    # random numbers.
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **size)
    return model


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    import sys

    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    model.load_state_dict(convert(state, model))
