"""``quick_gelu`` and ``positions``: effect, records, caches, checkpoints of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import MEAN, TINY_CLIP, WORDS
from safetensors.torch import save_file
from torch.testing import assert_close
from weight_forms import state_of, write_archive, write_tiny_config

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, from_checkpoint
from anomaly_clip.backbones.prompts import text_features
from anomaly_clip.cli import main
from anomaly_clip.commands.saved_settings import comparable, take_activation
from anomaly_clip.methods import SDP
from anomaly_clip.records import source_of, variant_of
from anomaly_clip.reporting.published_reader import load_published
from anomaly_clip.reporting.run_matching import differences
from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.metrics_file import weights_label


@pytest.fixture
def file(tiny_clip: CLIPBackbone, tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(state_of(tiny_clip.model), folder / "clip.safetensors")
    return folder / "clip.safetensors"


def write_settings(file: Path, **model: object) -> None:
    content = {"model_cfg": {**TINY_CLIP, **model}}
    (file.parent / "open_clip_config.json").write_text(json.dumps(content))


# -- settings ------------------------------------------------------------------------------------


def test_booleans_become_texts() -> None:
    assert CLIPSettings() == CLIPSettings(quick_gelu="auto", positions="bicubic_antialias")
    assert CLIPSettings(quick_gelu=True).quick_gelu == "true"
    assert CLIPSettings(quick_gelu=False) == CLIPSettings(quick_gelu="false")


@pytest.mark.parametrize("option", ["quick_gelu", "positions"])
def test_other_values_are_refused(option: str) -> None:
    values: dict[str, Any] = {option: "maybe"}
    with pytest.raises(ValueError, match=rf"backbone.{option} must be one of .*, got maybe"):
        CLIPSettings(**values)
    with pytest.raises(ValueError, match=rf"backbone.{option} must be one of .*, got maybe"):
        CLIPBackbone("ViT-B-16", "random", **values)


# -- activation ----------------------------------------------------------------------------------


def activation(backbone: CLIPBackbone) -> str:
    towers = (backbone.visual.transformer, backbone.model.transformer)
    names = {type(block.mlp.gelu).__name__ for tower in towers for block in tower.resblocks}
    assert len(names) == 1
    return names.pop()


@pytest.mark.parametrize("option", ["auto", "true", "false"])
@pytest.mark.parametrize("next_to", [None, False, True])
@pytest.mark.parametrize("config", [None, False, True])
def test_the_activation_of_a_file(
    file: Path,
    tmp_path: Path,
    option: Any,
    next_to: bool | None,
    config: bool | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The option, else the JSON model configuration, else the file next to the weights."""
    name = write_tiny_config(tmp_path, **({} if config is None else {"quick_gelu": config}))
    if next_to is not None:
        write_settings(file, quick_gelu=next_to)
    backbone = CLIPBackbone(name, str(file), quick_gelu=option)
    expected = next((v for v in (config, next_to) if v is not None), False)
    expected = expected if option == "auto" else option == "true"
    assert activation(backbone) == ("QuickGELU" if expected else "GELU")
    auto = next((v for v in (config, next_to) if v is not None), False)
    is_default = expected == auto == bool(config)
    assert backbone.weights.get("activation") == (None if is_default else activation(backbone))
    lines = capsys.readouterr().err.splitlines()
    assumed = [line for line in lines if "assumed" in line]
    assert len(assumed) == 1  # the pixel normalisation at least
    is_assumed = option == "auto" and config is None and next_to is None
    assert ("GELU, the activation of" in assumed[0]) == is_assumed
    differs = option == "auto" and next_to is not None and next_to != bool(config)
    assert len(lines) == 1 + differs


