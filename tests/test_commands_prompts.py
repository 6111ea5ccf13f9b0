from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_picture
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.cli import main
from anomaly_clip.commands.prompts import prompt_effects
from anomaly_clip.methods import SDP

FEW = PromptEnsemble(["{}", "good {}", "fine {}"], ["bad {}", "torn {}"], ["a {}.", "the {}."])


def tiny(clip: CLIPBackbone, words: PromptEnsemble = FEW) -> SDP:
    return SDP(clip, words, RVSSettings("mean"))


def test_every_prompt_has_a_row(tiny_clip: CLIPBackbone) -> None:
    rows, distances = prompt_effects(tiny(tiny_clip), "nut")
    assert [row.sentence for row in rows if row.abnormal] == FEW.for_category("nut")[1]
    assert len(rows) == 10
    assert all(abs(row.typical) <= 1.0001 and row.similarity is None for row in rows)
    assert set(distances) == {"mean", "pca", "kde", "dbscan", "mean_shift"}
    text = tiny(tiny_clip).text("nut")
    angle = np.degrees(np.arccos(float(text[:, 0] @ text[:, 1])))
    assert distances["mean"] == pytest.approx(angle, abs=1e-3)


def test_an_effect_is_the_difference_without_the_prompt(tiny_clip: CLIPBackbone) -> None:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    rows, _ = prompt_effects(tiny(tiny_clip), "nut", pixels)
    # Without the prompt "the bad nut.", the abnormal class has "bad" in one template only.
    kept = PromptEnsemble(FEW.states_normal, ["bad {}"], ["a {}."])
    sdp, without = tiny(tiny_clip), tiny(tiny_clip, kept)
    both = PromptEnsemble(FEW.states_normal, ["bad {}"], ["a {}.", "the {}."])
    rows, _ = prompt_effects(tiny(tiny_clip, both), "nut", pixels)
    whole, reduced = tiny(tiny_clip, both).text("nut"), sdp.text("nut").clone()
    reduced[:, 1] = without.text("nut")[:, 1]
    reduced[:, 0] = whole[:, 0]
    with_prompt, without_prompt = (
        sdp.score_with_text(pixels, text[None]) for text in (whole, reduced)
    )
    row = next(row for row in rows if row.sentence == "the bad nut.")
    assert row.text_effect == pytest.approx(
        float(with_prompt["image_score"] - without_prompt["image_score"]), abs=1e-5
    )
    parts = with_prompt["score_parts"] - without_prompt["score_parts"]
    assert row.map_effect == pytest.approx(float(parts[0, 1]), abs=1e-5)


def test_the_only_prompt_of_a_class_has_no_effect(tiny_clip: CLIPBackbone) -> None:
    alone = PromptEnsemble(["{}"], ["bad {}"], ["a {}."])
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    rows, distances = prompt_effects(tiny(tiny_clip, alone), "nut", pixels)
    assert [row.map_effect for row in rows] == [None, None]
    assert_close(distances["mean"], distances["kde"], atol=1e-3, rtol=0)


def test_the_command(
    tmp_path: Path, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = save_picture(tmp_path / "photo.png")
    words = ["prompts", "--data.category", "nut [M3]", f"--model.backbone.name={tiny_clip_config}"]
    words += ["--model.backbone.pretrained", "random", "--rvs.method", "mean", "--top", "2"]
    words += ["--prompts.states_normal", '["{}", "good {}"]']
    words += ["--prompts.states_abnormal", '["bad {}"]']
    file = tmp_path / "words.csv"
    assert main([*words, "--image", str(image), "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert "nut [M3]: 44 normal prompts, 22 abnormal prompts" in out
    assert "angle between the representative vectors in degrees: mean " in out
    assert "RANDOM WEIGHTS" in out
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 66
    assert rows[-1]["sentence"].startswith("a photo of a bad nut [M3]")
    assert {row["abnormal"] for row in rows} == {"0", "1"}
    assert all(float(row["map_effect"]) == float(row["map_effect"]) for row in rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--category missing"),
        (["--category", " "], "--category ' ' is empty"),
        (["--category", "nut", "--top", "0"], "--top must be 1 or more"),
        (["--category", "nut", "--image", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--category", "nut", "--prompts.templates", "[]"], "prompts.templates is empty"),
        (["--category", "nut", "--prompts.templates", '["a photo"]'], "needs one {}"),
        (["--category", "nut", "--prompts.states_normal", "[]"], "states_normal is empty"),
        (["--category", "nut", "--rvs.eps", "-1"], "rvs.eps must be above 0"),
        (["--categry", "nut"], "unknown option --categry"),
    ],
)
def test_a_users_mistakes(
    more: list[str], message: str, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prompts", "--backbone.name", tiny_clip_config, "--backbone.pretrained", "random"]
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err
