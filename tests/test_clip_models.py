"""Tests of models with image towers of timm: configurations, weights files and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm_clips import CLIP_TEXT, KINDS, backbone_of, config_of, write_config
from torch.testing import assert_close

from anomaly_clip.backbones import weights
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.clip_models import pixels_of_tags
from anomaly_clip.backbones.weight_tags import TagFile


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_open_clips_names(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    name = write_config(tmp_path, kind)
    stored = open_clip.CustomTextCLIP(
        **{k: v for k, v in config_of(kind).items() if k != "custom_text"}
    )
    file = tmp_path / "weights.safetensors"
    save_file({f"model.{k}": v.contiguous() for k, v in stored.state_dict().items()}, file)
    backbone = CLIPBackbone(name, str(file))
    assert_close(backbone.model.state_dict(), stored.state_dict())
    note = "CLIP's pixel normalisation is assumed, as no open_clip_config.json next to the file"
    printed = " ".join(capsys.readouterr().err.split())
    assert note in printed
    assert "activation" not in printed
    larger = CLIPBackbone(name, str(file), image_size=128)  # positions are interpolated
    assert larger.image_size == 128
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3}
    settings = {"model_cfg": config_of(kind), "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    assert CLIPBackbone(name, str(file)).std.flatten().tolist() == [0.25] * 3


def test_files_of_another_model(tmp_path: Path, tiny_clip: CLIPBackbone) -> None:
    siglip, other = backbone_of(tmp_path, "siglip"), backbone_of(tmp_path, "pe_core")
    image_tower = torch.nn.ModuleDict({"visual": siglip.visual})
    for number, model in enumerate((siglip.model, tiny_clip.model, image_tower)):
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, tmp_path / f"{number}.safetensors")
    with pytest.raises(
        ValueError, match=r"do not fit .*pe_core.json .*set backbone.name to the mo"
    ):
        CLIPBackbone(other.settings.name, str(tmp_path / "0.safetensors"))
    with pytest.raises(ValueError, match=r"do not fit .*siglip.json .Missing key visual.trunk"):
        CLIPBackbone(siglip.settings.name, str(tmp_path / "1.safetensors"))
    with pytest.raises(ValueError, match="image tower without a text tower: give the weights of a"):
        CLIPBackbone(siglip.settings.name, str(tmp_path / "2.safetensors"))
    with pytest.raises(ValueError, match=r"do not fit .*tiny_clip.json .*set backbone.name to the"):
        CLIPBackbone(tiny_clip.settings.name, str(tmp_path / "0.safetensors"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"timm_model_name": "test_resnet", "timm_pool": "avg"}, "ResNet is neither a ViT nor a"),
        ({"timm_pool": "avgmax", "timm_model_name": "small_vit_token"}, "has the pooling 'avgmax'"),
        ({"image_size": [32, 64]}, "images of 32 x 64 pixels are not square"),
        ({"timm_model_name": "no_such_vit"}, "open_clip cannot build this configuration"),
    ],
)
def test_image_towers_that_are_not_supported(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = config_of("siglip")
    config["vision_cfg"] |= change
    check_refusal(config, reason, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"pool_type": "first"}, "has the pooling 'first'"),
        ({"embed_cls": True}, "or more tokens"),
        ({"hf_model_name": "roberta-base"}, "is one of transformers"),
    ],
)
def test_text_towers_that_are_not_supported(
    text: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = config_of("mobileclip_b")
    config["text_cfg"] |= text
    check_refusal(config, reason, tmp_path)


def test_a_custom_text_tower_needs_a_tower_of_timm(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": 4, "width": 24, "head_width": 12, "patch_size": 8}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": CLIP_TEXT}
    check_refusal({**config, "custom_text": True}, "text tower is not that of CLIP", tmp_path)
    config["text_cfg"] = {**CLIP_TEXT, "no_causal_mask": True}
    check_refusal(config, "text tower is not that of CLIP", tmp_path)


def check_refusal(config: dict[str, Any], reason: str, folder: Path) -> None:
    file = folder / "other.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{reason}.*;"):
        CLIPBackbone(str(file), "random")


def test_pixel_normalisation_of_untrained_weights_is_that_of_all_tags() -> None:
    assert pixels_of_tags("ViT-B-16-SigLIP2") == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert pixels_of_tags("MobileCLIP2-S0") == {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert pixels_of_tags("a.json") == {}


def test_a_tag_brings_its_pixel_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("siglip")
    stored = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    file = tmp_path / "open_clip_model.safetensors"
    save_file({k: v.contiguous() for k, v in stored.state_dict().items()}, file)
    monkeypatch.setattr(weights, "read_config", lambda name: (config, {}))
    monkeypatch.setattr(weights, "fetch", lambda *_: TagFile(file, True))
    backbone = CLIPBackbone("ViT-B-16-SigLIP2", "webli")
    assert backbone.mean.flatten().tolist() == [0.5] * 3
    assert backbone.weights["pretrained"] == "webli"
    assert "activation" not in backbone.weights
    assert_close(backbone.model.state_dict(), stored.state_dict())
