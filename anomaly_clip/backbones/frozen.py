"""Base class of the frozen backbones: pixel normalisation, a fixed dtype, a hash of the weights."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.replays import Replays
from anomaly_clip.backbones.weight_settings import MAX_PIXEL
from anomaly_clip.errors import check_between
from anomaly_clip.records import WeightsRecord

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing since Python 3.11

__all__ = ["FrozenBackbone", "check_settings", "fingerprint"]

T = TypeVar("T")


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
        self.register_buffer("mean", _pixels("mean", mean), persistent=False)
        self.register_buffer("std", _pixels("std", std), persistent=False)
        # A black and a white pixel after normalisation; numbers, so that no check waits for a GPU.
        self._black = min((0 - m) / s for m, s in zip(mean, std, strict=True))
        self._white = max((1 - m) / s for m, s in zip(mean, std, strict=True))
        self._has_checked = False
        self.replays = Replays()

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
        self.replays.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> Self:
        """Move the weights or change their dtype, which makes recordings invalid."""
        self.replays.clear()
        return super()._apply(fn, *args, **options)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Load weights, which may replace the tensors of recordings (``assign=True``)."""
        self.replays.clear()
        super()._load_from_state_dict(*args, **options)

    def replayed(
        self,
        function: Callable[[Tensor], T],
        key: Hashable,
        images: Tensor,
        passes: float = 1.0,
        reads: Sequence[Tensor] = (),
    ) -> T:
        """Return ``function(images)``, for few images on a CUDA device from a CUDA graph.

        Args:
            function: Function of the images, of the frozen weights and of the settings in the key;
                see :class:`~anomaly_clip.backbones.replays.Replays`.
            key: Name of the function and all its settings.
            images: ``(B, 3, H, W)``.
            passes: How often the function computes each patch of an image.
            reads: Other tensors that the function reads, apart from the weights.
        """
        first = next(self.tower.parameters())  # other weights, other recordings
        return self.replays(function, key, images, passes, [first, *reads])

    def out_of_autocast(self) -> AbstractContextManager[object]:
        """Return a context in which the frozen weights are used in their own dtype.

        Autocast would cast them again at every use, which on a CPU costs more than it saves.
        """
        return torch.autocast(self.mean.device.type, enabled=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, even if the parent module is set to training mode."""
        return super().train(False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy in evaluation mode, which copies of torchvision's graphs are not in."""
        super().__setstate__(state)
        self.train(False)

    def check_normalised(self, images: Tensor) -> None:
        """Check that floating-point images do not look like 0 to 1 or 0 to 255.

        Normalisation turns everything darker than the mean negative. Images without a negative
        value are refused if they exceed white, if they reach from 0 to 1, or if they consist of
        256 levels between 0 and 1. Normalised images of one grey, or of a few bright ones, pass.

        Args:
            images: ``(B, 3, H, W)``, floating point.

        Raises:
            ValueError: If they do.
        """
        if not images.numel():
            return
        low, high = (float(bound) for bound in images.detach().aminmax())
        if low < 0 or low == high or (not self._black < 0 and high <= self._white):
            return
        unit = high <= 1 and ((low < 0.02 and high > 0.98) or _has_8_bit_levels(images))
        if unit or high > self._white + 0.5:
            mean, std = ([round(v, 3) for v in p.flatten().tolist()] for p in (self.mean, self.std))
            raise ValueError(
                f"floating-point images are taken as normalised, but their values from {low:.3g} "
                f"to {high:.3g} look like 0 to {1 if unit else 255}: give uint8 images from 0 to "
                f"255, or subtract the mean {mean} and divide by the standard deviation {std} (for "
                f"values from 0 to 1)"
            )

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images; floating-point images count as already normalised.

        The first floating-point images are checked; see :meth:`check_normalised`.
        """
        if images.is_floating_point() and not self._has_checked:
            self.check_normalised(images)
            self._has_checked = True  # later checks would make a GPU wait
        if not images.is_floating_point():
            images = (images.float() / 255 - self.mean) / self.std
        return images.to(next(self.tower.parameters()).dtype)


def _pixels(name: str, values: Sequence[float] | None) -> Tensor:
    """Return the mean or standard deviation of pixels as ``(1, 3, 1, 1)``.

    Raises:
        ValueError: If there are not three values, or they are not those of pixels in [0, 1].
    """
    if values is None or len(values) != 3:  # settings of a CNN may be null in a file
        given = values if values is None else list(values)
        raise ValueError(
            f"backbone.mean and backbone.std must have 3 values, one per colour, got {given}"
        )
    low = 0 if name == "std" else -MAX_PIXEL
    for value in values:
        check_between(
            f"backbone.{name}, of pixels in [0, 1],", value, low, MAX_PIXEL, open_low=True
        )
    return torch.tensor(list(values), dtype=torch.float32).reshape(1, -1, 1, 1)


def _has_8_bit_levels(images: Tensor) -> bool:
    """Return whether all values are multiples of 1 / 255, up to rounding of float32."""
    if images.dtype not in (torch.float32, torch.float64):
        return False  # half precision cannot tell
    levels = images.detach() * 255
    return bool(((levels - levels.round()).abs() < 1e-3).all())


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a module's tensors and layers.

    The hash covers the name, dtype, shape and bytes of each tensor. Activations and numbers of
    heads have no tensor, so the printed form of the layers is hashed as well.
    """
    digest = hashlib.sha256()
    for name, layer in module.named_modules():
        heads = getattr(layer, "num_heads", "")
        if heads or not list(layer.children()):
            digest.update(f"{name} {_printed(layer)} {heads} ".encode())
    for key, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {data.dtype} {tuple(data.shape)} ".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _printed(layer: nn.Module) -> str:
    """Return a layer as text, the same with every version of PyTorch."""
    text = str(layer)
    if isinstance(layer, nn.LayerNorm) and "bias=" not in text:  # earlier versions leave it out
        return f"{text.removesuffix(')')}, bias={layer.bias is not None})"
    return text


def check_settings(settings: Any, option: str) -> None:
    """Check that a backbone is given by a mapping of its settings, as in a checkpoint.

    Args:
        settings: What was given in place of a backbone or of its settings.
        option: The setting that a text most likely means.

    Raises:
        ValueError: If it is anything else.

    Example:
        >>> from anomaly_clip.backbones.frozen import check_settings
        >>> check_settings("demo", "pretrained")
        Traceback (most recent call last):
        ValueError: backbone 'demo': give its settings, such as backbone={"pretrained": 'demo'}
    """
    if not isinstance(settings, Mapping):
        given = repr(settings) if isinstance(settings, str) else type(settings).__name__
        example = given if isinstance(settings, str) else '"..."'
        raise ValueError(
            f'backbone {given}: give its settings, such as backbone={{"{option}": {example}}}'
        )
