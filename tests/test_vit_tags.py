"""Tags of timm's weights: records, the hub's cache, files by address, and what cannot be had."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vit_forms
from safetensors.torch import save_file

from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.backbones.vit_tags import choose, fetch_tag, tags_of

REPOSITORY = "models--timm--test_vit.r160_in1k"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set empty caches, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def cached(caches: Path, name: str) -> Path:
    folder = caches / "hub" / REPOSITORY
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    file = folder / "snapshots" / "abc" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("weights", ["auto", "r160_in1k"])
def test_a_tag_in_the_cache_of_the_hub(caches: Path, name: str, weights: str) -> None:
    state = vit_forms.randomised(timm.create_model("test_vit")).state_dict()
    file = cached(caches, name)
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    backbone = ViTBackbone("test_vit", weights)
    assert backbone.label == ("test_vit", "r160_in1k")
    assert backbone.model.state_dict()["pos_embed"].equal(state["pos_embed"])
    tagged = ViTBackbone("test_vit.r160_in1k")
    assert (tagged.label, tagged.identity) == (backbone.label, backbone.identity)
    assert ViTBackbone.of(backbone.settings).identity == backbone.identity
    assert ViTBackbone("test_vit", str(file)).identity == backbone.identity


def test_a_file_that_official_programs_have_downloaded(
    caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = choose("vit_small_patch14_dinov2", "auto")
    file = caches / "torch" / "checkpoints" / Path(choice.record.url).name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert fetch_tag(choice) == file
    assert capsys.readouterr().out == ""


def test_a_damaged_file_by_address_is_not_used(caches: Path) -> None:
    choice = choose("test_vit", "auto")
    digest = hashlib.sha256(b"whole").hexdigest()[:8]
    record = type(choice.record)(url=f"https://example.org/a-{digest}.pth")
    choice = choice._replace(record=record)
    file = caches / "torch" / "checkpoints" / f"a-{digest}.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"whole")
    assert fetch_tag(choice) == file
    file.write_bytes(b"cut")
    with (
        pytest.warns(UserWarning, match="its sha256 begins with"),
        pytest.raises(FileNotFoundError, match=r"cannot be downloaded .offline mode is set."),
    ):
        fetch_tag(choice)


def test_offline_the_error_names_caches_and_ways_out(caches: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        ViTBackbone("test_vit3")
    text = str(error.value)
    for part in (str(caches / "hub"), str(caches / "torch"), "offline mode is set", "'random'"):
        assert part in text
    for part in ("--model.backbone.weights FILE", "--model.backbone.pretrained demo"):
        assert part in text
    assert "\n" not in text


def test_an_unreachable_hub_is_tried_once(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []

    def refuse(request: Any, timeout: float) -> None:
        addresses.append(request.full_url)
        raise OSError("refused")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(FileNotFoundError, match=r"no answer from .*: refused"):
        ViTBackbone("test_vit3")
    assert len(addresses) == 1
    assert addresses[0].endswith("timm/test_vit3.r160_in1k")


def test_a_download_takes_safetensors_first(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    names = []

    def download(repository: str, name: str, revision: str | None) -> str:
        names.append((repository, name, revision))
        if name == "model.safetensors":
            raise EntryNotFoundError("no such file")
        return "a/pytorch_model.bin"

    monkeypatch.setattr("anomaly_clip.backbones.vit_tags.why_no_download", lambda address: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fetch_tag(choose("test_vit", "auto")) == Path("a/pytorch_model.bin")
    assert [name for _, name, _ in names] == ["model.safetensors", "pytorch_model.bin"]
    assert names[0][0] == "timm/test_vit.r160_in1k"


def test_tags_begin_with_the_default() -> None:
    tags = tags_of("vit_small_patch16_224")
    default = timm.get_pretrained_cfg("vit_small_patch16_224")
    assert default is not None
    assert tags[0] == default.tag
    assert "dino" in tags
    assert tags_of("test_vit4") == []


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("vit_small_patch16_224", "", "is empty; give 'auto'"),
        ("vit_small_patch16_224", "nonsense", "is no tag of vit_small_patch16_224 .*dino"),
        ("vit_small_patch16_224", "imagenet", "is for CNNs, not for .*give 'auto'"),
        ("vit_small_patch16_224.nonsense", "auto", "has no tag nonsense .*dino"),
        ("vit_small_patch16_224.dino", "augreg_in1k", "contradicts the tag in backbone.name"),
        ("test_vit4", "auto", "no weights of test_vit4 are published"),
        ("", "auto", "backbone.name is empty"),
        ("ViT_Small_Patch16_224", "auto", "did you mean vit_small_patch16_224"),
        ("timm/vit_small_patch16_224.dino", "auto", "did you mean vit_small_patch16_224"),
        ("vit_base_patch16_224_dino", "auto", "earlier name .*use vit_base_patch16_224.dino"),
    ],
)
def test_names_and_tags_that_do_not_fit(name: str, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        choose(name, weights)
    assert "\n" not in str(error.value)


def test_a_tag_in_the_name_with_a_file_chooses_the_record() -> None:
    choice = choose("vit_small_patch16_224.dino", "weights.pth")
    assert (choice.tag, choice.source, choice.is_tag) == ("dino", "weights.pth", False)
    assert tuple(choice.record.mean) == pytest.approx((0.485, 0.456, 0.406))
    assert choose("vit_small_patch16_224", "dino").record == choice.record
