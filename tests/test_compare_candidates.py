"""Backbones and sets of weights on the command line of ``compare``."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_clip.commands.compare_candidates import backbones, resolved, sets_of_weights
from anomaly_clip.errors import UserError


def test_the_name_decides_the_kind() -> None:
    cnn, vit, demo, clip = backbones(
        ["resnet18", "vit_small_patch14_dinov2.lvd142m", "demo", "ViT-B-16:openai"]
    )
    assert cnn.options == [
        *("--model.backbone.name", "resnet18"),
        *("--model.backbone.weights", "imagenet"),
    ]
    assert vit.label == "vit_small_patch14_dinov2.lvd142m"
    assert vit.options[-2:] == ["--model.backbone.weights", "auto"]
    assert demo.options[-2:] == ["--model.backbone.pretrained", "demo"]
    assert clip.label == "ViT-B-16-openai"
    assert clip.options[-2:] == ["--model.backbone.pretrained", "openai"]


def test_labels_weights_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tab.pt").touch()
    random, tab = backbones(["resnet18:random", "ours=resnet18:tab.pt layers=[layer1] sigma=2"])
    assert (random.label, random.word) == ("resnet18-random", "resnet18-random=resnet18:random")
    assert tab.label == "ours"
    assert tab.word == f"ours=resnet18:{tmp_path / 'tab.pt'} layers=[layer1] sigma=2"
    assert tab.options[4:] == ["--model.layers", "[layer1]", "--model.sigma", "2"]
    again, _ = backbones([tab.word, "demo"])  # as a comparison is resumed
    assert again.label == "ours"
    assert again.word == tab.word


def test_sets_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "tab.pt"
    file.touch()
    first, second = sets_of_weights(["imagenet", str(file)])
    assert first == ("imagenet", "imagenet", ["--model.backbone.weights", "imagenet"])
    assert (second.label, second.word) == ("tab", str(file))
    assert resolved("imagenet") == "imagenet"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet18"], "--backbones resnet18: expected two or more, such as resnet18"),
        (["resnet18", "resnet18 sigma=2"], "two backbones are named resnet18: give one of them a"),
        (["test_vit:random", "test_vit:random"], 'label, such as "other=test_vit:random"'),
        (["resnet18", "resnet19"], "neither torchvision nor timm has such a model; did you mean"),
        (["resnet18", ""], "'' names no backbone: write"),
        (["resnet18", "=demo"], "'=demo' names no backbone: write"),
        (["resnet18", ":random"], "':random' names no backbone: write"),
        (["resnet18", "demo sigma 2"], "'sigma' in 'demo sigma 2' is no setting: write OPTION=VAL"),
        (["resnet18", "demo sigma="], "'sigma=' in 'demo sigma=' is no setting"),
        (["resnet18", "ViT-B-16"], "ViT-B-16 is a CLIP model: add its weights, such as ViT-B-16:o"),
        (["resnet18", "a/b=demo"], "'a/b' is not fit for the name of a folder: give another label"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        backbones(words)
    assert message in str(caught.value)
