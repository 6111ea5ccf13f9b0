from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_golden import golden_images, golden_network, write_network
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import WeightsEnum, resnet18, squeezenet1_1

from anomaly_clip.backbones import cnn
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings, read_state


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(resnet18(weights=None).state_dict(), file)
    return file


@pytest.mark.golden
def test_golden_features(golden: Callable[[str], Any], tmp_path: Path) -> None:
    folder = golden("detectors")
    arrays, meta = load_file(folder.folder / "backbone.safetensors"), folder.meta
    network = golden_network(meta)
    assert_close(network["conv1.weight"].flatten()[:8], arrays["probe_conv1_first8"])
    assert_close(network["fc.weight"].flatten()[:8], arrays["probe_fc_first8"])
    images = golden_images(meta)
    assert_close(images, arrays["images"], atol=1e-6, rtol=0)
    backbone = CNNBackbone(weights=write_network(tmp_path, meta))
    for name, values in backbone(images).items():
        expected = arrays[name]
        assert_close(values, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert backbone.channels == {name: arrays[name].shape[1] for name in backbone.channels}


def test_channels_and_strides() -> None:
    backbone = CNNBackbone(weights="random", layers=["layer1", "layer3", "pooled"])
    assert backbone.channels == {"layer1": 64, "layer3": 256, "pooled": 512}
    assert backbone.strides == {"layer1": 4, "layer3": 16}
    features = backbone(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {"layer1": (2, 64, 56, 56), "layer3": (2, 256, 14, 14), "pooled": (2, 512)}


def test_the_backbone_is_frozen_and_normalises_images(state_file: Path) -> None:
    backbone = CNNBackbone(weights=str(state_file), layers=["layer1"])
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (cnn.MEAN, cnn.STD))
    normalised = (images / 255 - mean) / std
    assert_close(backbone(images), backbone(normalised))
    plain = CNNBackbone(weights=str(state_file), layers=["layer1"], mean=[0] * 3, std=[1] * 3)
    assert_close(plain(images), backbone(images / 255))


def test_pooled_features_are_the_input_of_the_classifier(state_file: Path) -> None:
    model = resnet18(weights=None)
    model.load_state_dict(torch.load(state_file, weights_only=True))
    images = torch.randn(2, 3, 96, 64)
    pooled = CNNBackbone(weights=str(state_file))(images)["pooled"]
    with torch.no_grad():
        assert_close(model.fc(pooled), model.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "prefixed", "no head"])
def test_formats_of_weight_files(state_file: Path, tmp_path: Path, form: str) -> None:
    state = torch.load(state_file, weights_only=True)
    file = tmp_path / "weights.pth"
    if form == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(state, file)
    elif form == "state_dict":
        torch.save({"epoch": 3, "state_dict": state}, file)
    elif form == "prefixed":
        torch.save({"model": {f"module.backbone.{k}": v for k, v in state.items()}}, file)
    else:
        torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, file)
    first, other = (CNNBackbone(weights=str(f), layers=["layer3"]) for f in (state_file, file))
    assert first.identity == other.identity
    images = torch.randn(1, 3, 64, 64)
    assert_close(first(images), other(images), atol=0, rtol=0)


def test_the_identity_follows_the_weights_that_are_used(state_file: Path, tmp_path: Path) -> None:
    state = torch.load(state_file, weights_only=True)
    state["fc.weight"] += 1
    torch.save(state, tmp_path / "a.pt")
    state["layer1.0.conv1.weight"][0] += 1
    torch.save(state, tmp_path / "b.pt")
    files = (state_file, tmp_path / "a.pt", tmp_path / "b.pt")
    first, head, stage = (CNNBackbone(weights=str(f), layers=["layer2"]).identity for f in files)
    assert first == head != stage


