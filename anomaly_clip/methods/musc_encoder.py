"""Features of images for MuSc, from any backbone, in the range of half precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from anomaly_clip.backbones import blocks, clip, clip_towers, cnn, frozen, vit
from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.towers import AnyBackbone
from anomaly_clip.files import source_hash
from anomaly_clip.records import Encoder

__all__ = [
    "CLASS_VECTOR",
    "class_vectors",
    "encode",
    "encoder_of",
    "halves",
]

FEATURE_CODE = (blocks, clip, clip_towers, cnn, frozen, vit)
"""Modules that the features of a frozen backbone depend on."""
LARGEST = 32768.0
"""Absolute value above which the features of an image are scaled down, to fit half precision."""
CLASS_VECTOR = ("image", "image_rest")
"""Names of two tensors of half precision, whose sum is the class vector with 22 bits."""


@torch.no_grad()
def encode(
    backbone: AnyBackbone, layers: Sequence[int] | Sequence[str], images: Tensor
) -> dict[str, Tensor]:
    """Return the features of images: layers ``(B, C, h, w)``, and class vectors ``(B, D)``.

    Of a CLIP model, these are the raw outputs of blocks, and the image embedding; of a ViT, the
    patches after the final norm, and the class token after it, as in the official code for DINO. Of
    a CNN, the class vector is the spatial average of the last layer (our choice).

    Args:
        backbone: The frozen backbone.
        layers: 1-based block numbers, or names of layers.
        images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.

    Returns:
        Features by layer number or name; unit class vectors as a sum, see ``CLASS_VECTOR``.
    """
    if isinstance(backbone, CNNBackbone):
        grids = backbone.feature_maps(images, [str(layer) for layer in layers])  # (B, C, h, w)
        vectors = grids[-1].mean(dim=(2, 3))
    else:
        last, first = backbone.num_layers, backbone.num_prefix_tokens
        numbers = sorted({*map(int, layers), last})
        tokens = dict(zip(numbers, backbone(images, numbers), strict=True))
        vectors = backbone.image_vectors(tokens[last])  # (B, D)
        chosen = [tokens[int(layer)] for layer in layers]
        outputs = [t.projected if isinstance(backbone, vit.ViTBackbone) else t.raw for t in chosen]
        patches = [output[:, first:].mT for output in outputs]  # (B, W, N)
        grids = [p.unflatten(2, backbone.grid_size) for p in patches]  # (B, W, g, g)
    vectors = unit(vectors.float())
    rounded = vectors.half()
    encoded = dict(zip(CLASS_VECTOR, (rounded, vectors - rounded.float()), strict=True))
    for layer, grid in zip(layers, grids, strict=True):
        # Standardising an image removes this factor, which is 1 unless values are extreme.
        factor = (grid.float().abs().amax(dim=(1, 2, 3), keepdim=True) / LARGEST).clamp(min=1)
        encoded[str(layer)] = grid / factor
    return encoded


def encoder_of(
    backbone: AnyBackbone,
    layers: Sequence[int] | Sequence[str],
    device: torch.device,
) -> Encoder:
    """Return :func:`encode` with everything that its features depend on."""
    code = source_hash(*(str(module.__file__) for module in FEATURE_CODE), __file__)
    dtype = next(backbone.tower.parameters()).dtype
    pixels = f"{backbone.mean.flatten().tolist()} {backbone.std.flatten().tolist()}"
    packages = [version(name) for name in ("open_clip_torch", "timm", "torchvision")]
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
