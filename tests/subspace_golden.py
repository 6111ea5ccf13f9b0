"""The golden arrays of SubspaceAD and AnomalyDINO: their network, their images, their settings."""

from __future__ import annotations

import json
from collections.abc import Callable

import timm
import torch
from helpers import Golden
from PIL import Image
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.methods.gaussians import RunningMoments
from anomaly_clip.methods.rotations import regular_rotations
from anomaly_clip.methods.subspace import Subspace, principal_subspace

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def vit_builder(arrays: Golden) -> Callable[[int, int], ViTBackbone]:
    """Return a function that builds the official ViT for images of a height and width."""
    config = json.loads((arrays.folder / "model_config.json").read_text())
    swiglu = config.pop("swiglu")
    if swiglu:
        config["mlp_layer"] = SwiGLUPacked
        config["act_layer"] = torch.nn.SiLU

    def golden_vit(pretrained: bool = False, **options: object) -> VisionTransformer:
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(name, None)
        return VisionTransformer(**{**config, **options})

    golden_vit.__module__ = __name__
    timm.models.register_model(golden_vit)

    def make(height: int, width: int) -> ViTBackbone:
        weights = str(arrays.folder / "state_dict.safetensors")
        return ViTBackbone("golden_vit", weights, (height, width), MEAN.tolist(), STD.tolist())

    return make


def square(images: Tensor, side: int) -> Tensor:
    """Resize uint8 images ``(n, H, W, 3)`` to uint8 ``(n, 3, side, side)``, as the house does."""
    resized = [
        Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BICUBIC)
        for image in images
    ]
    return (
        torch.stack([torch.tensor(list(i.tobytes()), dtype=torch.uint8) for i in resized])
        .view(len(images), side, side, 3)
        .permute(0, 3, 1, 2)
    )


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)).float()


def fitted(features: Tensor, explained: float) -> Subspace:
    """Return the subspace of features ``(M, C)``."""
    moments = RunningMoments()
    moments.add(features.unsqueeze(1))
    return principal_subspace(moments.take(), explained)


def resized(images: Tensor, edge: int, patch: int) -> Tensor:
    """Resize images ``(n, H, W, 3)`` so that their smaller edge is ``edge``; crop to patches."""
    height, width = images.shape[1:3]
    small = min(height, width)
    size = (int(edge * width / small), int(edge * height / small))
    rows, columns = size[1] // patch * patch, size[0] // patch * patch
    resized = [
        torch.frombuffer(
            bytearray(Image.fromarray(i.numpy()).resize(size, Image.Resampling.BICUBIC).tobytes()),
            dtype=torch.uint8,
        ).view(size[1], size[0], 3)
        for i in images
    ]
    return torch.stack(resized)[:, :rows, :columns].permute(0, 3, 1, 2)


class Dino:
    """The official settings on the golden images."""

    def __init__(self, arrays: Golden, build: Callable[[int, int], ViTBackbone]) -> None:
        self.arrays = arrays
        meta = self.meta = arrays.meta["dino"]
        config = json.loads((arrays.folder / "model_config.json").read_text())
        self.patch = config["patch_size"]
        self.grid = tuple(meta["grid"])
        self.backbone = build(*(n * self.patch for n in self.grid))
        self.images = self.resized(arrays.inputs["e2e.images"])
        self.tokens = torch.stack([self.embed(image[None])[0] for image in self.images])

    def resized(self, images: Tensor) -> Tensor:
        return resized(images, self.meta["edge"], self.patch)

    def embed(self, images: Tensor) -> Tensor:
        """Return the patches ``(B, N, C)`` after the final norm."""
        last = [self.backbone.num_layers]
        (maps,) = self.backbone.feature_maps(images, last, norm=True)
        return maps.flatten(2).mT

    def bank(self, rotated: bool) -> Tensor:
        normal = self.arrays.inputs["e2e.train_images"][self.meta["shots"]]
        if rotated:
            copies = [regular_rotations(image.permute(2, 0, 1)) for image in normal]
            normal = torch.cat(copies).permute(0, 2, 3, 1)
        return unit(torch.cat([self.embed(image[None])[0] for image in self.resized(normal)]))
