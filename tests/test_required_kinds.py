"""Methods that need a CNN, a ResNet or a CLIP refuse other backbones in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.clip_models import check_clip_settings
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.required_kinds import check_resnet, cnn_settings_of
from anomaly_clip.backbones.towers import BackboneSettings
from anomaly_clip.backbones.vit import ViTBackbone, ViTSettings
from anomaly_clip.cli import main
from anomaly_clip.methods import RD4AD, TAB, LinearProbe, RegAD

VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit() -> ViTBackbone:
    return ViTBackbone("test_vit", "random", 64)


@pytest.fixture(scope="module")
def cnn() -> CNNBackbone:
    return CNNBackbone("squeezenet1_1", "random", ["features.4"])


def test_settings_of_a_cnn_pass(cnn: CNNBackbone) -> None:
    settings = CNNSettings("resnet18", "random")
    assert cnn_settings_of(settings, "RD4AD", "") is settings
    assert cnn_settings_of(BackboneSettings(), "RD4AD", "") == CNNSettings()
    assert cnn_settings_of({"name": "resnet50", "weights": "a.pt"}, "TAB", "").name == "resnet50"
    assert cnn_settings_of(cnn, "RD4AD", "") == cnn.settings


@pytest.mark.parametrize(
    "backbone",
    [
        CNNSettings(VIT, "random"),
        BackboneSettings(VIT),
        ViTSettings(VIT),
        {"name": VIT, "weights": "random"},
        CLIPSettings("demo", "demo"),
        {"name": "demo", "pretrained": "demo"},
        "vit",
    ],
)
def test_other_settings_are_refused_with_a_reason(backbone: Any, vit: ViTBackbone) -> None:
    backbone = vit if backbone == "vit" else backbone
    message = "is no CNN of torchvision, but Own needs one, as it has one eye: choose one,"
    with pytest.raises(ValueError, match=message):
        cnn_settings_of(backbone, "Own", "it has one eye")


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2", "resnext50_32x4d", "no_such"])
def test_resnets_pass(name: str) -> None:
    check_resnet(CNNSettings(name, "random"), "TAB")


def test_other_cnns_are_no_resnets(cnn: CNNBackbone) -> None:
    message = "must be a ResNet for TAB, such as resnet18, got"
    with pytest.raises(ValueError, match=f"{message} squeezenet1_1"):
        check_resnet(cnn, "TAB")
    with pytest.raises(ValueError, match="must be a ResNet for RegAD, such as resnet18, got vgg16"):
        RegAD(CNNSettings("vgg16", "random"))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [RD4AD, RegAD, TAB, LinearProbe])
def test_methods_that_need_a_cnn(method: Any, vit: ViTBackbone) -> None:
    for backbone in (vit, BackboneSettings(VIT), CLIPSettings("demo", "demo")):
        with pytest.raises(
            ValueError, match=f"no CNN of torchvision, but {method.__name__} needs one, as"
        ):
            method(backbone)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (CLIPSettings("resnet18", "random"), "resnet18 is a CNN of torchvision, but this method"),
        (CLIPSettings(VIT, "random"), f"{VIT} is a model of timm, but this method needs a CLIP"),
        (BackboneSettings("resnet18"), "resnet18 is a CNN of torchvision, but this method needs"),
        (ViTSettings(VIT + ".augreg_in21k"), "is a model of timm, but this method needs a CLIP"),
        ({"name": "resnet18", "weights": "random"}, "resnet18 is a CNN of torchvision, but this"),
        (BackboneSettings("demo"), "settings of demo are those of CNNs and ViTs, but this method"),
        ("cnn", "squeezenet1_1 is a CNN of torchvision, but this method needs a CLIP model, which"),
        (3, "backbone int: give its settings"),
    ],
)
def test_methods_that_need_texts(backbone: Any, message: str, cnn: CNNBackbone) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPBackbone.of(cnn if backbone == "cnn" else backbone)  # type: ignore[arg-type]


def test_settings_of_a_clip_pass() -> None:
    check_clip_settings({"pretrained": "demo"})
    check_clip_settings({"name": "demo", "pretrained": "demo"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RD4AD --model.backbone.name " + VIT, "but RD4AD needs one, as its student"),
        (
            "RD4AD --model.backbone.pretrained demo",
            "model.backbone.pretrained is an option of CLIP models, but this method only takes "
            "CNNs of torchvision: give model.backbone.weights, or choose another method",
        ),
        ("SDP --model.backbone.name resnet18", "but this method needs a CLIP model, which has"),
        (
            "SDP --model.backbone.weights random",
            "model.backbone.weights is an option of CNNs and ViTs, but this method only takes "
            "CLIP models: give model.backbone.pretrained, or choose another method",
        ),
        ("TAB --model.backbone.name " + VIT, "but TAB needs one, as it trains a ResNet"),
        ("TAB --model.backbone.pretrained demo", "model.backbone.pretrained is an option of CLIP"),
        ("RegAD --model.backbone.name vgg16", "model.backbone.name must be a ResNet for RegAD"),
        ("LinearProbe --model.backbone.name " + VIT, "but LinearProbe needs one, as it"),
        ("Contrastive --model.backbone.name resnet18", "needs a CLIP model, which has texts"),
    ],
)
def test_refusals_of_the_command_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "MVTecAD", "--data.root", str(tmp_path), "--output.root", str(tmp_path / "r")]
    assert main(["fit", "--model", *words.split(), *data]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()  # and no image is read
