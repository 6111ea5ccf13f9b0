"""Features of images for MuSc, from a CLIP model or a CNN, in the range of half precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor

from anomaly_clip.backbones import clip, cnn, frozen
from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.frozen import check_settings
from anomaly_clip.files import source_hash
from anomaly_clip.records import DEMO, Encoder

__all__ = [
    "CLASS_VECTOR",
    "check_kind",
    "class_vectors",
    "encode",
    "encoder_of",
    "halves",
]

LARGEST = 32768.0
"""Absolute value above which the features of an image are scaled down, to fit half precision."""
CLASS_VECTOR = ("image", "image_rest")
"""Names of two tensors of half precision, whose sum is the class vector with 22 bits."""


def check_kind(backbone: object) -> None:
    """Check that settings of a backbone are all those of a CNN, or all those of a CLIP model.

    A mapping is of a CNN if it has ``weights``. The command line and files choose the kind by the
    options that are given, whatever the name is.

    Raises:
        ValueError: If there is an option of the other kind, the name is one of the other kind, or
            there are no settings.
    """
    if isinstance(backbone, (CLIPBackbone, CNNBackbone)):
        return
    if isinstance(backbone, (CLIPSettings, CNNSettings)):
        name, is_cnn = backbone.name, isinstance(backbone, CNNSettings)
    else:
        check_settings(backbone, "name")
        given = cast("Mapping[str, Any]", backbone)
        is_cnn = "weights" in given
        default = CNNSettings.name if is_cnn else CLIPSettings.name
        name = str(given.get("name", default))
        _check_options(given, is_cnn)
    if is_cnn and _is_clip(name):
        raise ValueError(
            f"backbone.name {name} is a CLIP model: give its weights with "
            f"model.backbone.pretrained, and no options of CNNs (model.backbone.weights, layers, "
            f"mean, std)"
        )
    if not is_cnn and _is_cnn(name):
        raise ValueError(
            f"backbone.name {name} is a CNN: give its weights with model.backbone.weights, its "
            f"image size with model.image_size, and no options of CLIP models "
            f"(model.backbone.pretrained, image_size, quick_gelu, positions)"
        )


def _check_options(given: Mapping[str, Any], is_cnn: bool) -> None:
    accepted = [field.name for field in fields(CNNSettings if is_cnn else CLIPSettings)]
    others = [name for name in given if name not in accepted]
    if others:
        kind = "a CNN, which has weights" if is_cnn else "a CLIP model"
        raise ValueError(
            f"backbone.{others[0]} is no option of {kind}: leave it out (options: "
            f"{', '.join(accepted)})"
        )


def _is_cnn(name: str) -> bool:
    from torchvision import models

    return name in models.list_models(module=models)


def _is_clip(name: str) -> bool:
    from open_clip import list_models

    return name == DEMO or name.endswith(".json") or name in list_models()


@torch.no_grad()
def encode(
    backbone: CLIPBackbone | CNNBackbone, layers: Sequence[int] | Sequence[str], images: Tensor
) -> dict[str, Tensor]:
    """Return the features of images: layers ``(B, C, h, w)``, and class vectors ``(B, D)``.

    Of a CLIP model, these are the raw outputs of blocks, and the image embedding. Of a CNN, the
    class vector is the spatial average of the last layer (our choice).

    Args:
        backbone: The frozen backbone.
        layers: 1-based block numbers, or names of layers.
        images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.

    Returns:
        Features by layer number or name; unit class vectors as a sum, see ``CLASS_VECTOR``.
    """
    if isinstance(backbone, CLIPBackbone):
        last = backbone.num_layers
        numbers = sorted({*map(int, layers), last})
        tokens = dict(zip(numbers, backbone(images, numbers), strict=True))
        vectors = tokens[last].projected[:, 0]  # (B, D)
        first = backbone.num_prefix_tokens
        patches = [tokens[int(layer)].raw[:, first:].mT for layer in layers]  # (B, W, N)
        grids = [p.unflatten(2, backbone.grid_size) for p in patches]  # (B, W, g, g)
    else:
        features = backbone(images)
        grids = [features[str(layer)] for layer in layers]  # (B, C, h, w)
        vectors = grids[-1].mean(dim=(2, 3))
    vectors = unit(vectors.float())
    rounded = vectors.half()
    encoded = dict(zip(CLASS_VECTOR, (rounded, vectors - rounded.float()), strict=True))
    for layer, grid in zip(layers, grids, strict=True):
        # Standardising an image removes this factor, which is 1 unless values are extreme.
        factor = (grid.float().abs().amax(dim=(1, 2, 3), keepdim=True) / LARGEST).clamp(min=1)
        encoded[str(layer)] = grid / factor
    return encoded


def encoder_of(
    backbone: CLIPBackbone | CNNBackbone,
    layers: Sequence[int] | Sequence[str],
    device: torch.device,
) -> Encoder:
    """Return :func:`encode` with everything that its features depend on."""
    code = source_hash(clip.__file__, cnn.__file__, frozen.__file__, __file__)
    dtype = next(backbone.tower.parameters()).dtype
    pixels = f"{backbone.mean.flatten().tolist()} {backbone.std.flatten().tolist()}"
    packages = [version(name) for name in ("open_clip_torch", "torchvision")]
    key = f"{backbone.identity} {dtype} {pixels} {list(layers)} {code} {packages}"
    return Encoder(partial(encode, backbone, layers), key, device)


def halves(encoder: Encoder, images: Tensor, source: str) -> dict[str, Tensor]:
    """Return features in half precision, on the CPU.

    Args:
        encoder: The encoder.
        images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.
        source: Description of the images, for messages.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    try:
        features = encoder.halves(images)
    except OverflowError:
        raise ValueError(
            f"features of an image are NaN or infinite, in {source}: give other backbone weights, "
            f"or set trainer.precision 32-true"
        ) from None
    return {name: value.cpu() for name, value in features.items()}


def class_vectors(features: dict[str, Tensor]) -> Tensor:
    """Return unit class vectors, float32 ``(n, D)``."""
    first, rest = (features[name].float() for name in CLASS_VECTOR)
    return unit(first + rest)
