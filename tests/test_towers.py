"""One choice of backbone: the kind follows from the name or, for CLIP models, from an option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.towers import BackboneSettings, settings_of, tower_of
from anomaly_clip.backbones.vit import ViTBackbone, ViTSettings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "resnet18"}, CNNSettings("resnet18", "imagenet")),
        ({"name": "resnet18", "weights": "random"}, CNNSettings("resnet18", "random")),
        ({"name": "test_vit", "weights": "random"}, ViTSettings("test_vit", "random")),
        ({"name": "test_vit.r160_in1k"}, ViTSettings("test_vit.r160_in1k", "auto")),
        ({"pretrained": "random"}, CLIPSettings(pretrained="random")),
        (BackboneSettings("test_vit"), ViTSettings("test_vit", "auto")),
        (BackboneSettings(weights="a.pth"), CNNSettings("resnet18", "a.pth")),
        (
            BackboneSettings("test_vit", mean=[0.1] * 3, std=[0.2] * 3),
            ViTSettings("test_vit", "auto", [0.1] * 3, [0.2] * 3),
        ),
    ],
)
def test_the_kind_of_settings(given: Any, expected: Any) -> None:
    assert settings_of(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "vit_smal_patch14_dinov2"}, "did you mean vit_small_patch14_dinov2"),
        ({"name": "ViT_Small_Patch14_Dinov2"}, "did you mean vit_small_patch14_dinov2"),
        ({"name": "timm/vit_small_patch14_dinov2.lvd142m"}, "did you mean vit_small_patch14_di"),
        (
            {"name": "resnet19"},
            "neither torchvision nor timm has such a model; did you mean resnet18",
        ),
        ({"name": ""}, "backbone.name is empty"),
        ({"name": "ViT-B-16", "weights": "random"}, "is a CLIP model"),
        ({"name": "test_vit", "pretrained": "random"}, "is a ViT without texts"),
        ({"name": "resnet18", "pretrained": "random"}, "is a CNN"),
        ({"name": "test_vit", "layers": ["layer1"]}, "choose blocks with model.layers"),
        ({"name": "test_vit", "image_size": 96, "weights": "random"}, "image_size is no option"),
        ("resnet18", "give its settings"),
    ],
)
def test_settings_that_contradict_each_other(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        settings_of(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2"),
        ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2"),
        ("facebook/dinov2-base", "vit_base_patch14_dinov2"),
        ("facebook/dinov2-with-registers-large", "vit_large_patch14_reg4_dinov2"),
        ("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "vit_small_patch16_dinov3"),
        ("dino_vitb8", "vit_base_patch8_224.dino"),
    ],
)
def test_names_of_official_code_and_of_the_model_hub(name: str, timms: str) -> None:
    with pytest.raises(ValueError, match=rf"timm has such a model; use {timms}$"):
        settings_of({"name": name})


def test_a_file_as_the_name(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file: give it as model.backbone.weights"):
        settings_of({"name": str(tmp_path / "weights.pth")})


def test_towers_of_each_kind() -> None:
    cnn = tower_of({"name": "resnet18", "weights": "random"}, ["layer1"], 64)
    assert isinstance(cnn, CNNBackbone)
    assert list(cnn.channels) == ["layer1"]
    vit = tower_of({"name": "test_vit", "weights": "random"}, [1], 64)
    assert isinstance(vit, ViTBackbone)
    assert vit.image_size == 64
    assert tower_of(vit, [1], 64) is vit
    with pytest.raises(ValueError, match=r"model.image_size 96 differs from the image size"):
        tower_of(vit, [1], 96)
