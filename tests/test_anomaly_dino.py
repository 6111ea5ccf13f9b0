from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import fit_images, quiet_trainer
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip import load, memory
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.errors import Diverged
from anomaly_clip.maps import patches_to_map
from anomaly_clip.methods import AnomalyDINO
from anomaly_clip.methods.object_masks import object_masks
from anomaly_clip.methods.rotations import regular_rotations
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
    return write_images(tmp_path_factory.mktemp("data") / "images", num_train=3, num_test=2)


def images_of(count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def tokens(backbone: ViTBackbone, images: Tensor) -> Tensor:
    """Return the patches of the last block after the final norm, ``(B, 16, 64)``."""
    (last,) = backbone(images, [6])
    return last.projected[:, backbone.num_prefix_tokens :]


@pytest.mark.parametrize("num_neighbours", [1, 4, 1000])
def test_scores_are_those_of_scikit_learn(backbone: ViTBackbone, num_neighbours: int) -> None:
    images = images_of(5)
    method = AnomalyDINO(backbone, SIZE, num_neighbours=num_neighbours, sigma=2.0)
    fit_images(method, images[:3])
    assert method.bank.shape == (48, 64)
    assert_close(method.bank.norm(dim=1), torch.ones(48))
    patches = tokens(backbone, images)
    search = NearestNeighbors(metric="cosine", algorithm="brute")
    search.fit(patches[:3].flatten(0, 1).numpy())
    nearest, _ = search.kneighbors(patches[3:].flatten(0, 1).numpy(), min(num_neighbours, 48))
    distances = torch.from_numpy(nearest.mean(axis=1)).view(2, 16)
    scores = method.score(images[3:], ["a", "a"])
    assert_close(scores["image_score"], distances.amax(dim=1), atol=1e-5, rtol=0)  # int(0.16) = 0
    raw = patches_to_map(distances, (SIZE, SIZE))
    expected = torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), 2.0)) for m in raw])
    assert_close(scores["anomaly_map"], expected, atol=1e-5, rtol=0)


def test_rotated_copies_are_in_the_memory_in_the_order_of_the_images(backbone: ViTBackbone) -> None:
    images = images_of(3)
    method = fit_images(AnomalyDINO(backbone, SIZE, rotations="on"), images)
    copies = torch.cat([regular_rotations(image) for image in images])
    assert_close(method.bank, method.embed(copies).flatten(0, 1), atol=1e-5, rtol=0)
    assert method.protocol()["rotations"] == 8


def test_masked_patches_have_distance_zero(backbone: ViTBackbone) -> None:
    images = images_of(4)
    method = fit_images(AnomalyDINO(backbone, SIZE, sigma=0.0), images[:2])
    plain = method.score(images[2:], ["a", "a"])
    method.masks, method.mask_threshold = "on", 3.0
    masks = object_masks(tokens(backbone, images[2:]), 3.0, "column")
    assert 0 < masks.double().mean() < 1
    masked = method.score(images[2:], ["a", "a"])
    bank = method.bank
    units = torch.nn.functional.normalize(tokens(backbone, images[2:]), dim=-1)
    distances = (1 - (units @ bank.T).amax(dim=-1)) * masks
    assert_close(masked["image_score"], distances.amax(dim=1), atol=1e-5, rtol=0)
    assert not torch.allclose(masked["anomaly_map"], plain["anomaly_map"])


def test_a_constant_image_with_masks(backbone: ViTBackbone) -> None:
    method = fit_images(AnomalyDINO(backbone, SIZE, masks="on"), images_of(1))
    for value in (0, 127, 255):
        constant = torch.full((2, 3, SIZE, SIZE), value, dtype=torch.uint8)
        assert method.score(constant, ["a", "a"])["image_score"].isfinite().all()


