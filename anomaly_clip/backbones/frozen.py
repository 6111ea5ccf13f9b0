"""What all frozen backbones share: normalisation inside, one type, and an identity."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anomaly_clip.records import WeightsRecord

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing since Python 3.11

__all__ = ["FrozenBackbone", "fingerprint"]


class FrozenBackbone(nn.Module, ABC):
    """A network that normalises its own pixels, is frozen and stays in evaluation mode.

    Args:
        mean: Pixel mean, of values in [0, 1].
        std: Pixel standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", _channel_values(mean), persistent=False)
        self.register_buffer("std", _channel_values(std), persistent=False)

    @property
    @abstractmethod
    def label(self) -> tuple[str, str]:
        """The architecture's name, and where the weights come from."""

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """Whether the weights are untrained, so that figures mean nothing."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What the identity is taken of."""

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """What looks at images, and is cast."""

    @cached_property
    def identity(self) -> str:
        """The sha256 over the loaded tensors and what of the architecture they do not show.

        It is the same for the same weights from any source.
        """
        return fingerprint(self.network)

    @property
    def weights(self) -> WeightsRecord:
        """Which weights these are, for a run's record."""
        name, source = self.label
        return WeightsRecord(
            backbone=name,
            pretrained=source,
            random=self.is_random,
            sha256=None if self.is_random else self.identity,
        )

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the image tower once; texts, normalisations and cosines stay in float32."""
        _ = self.identity  # of the weights as they were loaded
        self.tower.to(dtype)

    def out_of_autocast(self) -> AbstractContextManager[object]:
        """Return a context in which the frozen weights are used in their own type.

        Autocast would cast them again at every use, which on a CPU costs more than it saves.
        """
        return torch.autocast(self.mean.device.type, enabled=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the backbone is frozen, whatever its owner does."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images; floating ones are taken as normalised already."""
        if not images.is_floating_point():
            images = (images.float() / 255 - self.mean) / self.std
        return images.to(next(self.tower.parameters()).dtype)


def _channel_values(values: Sequence[float]) -> Tensor:
    if len(values) != 3:
        raise ValueError(f"backbone.mean and std have a value a colour, 3, got {list(values)}")
    return torch.tensor(list(values), dtype=torch.float32).reshape(1, -1, 1, 1)


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 over a module's tensors and layers.

    Of tensors, names, types, shapes and bytes count. Activations and numbers of heads, which no
    tensor shows, are in how layers describe themselves.
    """
    digest = hashlib.sha256()
    for name, layer in module.named_modules():
        heads = getattr(layer, "num_heads", "")
        if heads or not list(layer.children()):
            digest.update(f"{name} {layer} {heads} ".encode())
    for key, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {data.dtype} {tuple(data.shape)} ".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
