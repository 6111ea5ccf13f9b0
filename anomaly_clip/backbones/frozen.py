"""Base class of the frozen backbones: pixel normalisation, a fixed dtype, a hash of the weights."""

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
    """A frozen network that normalises its input images and always stays in evaluation mode.

    Args:
        mean: Pixel mean, for values in [0, 1].
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
        """Names of the architecture and of the weights' source."""

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """True if the weights are untrained and the metrics therefore mean nothing."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The module that :attr:`identity` hashes."""

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The image encoder, which :meth:`cast` converts."""

    @cached_property
    def identity(self) -> str:
        """The sha256 of the loaded tensors and layers; see :func:`fingerprint`.

        The same weights in the same architecture have the same identity, whatever their source.
        """
        return fingerprint(self.network)

    @property
    def weights(self) -> WeightsRecord:
        """Record of the weights, for the metadata of a run."""
        name, source = self.label
        return WeightsRecord(
            backbone=name,
            pretrained=source,
            random=self.is_random,
            sha256=None if self.is_random else self.identity,
        )

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the image tower; the text tower, normalisation and cosines stay in float32."""
        _ = self.identity  # computed now, from the weights before the cast
        self.tower.to(dtype)

    def out_of_autocast(self) -> AbstractContextManager[object]:
        """Return a context in which the frozen weights are used in their own dtype.

        Autocast would cast them again at every use, which on a CPU costs more than it saves.
        """
        return torch.autocast(self.mean.device.type, enabled=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, even if the parent module is set to training mode."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images; floating-point images count as already normalised."""
        if not images.is_floating_point():
            images = (images.float() / 255 - self.mean) / self.std
        return images.to(next(self.tower.parameters()).dtype)


def _channel_values(values: Sequence[float]) -> Tensor:
    if len(values) != 3:
        raise ValueError(
            f"backbone.mean and backbone.std must have 3 values, one per colour, got {list(values)}"
        )
    return torch.tensor(list(values), dtype=torch.float32).reshape(1, -1, 1, 1)


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a module's tensors and layers.

    The hash covers the name, dtype, shape and bytes of each tensor. Activations and numbers of
    heads have no tensor, so the printed form of the layers is hashed as well.
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
