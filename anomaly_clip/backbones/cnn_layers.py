"""Layers of torchvision's networks that detectors can use: feature maps, with stride and channels.

The network is built without memory for its weights (on torch's meta device) and run on one image
without content, which takes about a second.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["HEADS", "Layer", "describe_layers", "list_layers", "stride_of"]

HEADS = ("fc.", "classifier.", "head.")
"""Prefixes of classifier weights, which no feature depends on."""
SIDE = 256
"""Side in pixels of the image."""
MOST = 12
"""Number of layers that are listed; of more, the first ones are left out."""
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class Layer(NamedTuple):
    """A layer whose output is a feature map ``(B, C, h, w)``."""

    name: str
    stride: int
    """Pixels of the image per position of the map, along each side."""
    channels: int


class _Call(NamedTuple):
    """One call of a module."""

    name: str
    module: nn.Module
    stride_before: int
    shape: torch.Size


def list_layers(name: str) -> list[Layer]:
    """Return the layers of a torchvision network that have feature maps, in order of depth.

    Of consecutive layers with the same stride and channels, the last one is listed. Layers within
    a block can be used, too, but are not listed.

    Args:
        name: Name of the network, such as ``squeezenet1_1``.

    Returns:
        At most 12 layers; none for a network without feature maps, such as a transformer.

    Raises:
        ValueError: If torchvision has no such network.

    Example:
        >>> from anomaly_clip.backbones.cnn_layers import list_layers
        >>> list_layers("resnet18")[1]
        Layer(name='layer1', stride=4, channels=64)
    """
    from torchvision import models
    from torchvision.models.feature_extraction import get_graph_node_names

    if name not in models.list_models(module=models):
        raise ValueError(f"backbone.name {name}: torchvision has no such model")
    model = _without_weights(name)
    with torch.device("meta"):
        calls = _calls(model)
    if not calls:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nodes that exist only in training
        nodes = get_graph_node_names(model)[1]
    blocks = {n.rpartition(".")[0] for n in nodes}
    usable = {*nodes, *blocks, *(block.rpartition(".")[0] for block in blocks)}
    layers: list[Layer] = []
    for call in _coarse(calls, ""):
        layer = Layer(call.name, stride_of(call.shape), call.shape[1])
        if layer.name not in usable:
            continue
        if layers and layers[-1][1:] == layer[1:]:
            layers.pop()
        layers.append(layer)
    return layers[-MOST:]


def stride_of(shape: Sequence[int], side: int = SIDE) -> int:
    """Return the stride of a feature map in pixels, a power of two.

    Args:
        shape: Its shape ``(B, C, h, w)``.
        side: Side of the image in pixels.
    """
    return int(2 ** round(math.log2(side / shape[-1])))


def describe_layers(name: str, wrong: str | None = None) -> str:
    """Return the layers of a network as text, for messages and ``--help``.

    Args:
        name: Name of a torchvision network.
        wrong: Name of a layer that it does not have.
    """
    layers = list_layers(name)
    if not layers:
        return "it has no feature maps, so use a convolutional network, such as resnet18"
    near = get_close_matches(wrong or "", [layer.name for layer in layers], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    listed = ", ".join(f"{n} ({stride}, {channels})" for n, stride, channels in layers)
    return f"{hint}its layers (name, stride, channels): {listed}"


def _without_weights(name: str) -> nn.Module:
    from torchvision import models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the initialisation of Inception
        try:
            with torch.device("meta"):
                model: nn.Module = models.get_model(name, weights=None)
        except NotImplementedError:  # RegNet computes its widths with tensors
            with torch.random.fork_rng(devices=[]):
                model = models.get_model(name, weights=None).to("meta")
    return model.eval()


def _calls(model: nn.Module) -> list[_Call]:
    """Run a network and return the calls of its modules with feature maps, in order of their ends.

    The list is empty if the network does not take images of this size, as transformers do not.
    """
    calls: list[_Call] = []
    image = torch.zeros(1, 3, SIDE, SIDE)

    def watch(name: str, module: nn.Module) -> None:
        def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before = inputs[0] if inputs and isinstance(inputs[0], Tensor) else image
            if isinstance(output, Tensor) and _is_map(output.shape):
                stride = stride_of(before.shape) if _is_map(before.shape) else 1
                calls.append(_Call(name, module, stride, output.shape))

        module.register_forward_hook(keep)

    for name, module in model.named_modules():
        if name and not f"{name}.".startswith(HEADS) and not isinstance(module, POOLS):
            watch(name, module)
    try:
        with torch.no_grad():
            model(image)
    except (AssertionError, RuntimeError, ValueError):
        return []
    return calls


def _is_map(shape: torch.Size) -> bool:
    return len(shape) == 4 and shape[2] == shape[3] > 1


def _coarse(calls: Sequence[_Call], parent: str) -> Iterator[_Call]:
    """Yield the calls of the children of a module; of a child with several stages, its children."""
    for call in calls:
        if call.name.rpartition(".")[0] != parent:
            continue
        inside = list(_coarse(calls, call.name))
        is_container = type(call.module) is nn.Sequential and stride_of(call.shape) > (
            2 * call.stride_before
        )
        if is_container and inside:
            yield from inside
        else:
            yield call
