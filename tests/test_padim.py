from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detector_golden import golden_images, write_network
from helpers import fit_images, near, quiet_trainer, save_picture
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch.testing import assert_close
from torchvision.models import resnet18

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import PaDiM
from anomaly_clip.methods import gaussians as gaussians_module
from anomaly_clip.methods.gaussians import RunningMoments, inverse_factor
from anomaly_clip.methods.padim import choose_channels
from anomaly_clip.testing.processes import run_command


@pytest.fixture(scope="module")
def backbone() -> CNNBackbone:
    torch.manual_seed(0)
    return CNNBackbone(weights="random")


@pytest.mark.golden
def test_golden_padim(golden: Callable[[str], Any], tmp_path: Path) -> None:
    case = golden("detectors")
    arrays, meta = load_file(case.folder / "padim.safetensors"), case.meta
    settings = CNNSettings(weights=write_network(tmp_path, meta))
    images, few, size = golden_images(meta), meta["num_train"], meta["image_size"]
    options: dict[str, Any] = {"image_size": size, "num_channels": meta["padim_dims"]}
    method = PaDiM(settings, regularization=0.01 + 1e-5, blur_border="inner", **options)
    assert method.channels.tolist() == arrays["idx"].long().tolist()
    fit_images(method, images[:few])
    near(method.mean, arrays["mean"].T, 1e-4)
    near(method.factor.mT @ method.factor, arrays["inv_covariance"], 2e-3)
    tested = images[few:]
    side = arrays["anomalib_distance"].shape[-1]
    distances = method.distances(method.embed(tested)).view(-1, 1, side, side)
    near(distances, arrays["anomalib_distance"], 1e-3)
    scores = method.score(tested, ["a"] * len(tested))
    near(scores["anomaly_map"], arrays["anomalib_map"][:, 0], 1e-3)
    near(scores["image_score"], arrays["anomalib_score"].flatten(), 1e-3)


@pytest.mark.golden
def test_golden_padim_of_the_public_code_in_float64(
    golden: Callable[[str], Any], tmp_path: Path
) -> None:
    case = golden("detectors")
    arrays, meta = load_file(case.folder / "padim.safetensors"), case.meta
    settings = CNNSettings(weights=write_network(tmp_path, meta))
    method = PaDiM(settings, image_size=meta["image_size"], num_channels=meta["padim_dims"])
    for name in method.fitted_buffers:  # float64 statistics of float32 features
        setattr(method, name, torch.empty(0, dtype=torch.float64))
    images, few = golden_images(meta), meta["num_train"]
    whole = PaDiM(settings, image_size=meta["image_size"], num_channels=None)
    expected = arrays["concat_first_test_first4"]
    high, wide = expected.shape[-2:]
    side = arrays["public_distance_f64"].shape[-1]
    corner = whole.embed(images[few : few + 1]).mT.view(-1, side, side)[:, :high, :wide]
    near(corner, expected.view_as(corner), 1e-4)
    fit_images(method, images[:few])
    public = {k.removeprefix("public_"): v for k, v in arrays.items() if k.startswith("public_")}
    distances = method.distances(method.embed(images[few:]))
    near(distances, public["distance_f64"].reshape(distances.shape), 1e-6)
    scores = method.score(images[few:], ["a"] * (len(images) - few))
    near(scores["anomaly_map"], public["map_f64"].reshape(scores["anomaly_map"].shape), 1e-6)
    near(scores["image_score"], public["score_raw_f64"], 1e-6)


def test_the_choice_of_channels_is_that_of_the_public_code() -> None:
    # ResNet-18 with seed 1024; see docs/methods/padim.md.
    assert choose_channels(448, 100, 1024)[:10] == [408, 9, 247, 435, 199, 165, 424, 405, 266, 51]
    assert choose_channels(7, None, 0) == list(range(7))


def test_channels_can_be_selected_before_upsampling(backbone: CNNBackbone) -> None:
    images = torch.randn(2, 3, 64, 64)
    method = PaDiM(backbone, image_size=64, num_channels=50)
    features = backbone(images)
    size = features["layer1"].shape[-2:]
    plain = torch.cat(
        [F.interpolate(features[name], size) for name in ("layer1", "layer2", "layer3")], dim=1
    )
    expected = plain[:, method.channels].flatten(2).mT
    assert_close(method.embed(images), expected, atol=0, rtol=0)


