from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import save_picture, write_mvtec
from PIL import Image
from sklearn.metrics import silhouette_score
from torchvision.models import resnet18

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.cli import main
from anomaly_clip.commands import compare_images
from anomaly_clip.commands.compare import _comparison_rows, _comparison_table, run_compare
from anomaly_clip.data import MVTecAD


@pytest.fixture
def root(mvtec_root: Path) -> Path:
    return with_more_images(mvtec_root)


def with_more_images(root: Path) -> Path:
    """Add a third training image to each of two categories."""
    rng = np.random.default_rng(0)
    for category in ("bottle", "metal_nut"):
        array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        save_picture(root / category / "train" / "good" / "100.png", array)
    return root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "other.pt")
    return tmp_path / "other.pt"


def words(root: Path, weights: Path, folder: Path) -> list[str]:
    line = ["compare", "--weights", "random", str(weights), "--folder", str(folder)]
    line += ["--model", "PaDiM", "--model.image_size", "32", "--model.num_channels", "8"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    return [*line, "--trainer.accelerator", "cpu"]


class Compared(NamedTuple):
    """A finished comparison of two weights on two categories."""

    root: Path
    weights: Path
    folder: Path
    out: str

    def copied(self, folder: Path) -> Path:
        """Copy the folder, so that a test may change it."""
        return shutil.copytree(self.folder, folder)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    root = with_more_images(write_mvtec(tmp_path_factory.mktemp("compared")))
    weights, folder = root.parent / "other.pt", root.parent / "c"
    torch.manual_seed(3)
    torch.save(resnet18(weights=None).state_dict(), weights)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_compare(words(root, weights, folder)) == 0
    return Compared(root, weights, folder, out.getvalue())


def test_one_table_with_differences(compared: Compared, tmp_path: Path) -> None:
    root, weights, _, out = compared
    folder = compared.copied(tmp_path / "c")
    assert "PaDiM on MVTecAD, percent" in out
    assert out.count("PaDiM on") == 1
    assert "random: RANDOM WEIGHTS" in " ".join(out.split())
    content = json.loads((folder / "comparison.json").read_text())
    for label in ("random", "other"):
        metrics = json.loads((folder / label / "metrics.json").read_text())
        assert content["figures"]["bottle"][label] == metrics["categories"]["bottle"]
        assert content["figures"]["mean"][label] == pytest.approx(metrics["mean"])
    mean = content["figures"]["mean"]
    first, second = (mean[label]["pixel_auroc"] for label in ("random", "other"))
    line = next(line for line in out.splitlines() if line.strip().startswith("mean"))
    assert f"{100 * (second - first):+.1f}" in line
    with (folder / "comparison.csv").open() as file:
        assert [(row["category"], row["weights"]) for row in csv.DictReader(file)] == [
            (category, label)
            for category in ("bottle", "metal_nut", "mean")
            for label in ("random", "other")
        ]
    sheets = sorted((folder / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == ["bottle.png", "metal_nut.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width == 4 * 240 + 3 * 4  # image, two maps, ground truth
    # Repeated with the same folder: nothing runs again.
    before = (folder / "random" / "bottle" / "metrics.json").stat().st_mtime_ns
    assert main(words(root, weights, folder)) == 0
    assert (folder / "random" / "bottle" / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_features_of_both_backbones_are_drawn(
    root: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(1)
    for number in range(3):
        array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        save_picture(root / "bottle" / "test" / "good" / f"9{number}.png", array)
    folder = tmp_path / "c"
    line = [*words(root, weights, folder), "--data.categories", "[bottle]", "--pictures", "0"]
    assert main([*line, "--embedding", "layer3"]) == 0
    err = capsys.readouterr().err
    assert "other: silhouette of normal and defective images in layer3" in err
    assert "other: t-SNE of 7 test images\n" in err
    monkeypatch.setattr(compare_images, "MAX_EMBEDDED", 5)
    assert compare_images._embed_run(folder / "other" / "bottle", "other", "layer3") is not None
    assert "other: t-SNE of 5 test images of 7, evenly spaced" in capsys.readouterr().err
    assert not (folder / "pictures").exists()
    with Image.open(folder / "embeddings" / "bottle.png") as plot:
        assert plot.width == 2 * 480
    with (folder / "embeddings" / "bottle.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = [path.parent.name for path in sorted((root / "bottle" / "test").glob("*/*"))]
    for label in ("random", "other"):
        states = [row["state"] for row in rows if row["backbone"] == label]
        assert states == ["normal" if name == "good" else "defective" for name in labels]
    # The silhouette is that of the layer's features, computed directly.
    network = CNNBackbone("resnet18", str(weights), ["layer3"])
    paths = sorted((root / "bottle" / "test").glob("*/*"))
    data = MVTecAD(str(root), categories=["bottle"], image_size=32)
    images = torch.stack([data.dataset("test")[row]["image"] for row in range(len(paths))])
    features = network(images)["layer3"].flatten(1).numpy()
    expected = silhouette_score(features, [name == "good" for name in labels], metric="cosine")
    written = json.loads((folder / "silhouettes.json").read_text())
    assert written["states"]["bottle"]["other"] == pytest.approx(float(expected), abs=1e-5)


def test_another_comparison_is_not_mixed_in(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = compared.weights
    line = words(compared.root, weights, compared.folder)
    (tmp_path / "copy").mkdir()
    other = tmp_path / "copy" / weights.name
    other.write_bytes(weights.read_bytes())
    capsys.readouterr()
    assert main([str(other) if word == str(weights) else word for word in line]) == 2
    assert "has another comparison (the weights other were" in capsys.readouterr().err
    assert main([*line, "--model.sigma", "1"]) == 2
    assert "has another comparison (its options were --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--embedding", "layer9"], "layer9"), (["--weights", "random", "none.pt"], "none.pt")],
)
def test_mistakes_are_found_before_anything_is_run(
    root: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    line = [*words(root, weights, tmp_path / "c"), *more]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "[1/" not in err
    assert not (tmp_path / "c").exists()


def test_a_mean_over_other_categories_is_not_shown(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, weights, *_ = compared
    folder = compared.copied(tmp_path / "c")
    merged = folder / "other" / "metrics.json"
    for name in ("metrics.json", ".tested"):
        (folder / "other" / "bottle" / name).unlink()
    (folder / "other" / "bottle" / "checkpoints" / "last.ckpt").write_text("broken")
    capsys.readouterr()
    assert main(words(root, weights, folder)) == 1
    assert list(json.loads(merged.read_text())["categories"]) == ["metal_nut"]
    content = json.loads((folder / "comparison.json").read_text())["figures"]
    assert list(content) == ["metal_nut", "mean"]
    assert content["mean"]["random"] == pytest.approx(content["metal_nut"]["random"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "imagenet"], "--weights imagenet: expected two or more"),
        (["--weights", "a/tab.pt", "b/tab.safetensors"], "two sets of weights are named tab"),
    ],
)
def test_mistakes(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["compare", *options, "--folder", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_mistake_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["compare", "--weights", "random", "other.pt", "--model", "PaDiM"]
    assert main([*line, "--data", "MVTecAD", "--data.root", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_mean_leaves_out_undefined_metrics() -> None:
    values: dict[str, list[Any]] = {"pixel_ap": [0.2, None, 0.7], "pixel_pro": [None] * 3}
    runs: dict[str, Any] = {
        label: {
            "categories": {
                category: {name: row[place] for name, row in values.items()}
                for place, category in enumerate("abc")
            },
            "mean": dict.fromkeys(values),
        }
        for label in ("imagenet", "other")
    }
    runs["other"]["categories"]["b"] = {"pixel_ap": 0.6, "pixel_pro": 0.1}
    mean = _comparison_rows(runs, ["a", "b", "c"])["mean"]
    assert mean["imagenet"]["pixel_ap"] == pytest.approx(np.nanmean([0.2, np.nan, 0.7]))
    assert mean["imagenet"]["pixel_pro"] is None
    assert mean["other"]["pixel_ap"] == pytest.approx(np.mean([0.2, 0.6, 0.7]))
    assert mean["other"]["pixel_pro"] == pytest.approx(0.1)
    few = _comparison_rows(runs, ["b", "c"])["mean"]  # the mean is over the common categories
    assert few["other"]["pixel_ap"] == pytest.approx(np.mean([0.6, 0.7]))


def test_every_run_but_the_first_has_differences() -> None:
    values = {"one": 0.5, "two": 0.625, "three": None}
    run = {
        "method": "PaDiM",
        "weights": {"random": False},
        "protocol": {"data": "MVTecAD"},
    }
    runs: dict[str, Any] = {
        label: {
            "categories": {"nut": {"image_auroc": value}},
            "mean": {"image_auroc": value},
            "run": run,
        }
        for label, value in values.items()
    }
    table = _comparison_table(runs, _comparison_rows(runs, ["nut"]))
    headings = [str(column.header).rpartition("\n")[2] for column in table.columns]
    assert headings == ["category", "one", "two", "+/-", "three", "+/-"]
    row = [next(iter(column.cells)) for column in table.columns]
    assert [str(cell) for cell in row] == ["nut", "50.0", "62.5", "+12.5", "–", "–"]


@pytest.mark.parametrize(
    ("metric", "category", "announced"),
    [("pixel_auroc", "nut", True), ("pixel_auroc", "cap", False), ("pixel_ap", "nut", False)],
)
def test_only_marks_that_are_shown_are_announced(
    metric: str, category: str, announced: bool
) -> None:
    values = {"image_auroc": 0.5, "pixel_auroc": 0.5, "pixel_ap": 0.5}
    record = {"method": "PaDiM", "weights": {"random": False}, "protocol": {"data": "MVTecAD"}}
    run: dict[str, Any] = {
        "categories": {"nut": values, "cap": values},
        "mean": values,
        "intervals": {category: {metric: [0.1, 0.9]}},
        "run": record,
    }
    table = _comparison_table({"one": run}, _comparison_rows({"one": run}, ["nut"]))
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert any(cell.startswith("~") for cell in cells) == announced
    assert ("~ MARKS" in str(table.caption)) == announced


# -- backbones of different kinds ------------------------------------------------------------------

BACKBONES = ("resnet18:random layers=[layer1,layer2]", "vit=test_vit:random", "demo image_size=80")


def backbone_words(root: Path, folder: Path, *more: str) -> list[str]:
    line = ["compare", "--backbones", *BACKBONES, "--folder", str(folder)]
    line += ["--model", "PaDiM", "--model.image_size", "64", "--model.num_channels", "8"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    return [*line, "--data.categories", "[bottle]", "--trainer.accelerator", "cpu", *more]


@pytest.mark.slow
def test_backbones_of_all_kinds(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    line = backbone_words(root, folder, "--embedding", "layer3")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_compare(line) == 0
    printed = " ".join(out.getvalue().split())
    assert "resnet18-random, vit: RANDOM WEIGHTS" in printed
    assert "demo: demo weights, trained on generated images only" in printed
    content = json.loads((folder / "comparison.json").read_text())
    labels = ["resnet18-random", "vit", "demo"]
    assert list(content["figures"]["bottle"]) == labels
    records = [content["runs"][label]["weights"] for label in labels]
    assert [record["backbone"] for record in records] == ["resnet18", "test_vit", "demo"]
    assert [record["random"] for record in records] == [True, True, False]
    record = json.loads((folder / "compare.json").read_text())
    assert record["backbones"]["vit"] == "vit=test_vit:random"
    with Image.open(folder / "pictures" / "bottle.png") as sheet:
        assert sheet.width == 5 * 240 + 4 * 4  # image, three maps, ground truth
    silhouettes = json.loads((folder / "silhouettes.json").read_text())
    assert list(silhouettes["states"]["bottle"]) == labels
    # Resumed, nothing runs again; another backbone or kind of comparison is not mixed in.
    before = (folder / "vit" / "bottle" / "metrics.json").stat().st_mtime_ns
    assert main(["compare", "--resume", str(folder)]) == 0
    assert (folder / "vit" / "bottle" / "metrics.json").stat().st_mtime_ns == before
    assert main([word.replace("vit=test_vit", "vit=test_vit2") for word in line]) == 2
    assert main(["--weights" if word == "--backbones" else word for word in line]) == 2


def test_the_plan_of_backbones(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(backbone_words(root, root, "--dry-run")) == 0
    first, second, third = map(shlex.split, capsys.readouterr().out.splitlines())
    assert first[:2] == second[:2] == ["anomaly_clip", "each"]
    assert first[-3:] == [
        "--model.backbone.name=resnet18",
        "--model.backbone.weights=random",
        "--model.layers=[layer1,layer2]",
    ]
    assert second[-2:] == ["--model.backbone.name=test_vit", "--model.backbone.weights=random"]
    assert third[-3:-1] == ["--model.backbone.name=demo", "--model.backbone.pretrained=demo"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["vit=test_vit:random", "demo layers=[99]"], "expected ascending numbers between 1 and"),
        (["vit=test_vit:none.pt", "demo"], "none.pt"),
        (
            ["resnet18:random", "no_such_model:random"],
            "no_such_model: neither torchvision nor timm",
        ),
        (["resnet18:random", "demo sigmma=3"], "PaDiM has no such option: did you mean sigma?"),
    ],
)
def test_backbones_are_built_before_anything_is_run(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    message: str,
) -> None:
    line = backbone_words(root, tmp_path / "c")
    assert main(["compare", "--backbones", *changed, *line[2 + len(BACKBONES) :]]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "[1/" not in err
    assert not (tmp_path / "c").exists()