def test_nothing_is_assumed_of_complete_settings(
    file: Path, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (file.parent / "open_clip_config.json").write_text(json.dumps(content))
    backbone = CLIPBackbone(tiny_clip_config, str(file))
    assert backbone.mean.flatten().tolist() == [0.5] * 3
    for name, pretrained in ((tiny_clip_config, "random"), ("demo", "demo"), ("demo", "random")):
        CLIPBackbone(name, pretrained)
    assert capsys.readouterr().err == ""


def test_an_archive_states_its_activation(
    tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(tmp_path / "ViT.pt", quick_gelu=True)
    assert activation(CLIPBackbone(tiny_clip_config, str(tmp_path / "ViT.pt"))) == "QuickGELU"
    assert "QuickGELU according to the classes in the archive" in capsys.readouterr().err
    state = state_of(CLIPBackbone(tiny_clip_config, "random").model)
    torch.save({**state, "vocab_size": torch.tensor(49408)}, tmp_path / "openai.pt")
    assert activation(CLIPBackbone(tiny_clip_config, str(tmp_path / "openai.pt"))) == "QuickGELU"
    assert "that of OpenAI's archives" in capsys.readouterr().err


def test_activation_without_weights(tiny_clip_config: str) -> None:
    plain = CLIPBackbone(tiny_clip_config, "random")
    quick = CLIPBackbone(tiny_clip_config, "random", quick_gelu=True)
    assert (activation(plain), activation(quick)) == ("GELU", "QuickGELU")
    assert quick.weights["activation"] == "QuickGELU"


# -- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "mode", "antialias"),
    [
        ("bicubic_antialias", "bicubic", True),
        ("bicubic", "bicubic", False),
        ("bilinear", "bilinear", False),
    ],
)
@pytest.mark.parametrize("size", [48, 16])
def test_positions_are_interpolated_as_requested(
    tiny_clip: CLIPBackbone,
    tiny_clip_config: str,
    file: Path,
    positions: Any,
    mode: str,
    antialias: bool,
    size: int,
) -> None:
    backbone = CLIPBackbone(tiny_clip_config, str(file), size, positions=positions)
    old = tiny_clip.visual.positional_embedding
    grid = old[1:].T.reshape(1, 24, 4, 4)
    side = size // 8
    expected = F.interpolate(grid, (side, side), mode=mode, antialias=antialias)
    given = backbone.visual.positional_embedding
    assert_close(given[1:], expected.reshape(24, side * side).T)
    assert_close(given[0], old[0])


def test_positions_at_the_original_size_stay(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, file: Path
) -> None:
    backbone = CLIPBackbone(tiny_clip_config, str(file), positions="bilinear")
    assert backbone.identity == tiny_clip.identity
    assert backbone.weights["positions"] == "bilinear"


# -- records -------------------------------------------------------------------------------------


def test_the_record_names_what_is_not_the_default(tiny_clip_config: str, file: Path) -> None:
    plain = CLIPBackbone(tiny_clip_config, str(file)).weights
    assert set(plain) == {"backbone", "pretrained", "random", "sha256"}
    assert (source_of(plain), variant_of(plain)) == (str(file), "")
    assert CLIPBackbone(tiny_clip_config, str(file), quick_gelu=False).weights == plain
    other = CLIPBackbone(tiny_clip_config, str(file), quick_gelu=True, positions="bicubic").weights
    assert variant_of(other) == "QuickGELU, bicubic positions"
    assert weights_label(other) == f"{file}, QuickGELU, bicubic positions"


def test_a_run_with_other_options_matches_no_published_row() -> None:
    source = load_published()
    table = next(iter(source.tables.values()))
    row = next(row.run for row in table.rows if row.run is not None)
    run = FinishedRun(Path("a"), "SDP", "MVTecAD", "b", row.weights, False, {}, {})
    text = "its weights have GELU, bicubic positions"
    assert text not in differences(row, run, source, {})
    other = FinishedRun(
        *(Path("a"), "SDP", "MVTecAD", "b", row.weights, False, {}, {}),
        variant="GELU, bicubic positions",
    )
    assert text in differences(row, other, source, {})


# -- caches --------------------------------------------------------------------------------------


def test_text_features_are_not_shared_between_activations(
    tiny_clip_config: str, file: Path, tmp_path: Path
) -> None:
    features = {}
    for option in (False, True, False):
        backbone = CLIPBackbone(tiny_clip_config, str(file), quick_gelu=option)
        features[option] = text_features(backbone, "nut", WORDS, MEAN)
        embedded = backbone.encode_text(["a good nut."])
        assert torch.equal(embedded, backbone.encode_text(["a good nut."]))
    assert not torch.allclose(features[False], features[True], atol=1e-6)
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2


def test_the_identity_covers_positions(tiny_clip_config: str, file: Path) -> None:
    options: list[Any] = ["bicubic_antialias", "bicubic", "bilinear"]
    backbones = [CLIPBackbone(tiny_clip_config, str(file), 48, positions=p) for p in options]
    assert len({backbone.identity for backbone in backbones}) == 3


# -- checkpoints of version 0.1.0 ----------------------------------------------------------------


def test_saved_settings_without_the_options_give_the_activation_of_0_1(
    tiny_clip_config: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"name": tiny_clip_config, "pretrained": str(file), "image_size": None}
    assert from_checkpoint(saved)["quick_gelu"] == "auto"
    write_settings(file, quick_gelu=True)
    assert activation(CLIPBackbone.of(saved)) == "GELU"
    assert "quick_gelu is false, as in version 0.1.0" in capsys.readouterr().err
    assert activation(CLIPBackbone.of({**saved, "quick_gelu": "auto"})) == "QuickGELU"
    assert activation(CLIPBackbone.of(CLIPSettings(tiny_clip_config, str(file)))) == "QuickGELU"
    for pretrained in ("random", "laion400m_e31", "missing.pt"):
        assert from_checkpoint({"pretrained": pretrained})["quick_gelu"] == "auto"


def test_settings_are_compared_with_all_options(tiny_clip_config: str) -> None:
    old = {"name": tiny_clip_config, "pretrained": "random", "image_size": None}
    new = {**old, "quick_gelu": False, "positions": "bilinear"}
    assert comparable(old, "backbone", True) == comparable(new, "backbone", True)
    assert comparable(old, "backbone", False) != comparable(new, "backbone", False)
    default = {**old, "quick_gelu": "auto", "positions": "bicubic_antialias"}
    for name in ("backbone", "text"):
        assert comparable(old, name, False) == comparable(default, name, False)
    assert comparable(old, "text", False) != comparable(new, "text", False)
    cnn = {"name": "resnet18", "weights": "random", "layers": None}
    chosen = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "layers": None}
    assert comparable(cnn, "backbone", True) == {"name": "resnet18", **chosen}
    default = {**cnn, "weights": "auto", "mean": None, "std": None}
    assert comparable(default, "backbone", True) == comparable(cnn, "backbone", True)
    assert comparable(3, "backbone", True) == 3
    assert comparable({"a": 1}, "prompts", True) == {"a": 1}


