"""Max-pooling that is fast on CPUs, for the layers of CNNs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["replace_max_pooling"]


class ImagewiseMaxPool2d(nn.MaxPool2d):
    """Max-pooling of one image at a time with channels last; the values are those of the base.

    torch uses vector instructions for max-pooling on CPUs only if channels are last. The copies of
    one image stay in the cache.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Pool features ``(B, C, H, W)``."""
        if features.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(features)
        return torch.cat([self._pool(image) for image in features.split(1)])

    def _pool(self, features: Tensor) -> Tensor:
        last = features.contiguous(memory_format=torch.channels_last)
        return super().forward(last).contiguous()


def replace_max_pooling(network: nn.Module) -> None:
    """Replace all max-pooling layers of a network on images by faster ones."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.MaxPool2d and not module.return_indices:
            faster = ImagewiseMaxPool2d(
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                ceil_mode=module.ceil_mode,
            )
            network.set_submodule(name, faster.train(module.training))
