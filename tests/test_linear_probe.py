from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from PIL import Image
from probe_runs import fitted, state_of, wafers, words
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)
from torch.testing import assert_close
from torchvision.models import resnet18

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.data import MixedWM38
from anomaly_clip.data.wafer import PATTERNS
from anomaly_clip.methods import LinearProbe
from anomaly_clip.metric_values import CLASS_METRICS
from anomaly_clip.testing.processes import run_command

RANDOM_NETWORK = CNNSettings("resnet18", "random")
CONFIG = Path(__file__).parent.parent / "configs" / "linear_probe.yaml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return wafers(tmp_path / "wafers")


def run_test(runs: Path) -> Path:
    """Test the checkpoint of the first run and return the folder of the test run."""
    assert main(["test", "--ckpt_path", str(fitted(runs)), "--output.root", str(runs)]) == 0
    [folder] = {file.parent for file in runs.glob("*/*/metrics.json")}
    return folder


def scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, name: str) -> list[float]:
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


# -- fit and test --------------------------------------------------------------------------------


def check_files(run: Path, truth: NDArray[Any], predicted: NDArray[Any]) -> dict[str, Any]:
    """Compare the metrics of a run with scikit-learn's for its ``scores.csv``."""
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["mean", "categories", "intervals", "run"]
    assert list(metrics["mean"]) == list(CLASS_METRICS)
    assert metrics["categories"] == {"wafer map": metrics["mean"]}
    assert metrics["intervals"] == {}
    macro = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    expected = [accuracy_score(truth, predicted), *macro[:3]]
    assert list(metrics["mean"].values()) == pytest.approx(expected)
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["wafer map", "mean"]
    for name in CLASS_METRICS:
        assert float(rows[1][name]) == metrics["mean"][name]
        assert logged(run, f"test/{name}") == pytest.approx([metrics["mean"][name]])
    assert logged(run, "test/random_weights") == [1.0]
    assert metrics["run"]["weights"]["random"]
    return metrics


