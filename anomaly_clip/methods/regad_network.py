"""RegAD's network, which turns and scales what it sees, and what belongs to its training.

Settings and conventions are those of the public code (section 4 of the specification).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.cnn import CNNBackbone, load_network
from anomaly_clip.records import RANDOM

__all__ = [
    "STAGES",
    "RegistrationNetwork",
    "SpatialTransformer",
    "augment",
    "encoder",
    "joined_features",
    "negative_cosine",
    "predictor",
    "warp",
]

STAGES = ("layer1", "layer2", "layer3")
HIDDEN = 1024
"""Width of a spatial transformer's linear layer."""


class RegistrationNetwork(nn.Module):
    """Stem and three stages of a ResNet, a spatial transformer behind each.

    Args:
        start: The ResNet whose weights are copied.
        image_size: Side of the images, in pixels.

    Raises:
        ValueError: If it is no ResNet.
    """

    def __init__(self, start: CNNBackbone, image_size: int) -> None:
        super().__init__()
        name = start.settings.name
        model: Any = load_network(name, RANDOM)
        if not all(hasattr(model, part) for part in ("conv1", "bn1", "maxpool", *STAGES)):
            raise ValueError(f"model.backbone.name {name}: RegAD trains ResNets, such as resnet18")
        # What the frozen copy does not hold lies behind the last stage.
        model.load_state_dict(start.network.state_dict(), strict=False)
        self.image_size = image_size
        self.stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU(inplace=True), model.maxpool)
        self.blocks = nn.ModuleList(getattr(model, stage) for stage in STAGES)
        self.transformers = nn.ModuleList(
            SpatialTransformer(start.channels[stage], image_size // start.strides[stage])
            for stage in STAGES
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the last stage as it was turned, ``(B, C, h, w)``, of ``(B, 3, H, W)``."""
        return list(self._turned(pixels))[-1][0]

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Return what each stage saw, where it saw it: ``(B, C, h, w)`` each.

        The turns of a stage and of those before it are undone, one after the other.
        """
        undo: list[Tensor] = []
        stages = []
        for maps, matrix in self._turned(pixels):
            # inv_ex does not wait for the device to check what inv would check.
            undo.insert(0, torch.linalg.inv_ex(matrix).inverse)
            for undoing in undo:
                maps = warp(maps, undoing)
            stages.append(maps)
        return stages

    def _turned(self, pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield of each stage its output as it was turned, and the matrix that did it."""
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[-2:]) != size:
            raise ValueError(
                f"RegAD: expected images of {size[0]} x {size[1]} pixels (model.image_size), got "
                f"{pixels.shape[-2]} x {pixels.shape[-1]}"
            )
        maps = self.stem(pixels)
        for block, transformer in zip(self.blocks, self.transformers, strict=True):
            maps, matrix = transformer(block(maps))
            yield maps, matrix


class SpatialTransformer(nn.Module):
    """Turn and scale a map as it seems right from what is on it.

    Args:
        channels: Of the map.
        side: Of the map, in positions.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        left = -(-side // 4)  # each pooling halves, rounding up
        last = nn.Linear(HIDDEN, 3)
        nn.init.zeros_(last.weight)
        with torch.no_grad():  # neither turned nor scaled, to begin with
            last.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))
        self.look = nn.Sequential(
            *_narrowed(channels, 64),
            *_narrowed(64, 16),
            nn.Flatten(),
            nn.Linear(16 * left * left, HIDDEN),
            nn.ReLU(inplace=True),
            last,
        )

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps ``(B, C, h, w)`` as they were turned, and the matrices ``(B, 2, 2)``."""
        looked = self.look(maps)
        with torch.autocast(maps.device.type, enabled=False):  # half a position would be lost
            angle, across, along = at_least_float32(looked).unbind(dim=1)
            rows = (across * angle.cos(), -angle.sin(), angle.sin(), along * angle.cos())
            matrix = torch.stack(rows, dim=1).unflatten(1, (2, 2))  # (B, 2, 2)
            if self.training and not matrix.isfinite().all():
                # torch's gradient of reflected places ends the process where there is none.
                raise ValueError(
                    "RegAD diverged: how maps are turned is not finite; lower model.lr"
                )
            return warp(maps, matrix), matrix


def _narrowed(channels: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]


def encoder(channels: int) -> nn.Sequential:
    """Return what features are compared in: three linear maps a position.

    The public code has a BatchNorm more, which nothing goes through.
    """
    return nn.Sequential(
        *_mixed(channels), *_mixed(channels), nn.Conv2d(channels, channels, 1, bias=False)
    )


def predictor(channels: int) -> nn.Sequential:
    """Return what guesses from one encoding the other."""
    return nn.Sequential(*_mixed(channels), nn.Conv2d(channels, channels, 1, bias=False))


def _mixed(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def negative_cosine(guess: Tensor, target: Tensor) -> Tensor:
    """Return minus the cosine along channels, ``(B, h, w)``; no gradient reaches the target.

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
    """Return values in float32, or as they are if they are finer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def warp(maps: Tensor, matrix: Tensor, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Return ``(B, C, h, w)`` whose position p shows what was at ``matrix @ p + shift``.

    Positions go from -1 to 1; what comes from beyond the border is reflected.

    Args:
        maps: ``(B, C, h, w)``.
        matrix: ``(B, 2, 2)``.
        shift: To the right, and down.
    """
    fine = at_least_float32(maps)
    column = torch.tensor(shift, device=matrix.device, dtype=matrix.dtype).expand(len(matrix), 2)
    affine = torch.cat([matrix, column.unsqueeze(2)], dim=2).to(fine.dtype)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(fine.shape), align_corners=False)
    moved = F.grid_sample(fine, grid, "bilinear", padding_mode="reflection", align_corners=False)
    return moved.to(maps.dtype)


def augment(images: Tensor) -> Tensor:
    """Return images 22-fold, ``(22 * k, 3, H, W)``: first all as they are, then all of each kind.

    They are turned by up to a quarter of pi, moved, mirrored, grey, and turned by right angles.

    Args:
        images: Floating, ``(k, 3, H, W)``, square.
    """

    def turned(angle: float) -> Tensor:
        cos, sin = math.cos(angle), math.sin(angle)
        return warp(images, images.new_tensor([[cos, -sin], [sin, cos]]).expand(len(images), 2, 2))

    def moved(right: float, down: float) -> Tensor:
        return warp(images, torch.eye(2).to(images).expand(len(images), 2, 2), (right, down))

    grey = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    versions = [images]
    versions += [turned(steps * math.pi / 16) for steps in (-4, -3, -2, -1, 1, 2, 3, 4)]
    for far in (0.2, 0.1):
        corners = ((far, far), (-far, far), (-far, -far), (far, -far))
        versions += [moved(right, down) for right, down in corners]
    versions.append(images.flip(-1))
    versions.append((images * grey).sum(dim=1, keepdim=True).expand_as(images))
    versions += [images.rot90(quarters, (-2, -1)) for quarters in (1, 2, 3)]
    return torch.cat(versions)


def joined_features(stages: Sequence[Tensor], positions: Tensor | None = None) -> Tensor:
    """Return the features of all stages at positions of the first, ``(B, P, C)``.

    Coarse stages are enlarged by the nearest position.

    Args:
        stages: ``(B, C, h, w)`` each, square, the finest first.
        positions: Row by row; default: all.
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
