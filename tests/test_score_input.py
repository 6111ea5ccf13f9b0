"""Images and categories that ``score`` refuses, because their form is another than documented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MEAN, WORDS
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.methods import SDP, PaDiM, WinCLIP
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.regad import PixelCNNSettings

UINT8 = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
NAMES = ["plate", "nut"]


@pytest.fixture
def methods(tiny_clip: CLIPBackbone) -> list[AnomalyMethod]:
    settings = {"prompts": WORDS}
    padim = PaDiM(cnn(), image_size=32, layers=["features.4.cat"], num_channels=4)
    return [SDP(tiny_clip, rvs=MEAN, **settings), WinCLIP(tiny_clip, **settings), padim]  # type: ignore[arg-type]


def cnn() -> CNNBackbone:
    return CNNBackbone("squeezenet1_1", "random", ["features.4.cat"])


@pytest.mark.parametrize(
    ("images", "categories", "message"),
    [
        (UINT8, "plate", r"categories of 2 images, got 'plate': write \['plate'\] \* 2$"),
        (UINT8, ["plate"], "categories of 2 images, got 1: give one category per image$"),
        (UINT8, [0, 1], r"got \[0, 1\]: write a list of texts$"),
        (UINT8, None, "got None: write a list of texts$"),
        (UINT8[0], ["plate"], r"got \(3, 32, 32\): for a single image, give image\[None\]$"),
        (UINT8[0].permute(1, 2, 0), NAMES, r"give image.permute\(2, 0, 1\)\[None\]$"),
        (UINT8.permute(0, 2, 3, 1), NAMES, r"give images.permute\(0, 3, 1, 2\)$"),
        (UINT8[:, :1], NAMES, r"got \(2, 1, 32, 32\): give RGB images$"),
        (UINT8.long(), NAMES, "got torch.int64: convert them to uint8, with values from 0"),
        (UINT8.bool(), NAMES, "got torch.bool: convert"),
        (UINT8.numpy(), NAMES, r"as a tensor \(B, 3, H, W\), got ndarray: convert them"),
        (UINT8.float(), NAMES, "from 0 to 255 look like 0 to 255: give uint8 images"),
        (UINT8.double() / 255, NAMES, "from 0 to 1 look like 0 to 1: give uint8 images"),
    ],
)
def test_other_forms_are_refused_by_all_methods(
    images: Any, categories: Any, message: str, methods: list[AnomalyMethod]
) -> None:
    for method in methods:
        with pytest.raises(ValueError, match=message):
            method.score(images, categories)


def test_the_checks_come_before_the_method(tiny_clip: CLIPBackbone) -> None:
    class Counting(SDP):
        def score(self, images: Tensor, categories: list[str]) -> Any:
            """Count."""
            return len(categories)

    method = Counting(tiny_clip, WORDS, MEAN)
    assert method.score(UINT8, NAMES) == 2
    assert method.score.__doc__ == "Count."
    with pytest.raises(ValueError, match="got 'plate'"):
        method.score(UINT8, "plate")  # type: ignore[arg-type]


def normalised(pixels: Tensor, backbone: FrozenBackbone) -> Tensor:
    return (pixels - backbone.mean) / backbone.std


def ramp(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 32 * 32).view(1, 1, 32, 32).expand(1, 3, -1, -1)


@pytest.mark.parametrize("build", [lambda clip: clip, lambda clip: cnn()])
def test_normalised_images_pass(
    build: Callable[[CLIPBackbone], FrozenBackbone], tiny_clip: CLIPBackbone
) -> None:
    backbone = build(tiny_clip)
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 256, (4, 3, 32, 32))).float() / 255
    for pixels in (
        noise,
        ramp(0, 1),
        ramp(0.5, 0.7),  # bright and of low contrast: between 0 and 1 after normalisation
        ramp(0.5, 1),
        torch.full((1, 3, 32, 32), 0.55),
        torch.ones(1, 3, 32, 32),
        torch.zeros(1, 3, 32, 32),
    ):
        backbone.check_normalised(normalised(pixels, backbone))
        backbone.check_normalised(normalised(pixels, backbone).half())
    backbone.check_normalised(torch.zeros(1, 3, 32, 32))
    backbone.check_normalised(torch.empty(0, 3, 32, 32))


@pytest.mark.parametrize(
    ("images", "span"),
    [
        (ramp(0, 1), 1),
        (ramp(0.01, 0.99).half(), 1),
        ((ramp(0.3, 0.6) * 255).round() / 255, 1),  # a grey photograph as ToTensor gives it
        (ramp(0, 255), 255),
        (ramp(90, 120).bfloat16(), 255),
    ],
)
def test_plain_images_are_refused(images: Tensor, span: int, tiny_clip: CLIPBackbone) -> None:
    with pytest.raises(ValueError, match=f"look like 0 to {span}: give uint8 images") as caught:
        tiny_clip.check_normalised(images)
    assert "subtract the mean [0.48" in str(caught.value)


def test_a_backbone_checks_its_first_images() -> None:
    backbone = cnn()
    with pytest.raises(ValueError, match="look like 0 to 1"):
        backbone(UINT8.float() / 255)
    backbone(UINT8)
    with pytest.raises(ValueError, match="look like 0 to 255"):
        backbone(UINT8.float())
    backbone(normalised(UINT8.float() / 255, backbone))


def test_pixels_without_normalisation_reach_from_0_to_1() -> None:
    settings = PixelCNNSettings("squeezenet1_1", "random", ["features.4.cat"])
    backbone = CNNBackbone.of(settings)
    backbone.check_normalised(UINT8.float() / 255)
    with pytest.raises(ValueError, match="look like 0 to 255"):
        backbone.check_normalised(UINT8.float())
