from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detector_golden import golden_images, write_network
from helpers import fit_images, near
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip import memory
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.methods import PatchCore, feature_method, patchcore
from anomaly_clip.methods.patchcore import nearest_rows
from anomaly_clip.testing.processes import run_command


@pytest.fixture(scope="module")
def backbone() -> CNNBackbone:
    torch.manual_seed(0)
    return CNNBackbone(weights="random")


def with_bank(method: PatchCore, bank: Tensor) -> PatchCore:
    method.bank = bank
    return method.eval()


@pytest.mark.golden
def test_golden_patchcore(golden: Callable[[str], Any], tmp_path: Path) -> None:
    case = golden("detectors")
    arrays, meta = load_file(case.folder / "patchcore.safetensors"), case.meta
    settings = CNNSettings(weights=write_network(tmp_path, meta))
    images, few = golden_images(meta), meta["num_train"]
    options: dict[str, Any] = {"image_size": meta["image_size"], "blur_border": "inner"}
    method = PatchCore(settings, upsampling="nearest", **options)
    trained = method.embed(images[:few]).flatten(0, 1)
    near(trained[arrays["memory_bank_rows"]], arrays["memory_bank"], 1e-4)
    with_bank(method, arrays["memory_bank"])
    embedding = method.embed(images[few:])
    near(embedding.flatten(0, 1), arrays["test_embedding"], 1e-4)
    distances, rows = nearest_rows(embedding.flatten(0, 1), method.bank)
    assert torch.equal(rows.view_as(arrays["patch_nn_index"]), arrays["patch_nn_index"])
    near(distances.view_as(arrays["patch_distance"]), arrays["patch_distance"], 1e-4)
    scores = method.score(images[few:], ["a"] * meta["num_test"])
    near(scores["anomaly_map"], arrays["map_anomalib"][:, 0], 1e-4)
    near(scores["image_score"], arrays["score_reweighted_b9"], 1e-4)
    plain = with_bank(PatchCore(settings, num_neighbours=1, **options), arrays["memory_bank"])
    near(
        plain.score(images[few:], ["a"] * meta["num_test"])["image_score"],
        arrays["score_max"],
        1e-4,
    )
    for neighbours, name in ((9, "scaled003_score_reweighted_b9"), (1, "scaled003_score_max")):
        scaled = PatchCore(settings, num_neighbours=neighbours, **options)
        with_bank(scaled, 0.03 * arrays["memory_bank"])
        features = 0.03 * embedding
        distances, rows = nearest_rows(features.flatten(0, 1), scaled.bank)
        scores_of_images = scaled.image_scores(
            features, distances.view(len(features), -1), rows.view(len(features), -1)
        )
        near(scores_of_images, arrays[name], 1e-4)


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 24])
def test_nearest_rows_match_scipy(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchcore, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    features, bank = rng.normal(0, 1, (50, 6)), rng.normal(0, 1, (30, 6))
    plain = cdist(features, bank)
    distances, rows = nearest_rows(torch.from_numpy(features), torch.from_numpy(bank))
    np.testing.assert_array_equal(rows, plain.argmin(axis=1))
    np.testing.assert_allclose(distances, plain.min(axis=1), rtol=1e-5)


def test_patches_in_the_bank_are_normal(backbone: CNNBackbone) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    method = fit_images(PatchCore(backbone, image_size=64, coreset=1.0), images)
    assert method.bank.shape == (3 * 64, 384)
    scores = method.score(images, ["a"] * 3)
    assert float(scores["anomaly_map"].max()) < 1e-3
    other = method.score(images + 0.5 * torch.randn(3, 3, 64, 64), ["a"] * 3)
    assert float(other["image_score"].min()) > 0.1


def test_mixed_precision_leaves_distances_as_they_are(backbone: CNNBackbone) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    method = fit_images(PatchCore(backbone, image_size=64, coreset=0.5), images[:3])
    plain = method.score(images, ["a"] * 4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.score(images, ["a"] * 4)
    for name in ("anomaly_map", "image_score"):
        assert_close(mixed[name], plain[name], atol=1e-5, rtol=1e-5)


def test_the_embedding_by_hand(backbone: CNNBackbone) -> None:
    images = torch.randn(2, 3, 64, 64)
    features = backbone(images)
    fine, coarse = (
        F.conv2d(v, torch.full((v.shape[1], 1, 3, 3), 1 / 9), padding=1, groups=v.shape[1])
        for v in (features["layer2"], features["layer3"])
    )
    coarse = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)
    expected = torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).reshape(2, 64, 384)
    assert_close(PatchCore(backbone, image_size=64).embed(images), expected, atol=1e-5, rtol=1e-4)


