"""The small CLIP that comes with the project: what it is made of, and that it detects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.prompts import (
    PromptEnsemble,
    RVSSettings,
    embed_sentences,
    representative_vector,
)
from anomaly_clip.backbones.weights import ASSETS
from anomaly_clip.cli import main
from anomaly_clip.data import Demo
from anomaly_clip.demo.photographs import DEFECTS
from anomaly_clip.methods import SDP
from anomaly_clip.methods.sdp import text_score
from anomaly_clip.metrics import Evaluator, auroc
from anomaly_clip.records import Batch

CONFIGS = Path(__file__).parent.parent / "configs"
CARD = ASSETS / "demo_clip.md"
WEIGHTS = ASSETS / "demo_clip.safetensors"
MEASURED = Path(__file__).parent.parent / "benchmarks" / "results" / "demo_clip.json"

# What the shipped weights reach on a small set of held-out categories, less 0.02.
FLOORS = {"image_auroc": 0.937 - 0.02, "pixel_auroc": 0.977 - 0.02, "pixel_ap": 0.656 - 0.02}
SMALL_SET = [
    "blue denim cloth",
    "walnut wood board",
    "red brick wall",
    "black leather",
    "brass washer",
    "pink pill",
]


def settings(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    return config


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    with safe_open(WEIGHTS, "pt") as file:
        trained_on: dict[str, Any] = json.loads(file.metadata()["trained_on"])
    return trained_on


def test_what_the_demo_tests_was_never_trained_on(record: dict[str, Any]) -> None:
    data = settings("demo.yaml")["data"]["init_args"]
    tested = set(data["categories"])
    assert len(tested) >= 6
    assert not tested & set(record["categories"])
    assert record["held_out_defects"] == ["hole"]
    assert "hole" in DEFECTS
    shown = {s.defect for s in Demo(categories=sorted(tested), num_test=40).samples("test")}
    assert "hole" in shown
    assert data["seed"] != record["data_seed"]


def test_the_weights_are_those_of_the_training_configuration(record: dict[str, Any]) -> None:
    config = settings("demo_clip.yaml")
    data = config["data"]["init_args"]
    found = Demo(categories=data["categories"], train_categories="others").train_categories
    assert record["categories"] == found
    assert set(data["categories"]) == set(settings("demo.yaml")["data"]["init_args"]["categories"])
    pictures = 2 * data["num_scenes"] * config["trainer"]["max_epochs"]
    assert record["pictures"] == pictures


def test_the_file_is_small_and_the_card_speaks_of_it() -> None:
    assert WEIGHTS.stat().st_size <= 10_000_000
    backbone = CLIPBackbone(pretrained="demo")
    card = CARD.read_text(encoding="utf-8")
    assert backbone.identity in card
    assert "«" not in card  # nothing is left to be filled in


def test_the_cards_figures_are_those_that_were_measured() -> None:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert measured["weights"] == CLIPBackbone(pretrained="demo").identity
    card = CARD.read_text(encoding="utf-8")
    for seed, found in measured["held_out"].items():
        mean = found["mean"]
        row = " | ".join(f"{mean[k]:.3f}" for k in ("image_auroc", "pixel_auroc", "pixel_ap"))
        assert f"| {seed}" in card
        assert row in card
    for name in ("random weights", "centre prior", "median colour"):
        assert f"{measured['controls'][name]['pixel_auroc']:.3f}" in card
    for kind, found in measured["magnetic_tile"]["demo"].items():
        if kind != "mean":
            assert f"| {kind} | {found['image_auroc']:.3f} | {found['pixel_auroc']:.3f}" in card


def test_demo_is_found_without_a_name_or_a_network() -> None:
    backbone = CLIPBackbone.of(CLIPSettings(pretrained="demo"))
    assert backbone.settings.name == "demo"
    assert backbone.image_size == 128
    assert backbone.num_layers == 8
    assert backbone.weights["random"] is False
    assert backbone.visual.conv1.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"demo has an architecture of its own, not that of ViT-L"):
        CLIPBackbone("ViT-L-14", "demo")
    with pytest.raises(ValueError, match="the demo architecture has no tags"):
        CLIPBackbone("demo", "openai")
    untrained = CLIPBackbone("demo", "random")
    assert untrained.is_random
    assert untrained.identity != backbone.identity


@pytest.fixture(scope="module")
def sdp() -> SDP:
    """Return the demo's detector."""
    model = settings("demo.yaml")["model"]["init_args"]
    return SDP(CLIPSettings(**model["backbone"]), sigma=model["sigma"])


