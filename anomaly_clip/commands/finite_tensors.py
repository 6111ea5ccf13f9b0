"""Tensors of a fit that must be finite: weights, buffers, the state of the optimisers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from anomaly_clip.backbones.frozen import FrozenBackbone

__all__ = [
    "buffers",
    "frozen_prefixes",
    "has_no_nan",
    "not_finite",
    "optimizer_state",
    "running_statistics",
]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinite values.

    Args:
        tensors: Tensors by name, of any shape and type; the device is asked once.

    Example:
        >>> import torch
        >>> from anomaly_clip.commands.finite_tensors import not_finite
        >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])})
        ['b']
    """
    flags: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        values = tensor.detach()
        if values.is_complex():
            values = torch.view_as_real(values)
        if not values.is_floating_point() or not values.numel():
            continue
        if values.layout != torch.strided:
            values = values.coalesce().values()
        if values.itemsize < 2:
            values = values.float()
        flag = torch.stack(values.aminmax()).isfinite().all()
        flags.setdefault(flag.device, []).append((name, flag))
    wrong = set()
    for pairs in flags.values():
        finite = torch.stack([flag for _, flag in pairs]).tolist()
        wrong |= {name for (name, _), is_finite in zip(pairs, finite, strict=True) if not is_finite}
    return [name for name in tensors if name in wrong]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds; others, such as attention masks, may be -inf."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in module.named_buffers() if name in state}


def running_statistics(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the running statistics of normalisation layers."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            for key, buffer in layer.named_buffers(recurse=False):
                yield f"{name}.{key}", buffer


def has_no_nan(module: nn.Module, name: str) -> bool:
    """Return whether a module has a buffer of a name, without NaN."""
    tensors = dict(module.named_buffers())
    return name in tensors and not bool(tensors[name].isnan().any())


def frozen_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of the names in frozen backbones, which are checked when loaded."""
    return tuple(
        f"{name}." for name, part in module.named_modules() if isinstance(part, FrozenBackbone)
    )


def optimizer_state(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Return those tensors of the optimisers that have the shape of their weight."""
    names: dict[Tensor, str] = {weight: name for name, weight in module.named_parameters()}
    return {
        f"{key} of {names.get(parameter, 'a weight')} in the optimiser": value
        for optimizer in trainer.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
