"""Small methods in all their settings, ready to score images without a fit, to be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from helpers import WORDS
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.methods import (
    APRILGAN,
    CLIPADA,
    RD4AD,
    SDP,
    AnomalyCLIP,
    AnomalyDINO,
    PaDiM,
    PatchCore,
    RegAD,
    SDPPlus,
    SimpleNet,
    SubspaceAD,
    WinCLIP,
)
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.gaussians import RunningMoments, inverse_factor
from anomaly_clip.methods.prompted_method import ReferenceMethod
from anomaly_clip.methods.subspace import principal_subspace

NAME = "oak board"
MEAN = {"method": "mean"}
LAYERS = ["features.2", "features.3"]
VIT = {"name": "test_vit", "weights": "random"}
SIZE = 64


class Variant(NamedTuple):
    """A method with settings."""

    kind: type[AnomalyMethod]
    arguments: Mapping[str, Any] = {}
    number: int = 0
    """Number of reference images, or of rows of a bank of patches."""


REFINEMENTS = {
    f"CLIP-ADA {mode}": Variant(CLIPADA, {"refine": {"mode": mode}})
    for mode in ("bias", "multiply", "reencode", "none")
}
VARIANTS = {
    "SDP": Variant(SDP),
    "SDP original": Variant(SDP, {"paths": "original", "stages": [2, 4]}),
    "SDP clean": Variant(SDP, {"stage_tokens": "clean", "stages": [1, 3], "sigma": 0.0}),
    "SDP cosines": Variant(SDP, {"feature_surgery": False, "stages": [4], "sigma": 3.0}),
    "SDP+": Variant(SDPPlus),
    "SDP+ stages": Variant(SDPPlus, {"stages": [1, 3], "stage_tokens": "clean", "sigma": 2.0}),
    "WinCLIP": Variant(WinCLIP),
    "WinCLIP scale 1": Variant(WinCLIP, {"scales": [1], "temperature": 0.5}),
    "WinCLIP references": Variant(WinCLIP, {}, 2),
    "WinCLIP before the norm": Variant(WinCLIP, {"patch_norm": False, "scales": [6, 1]}, 1),
    "APRIL-GAN": Variant(APRILGAN),
    "APRIL-GAN layers": Variant(APRILGAN, {"layers": [1, 3]}),
    "APRIL-GAN references": Variant(APRILGAN, {"memory_layers": [2, 4]}, 2),
    "AnomalyCLIP": Variant(AnomalyCLIP),
    "AnomalyCLIP layers": Variant(AnomalyCLIP, {"layers": [1, 3, 4], "dense_blocks": 2}),
    "AnomalyCLIP Crane": Variant(AnomalyCLIP, {"inference": "crane", "layers": [2, 4]}),
    **REFINEMENTS,
    "CLIP-ADA steps": Variant(
        CLIPADA, {"refine": {"mode": "bias", "steps": 2, "blocks": 1, "fuse": "fine"}}
    ),
    "CLIP-ADA vv": Variant(CLIPADA, {"dense": "vv", "taps": [2, 3], "learn_tau": True}),
    "CLIP-ADA class token": Variant(
        CLIPADA, {"class_token": True, "map": {"eval_size": 40, "image_score": "avgpool_max"}}
    ),
    "CLIP-ADA two prompts": Variant(
        CLIPADA,
        {"prompt": {"n_prompts": 2}, "pre_norm": False, "map": {"image_score": "topk_mean"}},
    ),
    "PaDiM": Variant(PaDiM, {"num_channels": 20}),
    "PaDiM all channels": Variant(PaDiM, {"num_channels": None, "blur_border": "inner"}),
    "PaDiM one layer": Variant(PaDiM, {"num_channels": 1, "channel_seed": 1}),
    "PatchCore": Variant(PatchCore, {}, 40),
    "PatchCore 1 row": Variant(PatchCore, {}, 1),
    "PatchCore 25 rows": Variant(PatchCore, {"num_neighbours": 30}, 25),
    "PatchCore 26 rows": Variant(PatchCore, {"blur_border": "inner"}, 26),
    "PatchCore nearest": Variant(PatchCore, {"num_neighbours": 1, "upsampling": "nearest"}, 30),
    "PatchCore float16": Variant(PatchCore, {"bank_type": "float16"}, 30),
    "PatchCore with a ViT": Variant(PatchCore, {"backbone": VIT, "layers": [3, 5]}, 30),
    "SubspaceAD": Variant(SubspaceAD, {"backbone": VIT, "layers": [3, 5], "explained": 0.9}),
    "SubspaceAD with a CNN": Variant(
        SubspaceAD, {"combine": "concat", "explained": 0.8, "distance": "mahalanobis"}
    ),
    "SubspaceAD cosine": Variant(
        SubspaceAD, {"backbone": VIT, "explained": 0.9, "distance": "cosine"}
    ),
    "AnomalyDINO": Variant(AnomalyDINO, {"backbone": VIT}, 30),
    "AnomalyDINO with a CNN": Variant(
        AnomalyDINO, {"layers": LAYERS[1:], "num_neighbours": 40, "sigma": 0.0}, 30
    ),
    "RD4AD": Variant(RD4AD, {"amap_mode": "multiply"}),
    "RD4AD add": Variant(RD4AD, {"amap_mode": "add", "sigma": 0.0}),
    "SimpleNet": Variant(SimpleNet, {"pretrain_dim": 16, "target_dim": 12, "hidden": 8}),
    "RegAD": Variant(RegAD, {}, 2),
}
"""Variants by name."""


def build(variant: Variant, clip: Callable[[], CLIPBackbone], cnn: Callable[..., Any]) -> Any:
    """Return a method that scores images of the category :data:`NAME`.

    Args:
        variant: The method and its settings.
        clip: Function that returns a small CLIP.
        cnn: Function that returns the settings of a CNN of a given name.
    """
    kind, arguments, number = variant
    torch.manual_seed(3)
    if issubclass(kind, (SDP, ReferenceMethod, CLIPADA, AnomalyCLIP)):
        options: dict[str, Any] = {"backbone": clip()}
        if issubclass(kind, CLIPADA):
            options |= {"feature_layer": 3, "map": {"eval_size": 48}}
        elif not issubclass(kind, AnomalyCLIP):
            options |= {"prompts": WORDS, **({"rvs": MEAN} if issubclass(kind, SDP) else {})}
    else:
        options = {"backbone": cnn(kind), "image_size": SIZE}
        if kind is not SubspaceAD:
            options["sigma"] = 2.0
        on_cnn = "backbone" not in arguments
        if kind in (PaDiM, PatchCore, SimpleNet) or (kind is SubspaceAD and on_cnn):
            options["layers"] = LAYERS
    method: Any = kind(**{**options, **arguments}).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in method.parameters():
        if parameter.requires_grad and parameter.ndim:  # RegAD's transforms start as the identity
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise
    if isinstance(method, PaDiM):
        features = torch.randn(30, (SIZE // 8) ** 2, len(method.channels), generator=generator)
        centred = (features - features.mean(dim=0)).transpose(0, 1).double()  # (N, B, C)
        factor = inverse_factor(centred.mT @ centred, 30, 0.01)
        method.keep(mean=features.mean(dim=0), factor=factor)
    elif isinstance(method, PatchCore | AnomalyDINO):
        rows = method.embed(images_of(method, 3)).flatten(0, 1)
        order = torch.randperm(len(rows), generator=generator)[:number]
        method.bank = rows[order].to(getattr(method, "bank_type", torch.float32))
    elif isinstance(method, SubspaceAD):
        moments = RunningMoments()
        moments.add(method.embed(images_of(method, 3)).flatten(0, 1).unsqueeze(1))
        method.keep(**principal_subspace(moments.take(), method.explained)._asdict())
    elif hasattr(method, "trained"):
        method.trained.fill_(True)
    if isinstance(method, SimpleNet):  # or maps would hardly differ from a constant
        method.adaptor.weight.data *= 100
        patches = method.embed(images_of(method, 3)).flatten(0, 1)
        batch_norm: Any = method.discriminator[1]
        batch_norm.momentum = None
        method.discriminator.train()(method.adaptor(patches))
        method.discriminator.eval()
    if isinstance(method, RegAD):
        method.remember(images_of(method, number), NAME)
    elif isinstance(method, ReferenceMethod) and number:
        method._memory[NAME] = method.remember(images_of(method, number))
    return method


def images_of(method: AnomalyMethod, count: int, seed: int = 7) -> Tensor:
    """Return random uint8 images ``(count, 3, S, S)``, blurred so that patches differ."""
    side = method.image_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    fine = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.rand(count, 3, side, side, generator=generator)
    return ((0.8 * fine + 0.2 * noise) * 255).to(torch.uint8)


def small_cnn(kind: type) -> CNNBackbone | dict[str, str]:
    """Return a small CNN: a ResNet where the method needs one."""
    if kind in (RD4AD, RegAD):
        return {"name": "resnet18", "weights": "random"}
    return CNNBackbone("mobilenet_v3_small", "random", LAYERS)