def test_a_float16_bank_changes_the_map_by_at_most_5_percent(backbone: CNNBackbone) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    maps = {}
    for kind in ("float32", "float16"):
        method = PatchCore(backbone, image_size=64, coreset=0.25, bank_type=kind)
        fit_images(method, images)
        assert method.bank.dtype == getattr(torch, kind)
        maps[kind] = method.score(images, ["a"] * 4)["anomaly_map"]
    assert_close(maps["float16"], maps["float32"], atol=0.05 * float(maps["float32"].max()), rtol=0)


def words(verb: str, root: Path, runs: Path, *more: str) -> list[str]:
    line = [verb, "--model", "PatchCore", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "32", "--model.coreset", "0.5"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    line += ["--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    return [*line, "--data.categories", "[bottle]", "--output.root", str(runs), *more]


def test_fit_logs_its_cost_and_a_test_needs_only_the_checkpoint(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("fit", mvtec_root, tmp_path / "runs")) == 0
    err = capsys.readouterr().err
    assert (
        "PatchCore: 2 images have 32 patches of 384 values, and the bank keeps 16 patches; "
        "the fit takes about" in err
    )
    checkpoint = tmp_path / "runs" / "PatchCore" / "1-fit" / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name: tuple(v.shape) for name, v in state.items()} == {"unused": (), "bank": (16, 384)}
    line = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    assert main([*line, "--model.sigma", "2"]) == 0
    (metrics,) = (tmp_path / "t").rglob("metrics.json")
    assert json.loads(metrics.read_text())["run"]["method"] == "PatchCore"
    capsys.readouterr()
    assert main([*line, "--model.coreset", "0.1"]) == 2
    assert "model.coreset is 0.1, but" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_choose_the_same_rows(mvtec_root: Path, tmp_path: Path) -> None:
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "1"]
    done = run_command(words("fit", mvtec_root, tmp_path / "two", *ddp), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(words("fit", mvtec_root, tmp_path / "one", "--data.batch_size", "1")) == 0
    banks = [
        torch.load(tmp_path / name / "PatchCore/1-fit/checkpoints/last.ckpt", weights_only=True)
        for name in ("one", "two")
    ]
    first, second = (bank["state_dict"]["bank"] for bank in banks)
    assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_a_bank_larger_than_memory_is_refused(
    mvtec_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: 10_000)
    assert main(words("fit", mvtec_root, tmp_path / "runs")) == 2
    err = capsys.readouterr().err
    assert "GB that are free on cpu: set model.memory_gb, or lower data.fraction" in err
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coreset": 0.0}, "model.coreset must be in"),
        ({"projection_eps": 1.0}, "model.projection_eps must be in"),
        ({"num_neighbours": 0}, "model.num_neighbours must be 1 or more"),
        ({"memory_gb": 0}, r"model.memory_gb must be in \(0, 1000000.0\], got 0"),
        ({"memory_gb": 1e300}, r"model.memory_gb must be in \(0, 1000000.0\], got 1e\+300"),
        ({"layers": ["layer7"]}, r"model.layers must name spatial layers .*, got \['layer7'\]"),
    ],
)
def test_bad_arguments_are_named(
    backbone: CNNBackbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PatchCore(backbone, **options)


def test_patches_are_put_in_the_order_of_their_images() -> None:
    patches = torch.arange(12.0).view(6, 2, 1)  # two patches per image
    order = torch.tensor([4, 0, 2, 5, 1, 3])  # as gathered from the processes
    parts = [(rows, patches[rows]) for rows in order.split([1, 3, 2])]
    assert_close(feature_method.in_order(parts), patches.flatten(0, 1), atol=0, rtol=0)
    assert parts == []  # each part is freed after it is copied


@pytest.mark.parametrize("eps", [0.0, 0.9])
def test_a_fit_needs_at_most_four_fifths_of_the_free_memory(
    eps: float, backbone: CNNBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PatchCore(backbone, image_size=32, coreset=0.5, projection_eps=eps)
    data = SimpleNamespace(fit_samples=lambda: [None] * 2)
    monkeypatch.setattr(PatchCore, "data", property(lambda _: data))
    rows, width = 2 * 4 * 4, 384
    # Values per patch during the selection. Without a projection (eps 0), these are the centred
    # features. Otherwise, they are the projected features and a centred copy of them.
    points = width if eps == 0 else 2 * johnson_lindenstrauss_min_dim(rows, eps=eps)
    # Float32 values: all patches, the selected half, the points, and three values per patch.
    needed = 4 * (rows * width + rows // 2 * width + rows * points + 3 * rows)
    assert method.cost(rows, width) == {torch.device("cpu"): needed}
    free = [needed * 5 // 4 - 1, needed * 5 // 4 + 1]
    monkeypatch.setattr(memory, "available_memory", lambda _: free[0])
    with pytest.raises(ValueError, match=r"use 80% of the .* GB that are free on cpu: set"):
        method.on_fit_start()
    monkeypatch.setattr(memory, "available_memory", lambda _: free[1])
    method.on_fit_start()
    monkeypatch.setattr(memory, "available_memory", lambda _: None)  # not known
    method.on_fit_start()


@pytest.mark.parametrize(
    ("num_patches", "size"), [(1, 1), (14, 1), (16, 2), (25, 2), (36, 4), (1000, 100)]
)
def test_the_coreset_is_a_fraction_of_the_patches_but_never_empty(
    num_patches: int, size: int, backbone: CNNBackbone
) -> None:
    method = PatchCore(backbone, image_size=32, coreset=0.1, projection_eps=0.0)
    assert method.num_kept(num_patches) == size
    assert len(method.choose(torch.randn(num_patches, 3), num_patches)) == size


PATCHES = 16  # of an image of 32 pixels


def bounded(backbone: CNNBackbone, most: int, **options: Any) -> PatchCore:
    """Return a method with memory for a number of patches, and for half of the next one."""
    method = PatchCore(backbone, image_size=32, memory_gb=1.0, **options)
    costs = [method.cost(rows, 384)[torch.device("cpu")] for rows in (most, most + 1)]
    method.memory_gb = sum(costs) / 2 / memory.GB
    return method


@pytest.mark.parametrize("eps", [0.0, 0.9])
def test_the_bound_is_the_memory_of_patches_points_and_half_of_the_patches(
    eps: float, backbone: CNNBackbone
) -> None:
    method = bounded(backbone, 50, projection_eps=eps)
    assert method.most_rows(384) == 50
    points = 384 if eps == 0 else 2 * min(384, johnson_lindenstrauss_min_dim(50, eps=eps))
    assert method.cost(50, 384) == {torch.device("cpu"): 4 * (75 * 384 + 50 * points + 150)}
    assert PatchCore(backbone, image_size=32).most_rows(384) is None


def bank_of(method: PatchCore, patches: Tensor, batch: int = 3) -> Tensor:
    """Return the bank of images' patches ``(n, N, C)`` that arrive in batches."""
    for index in torch.arange(len(patches)).split(batch):
        method.hold(index, patches[index])
    return method.choose(feature_method.in_order(method._parts), method._num_seen)


def test_patches_in_memory_never_exceed_the_bound(
    backbone: CNNBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = bounded(backbone, 50, coreset=0.25)
    held: list[int] = []
    thinned: list[tuple[int, int]] = []

    def recorded(index: Tensor, features: Tensor) -> None:
        hold(index, features)
        held.append(sum(len(part) for part, _ in method._parts))

    def counted(count: int) -> None:
        thinned.append((sum(len(part) for part, _ in method._parts), count))
        thin(count)

    hold, thin = method.hold, method.thin
    monkeypatch.setattr(method, "hold", recorded)
    monkeypatch.setattr(method, "thin", counted)
    patches = torch.randn(8, PATCHES, 384, generator=torch.Generator().manual_seed(0))
    bank = bank_of(method, patches)
    # Batches come in pieces of 25 and 23, 25 and 23, 25 and 7 patches. Each but the first two
    # pieces makes room by a thinning, which leaves 25.
    assert held == [48, 48, 32]
    assert thinned == [(48, 25), (50, 25), (48, 25), (50, 25)]
    rows = {tuple(row) for row in bank.tolist()}
    assert len(bank) == len(rows) == 25  # half of the bound, not 32, a quarter of all patches
    assert rows < {tuple(row) for row in patches.flatten(0, 1).tolist()}
    assert torch.equal(bank_of(bounded(backbone, 50, coreset=0.25), patches), bank)
    assert len(bank_of(bounded(backbone, 50, coreset=0.1), patches)) == 13  # a tenth of 128


def test_a_bound_with_room_for_all_patches_changes_nothing(backbone: CNNBackbone) -> None:
    patches = torch.randn(3, PATCHES, 384, generator=torch.Generator().manual_seed(0))
    plain = bank_of(PatchCore(backbone, image_size=32, coreset=0.7), patches)
    enough = bank_of(bounded(backbone, 3 * PATCHES, coreset=0.7), patches)
    assert len(plain) == 34
    assert torch.equal(enough, plain)


def test_thinning_keeps_outliers_and_forgets_the_order_of_arrival(backbone: CNNBackbone) -> None:
    method = PatchCore(backbone, image_size=32, memory_gb=1.0, projection_eps=0.0)
    patches = torch.tensor([[0.0], [0.1], [9.0], [0.2], [-9.0], [0.3]]).unsqueeze(1)
    kept = []
    for order in ([0, 1, 2, 3, 4, 5], [4, 2, 0, 5, 3, 1]):
        rows = torch.tensor(order)
        method._parts = [(part, patches[part]) for part in rows.split(4)]
        method.thin(3)
        ((numbers, values),) = method._parts
        assert torch.equal(values, patches[numbers])
        kept.append(numbers.tolist())
    assert kept[0] == kept[1]
    assert {2, 4} < set(kept[0])


@pytest.mark.parametrize("share", [0.4, 1.1])
def test_a_bound_is_logged_and_refused_below_two_images(
    share: float, mvtec_root: Path, backbone: CNNBackbone, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    method = bounded(backbone, round(2 * PATCHES * share), coreset=0.5)
    data = SimpleNamespace(fit_samples=lambda: [None] * 9)
    monkeypatch.setattr(PatchCore, "data", property(lambda _: data))
    if share < 1:
        message = r"model.memory_gb .* has room for 13 patches, but not for 32, .*: set it to 9."
        with pytest.raises(ValueError, match=message):
            method.on_fit_start()
    else:
        method.on_fit_start()
        err = capsys.readouterr().err
        assert "9 images have 144 patches of 384 values" in err
        assert "the bank keeps 17 patches, with at most 35 of them in memory; the fit" in err
