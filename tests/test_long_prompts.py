"""Prompts that have more tokens than CLIP's text tower."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import PromptEnsemble, check_prompts, text_features
from anomaly_clip.backbones.tab_prompts import PROMPT_SETS, TABPrompts
from anomaly_clip.cli import main
from anomaly_clip.data.info import DATASETS
from anomaly_clip.demo.photographs import CATEGORIES

LONG = "x7q9" * 20  # 80 tokens in all: every letter and digit is one
FULL = " ".join(["part"] * 66)  # with the longest prompts just too long


@pytest.mark.slow
def test_published_prompts_are_complete(tiny_clip: CLIPBackbone) -> None:
    names = {*CATEGORIES, "laser-cut plank", "magnetic tile"}
    for data in DATASETS:
        names |= {*data_words(data)}
    assert len(names) > 60
    ensembles: list[PromptEnsemble | TABPrompts] = [
        PromptEnsemble(),
        PromptEnsemble(templates="reimpl"),
    ]
    ensembles += [TABPrompts(preset) for preset in PROMPT_SETS]
    ensembles += [TABPrompts(positions=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ensemble in ensembles:
            for name in names:
                check_prompts(tiny_clip, name, *ensemble.for_category(name))


def data_words(data: str) -> set[str]:
    from anomaly_clip.data.info import dataset_info

    info = dataset_info(data)
    return {*info.words.values(), *info.counts}


@pytest.mark.parametrize("length", range(70, 78))
def test_a_prompt_is_cut_if_its_end_is_missing(tiny_clip: CLIPBackbone, length: int) -> None:
    prompt = " ".join(["part"] * length)
    ids = tiny_clip.tokenize([prompt])
    kept = int((ids[0] == tiny_clip.tokenize(["part"])[0, 1]).sum())
    assert tiny_clip.is_cut(prompt) == (kept < length)


def test_bytes_are_counted_rather_than_letters(tiny_clip: CLIPBackbone) -> None:
    assert not tiny_clip.is_cut("板" * 20)
    assert tiny_clip.is_cut("板" * 60)


def test_normal_prompts_that_become_abnormal_are_refused(tiny_clip: CLIPBackbone) -> None:
    with pytest.raises(ValueError, match=r"198 of 418|have more than the 77 tokens") as caught:
        text_features(tiny_clip, LONG)
    message = str(caught.value)
    assert message.startswith(f"prompts with the name '{LONG}': 418 of 418 have more than")
    assert message.endswith(": give a shorter name with data.category or data.words")
    assert "normal prompts equal abnormal ones" in message


def test_ends_that_are_lost_are_told_once(tiny_clip: CLIPBackbone) -> None:
    with pytest.warns(UserWarning, match=r"\d+ of 418 have more than the 77 tokens") as caught:
        text_features(tiny_clip, FULL)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "and lose their ends, such as 'a" in message
    assert re.search(r"', which loses '.+': give a shorter name", message)


def test_the_end_that_is_lost(tiny_clip: CLIPBackbone) -> None:
    prompt = " ".join(["part"] * 74)
    assert tiny_clip.lost_end(prompt) == ""
    assert tiny_clip.lost_end(f"{prompt} with") == ""
    assert tiny_clip.lost_end(f"{prompt} with flaw.") == "flaw ."


FOLDER = ["--data", "ImageFolder", "--data.root", "ROOT/bottle", "--data.category", LONG]
CLIP = ["--model.backbone.pretrained", "demo", "--data.num_workers", "0"]
AUXILIARY = ["--data.auxiliary", "ImageFolder", "--data.auxiliary.root", "ROOT/metal_nut"]
AUXILIARY += ["--data.auxiliary.category", LONG]
TAB = ["--model.backbone.weights=random", "--model.text.name=demo", "--model.text.pretrained=demo"]
TAB += [
    "--trainer.max_epochs=1",
    "--data",
    "MVTecAD",
    "--data.root",
    "ROOT",
    "--data.words.bottle",
    LONG,
]


@pytest.mark.parametrize(
    "words",
    [
        ["test", "--model", "SDP", *FOLDER, *CLIP],
        ["predict", "--model", "WinCLIP", *FOLDER, *CLIP],
        ["fit", "--model", "SDPPlus", *FOLDER, *CLIP, *AUXILIARY, "--trainer.max_epochs=1"],
        [
            "fit",
            "--model",
            "TAB",
            *TAB,
            "--data.synthesis.recipe=nsa",
            "--data.synthesis.mode=pair",
        ],
        ["prompts", "--category", LONG, "--backbone.pretrained", "demo"],
    ],
)
def test_every_method_with_names_in_prompts(
    words: list[str],
    tmp_path: Path,
    mvtec_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("ROOT", str(mvtec_root)) for word in words]) == 2
    assert f"prompts with the name '{LONG}'" in capsys.readouterr().err
    assert not list(Path().glob("runs/*/*"))
