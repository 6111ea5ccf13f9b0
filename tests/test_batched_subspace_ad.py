"""Batched zero-shot SubspaceAD, and with it the base class of transductive methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quiet_trainer
from sklearn.decomposition import PCA
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip import load
from anomaly_clip.backbones.towers import BackboneSettings
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import BatchedSubspaceAD
from anomaly_clip.methods.subspace import smoothed_maps, top_mean
from anomaly_clip.testing.images import NAMES, write_images
from anomaly_clip.testing.processes import run_command
from anomaly_clip.testing.run_files import read_scores

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*")
SIZE = 64


@pytest.fixture(scope="module")
def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone("test_vit", "random", SIZE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", num_train=1, num_test=3)


def images_of(count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def test_scores_are_those_of_scikit_learn(backbone: ViTBackbone) -> None:
    images = images_of(5)
    method = BatchedSubspaceAD(backbone, SIZE, [3, 5], explained=0.8)
    maps = backbone.feature_maps(images, [3, 5])
    features = ((maps[0] + maps[1]) / 2).flatten(2).mT.double().flatten(0, 1).numpy()
    pca = PCA(0.8, svd_solver="full").fit(features)
    rebuilt = pca.inverse_transform(pca.transform(features))
    distances = torch.from_numpy(((features - rebuilt) ** 2).sum(axis=1)).view(5, 4, 4)
    expected = smoothed_maps(distances, (SIZE, SIZE))
    scores = method.score(images, ["a"] * 5)
    assert_close(scores["anomaly_map"].double(), expected, atol=1e-5, rtol=1e-3)
    expected_scores = top_mean(expected.flatten(1))
    assert_close(scores["image_score"].double(), expected_scores, atol=1e-5, rtol=1e-3)


def test_categories_are_scored_apart_and_in_any_order(backbone: ViTBackbone) -> None:
    images = images_of(6)
    method = BatchedSubspaceAD(backbone, SIZE)
    mixed = method.score(images, ["a", "b", "a", "b", "b", "a"])["image_score"]
    for rows in ([0, 2, 5], [1, 3, 4]):
        apart = method.score(images[rows], ["x"] * 3)["image_score"]
        assert_close(mixed[rows], apart, atol=1e-5, rtol=1e-4)


def test_default_layers(backbone: ViTBackbone) -> None:
    assert BatchedSubspaceAD(backbone, SIZE).layers == [4]
    assert BatchedSubspaceAD.stages == ("layer3",)


def test_a_single_image_is_refused(backbone: ViTBackbone) -> None:
    method = BatchedSubspaceAD(backbone, SIZE)
    message = "BatchedSubspaceAD compares the images of a category with each other, but b has 1"
    with pytest.raises(ValueError, match=message):
        method.score(images_of(3), ["a", "a", "b"])


def test_unusable_features_are_refused(
    backbone: ViTBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = BatchedSubspaceAD(backbone, SIZE)
    embed = method.embed
    monkeypatch.setattr(method, "embed", lambda images: embed(images) * torch.inf)
    with pytest.raises(ValueError, match="are NaN or infinite, in the images to score"):
        method.score(images_of(2), ["a", "a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explained": 0.0}, "model.explained"),
        ({"distance": "far"}, "model.distance must be one of"),
        ({"combine": "sum"}, "model.combine must be one of mean, concat"),
        ({"layers": [7]}, "numbers from 1 to 6"),
        ({"image_size": 8}, "model.image_size must be 32 or more"),
    ],
)
def test_unsupported_options_are_refused(
    backbone: ViTBackbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchedSubspaceAD(backbone, **{"image_size": SIZE, **options})


@pytest.mark.slow
def test_features_are_freed_category_after_category(
    backbone: ViTBackbone, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is encoded once, and a category is scored before the next one is encoded."""
    method = BatchedSubspaceAD(backbone, SIZE)
    events: list[str] = []
    embed, compare = method.embed, method.compare

    def counted(images: Tensor) -> Tensor:
        events.append(f"encoded {len(images)}")
        return embed(images)

    def compared(name: str, *arguments: Any) -> Any:
        events.append(f"scored {name}")
        return compare(name, *arguments)

    monkeypatch.setattr(method, "embed", counted)
    monkeypatch.setattr(method, "compare", compared)
    data = MVTecAD(str(root), num_workers=0, batch_size=6)
    quiet_trainer().test(method, data, verbose=False)
    first, second = data.categories
    assert events == ["encoded 6", "encoded 6", f"scored {first}", f"scored {second}"]


