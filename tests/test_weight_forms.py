"""Every form in which people have weights is taken, or refused with the way out."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weight_forms import (
    TAKEN,
    change_archive,
    state_of,
    write_archive,
    write_refused,
)

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.weight_files import WeightFileError, check_floating
from anomaly_clip.backbones.weights import load_clip
from anomaly_clip.cli import main


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", TAKEN)
def test_forms_that_are_taken(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path, form: str, images: torch.Tensor
) -> None:
    content = TAKEN[form](state_of(tiny_clip.model))
    torch.save(content, tmp_path / "clip.pt")
    taken = CLIPBackbone(tiny_clip_config, str(tmp_path / "clip.pt"), quick_gelu="false")
    tolerance = {"half precision": 2e-3, "bfloat16": 2e-2}.get(form, 0)
    for ours, theirs in (
        (taken(images)[0].projected, tiny_clip(images)[0].projected),
        (taken.encode_text(["a nut"]), tiny_clip.encode_text(["a nut"])),
    ):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    if not tolerance:
        assert taken.identity == tiny_clip.identity


@pytest.mark.parametrize(
    "name", ["clip.safetensors", "clip.bin", "0a1b2c", "clip.tar", "clip.ckpt"]
)
@pytest.mark.parametrize("writer", ["safetensors", "zip", "legacy"])
def test_the_content_decides_rather_than_the_name(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path, name: str, writer: str
) -> None:
    state, path = state_of(tiny_clip.model), tmp_path / name
    if writer == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=writer == "zip")
    assert CLIPBackbone(tiny_clip_config, str(path)).identity == tiny_clip.identity


def test_forms_that_are_refused(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path
) -> None:
    for form, (path, message) in write_refused(tmp_path, state_of(tiny_clip.model)).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=r"^backbone\.pretrained ") as error:
                load_clip(tiny_clip_config, str(path))
        text = str(error.value)
        assert message in text, form
        assert str(path) in text, form
        assert "; " in text, form
        assert "\n" not in text, form
        assert "\x1b" not in text, form
        assert "weights_only" not in text, form


@pytest.mark.parametrize(
    "form", ["empty", "module", "web page", "short", "two CLIPs", "another width", "NaN", "meta"]
)
def test_the_command_line_says_so_in_one_line(
    tiny_clip: CLIPBackbone,
    tiny_clip_config: str,
    tmp_path: Path,
    form: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, message = write_refused(tmp_path, state_of(tiny_clip.model))[form]
    words = ["prompts", "--category", "nut", "--backbone.name", tiny_clip_config]
    assert main([*words, "--backbone.pretrained", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("name", ["~nobody-here/clip.pt", f"{'a' * 300}.pt", "b" * 300])
def test_paths_that_the_system_refuses(
    tiny_clip_config: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prompts", "--category", "nut", "--backbone.name", tiny_clip_config]
    assert main([*words, "--backbone.pretrained", name]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert f"backbone.pretrained {name}" in line
    assert "Union" not in line


def test_a_configuration_that_is_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.json").write_text("3")
    words = ["prompts", "--category", "nut", "--backbone.name", str(tmp_path / "model.json")]
    assert main([*words, "--backbone.pretrained", "random"]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    # Newer versions of open_clip fail later.
    reasons = (
        "the weights cannot be loaded (TypeError: ",
        "the model configuration cannot be used (",
    )
    assert any(f"model.json: {reason}" in line for reason in reasons)


def test_exceptions_of_libraries_become_one_sentence(
    tiny_clip: CLIPBackbone,
    tiny_clip_config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this.\nSecond line")

    torch.save(state_of(tiny_clip.model), tmp_path / "clip.pt")
    monkeypatch.setattr("anomaly_clip.backbones.weights.resize_pos_embed", fail)
    with pytest.raises(ValueError, match=r"clip\.pt .*\(RuntimeError: no kernel for this\); give"):
        load_clip(tiny_clip_config, str(tmp_path / "clip.pt"))


@pytest.mark.parametrize("half", [False, True])
def test_archives_give_features_without_a_warning(
    tiny_clip_config: str, tmp_path: Path, images: torch.Tensor, half: bool
) -> None:
    state = write_archive(tmp_path / "ViT.pt", half=half)
    taken = CLIPBackbone(tiny_clip_config, str(tmp_path / "ViT.pt"))
    torch.save(state, tmp_path / "state.pt")
    plain = CLIPBackbone(tiny_clip_config, str(tmp_path / "state.pt"))
    assert taken.identity == plain.identity
    assert torch.equal(taken(images)[0].projected, plain(images)[0].projected)


def test_a_damaged_archive_is_refused(tiny_clip_config: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "ViT.pt")
    changed = change_archive(tmp_path / "ViT.pt", tmp_path / "bad.pt", {"data.pkl": b"\x80\x02."})
    with pytest.raises(
        ValueError, match=r"a TorchScript archive of which only tensors are read, b"
    ):
        load_clip(tiny_clip_config, str(changed))


def test_repeated_elements_are_refused_from_a_gigabyte_on() -> None:
    ones = torch.ones(1)
    check_floating({"a": ones.expand(2**20, 4), "b": ones})
    with pytest.raises(WeightFileError, match=r"repeat their elements \(b has 268435456 of them\)"):
        check_floating({"a": ones.expand(2**20, 4), "b": ones.expand(2**28)})