def test_random_weights_follow_the_seed_alone() -> None:
    backbones = []
    for seed, numbers_used in ((0, 0), (0, 3), (1, 0)):
        torch.manual_seed(seed)
        torch.rand(numbers_used)
        backbones.append(CNNBackbone(weights="random", layers=["layer1"]))
    assert backbones[0].identity == backbones[1].identity != backbones[2].identity
    assert backbones[0].weights["random"]
    assert backbones[0].weights["sha256"] is None


def test_nodes_of_other_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = squeezenet1_1(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "s.pt")
    layers = ["features.7", "features.10"]
    backbone = CNNBackbone("squeezenet1_1", str(tmp_path / "s.pt"), layers)
    assert backbone.channels == {"features.7": 256, "features.10": 384}
    assert backbone.strides == {"features.7": 8, "features.10": 16}
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert_close(backbone(images)["features.7"], model.features[:8](images))


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("vit_b_16", "encoder.ln", "vit_b_16 does not accept images of 256 pixels"),
        ("swin_t", "features.1", r"features.1 of swin_t has the shape \(1, 64, 64, 96\)"),
    ],
)
def test_transformers_are_rejected(name: str, layer: str, message: str) -> None:
    with pytest.raises(
        ValueError, match=f"{message}.*; it(s layers|.*use a convolutional network)"
    ):
        CNNBackbone(name, "random", [layer])


def test_a_corrupt_download_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError('invalid hash value (expected "f37072fd", got "00000000")')

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(WeightsEnum, "get_state_dict", broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"download of resnet18-f37072fd.pth is corrupt \(.*\)"):
        CNNBackbone(layers=["layer1"])


def test_imagenet_weights_come_from_the_cache(
    state_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir()
    cached.write_bytes(state_file.read_bytes())
    backbone = CNNBackbone(layers=["layer1"])
    assert backbone.weights["pretrained"] == "imagenet"
    assert backbone.identity == CNNBackbone(weights=str(state_file), layers=["layer1"]).identity


def test_without_network_the_error_names_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        FileNotFoundError, match=r"cannot be downloaded \(no network\); copy the file"
    ):
        CNNBackbone()


def test_offline_mode_asks_for_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", forbidden)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"\(offline mode is set\); copy the file"):
        CNNBackbone()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnt18"}, "torchvision has no such model; did you mean resnet18"),
        ({"layers": ["layer9"]}, "resnet18 has no layer9"),
        ({"name": "squeezenet1_1"}, "backbone.layers of squeezenet1_1 is not set"),
        ({"weights": ""}, "backbone.weights of resnet18 is empty"),
        ({"weights": "nowhere.pt"}, "there is no such file"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CNNBackbone.of(CNNSettings(**{"weights": "random", **options}))


def test_files_that_do_not_fit_are_named(state_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks layer1\.0\.conv3\.weight and .* more; give"):
        CNNBackbone("resnet50", str(state_file))
    state = torch.load(state_file, weights_only=True)
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"has the unexpected key extra\.weight; give weights"):
        CNNBackbone(weights=str(tmp_path / "more.pt"))
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, tmp_path / "grey.pt")
    with pytest.raises(ValueError, match=r"has a different shape for conv1\.weight"):
        CNNBackbone(weights=str(tmp_path / "grey.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"a": 1}, tmp_path / "poor.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    for name, message in (
        ("text.pt", "cannot be read safely as weights"),
        ("poor.pt", "contains no weights"),
        ("module.pt", "cannot be read safely as weights"),
    ):
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(1, 1, 64, 64\)"):
        CNNBackbone(weights=str(state_file))(torch.zeros(1, 1, 64, 64))


def test_half_precision(state_file: Path) -> None:
    backbone = CNNBackbone(weights=str(state_file), layers=["layer1"])
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64))).byte()
    before = backbone(images)["layer1"]
    backbone.cast(torch.bfloat16)
    after = backbone(images)["layer1"]
    assert after.dtype == torch.bfloat16
    assert_close(after.float(), before, atol=0.1, rtol=0.1)