def test_the_distance_matches_scipy(backbone: CNNBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    # At most two positions at a time: five positions are split into three parts.
    monkeypatch.setitem(gaussians_module.POSITIONS, "cpu", 2)
    rng = np.random.default_rng(1)
    features = torch.from_numpy(rng.normal(0, 1, (20, 5, 4)))
    moments = RunningMoments()
    moments.add(features)
    count, mean, scatter = moments.take()
    method = PaDiM(backbone, num_channels=4).double()
    method.keep(mean=mean, factor=inverse_factor(scatter, count, 0.01))
    other = torch.from_numpy(rng.normal(0, 2, (3, 5, 4)))
    distances = method.distances(other)
    for image in range(3):
        for position in range(5):
            covariance = np.cov(features[:, position].numpy(), rowvar=False) + 0.01 * np.eye(4)
            inverse = np.linalg.inv(covariance)
            expected = mahalanobis(other[image, position], mean[position], inverse)
            assert float(distances[image, position]) == pytest.approx(expected, rel=1e-9)


def test_map_and_score(backbone: CNNBackbone) -> None:
    torch.manual_seed(3)
    images = torch.randn(6, 3, 64, 64)
    method = fit_images(PaDiM(backbone, image_size=64, num_channels=10, sigma=2.0), images[:4])
    scores = method.score(images[4:], ["a", "a"])
    grid = method.distances(method.embed(images[4:])).view(2, 1, 16, 16)
    raw = F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    blurred = np.stack([gaussian_filter(image_map.numpy(), 2.0) for image_map in raw])
    np.testing.assert_allclose(scores["anomaly_map"], blurred, rtol=1e-4)
    assert_close(scores["image_score"], scores["anomaly_map"].flatten(1).amax(1))
    alone = method.score(images[4:5], ["b"])["anomaly_map"]
    assert_close(alone[0], scores["anomaly_map"][0], atol=1e-4, rtol=1e-4)


def words(verb: str, root: Path, runs: Path, *more: str) -> list[str]:
    line = [verb, "--model", "PaDiM", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "32", "--model.num_channels", "8"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    line += ["--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    return [*line, "--output.root", str(runs), *more]


ONE = ("--data.categories", "[bottle]")


@pytest.fixture
def seven_bottles(mvtec_root: Path) -> Path:
    """Return a folder in MVTec-AD's layout with seven training images of bottles."""
    rng = np.random.default_rng(0)
    for number in range(5):
        array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        save_picture(mvtec_root / "bottle" / "train" / "good" / f"{100 + number}.png", array)
    return mvtec_root


@pytest.mark.slow
def test_fit_and_test_from_the_checkpoint_alone(
    seven_bottles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("fit", seven_bottles, tmp_path / "runs", *ONE)) == 0
    printed = "".join(capsys.readouterr())
    assert "fit PaDiM" in printed
    assert "params" not in printed  # Lightning's summary means nothing of a single pass
    [checkpoint] = (tmp_path / "runs" / "PaDiM" / "1-fit" / "checkpoints").iterdir()
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name: tuple(value.shape) for name, value in kept.items()} == {
        "unused": (),
        "channels": (8,),
        "mean": (64, 8),
        "factor": (64, 8, 8),
    }
    for verb in ("test", "predict"):
        line = [verb, "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / verb)]
        assert main(line) == 0
    (metrics,) = (tmp_path / "test").rglob("metrics.json")
    assert json.loads(metrics.read_text())["run"]["method"] == "PaDiM"
    assert list((tmp_path / "predict").rglob("scores.csv"))


@pytest.mark.slow
def test_two_processes_compute_the_same_gaussians(seven_bottles: Path, tmp_path: Path) -> None:
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "1"]
    line = words("fit", seven_bottles, tmp_path / "two", *ONE, *ddp)
    done = run_command(line, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(words("fit", seven_bottles, tmp_path / "one", *ONE)) == 0
    states = [
        torch.load(tmp_path / name / "PaDiM/1-fit/checkpoints/last.ckpt", weights_only=True)[
            "state_dict"
        ]
        for name in ("one", "two")
    ]
    # The processes get four and three of the seven images.
    # Rounding depends on the batch size.
    assert_close(states[0], states[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "PaDiM is one model per category, but data.root"),
        ((*ONE, "--trainer.max_epochs", "2"), "set trainer.max_epochs to 1, not 2"),
        ((*ONE, "--data.shots", "1"), "PaDiM needs at least 2 normal training images"),
        (
            (*ONE, "--model.num_channels", "999"),
            "between 1 and 448, the number of channels of layer1,",
        ),
        ((*ONE, "--model.layers", "[pooled]"), r"backbone .*, got \['pooled'\]"),
        ((*ONE, "--model.layers", "[layer2, layer1]"), "must list the finest layer first"),
        ((*ONE, "--model.regularization", "0"), "model.regularization must be above 0"),
        ((*ONE, "--model.image_size", "8"), "model.image_size must be 32 or more"),
        ((*ONE, "--model.layers", "[]"), "backbone.layers of resnet18 is empty"),
        ((*ONE, "--model.backbone.mean", "[0.5, 0.5]"), "3 values, one per colour"),
        ((*ONE, "--data.synthesis.recipe", "perlin"), "on normal images only: leave out data.syn"),
        ((*ONE, "--data.val_split", "test"), "cannot be validated during the fit"),
    ],
)
def test_unsupported_options_are_refused(
    seven_bottles: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    assert main(words("fit", seven_bottles, tmp_path / "runs", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "runs").glob("*/*"))


def test_nothing_is_tested_before_a_fit(
    seven_bottles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("test", seven_bottles, tmp_path, *ONE)) == 2
    assert "PaDiM must be fitted first" in capsys.readouterr().err


def test_mixed_precision_leaves_distances_as_they_are(backbone: CNNBackbone) -> None:
    torch.manual_seed(3)
    images = torch.randn(6, 3, 64, 64)
    method = fit_images(PaDiM(backbone, image_size=64, num_channels=10), images[:4])
    plain = method.score(images[4:], ["a", "a"])["anomaly_map"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.score(images[4:], ["a", "a"])["anomaly_map"]
    assert_close(mixed, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_half_precision_keeps_its_gaussians_in_float32(seven_bottles: Path, tmp_path: Path) -> None:
    line = words("fit", seven_bottles, tmp_path, *ONE, "--trainer.precision", "bf16-true")
    assert main([*line, "--trainer.enable_model_summary", "false"]) == 0
    [checkpoint] = tmp_path.glob("*/1-*/checkpoints/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["factor"].dtype == state["mean"].dtype == torch.float32
    # The backbone is recognised although it was cast.
    assert main(["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]) == 0


@pytest.mark.slow
def test_a_checkpoint_loads_with_another_copy_of_the_weights(
    seven_bottles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    state = resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "a.pt")
    weights = ("--model.backbone.weights", str(tmp_path / "a.pt"))
    assert main(words("fit", seven_bottles, tmp_path / "runs", *ONE, *weights)) == 0
    [checkpoint] = (tmp_path / "runs").glob("*/1-*/checkpoints/last.ckpt")
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    test = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    capsys.readouterr()
    assert main(test) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main([*test, "--model.backbone.weights", str(tmp_path / "b.pt")]) == 0
    state["conv1.weight"] += 1
    torch.save(state, tmp_path / "other.pt")
    assert main([*test, "--model.backbone.weights", str(tmp_path / "other.pt")]) == 2
    assert "use the backbone and weights of the fit" in capsys.readouterr().err


def test_an_unfitted_method_is_not_tested_from_python(seven_bottles: Path) -> None:
    method = PaDiM(CNNSettings(weights="random"), image_size=32, num_channels=5)
    data = MVTecAD(str(seven_bottles), categories=["bottle"], num_workers=0)
    with pytest.raises(ValueError, match="PaDiM must be fitted first"):
        quiet_trainer().test(method, data, verbose=False)


def test_each_image_is_used_once(seven_bottles: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    seen: list[int] = []

    class Recording(PaDiM):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
            seen.extend(batch["index"].tolist())
            return super().training_step(batch, batch_idx)

    data = MVTecAD(str(seven_bottles), categories=["bottle"], num_workers=0, batch_size=3)
    quiet_trainer(max_epochs=1).fit(
        Recording(CNNSettings(weights="random"), image_size=32, num_channels=5), data
    )
    assert sorted(seen) == list(range(7))


# -- the order of channels -------------------------------------------------------------------------


def channels_by_hand(method: PaDiM, images: torch.Tensor) -> torch.Tensor:
    """Return the channels of ``embed`` from all features, upsampled before the choice."""
    features = method.backbone(images)
    size = features[method.layers[0]].shape[-2:]
    maps = [F.interpolate(features[layer], size, mode="nearest") for layer in method.layers]
    return torch.cat(maps, dim=1).flatten(2)[:, method.channels].mT


def small(backbone: CNNBackbone, **options: Any) -> PaDiM:
    return PaDiM(backbone, **{"image_size": 64, "num_channels": 30, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"num_channels": None}, {"num_channels": 1}, {"layers": ["layer2", "layer2", "layer3"]}],
    ids=["some", "all", "one", "a layer twice"],
)
def test_channels_are_in_the_order_of_sampling(
    backbone: CNNBackbone, options: dict[str, Any]
) -> None:
    method, images = small(backbone, **options), torch.randint(0, 256, (2, 3, 64, 64)).byte()
    assert torch.equal(method.embed(images), channels_by_hand(method, images))


@pytest.mark.parametrize("side", [64, 72, 104])
def test_channels_of_grids_that_are_no_multiples(backbone: CNNBackbone, side: int) -> None:
    method, images = small(backbone), torch.randint(0, 256, (2, 3, side, side)).byte()
    sides = [maps.shape[-1] for maps in backbone.feature_maps(images, method.layers)]
    assert all(a % b == 0 for a, b in pairwise(sides)) == (side == 64)
    features = method.embed(images)
    assert torch.equal(features, channels_by_hand(method, images))
    assert features.is_contiguous()  # otherwise the products of `distances` would be slow


def test_distances_do_not_depend_on_the_memory_layout(backbone: CNNBackbone) -> None:
    method = copy.deepcopy(small(backbone))
    method.mean, method.factor = torch.randn(9, 5), torch.randn(9, 5, 5)
    features = torch.randn(4, 5, 9).mT
    difference = (features - method.mean)[..., None]  # (B, N, C, 1)
    expected = (method.factor @ difference).square().sum((-1, -2)).sqrt()
    for same in (features, features.contiguous()):
        torch.testing.assert_close(method.distances(same), expected)


def test_checkpoints_hold_the_channels_alone(backbone: CNNBackbone) -> None:
    keys = {key for key in small(backbone).state_dict() if not key.startswith("backbone.")}
    assert keys == {"channels", "mean", "factor", "unused"}


def test_loaded_channels_are_put_in_their_order(backbone: CNNBackbone) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64)).byte()
    source, target = small(backbone, channel_seed=1), small(backbone, channel_seed=2)
    assert not torch.equal(source.embed(images), target.embed(images))
    parent = torch.nn.ModuleDict({"detector": target})  # as a part of something larger
    parent.load_state_dict({f"detector.{k}": v for k, v in source.state_dict().items()})
    assert torch.equal(target.embed(images), source.embed(images))
    assert torch.equal(target.embed(images), channels_by_hand(target, images))


def test_copies_keep_the_order_of_channels(backbone: CNNBackbone) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64)).byte()
    method, other = small(backbone), small(backbone, channel_seed=5)
    copies = [copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    for duplicate in copies:
        assert torch.equal(duplicate.embed(images), method.embed(images))
        duplicate.load_state_dict(other.state_dict())  # and leave the original as it is
        assert torch.equal(duplicate.embed(images), other.embed(images))
    assert torch.equal(method.embed(images), channels_by_hand(method, images))


def test_casts_and_moves_keep_indices(backbone: CNNBackbone) -> None:
    method = copy.deepcopy(small(backbone))
    method.to(torch.bfloat16)
    for name in ("channels", "within"):
        assert getattr(method, name).dtype == torch.int64
    assert method.to("meta").within.device.type == "meta"