# -- commands --------------------------------------------------------------------------------------


def words(verb: str, root: Path, folder: Path, data: str, model: str = "Subspace") -> list[str]:
    name = {"Subspace": "BatchedSubspaceAD", "Dino": "BatchedAnomalyDINO"}[model]
    line = [verb, f"--model={name}", "--model.backbone.name=test_vit"]
    line += ["--model.backbone.weights=random", f"--model.image_size={SIZE}"]
    line += [f"--data={data}", f"--data.root={root}", "--data.num_workers=0", "--data.batch_size=2"]
    return [*line, "--trainer.accelerator=cpu", f"--output.folder={folder}"]


def scores_in(folder: Path) -> dict[str, float]:
    return {Path(r["path"]).as_posix(): float(r["image_score"]) for r in read_scores(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Subspace", "Dino"])
def test_runs_are_transductive_in_one_or_two_processes(
    model: str, root: Path, tmp_path: Path
) -> None:
    line = words("test", root, tmp_path / "one", "MVTecAD", model)
    assert main(line) == 0
    protocol = json.loads((tmp_path / "one" / "metrics.json").read_text())["run"]["protocol"]
    assert protocol["transductive"] is True
    assert protocol["fitted"] is False
    assert protocol["images"] == dict.fromkeys(NAMES, 6)
    assert protocol["layers"] == ([4] if model == "Subspace" else [6])
    line = words("test", root, tmp_path / "two", "MVTecAD", model)
    done = run_command(
        [*line, "--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=1"],
        processes=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = scores_in(tmp_path / "one")
    assert len(expected) == 12
    assert scores_in(tmp_path / "two") == pytest.approx(expected, rel=1e-3, abs=1e-5)
    each = words("each", root, tmp_path / "each", "MVTecAD", model)
    assert main(each) == 0
    of_each: dict[str, float] = {}
    for name in NAMES:
        of_each |= scores_in(tmp_path / "each" / name)
    assert of_each == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert "TRANSDUCTIVE" in (tmp_path / "each" / "report.html").read_text().upper()


@pytest.mark.slow
def test_a_folder_is_predicted_as_by_a_detector(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(sorted((root / NAMES[0] / "test").rglob("*.png"))):
        shutil.copy(file, folder / f"{number}.png")
    assert main(words("predict", folder, tmp_path / "run", "ImageFolder")) == 0
    expected = scores_in(tmp_path / "run")
    assert len(expected) == 6
    settings = BackboneSettings("test_vit", "random")
    detector = load(BatchedSubspaceAD(settings, SIZE).eval())
    again = [prediction.score for prediction in detector.predict(list(expected))]
    assert again == pytest.approx(list(expected.values()), rel=1e-3, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2, better 20, images of the same thing"):
        detector.predict(next(iter(expected)))
    with pytest.raises(ValueError, match="scores images by each other, so that no program"):
        detector.export(tmp_path / "program")
    assert not (tmp_path / "program").exists()
    capsys.readouterr()
    assert main(words("calibrate", folder, tmp_path / "calibration", "ImageFolder")) == 2
    assert "so that no threshold holds" in " ".join(capsys.readouterr().err.split())
    assert main(words("fit", folder, tmp_path / "fit", "ImageFolder")) == 2
    assert not (tmp_path / "fit").exists()
