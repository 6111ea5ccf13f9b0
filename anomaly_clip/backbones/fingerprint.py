"""Which weights a network has, whatever file or tag they came from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["fingerprint"]


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