@pytest.fixture(scope="module")
def small_set(sdp: SDP) -> list[Batch]:
    data = Demo(
        categories=SMALL_SET,
        num_test=24,
        seed=504,  # of no training, tuning or test set
        picture_size=settings("demo.yaml")["data"]["init_args"]["picture_size"],
        image_size=sdp.image_size,
        num_workers=0,
    )
    return list(data.test_dataloader())


@pytest.mark.slow
def test_it_detects_what_it_never_saw(sdp: SDP, small_set: list[Batch]) -> None:
    evaluator = Evaluator(SMALL_SET)
    for batch in small_set:
        evaluator.update(sdp.score(batch["image"], batch["category"]), batch)
    found = evaluator.compute()["mean"]
    for name, floor in FLOORS.items():
        assert (found[name] or 0) >= floor, (name, found[name])


@pytest.mark.slow
def test_the_words_decide(sdp: SDP, small_set: list[Batch]) -> None:
    """Words for abnormal detect; exchanged they mislead, and words that mean the same do little."""
    with torch.no_grad():
        classes = torch.cat([sdp.encode(batch["image"])[1] for batch in small_set])
    labels = torch.cat([batch["label"] for batch in small_set])
    names = [name for batch in small_set for name in batch["category"]]

    def area(texts: dict[str, Tensor]) -> float:
        score = text_score(classes, torch.stack([texts[name] for name in names]))
        own = [torch.tensor([name == wanted for name in names]) for wanted in SMALL_SET]
        return sum(auroc(score[of], labels[of]) for of in own) / len(own)

    real = {name: sdp.text(name) for name in SMALL_SET}
    found = area(real)
    assert found > 0.7
    assert area({name: text.flip(-1) for name, text in real.items()}) == pytest.approx(1 - found)
    rng = torch.Generator().manual_seed(0)
    rows = {
        name: embed_sentences(sdp.backbone, PromptEnsemble().sentences(name)[0])
        for name in SMALL_SET
    }
    apart = []
    for _ in range(10):
        halves = {}
        for name, words in rows.items():
            parts = torch.randperm(len(words), generator=rng).chunk(2)
            columns = [representative_vector(words[part], RVSSettings("mean")) for part in parts]
            halves[name] = torch.stack(columns, dim=1)
        apart.append(abs(area(halves) - 0.5))
    assert sum(apart) / len(apart) < 0.5 * (found - 0.5)


def test_the_factor_of_100_leaves_scores_apart(sdp: SDP, small_set: list[Batch]) -> None:
    batch = small_set[0]
    score = sdp.score(batch["image"], batch["category"])["image_score"]
    assert ((score > 0.01) & (score < 0.99)).float().mean() > 0.5
    assert len(score.unique()) == len(score)


def test_the_demo_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--config", str(CONFIGS / "demo.yaml"), "--output.root", str(tmp_path)]
    words += ["--data.categories", "[black leather]", "--data.num_test", "6"]
    assert main([*words, "--data.num_workers", "0"]) == 0
    said = capsys.readouterr()
    run = tmp_path / "demo" / "1"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(re.findall("<img ", page)) == 6 == len(list(run.rglob("*.webp")))
    for text in (page, said.out):
        assert "demo weights" in " ".join(text.split())
    assert str(run / "report.html") in "".join(said.err.split())
    weights = json.loads((run / "metrics.json").read_text())["run"]["weights"]
    assert weights["pretrained"] == weights["backbone"] == "demo"