@pytest.mark.slow
def test_a_frozen_backbone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    assert main(words(root, runs, epochs=12)) == 0
    assert logged(runs / "LinearProbe" / "1-fit", "train/accuracy")[-1] > 0.8
    checkpoint = torch.load(fitted(runs), weights_only=True)
    assert set(checkpoint["state_dict"]) == {"head.weight", "head.bias"}
    assert checkpoint["state_dict"]["head.weight"].shape == (4, 512)
    capsys.readouterr()
    run = run_test(runs)
    out, err = capsys.readouterr()
    assert "RANDOM WEIGHTS" in err
    assert "LinearProbe on MixedWM38, test; backbone frozen" in out
    for heading in ("accuracy", "precision", "recall", "F1", "wafer map"):
        assert heading in out
    rows = scores(run)
    assert len(rows) == 8
    truth, guess = (np.array([row[key] for row in rows]) for key in ("true", "predicted"))
    metrics = check_files(run, truth, guess)
    assert metrics["mean"]["accuracy"] >= 0.5  # chance is 0.25
    protocol = metrics["run"]["protocol"]
    assert (protocol["frozen"], protocol["classes"], protocol["epochs"]) == (True, 4, 12)
    assert protocol["optim"] == {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "schedule": "cosine",
    }
    assert (protocol["targets"], protocol["split_seed"], protocol["complete"]) == (
        "single",
        10,
        True,
    )
    assert (protocol["images"], protocol["anomalous"]) == ({"wafer map": 8}, {"wafer map": 6})
    assert protocol["overlap"] == 0
    assert metrics["run"]["checkpoint"] == str(fitted(runs))
    names = ["good", "Edge-Ring", "Center", "Center+Edge-Ring"]
    with (run / "confusion.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0] == ["true", *names]
    counts = np.array([row[1:] for row in table[1:]], int)
    np.testing.assert_array_equal(counts, confusion_matrix(truth, guess, labels=names))
    with Image.open(run / "confusion.png") as plot:
        assert plot.getpixel((1, 1)) == (255, 255, 255)
    assert all(0.25 < float(row["probability"]) <= 1 for row in rows)
    assert not (run / ".scratch").exists()
    # ``predict`` writes the same scores, without the kinds of defect that a test compares.
    line = ["predict", "--ckpt_path", str(fitted(runs)), "--output.root", str(tmp_path / "p")]
    assert main(line) == 0
    [written] = (tmp_path / "p").glob("*/1-*/scores.csv")
    predicted = scores(written.parent)
    assert predicted == [{key: row[key] for key in predicted[0]} for row in rows]
    assert set(rows[0]) - set(predicted[0]) == {"defect"}


@pytest.mark.slow
def test_a_trained_backbone(root: Path, tmp_path: Path, weights: Path) -> None:
    runs = tmp_path / "runs"
    line = words(root, runs, "--model.frozen", "false", "--model.optim.lr", "0.02", epochs=5)
    line += ["--model.backbone.weights", str(weights)]
    assert main(line) == 0
    weights.unlink()  # the checkpoint holds all that is needed
    run = run_test(runs)
    metrics = json.loads((run / "metrics.json").read_text())
    assert logged(runs / "LinearProbe" / "1-fit", "train/accuracy")[-1] > 0.8
    assert metrics["run"]["weights"]["pretrained"] == str(weights)
    assert len(metrics["run"]["weights"]["sha256"]) == 64
    state = state_of(fitted(runs))
    start = torch.load(tmp_path / "copy.pt", weights_only=True)
    assert not state["encoder.conv1.weight"].equal(start["conv1.weight"])
    assert int(state["encoder.bn1.num_batches_tracked"]) == 5 * 2
    # From Python, without a trainer.
    probe = LinearProbe.load_from_checkpoint(fitted(runs)).eval()
    data = MixedWM38(str(root), image_size=32)
    images = torch.stack(
        [item["image"] for item in map(data.dataset("test").__getitem__, range(8))]
    )
    with torch.no_grad():
        best = probe.logits(probe.pooled(images)).argmax(1)
    assert [probe.target_names[place] for place in best] == [r["predicted"] for r in scores(run)]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    for name in ("other.pt", "copy.pt"):
        torch.manual_seed(3)
        torch.save(resnet18(weights=None).state_dict(), tmp_path / name)
    return tmp_path / "other.pt"


def test_several_patterns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat(np.concatenate([np.zeros((1, 8), int), np.eye(8, dtype=int)]), 6, axis=0)
    np.savez(tmp_path / "MixedWM38.npz", rng.integers(0, 3, (54, 52, 52)), targets)
    runs = tmp_path / "runs"
    line = words(tmp_path / "MixedWM38.npz", runs, "--data.targets", "multi")
    assert main([*line, "--data.val_split", "test"]) == 0
    assert len(logged(runs / "LinearProbe" / "1-fit", "val/f1")) == 3
    run = run_test(runs)
    assert "MixedWM38" in capsys.readouterr().out
    rows = scores(run)
    probabilities = np.array([[float(row[name]) for name in PATTERNS] for row in rows])
    truth = np.array([[name in row["true"].split("+") for name in PATTERNS] for row in rows])
    assert truth.sum() == sum(int(row["label"]) for row in rows)
    predicted = probabilities > 0.5
    check_files(run, truth, predicted)
    for row, is_present in zip(rows, predicted, strict=True):
        names = [name for name, is_on in zip(PATTERNS, is_present, strict=True) if is_on]
        assert row["predicted"] == ("+".join(names) or "good")
    with (run / "confusion.csv").open() as file:
        table = {row["pattern"]: row for row in csv.DictReader(file)}
    (absent, wrong), (missed, present) = multilabel_confusion_matrix(truth, predicted)[3]
    edge_ring = table["Edge-Ring"]
    assert int(edge_ring["true_negative"]) == absent
    assert int(edge_ring["false_positive"]) == wrong
    assert int(edge_ring["false_negative"]) == missed
    assert int(edge_ring["true_positive"]) == present


@pytest.mark.slow
def test_cached_features_do_not_change_the_results(root: Path, tmp_path: Path) -> None:
    for workers, cached in (("1", "true"), ("0", "false")):
        runs = tmp_path / cached
        line = words(root, runs, "--model.cache_features", cached, "--data.val_split", "test")
        assert main([*line, "--data.num_workers", workers]) == 0
    heads = [state_of(fitted(tmp_path / cached)) for cached in ("true", "false")]
    assert_close(heads[0], heads[1], atol=1e-6, rtol=1e-5)
    val = [
        logged(tmp_path / cached / "LinearProbe" / "1-fit", "val/f1")
        for cached in ("true", "false")
    ]
    assert val[0] == pytest.approx(val[1])
    predicted = [
        [row["predicted"] for row in scores(run_test(tmp_path / cached))]
        for cached in ("true", "false")
    ]
    assert predicted[0] == predicted[1]


def test_cached_features_are_those_of_the_backbone(root: Path) -> None:
    probe = LinearProbe(CNNBackbone("resnet18", "random", ["pooled"]), image_size=32)
    data = MixedWM38(str(root), batch_size=8, num_workers=0)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(probe, data)
    dataset = data.fit_dataset()
    item = dataset[5]
    assert "image" not in item
    dataset.features = None  # type: ignore[union-attr]
    image = dataset[5]["image"][None]
    assert_close(item["features"]["pooled"], probe.backbone(image)["pooled"][0])
    assert not probe.backbone.features.training


@pytest.mark.slow
def test_a_resumed_fit_is_the_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    every = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1}}
    for frozen in ("true", "false"):
        line = words(root, tmp_path / frozen, "--trainer.callbacks+", json.dumps(every), epochs=2)
        line += ["--model.frozen", frozen]
        assert main(line) == 0
        [between] = (tmp_path / frozen / "LinearProbe" / "1-fit" / "checkpoints").glob(
            "epoch=0-*.ckpt"
        )
        assert main([*line, "--ckpt_path", str(between)]) == 0
        first, second = (state_of(fitted(tmp_path / frozen, number)) for number in (1, 2))
        assert_close(first, second, atol=0, rtol=0)


