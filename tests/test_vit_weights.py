"""Loading of a timm ViT from files: pixel normalisation, settings next to the file, summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vit_forms
from safetensors.torch import save_file

from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.backbones.vit_weights import load_vit, summary_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = vit_forms.randomised(timm.create_model("test_vit", num_classes=0)).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    ],
)
def test_normalisation_stated_next_to_the_file(
    file: Path, name: str, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / name).write_text(json.dumps(content))
    for source in (file, file.parent):
        loaded = load_vit("test_vit", str(source))
        assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "assumed" not in capsys.readouterr().out


def test_normalisation_that_nothing_states(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = timm.get_pretrained_cfg("test_vit")
    assert record is not None
    assert load_vit("test_vit", str(file)).mean == tuple(record.mean)
    out = capsys.readouterr()
    assert "the pixel normalisation of test_vit.r160_in1k is assumed" in out.out + out.err
    (file.parent / "config.json").write_text('{"pretrained_cfg": {"mean": [127, 127, 127]}}')
    with pytest.warns(UserWarning, match="must be within 10 of 0"):
        assert load_vit("test_vit", str(file)).mean == tuple(record.mean)


def test_the_tag_of_a_record_is_kept_with_a_file(file: Path) -> None:
    backbone = ViTBackbone("test_vit.r160_in1k", str(file))
    assert backbone.settings.name == "test_vit.r160_in1k"
    assert ViTBackbone("test_vit", str(file)).settings.name == "test_vit"
    assert ViTBackbone.of(backbone.settings).identity == backbone.identity


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no such file; give an existing weights file, a tag"),
        (b"", ValueError, "it is empty"),
        (b"<html>", ValueError, "web page"),
    ],
)
def test_files_that_cannot_be_read(
    content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(error, match=message):
        load_vit("test_vit", str(tmp_path / "weights.pth"))


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="whole pickled model"):
        load_vit("test_vit", str(tmp_path / "weights.pth"))


def test_the_identity_depends_on_weights_and_grid(file: Path) -> None:
    """Positional embeddings are interpolated, as those of a CLIP; rotary ones have no tensor."""
    first = ViTBackbone("test_vit", str(file))
    assert first.weights["sha256"] == first.identity
    assert ViTBackbone("test_vit", str(file), 160).identity == first.identity
    assert ViTBackbone("test_vit", str(file), 96).identity != first.identity
    torch.manual_seed(0)
    rotary = ViTBackbone("vit_form_dinov3", "random")
    torch.manual_seed(0)
    assert ViTBackbone("vit_form_dinov3", "random", 96).identity == rotary.identity


def test_numbers_for_the_help() -> None:
    summary = summary_of("test_vit3.r160_in1k")
    model: Any = timm.create_model("test_vit3")
    assert summary.num_blocks == len(model.blocks)
    assert (summary.width, summary.stride, summary.image_size) == (model.embed_dim, 16, 160)
    assert summary.num_prefix_tokens == model.num_prefix_tokens
    assert summary.tags == ["r160_in1k"]
    with pytest.raises(ValueError, match="do not return one token per patch"):
        summary_of("test_resnet")
