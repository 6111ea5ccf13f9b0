"""Network and images from which the golden arrays of the detectors were computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import resnet18


def golden_network(meta: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict that the README of the golden folder describes."""
    rng = np.random.RandomState(meta["network_seed"])
    state = resnet18(weights=None).state_dict()
    for name, value in state.items():
        if name == "fc.bias" or name.endswith("num_batches_tracked"):
            continue
        sampled = rng.standard_normal(tuple(value.shape))
        if value.ndim == 4:
            sampled *= np.sqrt(2 / np.prod(value.shape[1:]))
        elif value.ndim == 2:
            sampled *= 0.01
        elif name.endswith("running_var"):
            sampled = 1 + 0.2 * np.abs(sampled)
        elif name.endswith(("running_mean", "bias")):
            sampled *= 0.1
        else:
            sampled = 1 + 0.1 * sampled
        state[name] = torch.from_numpy(sampled.astype(np.float32))
    return state


def golden_images(meta: dict[str, Any]) -> Tensor:
    """Return training and test images, float32, already normalised."""
    count, side = meta["num_train"] + meta["num_test"], meta["image_size"]
    rng = np.random.RandomState(meta["image_seed"])
    base = np.kron(rng.standard_normal((1, 3, 8, 8)), np.ones((side // 8, side // 8)))
    images = base + 0.35 * rng.standard_normal((count, 3, side, side))
    first = meta["defect_from_index"]
    for index in range(first, count):
        a = side // 4 + 3 * (index - first)
        images[index, :, a : a + side // 5, a : a + side // 6] += 2.5
    return torch.from_numpy(images.astype(np.float32))


def write_network(folder: Path, meta: dict[str, Any]) -> str:
    """Save the network and return the path of the file."""
    torch.save(golden_network(meta), folder / "resnet18.pt")
    return str(folder / "resnet18.pt")


@torch.no_grad()
def fill_by_shape(module: torch.nn.Module) -> None:
    """Fill convolutions and linear layers as the README of the golden folder describes."""
    for name, value in module.state_dict().items():
        if value.ndim in (2, 4):
            rng = np.random.RandomState(1000 + sum(value.shape))
            scale = np.sqrt(2 / np.prod(value.shape[1:]))
            sampled = rng.standard_normal(tuple(value.shape)) * scale
            value.copy_(torch.from_numpy(sampled.astype(np.float32)))
        elif name.endswith("bias"):
            value.zero_()