@pytest.mark.slow
def test_two_processes_match_one(root: Path, tmp_path: Path) -> None:
    assert main(words(root, tmp_path / "one")) == 0
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "8"]
    compared = {"class_path": "ddp_checks.Compared", "init_args": {"file": str(tmp_path / "c")}}
    line = words(root, tmp_path / "two", *ddp, "--trainer.callbacks+", json.dumps(compared))
    again = [
        "test",
        "--config",
        str(tmp_path / "two" / "LinearProbe" / "1-fit" / "config-fit.yaml"),
    ]
    again += ["--ckpt_path", str(fitted(tmp_path / "two")), "--trainer.callbacks", "null"]
    again += ["--output.root", str(tmp_path / "tested"), "--output.name", "again"]
    for part in (line, again):
        done = run_command(part, processes=2)
        assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "c").read_text())
    assert record["equal"]
    first, second = record["rows"]
    assert len(first) == len(second) == 3 * 16
    assert sorted(first[:16] + second[:16]) == list(range(32))
    states = [state_of(fitted(tmp_path / name)) for name in ("one", "two")]
    assert_close(states[0], states[1], atol=1e-3, rtol=1e-3)
    alone, shared = run_test(tmp_path / "one"), tmp_path / "tested" / "again" / "1-test"
    means = [json.loads((run / "metrics.json").read_text())["mean"] for run in (alone, shared)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)
    assert [row["predicted"] for row in scores(alone)] == [
        row["predicted"] for row in scores(shared)
    ]


# -- components ----------------------------------------------------------------------------------


