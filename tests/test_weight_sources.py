"""Places that weights come from: folders, the hub's cache, caches by address, tags, settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import TINY_CLIP
from safetensors.torch import save_file
from weight_forms import state_of, to_transformers, write_archive

from anomaly_clip.backbones import weights
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.weight_settings import settings_next_to
from anomaly_clip.backbones.weight_sources import local_file
from anomaly_clip.backbones.weight_tags import other_epoch
from anomaly_clip.records import variant_of

OPTION = "backbone.pretrained"


@pytest.fixture
def snapshot(tiny_clip: CLIPBackbone, tmp_path: Path) -> Path:
    """Write a repository as the model hub caches it; return the snapshot's folder."""
    repository = tmp_path / "models--timm--tiny"
    folder, blobs = repository / "snapshots" / "abc", repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(state_of(tiny_clip.model), blobs / "0123")
    content = {
        "model_cfg": {**TINY_CLIP, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]},
    }
    (blobs / "4567").write_text(json.dumps(content))
    for name, blob in (("open_clip_model.safetensors", "0123"), ("open_clip_config.json", "4567")):
        (folder / name).symlink_to(f"../../blobs/{blob}")
    return folder


def forms(snapshot: Path) -> dict[str, Path]:
    return {
        "the link in the snapshot": snapshot / "open_clip_model.safetensors",
        "the snapshot": snapshot,
        "the repository": snapshot.parent.parent,
        "the blob": snapshot.parent.parent / "blobs" / "0123",
    }


@pytest.mark.parametrize("form", forms(Path("a/b/c")))
def test_a_snapshot_of_the_hub(
    snapshot: Path, tiny_clip_config: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = weights.load_clip(tiny_clip_config, str(forms(snapshot)[form]))
    assert loaded.activation == "QuickGELU"
    assert loaded.mean == (0.5, 0.4, 0.3)
    assert loaded.std == (0.2, 0.2, 0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "the activation is QuickGELU according to" in lines[0]
    assert "open_clip_config.json, not GELU as in" in lines[0]


def test_folders(snapshot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"folder is a folder with no weights file: give the path"):
        local_file(str(folder), OPTION)
    (folder / "b.pt").touch()
    (folder / "notes.txt").touch()
    assert local_file(str(folder), OPTION) == folder / "b.pt"
    (folder / "a.pth").touch()
    with pytest.raises(ValueError, match=r"with 2 weights files \(a.pth, b.pt\)"):
        local_file(str(folder), OPTION)
    (folder / "pytorch_model.bin").touch()
    (folder / "model.safetensors").touch()
    assert local_file(str(folder), OPTION) == folder / "model.safetensors"
    (snapshot.parent / "other").mkdir()
    assert local_file(str(snapshot.parent.parent), OPTION).parent == snapshot
    (snapshot.parent.parent / "blobs" / "0123").unlink()
    with pytest.raises(FileNotFoundError, match=r"is a link to ../../blobs/0123, which does not e"):
        local_file(str(snapshot / "open_clip_model.safetensors"), OPTION)


@pytest.mark.parametrize(
    "address",
    ["https://example.org/ViT-B-16.pt", "hf-hub:timm/vit", "file:///a/b.pt", "s3://bucket/a.pt"],
)
def test_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is an address, not a file: download"):
        weights.load_clip("ViT-B-16", address)


def test_a_name_without_a_suffix_may_be_a_file(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(state_of(tiny_clip.model), "0123")
    assert CLIPBackbone(tiny_clip_config, "0123").identity == tiny_clip.identity
    with pytest.raises(ValueError, match="has no tags"):
        CLIPBackbone(tiny_clip_config, "4567")


# -- settings next to a file ---------------------------------------------------------------------


def write_transformers(folder: Path, state: dict[str, torch.Tensor], **config: object) -> Path:
    save_file(to_transformers(state), folder / "model.safetensors")
    content = {"model_type": "clip", **config}
    (folder / "config.json").write_text(json.dumps(content))
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("towers", "expected"),
    [
        ({}, "QuickGELU"),  # the default of transformers
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "QuickGELU"),
        ({f"{name}_config": {"hidden_act": "gelu"} for name in ("vision", "text")}, None),
        ({f"{name}_config_dict": {"hidden_act": "gelu"} for name in ("vision", "text")}, None),
    ],
)
def test_settings_of_transformers(
    tiny_clip: CLIPBackbone,
    tiny_clip_config: str,
    tmp_path: Path,
    towers: dict[str, Any],
    expected: str | None,
) -> None:
    file = write_transformers(tmp_path, state_of(tiny_clip.model), **towers)
    loaded = weights.load_clip(tiny_clip_config, str(file))
    assert loaded.activation == expected
    assert loaded.mean == (0.1, 0.2, 0.3)


def test_the_settings_of_the_layout_are_read_first(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    file = write_transformers(tmp_path, state_of(tiny_clip.model))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"quick_gelu": False}))
    for layout, expected in (("transformers", True), ("open_clip", False), (None, False)):
        settings = settings_next_to(file, layout)
        assert settings is not None
        assert settings.quick_gelu is expected


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"preprocess_cfg": {"mean": [1, 2]}}', '{"preprocess_cfg": {"mean": ["a"]}}'),
        *('{"quick_gelu": "false"}', '{"model_cfg": {"quick_gelu": "true"}}'),
        *('{"preprocess_cfg": {"mean": 0.5}}', '{"preprocess_cfg": {"std": [0, 0.2, 0.2]}}'),
        *(
            '{"preprocess_cfg": {"std": [NaN, 1, 1]}}',
            '{"preprocess_cfg": {"mean": [1e999, 0, 0]}}',
        ),
        *('{"preprocess_cfg": {"mean": [123.7, 116, 104]}}', "[" * 100_000),
    ],
)
def test_settings_that_cannot_be_read(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path, content: str
) -> None:
    torch.save(state_of(tiny_clip.model), tmp_path / "clip.pt")
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.warns(UserWarning, match=r"clip.pt, cannot be used \(.*\), and none of") as caught:
        loaded = weights.load_clip(tiny_clip_config, str(tmp_path / "clip.pt"))
    assert len(caught) == 1
    assert loaded.activation is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quick_gelu": "false"}, "quick_gelu is 'false', neither true nor false"),
        ({"preprocess_cfg": {"std": [0.2, 0, 0.2]}}, "std contains 0, and must be in"),
        ({"preprocess_cfg": {"mean": [0.5] * 4}}, "mean has 4 values"),
        ({"preprocess_cfg": [1]}, "cannot be used"),
    ],
)
def test_impossible_values_in_a_model_configuration(
    tiny_clip_config: str, tmp_path: Path, more: dict[str, object], message: str
) -> None:
    config = json.loads(Path(tiny_clip_config).read_text())
    content = {**config, **more} if "quick_gelu" in more else {"model_cfg": config, **more}
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        weights.load_clip(str(tmp_path / "model.json"), "random")


