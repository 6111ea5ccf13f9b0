from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_CLIP
from safetensors.torch import save_file
from torch import nn

from anomaly_clip.backbones import weights
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.frozen import fingerprint
from anomaly_clip.backbones.weights import load_clip


@pytest.fixture
def saved(tiny_clip: CLIPBackbone, tmp_path: Path) -> Path:
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in tiny_clip.model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "pt", "state_dict in pt"])
def test_a_file_gives_the_saved_weights(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, saved: Path, tmp_path: Path, form: str
) -> None:
    state, path = tiny_clip.model.state_dict(), saved
    if form != "safetensors":
        path = tmp_path / "clip.pt"
        torch.save({"state_dict": state} if "in" in form else state, path)
    loaded = load_clip(tiny_clip_config, str(path)).model
    assert fingerprint(loaded) == fingerprint(tiny_clip.model)


def test_random_weights_depend_on_the_seed_and_move_no_generator(tiny_clip_config: str) -> None:
    torch.manual_seed(3)
    first = fingerprint(load_clip(tiny_clip_config, "random").model)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert fingerprint(load_clip(tiny_clip_config, "random").model) == first
    torch.manual_seed(4)
    assert fingerprint(load_clip(tiny_clip_config, "random").model) != first


def test_fingerprint_sees_values_names_and_shapes() -> None:
    layer = nn.Linear(2, 3)
    first = fingerprint(layer)
    assert fingerprint(layer) == first
    assert fingerprint(nn.Sequential(layer)) != first
    with torch.no_grad():
        layer.bias[1] += 1e-6
    assert fingerprint(layer) != first


def test_another_image_size_interpolates_the_positions(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, saved: Path
) -> None:
    model = load_clip(tiny_clip_config, str(saved), image_size=48).model
    assert model.visual.positional_embedding.shape == (37, 24)
    old = tiny_clip.visual.positional_embedding
    torch.testing.assert_close(model.visual.positional_embedding[0], old[0])


def test_positions_that_nobody_asked_to_interpolate_are_noted(
    tiny_clip: CLIPBackbone,
    tiny_clip_config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = dict(tiny_clip.model.state_dict())
    state["positional_embedding"] = torch.zeros(100, 8)
    state["visual.positional_embedding"] = torch.zeros(10, 24)
    torch.save(state, tmp_path / "clip.pt")

    def notes(image_size: int | None) -> list[str]:
        load_clip(tiny_clip_config, str(tmp_path / "clip.pt"), image_size, quick_gelu="false")
        captured = capsys.readouterr()
        return [line for line in (captured.out + captured.err).splitlines() if "tower" in line]

    text, image = notes(None)
    assert "text tower are interpolated from 100 to 77 positions" in text
    assert "image tower are interpolated from 3x3 to 4x4 patches; backbone.image_size 24" in image
    assert notes(32) == [text]


def test_positions_of_the_model_give_no_note(
    tiny_clip_config: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image_size in (None, 48):
        load_clip(tiny_clip_config, str(saved), image_size)
    captured = capsys.readouterr()
    assert "interpolated" not in captured.out + captured.err


def test_the_mean_is_read_from_a_published_configuration(
    tiny_clip_config: str, tmp_path: Path
) -> None:
    path = tmp_path / "open_clip_config.json"
    config = json.loads(Path(tiny_clip_config).read_text())
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    assert load_clip(str(path), "random").mean == (0.5, 0.5, 0.5)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("should_not_be_here",)


def test_a_pickle_with_code_is_rejected_and_does_not_run(
    tiny_clip_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="could run code, and is rejected"):
        load_clip(tiny_clip_config, str(tmp_path / "evil.pt"))
    assert not (tmp_path / "should_not_be_here").exists()


def test_offline_the_error_names_tag_cache_and_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load_clip("ViT-B-16-plus-240", "laion400m_e31")
    for part in ("laion400m_e31", str(tmp_path), "--model.backbone.pretrained", "random"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timeouts = []

    def refuse(request: object, timeout: float) -> None:
        timeouts.append(timeout)
        raise OSError("refused")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(FileNotFoundError, match=r"no answer from huggingface.co: refused"):
        load_clip("ViT-B-16-plus-240", "laion400m_e31")
    assert timeouts == [weights.HUB_TIMEOUT]


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-16", "", "is empty"),
        ("ViT-B-16", "nonsense", "not a tag of ViT-B-16 .known: .*laion400m_e31"),
        ("ViT-B-16", "openai", "use backbone.name ViT-B-16-quickgelu"),
        ("ViT-B-61", "random", "did you mean ViT-B-"),
        ("RN50", "random", "because its image tower is no ViT; use a CLIP with a plain ViT"),
    ],
)
def test_names_and_tags_that_do_not_fit(name: str, pretrained: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_clip(name, pretrained)


def test_files_that_do_not_fit(tiny_clip_config: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"do not fit .* \(Missing key"):
        load_clip(tiny_clip_config, str(tmp_path / "other.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_clip(tiny_clip_config, str(tmp_path / "broken.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_clip(tiny_clip_config, "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_clip("missing.json", "random")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON model configuration"):
        load_clip(str(tmp_path / "bad.json"), "random")
    (tmp_path / "poor.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks \['embed_dim'"):
        load_clip(str(tmp_path / "poor.json"), "random")
    with pytest.raises(ValueError, match="has no tags"):
        load_clip(tiny_clip_config, "laion400m_e31")


@pytest.mark.parametrize(
    ("tower", "name", "value", "message"),
    [
        ("text_cfg", "context_length", 0, "text_cfg.context_length is 0, not a whole number"),
        ("vision_cfg", "patch_size", 0, "vision_cfg.patch_size is 0, not a whole number"),
        ("vision_cfg", "layers", -1, "vision_cfg.layers is -1, not a whole number"),
        ("text_cfg", "heads", 0, "text_cfg.heads is 0, not a whole number"),
        ("text_cfg", "heads", True, "text_cfg.heads is True, not a whole number"),
        ("text_cfg", "heads", 5, "open_clip cannot build this configuration"),
        ("text_cfg", "vocab_size", 3, "CLIP's tokeniser has 49408"),
        ("vision_cfg", "image_size", 3, "less than the patch_size"),
        ("", "embed_dim", 1e9, "embed_dim is 1000000000.0, not a whole number"),
        ("", "embed_dim", 10**400, "a number has more than 300 digits"),
        ("", "vision_cfg", [1], r"vision_cfg is \[1\], not an object"),
        ("", "model_cfg", 3, "cannot be used"),
    ],
)
def test_impossible_sizes_in_a_model_configuration(
    tower: str, name: str, value: object, message: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = deepcopy(TINY_CLIP)
    (config[tower] if tower else config)[name] = value
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"backbone.name .*model.json: .*{message}"):
        load_clip(str(tmp_path / "model.json"), "random")