def test_default_layers(backbone: ViTBackbone) -> None:
    assert AnomalyDINO(backbone, SIZE).layers == [6]
    assert AnomalyDINO.stages == ("layer4",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2, 4]}, r"\[2, 4\]: AnomalyDINO compares patches of one layer; give one"),
        ({"num_neighbours": 0}, "model.num_neighbours must be 1 or more"),
        ({"rotations": "45"}, "model.rotations must be one of auto, informed, on, off, got 45"),
        ({"masks": "yes"}, "model.masks must be one of auto, on, off, got yes"),
        ({"mask_shape": "row"}, "model.mask_shape must be one of column, grid, got row"),
        ({"sigma": -1.0}, "model.sigma must be 0 or more"),
    ],
)
def test_unsupported_options_are_refused(
    backbone: ViTBackbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyDINO(backbone, SIZE, **options)


def test_unusable_features_are_refused(
    backbone: ViTBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = AnomalyDINO(backbone, SIZE)
    embed = method.embed
    monkeypatch.setattr(method, "embed", lambda images: embed(images) * torch.nan)
    with pytest.raises(Diverged, match="fitted bank of AnomalyDINO is NaN or infinite"):
        fit_images(method, images_of(2))


@pytest.mark.parametrize("rotations", ["on", "off"])
def test_a_memory_larger_than_the_free_memory_is_refused(
    rotations: Any,
    backbone: ViTBackbone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method = AnomalyDINO(backbone, SIZE, rotations=rotations)
    method.trainer = quiet_trainer()
    data = SimpleNamespace(fit_samples=lambda: [None] * 5, train_categories=["a"])
    monkeypatch.setattr(AnomalyDINO, "data", property(lambda _: data))
    monkeypatch.setattr(AnomalyDINO, "dataset_name", None)
    rows = 5 * 16 * (8 if rotations == "on" else 1)
    needed = rows * 64 * 4
    monkeypatch.setattr(memory, "available_memory", lambda _: needed * 5 // 4 + 1)
    method.on_fit_start()
    assert f"the memory has {rows} patches of 5 images" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(memory, "available_memory", lambda _: needed * 5 // 4 - 1)
    with pytest.raises(ValueError, match=rf"GB for {rows} patches, but may only use 80%.*: lower"):
        method.on_fit_start()


def fitted_on(backbone: ViTBackbone, root: Path, **options: Any) -> AnomalyDINO:
    method = AnomalyDINO(backbone, SIZE, **options)
    data = MVTecAD(str(root), [NAMES[0]], num_workers=0, batch_size=2)
    quiet_trainer(max_epochs=1).fit(method, datamodule=data)
    return method


@pytest.mark.slow
def test_published_settings_follow_from_the_category(
    backbone: ViTBackbone, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = fitted_on(backbone, root)
    assert (method.has_rotations, method.has_masks) == (True, False)  # no category of MVTec-AD
    monkeypatch.setitem(object_masks.__globals__["MASKED"], "MVTecAD", (NAMES[0],))
    method = fitted_on(backbone, root)
    assert not method.has_masks  # the published threshold does not belong to this backbone
    method = fitted_on(backbone, root, mask_threshold=3.0)
    assert method.has_masks
    assert method.protocol()["object_masks"] == {"threshold": 3.0, "shape": "column"}
    informed = fitted_on(backbone, root, rotations="informed", masks="off")
    assert (informed.has_rotations, informed.has_masks) == (False, False)
    assert informed.not_exportable is None
    assert len(method.bank) == 8 * len(informed.bank)


# -- commands --------------------------------------------------------------------------------------


def words(verb: str, root: Path, folder: Path, *more: str) -> list[str]:
    line = [verb, "--model=AnomalyDINO", "--model.backbone.name=test_vit"]
    line += ["--model.backbone.weights=random", f"--model.image_size={SIZE}"]
    line += ["--data=MVTecAD", f"--data.root={root}", "--data.num_workers=0", "--data.batch_size=2"]
    return [*line, "--trainer.accelerator=cpu", f"--output.folder={folder}", *more]


ONE = f"--data.categories=[{NAMES[0]}]"


@pytest.mark.slow
def test_a_checkpoint_keeps_what_belongs_to_its_category(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [ONE, "--data.shots=2", "--model.masks=on"]
    assert main(words("fit", root, tmp_path / "fit", *more)) == 0
    checkpoint = tmp_path / "fit" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert set(saved["state_dict"]) == {"unused", "bank"}
    assert saved["anomaly_dino"] == {"rotations": True, "masks": False}
    assert main(["test", f"--ckpt_path={checkpoint}", f"--output.folder={tmp_path / 'test'}"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("with test_vit, masks may be wrong") == 1
    protocol = json.loads((tmp_path / "test" / "metrics.json").read_text())["run"]["protocol"]
    assert (protocol["rotations"], protocol["shots"]) == (8, 2)
    assert protocol["object_masks"] == {"threshold": 10.0, "shape": "column"}
    scores = {row["path"]: float(row["image_score"]) for row in read_scores(tmp_path / "test")}
    detector = load(tmp_path / "fit")
    again = [prediction.score for prediction in detector.predict(list(scores))]
    assert again == pytest.approx(list(scores.values()), rel=1e-4, abs=1e-6)
    # Masks follow from the patches of each image, which no program computes.
    target = tmp_path / "program"
    assert main(["export", f"--ckpt_path={checkpoint}", "--format=onnx", f"--folder={target}"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "AnomalyDINO cannot be exported: it masks objects by principal components" in err
    assert not target.exists()


@pytest.mark.slow
def test_two_processes_fill_the_same_memory(root: Path, tmp_path: Path) -> None:
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    done = run_command(words("fit", root, tmp_path / "two", ONE, *ddp), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(words("fit", root, tmp_path / "one", ONE)) == 0
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("one", "two")
    )
    assert first["state_dict"]["bank"].shape == (3 * 8 * 16, 64)
    assert_close(first["state_dict"]["bank"], second["state_dict"]["bank"], atol=1e-5, rtol=0)
