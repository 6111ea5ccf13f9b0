"""Tests of the small CLIP that comes with the project: training record and results."""

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
from anomaly_clip.backbones.clip_models import ASSETS
from anomaly_clip.backbones.prompts import (
    PromptEnsemble,
    RVSSettings,
    embed_prompts,
    representative_vector,
)
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

# Results of the shipped weights on a small set of held-out categories, minus 0.02.
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


def test_the_demo_tests_held_out_categories_only(record: dict[str, Any]) -> None:
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
    trained_on = Demo(categories=data["categories"], train_categories="others").train_categories
    assert record["categories"] == trained_on
    assert set(data["categories"]) == set(settings("demo.yaml")["data"]["init_args"]["categories"])
    num_images = 2 * data["num_scenes"] * config["trainer"]["max_epochs"]
    assert record["pictures"] == num_images


def test_the_file_is_small_and_identified_in_the_card() -> None:
    assert WEIGHTS.stat().st_size <= 10_000_000
    backbone = CLIPBackbone(pretrained="demo")
    card = CARD.read_text(encoding="utf-8")
    assert backbone.identity in card
    assert "«" not in card  # no placeholder is left


def test_the_card_states_the_measured_results() -> None:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert measured["weights"] == CLIPBackbone(pretrained="demo").identity
    card = CARD.read_text(encoding="utf-8")
    for seed, results in measured["held_out"].items():
        mean = results["mean"]
        row = " | ".join(f"{mean[k]:.3f}" for k in ("image_auroc", "pixel_auroc", "pixel_ap"))
        assert f"| {seed}" in card
        assert row in card
    for name in ("random weights", "centre prior", "median colour"):
        assert f"{measured['controls'][name]['pixel_auroc']:.3f}" in card
    for kind, result in measured["magnetic_tile"]["demo"].items():
        if kind != "mean":
            assert f"| {kind} | {result['image_auroc']:.3f} | {result['pixel_auroc']:.3f}" in card


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
        seed=504,  # not used in any training, tuning or test set
        picture_size=settings("demo.yaml")["data"]["init_args"]["picture_size"],
        image_size=sdp.image_size,
        num_workers=0,
    )
    return list(data.test_dataloader())


@pytest.mark.slow
def test_it_detects_defects_of_held_out_categories(sdp: SDP, small_set: list[Batch]) -> None:
    evaluator = Evaluator(SMALL_SET)
    for batch in small_set:
        evaluator.update(sdp.score(batch["image"], batch["category"]), batch)
    mean = evaluator.compute()["mean"]
    for name, floor in FLOORS.items():
        assert (mean[name] or 0) >= floor, (name, mean[name])


@pytest.mark.slow
def test_detection_depends_on_the_prompts(sdp: SDP, small_set: list[Batch]) -> None:
    """Swapped prompts invert the scores, and two sets of normal prompts barely detect defects."""
    with torch.no_grad():
        classes = torch.cat([sdp.encode(batch["image"])[1] for batch in small_set])
    labels = torch.cat([batch["label"] for batch in small_set])
    names = [name for batch in small_set for name in batch["category"]]

    def area(texts: dict[str, Tensor]) -> float:
        score = text_score(classes, torch.stack([texts[name] for name in names]))
        masks = [torch.tensor([name == category for name in names]) for category in SMALL_SET]
        return sum(auroc(score[mask], labels[mask]) for mask in masks) / len(masks)

    real = {name: sdp.text(name) for name in SMALL_SET}
    detection = area(real)
    assert detection > 0.7
    swapped = area({name: text.flip(-1) for name, text in real.items()})
    assert swapped == pytest.approx(1 - detection)
    rng = torch.Generator().manual_seed(0)
    normal_prompts = {
        name: embed_prompts(sdp.backbone, PromptEnsemble().for_category(name)[0])
        for name in SMALL_SET
    }
    deviations = []
    for _ in range(10):
        halves = {}
        for name, embeddings in normal_prompts.items():
            parts = torch.randperm(len(embeddings), generator=rng).chunk(2)
            columns = [
                representative_vector(embeddings[part], RVSSettings("mean")) for part in parts
            ]
            halves[name] = torch.stack(columns, dim=1)
        deviations.append(abs(area(halves) - 0.5))
    assert sum(deviations) / len(deviations) < 0.5 * (detection - 0.5)


def test_the_logit_scale_of_100_keeps_scores_distinct(sdp: SDP, small_set: list[Batch]) -> None:
    batch = small_set[0]
    score = sdp.score(batch["image"], batch["category"])["image_score"]
    assert ((score > 0.01) & (score < 0.99)).float().mean() > 0.5
    assert len(score.unique()) == len(score)


def test_the_demo_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test", "--config", str(CONFIGS / "demo.yaml"), "--output.root", str(tmp_path)]
    arguments += ["--data.categories", "[black leather]", "--data.num_test", "6"]
    assert main([*arguments, "--data.num_workers", "0"]) == 0
    printed = capsys.readouterr()
    run = tmp_path / "demo" / "1-test"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(re.findall("<img ", page)) == 6 == len(list(run.rglob("*.webp")))
    for text in (page, printed.out):
        assert "demo weights" in " ".join(text.split())
    assert str(run / "report.html") in "".join(printed.err.split())
    weights = json.loads((run / "metrics.json").read_text())["run"]["weights"]
    assert weights["pretrained"] == weights["backbone"] == "demo"