def test_settings_of_other_models_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    assert settings_next_to(tmp_path / "clip.pt") is None
    (tmp_path / "config.json").write_text(
        '{"model_type": "clip", "vision_config": {"hidden_act": "relu"}}'
    )
    with pytest.warns(UserWarning, match="hidden_act is quick_gelu and relu"):
        assert settings_next_to(tmp_path / "clip.pt") is None


# -- tags ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_tags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Register a tiny model; return the records of its tags, and empty all caches."""
    records: dict[str, dict[str, Any]] = {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY_CLIP)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", records)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return records


def by_address(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> str:
    """Write a file into the cache of files by address; return its address, with its hash."""
    folder = tmp_path / "home" / ".cache" / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "file")
    digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()[:8]
    (folder / "file").rename(folder / f"{name}-{digest}.pt")
    return f"https://github.com/mlfoundations/open_clip/releases/{name}-{digest}.pt"


def test_a_file_of_official_programs_is_used_for_its_tag(
    tiny_clip: CLIPBackbone, tiny_tags: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    url = by_address(tmp_path, state_of(tiny_clip.model), "tiny-laion_e1")
    tiny_tags["laion_e1"] = {"url": url, "hf_hub": "timm/tiny.laion_e1/"}
    loaded = CLIPBackbone("tiny", "laion_e1")
    assert loaded.identity == tiny_clip.identity
    assert loaded.weights["pretrained"] == "laion_e1"
    assert set(loaded.weights) == {"backbone", "pretrained", "random", "sha256"}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("option", ["auto", "true", "false"])
def test_an_activation_equal_to_that_of_the_tag_is_the_default(
    tiny_clip: CLIPBackbone,
    tiny_tags: dict[str, dict[str, Any]],
    tmp_path: Path,
    option: Any,
    trained: bool,
) -> None:
    url = by_address(tmp_path, state_of(tiny_clip.model), "tiny-laion_e1")
    tiny_tags["laion_e1"] = {"url": url, "quick_gelu": trained}
    if option == "auto" and trained:  # the model name has GELU
        with pytest.raises(ValueError, match="trained with a different activation"):
            CLIPBackbone("tiny", "laion_e1", quick_gelu=option)
        return
    backbone = CLIPBackbone("tiny", "laion_e1", quick_gelu=option)
    is_quick = option == "true"
    label = "" if is_quick == trained else "QuickGELU" if is_quick else "GELU"
    assert variant_of(backbone.weights) == label
    assert type(backbone.visual.transformer.resblocks[0].mlp.gelu).__name__ == (
        "QuickGELU" if is_quick else "GELU"
    )


def test_a_file_with_another_hash_is_not_used(
    tiny_clip: CLIPBackbone, tiny_tags: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    url = by_address(tmp_path, state_of(tiny_clip.model), "tiny-laion_e1")
    file = tmp_path / "home" / ".cache" / "clip" / url.rpartition("/")[2]
    file.write_bytes(file.read_bytes()[:-1])
    tiny_tags["laion_e1"] = {"url": url, "hf_hub": "timm/tiny.laion_e1/"}
    with (
        pytest.warns(UserWarning, match=r"is not used: its sha256 begins with \w{8}, not"),
        pytest.raises(
            FileNotFoundError, match=r"laion_e1 of tiny is not in .* cannot be downloaded"
        ),
    ):
        CLIPBackbone("tiny", "laion_e1")


def test_an_archive_by_address_of_openai(
    tiny_tags: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "home" / ".cache" / "clip"
    folder.mkdir(parents=True)
    state = write_archive(folder / "Tiny.pt", quick_gelu=True)
    digest = hashlib.sha256((folder / "Tiny.pt").read_bytes()).hexdigest()
    tiny_tags["openai"] = {"url": f"https://openaipublic/{digest}/Tiny.pt", "quick_gelu": True}
    with pytest.raises(ValueError, match=r"set backbone.quick_gelu to true \(or to false for GELU"):
        CLIPBackbone("tiny", "openai")
    published = CLIPBackbone("tiny", "openai", quick_gelu=False)
    assert published.weights["activation"] == "GELU"
    trained = CLIPBackbone("tiny", "openai", quick_gelu="true")
    assert "activation" not in trained.weights  # that of the tag's record
    assert trained.identity != published.identity
    for key, value in state.items():
        assert torch.equal(trained.model.state_dict()[key], value)
    tiny_tags["openai"]["url"] = f"https://openaipublic/{'0' * 64}/Tiny.pt"
    with (
        pytest.warns(UserWarning, match="its sha256 begins with"),
        pytest.raises(FileNotFoundError),
    ):
        CLIPBackbone("tiny", "openai", quick_gelu="true")


def fill_hub(tmp_path: Path, repository: str, state: dict[str, torch.Tensor]) -> None:
    root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "snapshots" / "abc").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    save_file(state, root / "snapshots" / "abc" / "open_clip_model.safetensors")


def test_the_weights_of_another_epoch_are_named(
    tiny_clip: CLIPBackbone, tiny_tags: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    fill_hub(tmp_path, "timm/tiny.laion_e31", state_of(tiny_clip.model))
    record = {"url": "https://a/tiny-laion_e32-01234567.pt", "hf_hub": "timm/tiny.laion_e31/"}
    tiny_tags["laion_e32"] = record
    with pytest.warns(UserWarning, match=r"the model hub has the weights of laion_e31 under") as w:
        loaded = CLIPBackbone("tiny", "laion_e32")
    assert "give the file tiny-laion_e32-01234567.pt for those of laion_e32, or" in str(
        w[0].message
    )
    assert loaded.settings.pretrained == "laion_e32"
    assert loaded.weights["pretrained"] == "laion_e32 (weights of laion_e31)"
    tiny_tags["laion_e31"] = {"hf_hub": "timm/tiny.laion_e31/"}
    assert CLIPBackbone("tiny", "laion_e31").weights["pretrained"] == "laion_e31"
    state = {**state_of(tiny_clip.model), "logit_scale": torch.tensor(1.0)}
    record["url"] = by_address(tmp_path, state, "tiny-laion_e32")
    loaded = CLIPBackbone("tiny", "laion_e32")  # the right file, though the hub's is cached
    assert float(loaded.model.logit_scale) == 1
    assert loaded.weights["pretrained"] == "laion_e32"


def test_tags_of_open_clip_with_the_weights_of_another_epoch() -> None:
    wrong = [
        (name, tag)
        for name, tag in open_clip.list_pretrained()
        if other_epoch(tag, open_clip.get_pretrained_cfg(name, tag))
    ]
    assert set(wrong) <= {("ViT-B-16-plus-240", "laion400m_e32")}
    record = {"hf_hub": "", "url": "https://a/vit_b_16-laion400m_e31-00efa78f.pt"}
    assert other_epoch("laion400m-e32", record) == "laion400m-e31"
    assert other_epoch("openai", record) is None
    assert other_epoch("laion2b_s34b_b88k", record) is None


@pytest.mark.parametrize(
    ("name", "tag", "why"),
    [
        ("RN50-quickgelu", "openai", "image tower is no ViT"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "a CoCa"),
        ("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k", "text tower is one of transformers"),
    ],
)
def test_unsupported_models_are_refused_before_a_download(
    name: str, tag: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    monkeypatch.setattr(weights, "fetch", download)
    with pytest.raises(ValueError, match=f"{why}.*use a CLIP with a plain ViT.*or FastViT of timm"):
        weights.load_clip(name, tag)
