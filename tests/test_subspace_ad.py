from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fit_images, quiet_trainer
from sklearn.decomposition import PCA
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip import load
from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.errors import Diverged
from anomaly_clip.maps import gaussian_blur, patches_to_map
from anomaly_clip.methods import AnomalyDINO, SubspaceAD
from anomaly_clip.methods.rotations import random_rotations
from anomaly_clip.testing.images import NAMES, write_images
from anomaly_clip.testing.processes import run_command
from anomaly_clip.testing.run_files import read_scores

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*")

SIZE = 64


@pytest.fixture(scope="module")
def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone("test_vit", "random", SIZE)


def images_of(count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def projector(method: SubspaceAD) -> Tensor:
    return method.components @ method.components.mT


def test_a_fit_and_its_scores_are_those_of_scikit_learn(backbone: ViTBackbone) -> None:
    images = images_of(6)
    method = fit_images(SubspaceAD(backbone, SIZE, [3, 5], explained=0.9), images[:4])
    maps = backbone.feature_maps(images, [3, 5])
    features = ((maps[0] + maps[1]) / 2).flatten(2).mT.double().numpy()  # (6, 16, 64)
    pca = PCA(0.9, svd_solver="full").fit(features[:4].reshape(64, -1))
    assert method.components.shape == (64, pca.n_components_)
    assert method.components.dtype == method.mean.dtype == torch.float32
    tested = features[4:].reshape(32, -1)
    rebuilt = pca.inverse_transform(pca.transform(tested))
    distances = torch.from_numpy(((tested - rebuilt) ** 2).sum(axis=1)).view(2, 16)
    scores = method.score(images[4:], ["a", "a"])
    expected = gaussian_blur(
        patches_to_map(distances, (SIZE, SIZE)), 4, truncate=0.25, border="inner"
    )
    assert_close(scores["anomaly_map"].double(), expected, atol=1e-5, rtol=1e-4)
    highest = expected.flatten(1).sort(dim=1, descending=True).values[:, :40]  # 1 % of 4096
    assert_close(scores["image_score"].double(), highest.mean(dim=1), atol=1e-5, rtol=1e-4)


def test_default_layers(backbone: ViTBackbone) -> None:
    assert SubspaceAD(backbone, SIZE).layers == [4]  # the last block of the third quarter of 6
    assert SubspaceAD.stages == ("layer3",)
    assert SubspaceAD(backbone, SIZE).default_blocks(24) == [14, 15, 16, 17, 18]


def fit_rotated(backbone: ViTBackbone, root: Path, batch_size: int, **options: Any) -> SubspaceAD:
    data = MVTecAD(str(root), [NAMES[0]], num_workers=0, batch_size=batch_size)
    method = SubspaceAD(backbone, SIZE, [4], **options)
    quiet_trainer(max_epochs=1).fit(method, datamodule=data)
    return method


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", num_train=5, num_test=2)


@pytest.mark.slow
def test_rotated_copies_depend_on_seed_and_index_alone(backbone: ViTBackbone, root: Path) -> None:
    few = fit_rotated(backbone, root, 2, rotations=3)
    all_at_once = fit_rotated(backbone, root, 16, rotations=3)
    assert_close(projector(few), projector(all_at_once), atol=1e-4, rtol=0)
    assert_close(few.mean, all_at_once.mean, atol=1e-5, rtol=0)
    for other in (
        fit_rotated(backbone, root, 16),
        fit_rotated(backbone, root, 16, rotations=3, seed=1),
        fit_rotated(backbone, root, 16, rotations=3, unrotated=[NAMES[0]]),
    ):
        assert not torch.allclose(other.mean, few.mean, atol=1e-4)
    assert few.protocol()["rotations"] == 3
    assert fit_rotated(backbone, root, 4, rotations=3, unrotated=NAMES).protocol()["rotations"] == 0


def test_statistics_are_of_images_and_copies(backbone: ViTBackbone) -> None:
    images = images_of(2)
    method = SubspaceAD(backbone, SIZE, [4], rotations=2, seed=5)
    fit_images(method, images)
    copies = [random_rotations(image, 2, 5, index) for index, image in enumerate(images)]
    patches = method.embed(torch.cat([images, *copies])).flatten(0, 1)
    assert_close(method.mean, patches.mean(dim=0), atol=1e-5, rtol=1e-5)
    unrotated = fit_images(SubspaceAD(backbone, SIZE, [4], rotations=2, unrotated=["a"]), images)
    assert_close(unrotated.mean, method.embed(images).mean(dim=(0, 1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("distance", ["reconstruction", "mahalanobis", "euclidean", "cosine"])
def test_all_distances_are_finite_after_a_fit_on_one_image(
    backbone: ViTBackbone, distance: Any
) -> None:
    """One image has 16 patches, fewer than the 64 channels."""
    method = SubspaceAD(backbone, SIZE, [2, 4], "concat", 1.0, distance)
    fit_images(method, images_of(1))
    assert method.components.shape == (128, 15)
    scores = method.score(images_of(2, seed=4), ["a", "a"])
    assert scores["image_score"].isfinite().all()
    assert scores["image_score"].min() > 1e-4


def test_a_fit_on_blank_images(backbone: ViTBackbone) -> None:
    """Positions tell the patches of a blank image apart, so that they have a subspace."""
    blank = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    method = fit_images(SubspaceAD(backbone, SIZE), blank)
    assert method.score(blank, ["a", "a"])["image_score"].isfinite().all()
    method = fit_images(SubspaceAD(backbone, SIZE, explained=1e-6), blank)
    assert method.components.shape == (64, 1)


def test_unusable_features_are_refused(
    backbone: ViTBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = SubspaceAD(backbone, SIZE)
    embed = method.embed
    monkeypatch.setattr(method, "embed", lambda images: embed(images) * torch.nan)
    with pytest.raises(Diverged, match="fitted patches of SubspaceAD is NaN or infinite"):
        fit_images(method, images_of(2))


def test_mixed_precision_leaves_distances_as_they_are(backbone: ViTBackbone) -> None:
    method = fit_images(SubspaceAD(backbone, SIZE, [2, 4]), images_of(4))
    tested = images_of(2, seed=4)
    plain = method.score(tested, ["a", "a"])["anomaly_map"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.score(tested, ["a", "a"])["anomaly_map"]
    assert_close(mixed, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [SubspaceAD, AnomalyDINO])
def test_a_fit_in_half_precision_is_scored_in_float32(backbone: ViTBackbone, kind: Any) -> None:
    """As Lightning does with the precision bf16-true, the fitted buffers are converted."""
    method = fit_images(kind(backbone, SIZE, [6]), images_of(4))
    tested = images_of(2, seed=4)
    exact = method.score(tested, ["a", "a"])
    for name in method.fitted_buffers:
        setattr(method, name, getattr(method, name).bfloat16())
    scores = method.score(tested, ["a", "a"])
    assert scores["anomaly_map"].dtype == scores["image_score"].dtype == torch.float32
    assert_close(scores["image_score"], exact["image_score"], atol=0, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explained": 0.0}, "model.explained"),
        ({"explained": 1.5}, "model.explained"),
        ({"rotations": -1}, "model.rotations must be 0 or more"),
        ({"seed": -1}, "model.seed"),
        ({"distance": "far"}, "model.distance must be one of reconstruction, mahalanobis"),
        ({"combine": "sum"}, "model.combine must be one of mean, concat"),
        ({"layers": [7]}, "numbers from 1 to 6"),
        ({"layers": []}, "numbers from 1 to 6"),
        ({"image_size": 8}, "model.image_size must be 32 or more"),
    ],
)
def test_unsupported_options_are_refused(
    backbone: ViTBackbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SubspaceAD(backbone, **{"image_size": SIZE, **options})


@pytest.mark.slow
def test_layers_of_several_sizes_have_no_mean() -> None:
    cnn = CNNSettings("resnet18", "random")
    with pytest.raises(ValueError, match=r"set model\.combine to concat, or choose one of them"):
        SubspaceAD(cnn, SIZE, ["layer2", "layer3"])
    method = SubspaceAD(cnn, SIZE, ["layer2", "layer3"], "concat")
    assert method.embed(images_of(1)).shape == (1, 64, 128 + 256)


# -- commands --------------------------------------------------------------------------------------


def words(verb: str, root: Path, folder: Path, *more: str) -> list[str]:
    line = [verb, "--model=SubspaceAD", "--model.backbone.name=test_vit"]
    line += ["--model.backbone.weights=random", f"--model.image_size={SIZE}"]
    line += ["--data=MVTecAD", f"--data.root={root}", "--data.num_workers=0", "--data.batch_size=2"]
    return [*line, "--trainer.accelerator=cpu", f"--output.folder={folder}", *more]


ONE = f"--data.categories=[{NAMES[0]}]"


@pytest.mark.slow
def test_a_few_shot_fit_and_a_test_of_each_category(root: Path, tmp_path: Path) -> None:
    more = ["--data.shots=1", "--model.rotations=2", f"--model.unrotated=[{NAMES[1]}]"]
    assert main(words("each", root, tmp_path / "each", *more)) == 0
    content = json.loads((tmp_path / "each" / "metrics.json").read_text())
    protocol = content["run"]["protocol"]
    assert protocol["shots"] == 1
    assert protocol["layers"] == [4]
    assert protocol["explained"] == 0.99
    assert protocol["distance"] == "reconstruction"
    assert protocol["rotations"] == {NAMES[0]: 2, NAMES[1]: 0}
    checkpoint = next((tmp_path / "each").rglob("last.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    assert set(saved["state_dict"]) == {"unused", "mean", "components", "eigenvalues"}
    assert checkpoint.stat().st_size < 500_000  # no tower
    page = (tmp_path / "each" / "report.html").read_text()
    assert "share of the variance that the subspace explains" in page


@pytest.mark.slow
def test_a_detector_scores_as_the_command_does(root: Path, tmp_path: Path) -> None:
    assert main(words("fit", root, tmp_path / "fit", ONE, "--model.rotations=1")) == 0
    line = ["test", f"--ckpt_path={tmp_path / 'fit'}", f"--output.folder={tmp_path / 'test'}"]
    assert main(line) == 0
    scores = {row["path"]: float(row["image_score"]) for row in read_scores(tmp_path / "test")}
    assert len(scores) == 4
    detector = load(tmp_path / "fit")
    assert [p.score for p in detector.predict(list(scores))] == pytest.approx(
        list(scores.values()), rel=1e-4
    )


@pytest.mark.slow
def test_a_fit_does_not_resume(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("fit", root, tmp_path / "fit", ONE)) == 0
    checkpoint = tmp_path / "fit" / "checkpoints" / "last.ckpt"
    assert main(words("fit", root, tmp_path / "again", ONE, f"--ckpt_path={checkpoint}")) == 2
    assert "single pass, which cannot be resumed" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_compute_the_same_subspace(root: Path, tmp_path: Path) -> None:
    more = [ONE, "--model.rotations=2", "--model.explained=0.9"]
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    done = run_command(words("fit", root, tmp_path / "two", *more, *ddp), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(words("fit", root, tmp_path / "one", *more)) == 0
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    assert first["components"].shape == second["components"].shape
    assert_close(first["mean"], second["mean"], atol=1e-5, rtol=1e-5)
    pairs = [state["components"] @ state["components"].mT for state in (first, second)]
    assert_close(*pairs, atol=1e-4, rtol=0)