def test_initial_weights_depend_on_the_seed_alone(root: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.randn(seed + 3)  # earlier random numbers do not matter
        probe = LinearProbe(RANDOM_NETWORK, image_size=32, seed=seed)
        probe._set_classes("single", ["a", "b", "c"], "the test")
        heads.append(probe.head.weight)
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_flips_follow_seed_epoch_and_image() -> None:
    probe = LinearProbe(RANDOM_NETWORK, image_size=32, frozen=False)
    images = torch.arange(40 * 3 * 4).reshape(40, 3, 2, 2)
    before = torch.get_rng_state()
    index = torch.arange(40)
    flipped = probe._flipped(images, index)
    assert torch.get_rng_state().equal(before)
    options = [images, images.flip(2), images.flip(3), images.flip(2, 3)]
    kinds = [
        next(kind for kind, option in enumerate(options) if flipped[row].equal(option[row]))
        for row in range(40)
    ]
    assert set(kinds) == {0, 1, 2, 3}
    order = torch.randperm(40)
    assert probe._flipped(images[order], index[order]).equal(flipped[order])
    assert (
        not LinearProbe(RANDOM_NETWORK, frozen=False, seed=1)._flipped(images, index).equal(flipped)
    )


def test_losses_match_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 512, generator=generator)
    probe = LinearProbe(RANDOM_NETWORK, image_size=32)
    probe._set_classes("multi", list(PATTERNS), "the test")
    probe.log = lambda *args, **options: None  # type: ignore[method-assign]
    target = torch.rand(5, 8, generator=generator) < 0.3
    batch: Any = {"features": {"pooled": features}, "target": target}
    logits = features @ probe.head.weight.T + probe.head.bias
    right = F.logsigmoid(torch.where(target, logits, -logits))
    assert_close(probe.training_step(batch, 0), -right.mean())
    probe.targets = "single"
    batch["target"] = F.one_hot(torch.tensor([0, 7, 3, 3, 1]), 8).bool()
    expected = -logits.log_softmax(1)[batch["target"]].mean()
    assert_close(probe.training_step(batch, 0), expected)


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_mixed_precision_keeps_the_loss_in_float32(
    root: Path, tmp_path: Path, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    ordinary = F.cross_entropy

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.add(logits.dtype)
        return ordinary(logits, target)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    line = words(root, tmp_path, "--trainer.precision", "bf16-mixed", "--model.frozen", frozen)
    assert main([*line, "--trainer.max_epochs", "1"]) == 0
    assert seen == {torch.float32}
    assert all(value.dtype != torch.bfloat16 for value in state_of(fitted(tmp_path)).values())


def test_the_probed_layer_must_be_single_and_not_spatial() -> None:
    settings = CNNSettings("squeezenet1_1", "random", ["flatten"])
    assert LinearProbe(settings, image_size=64).width == 1000
    with pytest.raises(ValueError, match=r"got model\.backbone\.name squeezenet1_1 and layers"):
        LinearProbe(settings, frozen=False)
    with pytest.raises(
        ValueError, match=r"not spatial for LinearProbe, such as pooled, got \[layer3\]"
    ):
        LinearProbe(CNNSettings("resnet18", "random", ["layer3"]))
    with pytest.raises(ValueError, match="must name a single layer for LinearProbe"):
        LinearProbe(CNNSettings("resnet18", "random", ["layer3", "pooled"]))


# -- each, compare, the configuration ------------------------------------------------------------


@pytest.mark.slow
def test_each_fits_and_tests_the_one_category(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(root, tmp_path / "runs", verb="each")) == 0
    run = tmp_path / "runs" / "LinearProbe" / "1-each"
    merged = json.loads((run / "metrics.json").read_text())
    single = json.loads((run / "wafer map" / "metrics.json").read_text())
    assert merged["mean"] == single["mean"]
    assert merged["run"]["protocol"]["one_model_a_category"]
    assert (run / "wafer map" / "confusion.png").is_file()
    assert (run / "metrics.csv").read_text() == (run / "wafer map" / "metrics.csv").read_text()
    out = capsys.readouterr().out
    assert out.count("LinearProbe on MixedWM38") == 1
    assert "accuracy" in out


@pytest.mark.slow
def test_compare_prints_one_table_with_differences(
    root: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    line = ["compare", "--weights", "random", str(weights), "--folder", str(folder)]
    line += ["--config", str(CONFIG), "--data.root", str(root), "--model.image_size", "32"]
    line += ["--data.batch_size", "8", "--data.num_workers", "0", "--trainer.max_epochs", "2"]
    line += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    assert main([*line, "--trainer.enable_model_summary", "false"]) == 0
    out = capsys.readouterr().out
    assert "LinearProbe on MixedWM38, percent" in out
    assert out.count("LinearProbe on") == 1
    assert "random: RANDOM WEIGHTS" in " ".join(out.split())
    content = json.loads((folder / "comparison.json").read_text())
    mean = content["figures"]["mean"]
    assert list(mean["random"]) == list(CLASS_METRICS)
    lines = [line for line in out.splitlines() if line.strip().startswith("mean")]
    for name in CLASS_METRICS:
        assert f"{100 * (mean['other'][name] - mean['random'][name]):+.1f}" in lines[0]
    with (folder / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["weights"]) for row in rows] == [
        (category, label) for category in ("wafer map", "mean") for label in ("random", "other")
    ]
    assert float(rows[1]["recall"]) == content["figures"]["wafer map"]["other"]["recall"]
    assert not (folder / "pictures").exists()