def test_the_activation_is_taken_only_from_old_checkpoints(
    tiny_clip_config: str, file: Path
) -> None:
    write_settings(file, quick_gelu=True)
    old = {"name": tiny_clip_config, "pretrained": str(file)}
    for saved, option, expected in (
        (old, "auto", "false"),
        (old, "true", "true"),
        ({**old, "quick_gelu": "auto"}, "auto", "auto"),
        ({"weights": "random"}, "auto", "auto"),
    ):
        arguments = {"backbone": {**old, "quick_gelu": option}}
        take_activation(arguments, "backbone", saved)
        assert arguments["backbone"]["quick_gelu"] == expected


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["false", "no"])
def test_a_run_records_both_options(
    tiny_sdp: list[str],
    file: Path,
    tmp_path: Path,
    typed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_settings(file, quick_gelu=True)
    words = [word for word in tiny_sdp if "pretrained" not in word]
    words += [f"--model.backbone.pretrained={file}", "--model.backbone.image_size=48"]
    words += [f"--model.backbone.quick_gelu={typed}", "--model.backbone.positions=bilinear"]
    assert main(["test", *words]) == 0
    assert f"with weights {file}, GELU, bilinear positions |" in capsys.readouterr().err
    (run,) = (tmp_path / "runs").rglob("metrics.json")
    weights = json.loads(run.read_text())["run"]["weights"]
    assert (weights["activation"], weights["positions"]) == ("GELU", "bilinear")
    assert "GELU, bilinear positions" in (run.parent / "report.html").read_text()
    assert "GELU, bilinear positions" in (run.parent / "metrics.csv").read_text()
    config = yaml.safe_load((run.parent / "config-test.yaml").read_text())
    backbone = config["model"]["init_args"]["backbone"]
    assert (str(backbone["quick_gelu"]).lower(), backbone["positions"]) == ("false", "bilinear")
    again = ["test", "--config", str(run.parent / "config-test.yaml")]
    assert main([*again, f"--output.root={tmp_path / 'again'}"]) == 0
    (second,) = (tmp_path / "again").rglob("metrics.json")
    assert json.loads(second.read_text())["run"]["weights"] == weights


def test_the_prompts_verb_takes_both_options(
    tiny_clip_config: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prompts", "--category", "nut", "--backbone.name", tiny_clip_config]
    words += ["--backbone.pretrained", str(file), "--prompts.states_normal", '["a {}"]']
    words += ["--prompts.states_abnormal", '["bad {}"]', "--rvs.method", "mean"]
    outputs = {}
    for option in ("auto", "true", "false"):
        more = ["--backbone.quick_gelu", option, "--backbone.positions", "bicubic"]
        assert main([*words, *more]) == 0
        outputs[option] = capsys.readouterr().out
    assert outputs["auto"] == outputs["false"] != outputs["true"]
    assert main([*words, "--backbone.quick_gelu", "maybe"]) == 2
    assert "backbone.quick_gelu: expected one of 'auto', 'true'" in capsys.readouterr().err


def test_sdp_in_python(tiny_clip_config: str, file: Path) -> None:
    settings = CLIPSettings(tiny_clip_config, str(file), quick_gelu=True)
    assert activation(SDP(settings).backbone) == "QuickGELU"
    assert SDP({"name": tiny_clip_config, "pretrained": "random", "quick_gelu": True}).backbone  # type: ignore[arg-type]
