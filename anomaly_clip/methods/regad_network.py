"""Parts of RegAD: the network with spatial transformers, the training heads, the augmentation.

Settings and conventions are those of the public code; see docs/methods/regad.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.cnn import CNNBackbone, load_network
from anomaly_clip.errors import Diverged
from anomaly_clip.records import RANDOM

__all__ = [
    "STAGES",
    "RegistrationNetwork",
    "SpatialTransformer",
    "augment",
    "encoder",
    "inverted",
    "joined_features",
    "negative_cosine",
    "predictor",
    "warp",
]

STAGES = ("layer1", "layer2", "layer3")
HIDDEN = 1024
"""Width of a spatial transformer's hidden layer."""


class RegistrationNetwork(nn.Module):
    """Stem and three stages of a ResNet, with a spatial transformer after each stage.

    Args:
        start: The ResNet whose weights are copied.
        image_size: Side of the images, in pixels.
    """

    def __init__(self, start: CNNBackbone, image_size: int) -> None:
        super().__init__()
        model: Any = load_network(start.settings.name, RANDOM)
        # Weights missing from the frozen copy belong to layers after the last stage.
        model.load_state_dict(start.network.state_dict(), strict=False)
        self.image_size = image_size
        self.stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU(inplace=True), model.maxpool)
        self.blocks = nn.ModuleList(getattr(model, stage) for stage in STAGES)
        self.transformers = nn.ModuleList(
            SpatialTransformer(start.channels[stage], image_size // start.strides[stage])
            for stage in STAGES
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the last stage's transformed output ``(B, C, h, w)`` for ``(B, 3, H, W)``."""
        return list(self._transformed(pixels))[-1][0]

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Return the output of each stage, aligned with the image: ``(B, C, h, w)`` each.

        The output of a stage is warped by the inverses of the stage's own transform and of all
        earlier ones, the latest first.
        """
        inverses: list[Tensor] = []
        stages = []
        for maps, matrix in self._transformed(pixels):
            inverses.insert(0, inverted(matrix))
            for inverse in inverses:
                maps = warp(maps, inverse)
            stages.append(maps)
        return stages

    def _transformed(self, pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the transformed output and the transform's matrix of each stage."""
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[-2:]) != size:
            raise ValueError(
                f"RegAD expected images of {size[0]} x {size[1]} pixels (model.image_size), got "
                f"{pixels.shape[-2]} x {pixels.shape[-1]}: resize them"
            )
        maps = self.stem(pixels)
        for block, transformer in zip(self.blocks, self.transformers, strict=True):
            maps, matrix = transformer(block(maps))
            yield maps, matrix


class SpatialTransformer(nn.Module):
    """Rotate and scale a feature map by parameters predicted from the map itself.

    Args:
        channels: Channels of the map.
        side: Side of the map, in positions.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        pooled = -(-side // 4)  # each of two poolings halves the side, rounding up
        last = nn.Linear(HIDDEN, 3)
        nn.init.zeros_(last.weight)
        with torch.no_grad():  # starts as the identity
            last.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))
        self.look = nn.Sequential(
            *_pooled_block(channels, 64),
            *_pooled_block(64, 16),
            nn.Flatten(),
            nn.Linear(16 * pooled * pooled, HIDDEN),
            nn.ReLU(inplace=True),
            last,
        )

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed maps ``(B, C, h, w)`` and the matrices ``(B, 2, 2)``."""
        predicted = self.look(maps)
        # Under autocast, the warped positions would be wrong by half a position.
        with torch.autocast(maps.device.type, enabled=False):
            angle, across, along = at_least_float32(predicted).unbind(dim=1)
            rows = (across * angle.cos(), -angle.sin(), angle.sin(), along * angle.cos())
            matrix = torch.stack(rows, dim=1).unflatten(1, (2, 2))  # (B, 2, 2)
            if self.training and not matrix.isfinite().all():
                # Such matrices crash the process in torch's gradient of reflection padding.
                broken = int((~matrix.isfinite()).flatten(1).any(dim=1).sum())
                raise Diverged(
                    f"RegAD diverged: the transforms of {broken} of {len(matrix)} feature maps are "
                    f"not finite; lower model.lr"
                )
            return warp(maps, matrix), matrix


def _pooled_block(channels: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]


def encoder(channels: int) -> nn.Sequential:
    """Return the encoder whose outputs are compared: three linear maps per position.

    The public code has one more BatchNorm, which it never uses.
    """
    return nn.Sequential(
        *_block(channels), *_block(channels), nn.Conv2d(channels, channels, 1, bias=False)
    )


def predictor(channels: int) -> nn.Sequential:
    """Return the network that predicts the encoding of one image from that of another."""
    return nn.Sequential(*_block(channels), nn.Conv2d(channels, channels, 1, bias=False))


def _block(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def negative_cosine(guess: Tensor, target: Tensor) -> Tensor:
    """Return the negative cosine along channels, ``(B, h, w)``; no gradient reaches the target.

    Example:
        >>> import torch
        >>> from anomaly_clip.methods.regad_network import negative_cosine
        >>> maps = torch.ones(1, 4, 1, 1)
        >>> negative_cosine(maps, -2 * maps)
        tensor([[[1.]]])
    """
    with torch.autocast(guess.device.type, enabled=False):
        return -F.cosine_similarity(
            at_least_float32(guess), at_least_float32(target.detach()), dim=1
        )


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32, or unchanged if their type is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def inverted(matrix: Tensor) -> Tensor:
    """Return the inverses of matrices ``(B, 2, 2)``; those of singular ones are not finite."""
    if not torch.compiler.is_compiling():
        # Unlike inv, inv_ex does not wait for the device to check the result.
        return torch.linalg.inv_ex(matrix).inverse
    a, b, c, d = matrix.flatten(1).unbind(dim=1)  # ONNX has no inverse
    adjugate = torch.stack([d, -b, -c, a], dim=1) / (a * d - b * c).unsqueeze(1)
    return adjugate.unflatten(1, (2, 2))  # (B, 2, 2)


def warp(maps: Tensor, matrix: Tensor, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Return maps ``(B, C, h, w)`` whose position p is sampled at ``matrix @ p + shift``.

    Positions range from -1 to 1; those beyond the border are reflected.

    Args:
        maps: ``(B, C, h, w)``.
        matrix: ``(B, 2, 2)``.
        shift: Offset of the sampled position: to the right, then downwards.
    """
    fine = at_least_float32(maps)
    column = torch.tensor(shift, device=matrix.device, dtype=matrix.dtype).expand(len(matrix), 2)
    affine = torch.cat([matrix, column.unsqueeze(2)], dim=2).to(fine.dtype)  # (B, 2, 3)
    # F.affine_grid compares the number of images, which is unknown while a graph is traced.
    grid = torch.affine_grid_generator(affine, list(fine.shape), align_corners=False)
    warped = F.grid_sample(fine, grid, "bilinear", padding_mode="reflection", align_corners=False)
    return warped.to(maps.dtype)


def augment(images: Tensor) -> Tensor:
    """Return images followed by 21 augmented versions of them, ``(22 * k, 3, H, W)``.

    Each version holds all images. In this order, the images are rotated by up to a quarter of pi,
    translated, mirrored, converted to grey, and rotated by right angles.

    Args:
        images: Floating-point ``(k, 3, H, W)``, square.
    """

    def rotated(angle: float) -> Tensor:
        cos, sin = math.cos(angle), math.sin(angle)
        return warp(images, images.new_tensor([[cos, -sin], [sin, cos]]).expand(len(images), 2, 2))

    def translated(right: float, down: float) -> Tensor:
        return warp(images, torch.eye(2).to(images).expand(len(images), 2, 2), (right, down))

    grey = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    versions = [images]
    versions += [rotated(steps * math.pi / 16) for steps in (-4, -3, -2, -1, 1, 2, 3, 4)]
    for far in (0.2, 0.1):
        corners = ((far, far), (-far, far), (-far, -far), (far, -far))
        versions += [translated(right, down) for right, down in corners]
    versions.append(images.flip(-1))
    versions.append((images * grey).sum(dim=1, keepdim=True).expand_as(images))
    versions += [images.rot90(quarters, (-2, -1)) for quarters in (1, 2, 3)]
    return torch.cat(versions)


def joined_features(stages: Sequence[Tensor], positions: Tensor | None = None) -> Tensor:
    """Return the concatenated features of all stages at given positions, ``(B, P, C)``.

    Coarse stages are upsampled by nearest neighbour.

    Args:
        stages: ``(B, C, h, w)`` each, square, finest first.
        positions: Row-major indices in the first stage; default: all positions.
    """
    side = stages[0].shape[-1]
    if positions is None:
        positions = torch.arange(side * side)
    positions = positions.to(stages[0].device)
    parts = []
    for stage in stages:
        step = side // stage.shape[-1]
        row, column = positions // side // step, positions % side // step
        parts.append(stage[:, :, row, column])  # (B, C, P)
    return torch.cat(parts, dim=1).mT  # (B, P, C)
