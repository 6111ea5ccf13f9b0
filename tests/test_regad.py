from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from ddp_checks import Compared
from detector_golden import fill_by_shape, golden_images, write_network
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from regad_runs import ONE, one_thread, pixel_cnn, three_categories, trained_regad, words
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.testing import assert_close
from torchvision.models import resnet18

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import RegAD
from anomaly_clip.methods.regad import PixelCNNSettings, averaged, spread
from anomaly_clip.methods.regad_network import (
    augment,
    joined_features,
)
from anomaly_clip.metric_values import METRICS, Results
from anomaly_clip.metrics.evaluator import Evaluator
from anomaly_clip.testing.processes import run_command


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def backbone() -> CNNBackbone:
    return pixel_cnn()


@pytest.fixture(scope="module")
def method(backbone: CNNBackbone) -> RegAD:
    return trained_regad(backbone)


def near(actual: Tensor, expected: Tensor, relative: float) -> None:
    largest = float(expected.abs().max())
    assert_close(actual, expected, atol=relative * largest, rtol=0)


# -- against the official code -------------------------------------------------------------------


@pytest.mark.golden
def test_golden_registration(golden: Callable[[str], Any], tmp_path: Path) -> None:
    case = golden("detectors")
    arrays, meta = load_file(case.folder / "regad.safetensors"), case.meta
    counts = json.loads((case.folder / "architectures.json").read_text())
    method = RegAD(PixelCNNSettings(weights=write_network(tmp_path, meta))).eval()
    for part in (*method.network.transformers, method.encoder, method.predictor):
        fill_by_shape(part)
    for transformer, angle in zip(method.network.transformers, (0.12, 0.17, 0.22), strict=True):
        last = transformer.look[-1]  # type: ignore[index]
        last.weight.data.zero_()  # type: ignore[union-attr]
        last.bias.data.copy_(torch.tensor([angle, 1.1, 0.92]))  # type: ignore[union-attr]
    side = arrays["query"].shape[-1]
    options = {"num_train": 2, "num_test": 0, "image_size": side, "defect_from_index": 1}
    images = golden_images({**options, "image_seed": meta["regad_image_seed"]})
    near(images[:1], arrays["query"].float(), 1e-2)
    with torch.no_grad():
        raw = method.network(images)
        first, second, third = method.network.stages(images[:1])
        near(raw[:1], arrays["stn3_raw"], 1e-3)
        near(first[..., ::7, ::7], arrays["stn1_output_stride7"], 1e-3)
        near(second[..., ::7, ::7], arrays["stn2_output_stride7"], 1e-3)
        near(third, arrays["stn3_output"], 1e-3)
        encoded = method.encoder(raw[:1])
        near(encoded, arrays["encoder_out"], 1e-3)
        near(method.predictor(encoded), arrays["predictor_out"], 1e-3)
        loss = method.loss_map(raw[:1], raw[1:])
    near(loss, arrays["loss_map"], 1e-3)
    near(loss.mean(), arrays["loss"], 1e-3)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert [count(t) for t in method.network.transformers] == counts["regad_stn_params"]
    assert count(method.predictor) == counts["regad_predictor_params"]
    # The official encoder has one more BatchNorm, of 256 channels, which it never uses.
    assert count(method.encoder) == counts["regad_encoder_params"] - 2 * 256


# -- loss and features, compared with plain computations -----------------------------------------


def test_the_loss_averages_both_directions(method: RegAD) -> None:
    torch.manual_seed(0)
    query, support = torch.randn(2, 2, 256, 4, 4)
    with torch.no_grad():
        first, second = (method.encoder(maps).numpy() for maps in (query, support))
        forward, backward = (
            method.predictor(method.encoder(maps)).numpy() for maps in (query, support)
        )
        loss = method.loss_map(query, support)

    def cosine(a: Any, b: Any) -> Any:
        length = np.sqrt((a**2).sum(1)) * np.sqrt((b**2).sum(1))
        return (a * b).sum(1) / length

    expected = -(cosine(forward, second) + cosine(backward, first)) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_coarse_stages_are_upsampled_by_nearest_neighbour(method: RegAD) -> None:
    stages = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(2, 2, 2, 2)]
    expected = torch.cat([F.interpolate(stage, (8, 8)) for stage in stages], dim=1).flatten(2).mT
    assert_close(joined_features(stages), expected, atol=0, rtol=0)
    positions = torch.tensor([63, 0, 17])
    assert_close(joined_features(stages, positions), expected[:, positions], atol=0, rtol=0)


# -- Gaussians -----------------------------------------------------------------------------------


def test_map_and_score_are_those_of_the_plain_recipe(method: RegAD) -> None:
    rng = np.random.default_rng(0)
    references = torch.from_numpy(rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8))
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8))
    with torch.no_grad():
        normal = joined_features(method.network.stages(augment(references / 255))).double()
        features = joined_features(method.network.stages(images / 255)).double()
    assert normal.shape == (44, 256, 448)
    distances = torch.zeros(2, 256, dtype=torch.float64)
    for position in range(256):
        covariance = torch.cov(normal[:, position].T) + 0.01 * torch.eye(448)
        difference = features[:, position] - normal[:, position].mean(dim=0)
        solved = torch.linalg.solve(covariance, difference.T)
        distances[:, position] = (difference.T * solved).sum(dim=0).sqrt()
    grid = distances.view(2, 1, 16, 16)
    raw = F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    expected = np.stack([gaussian_filter(image_map.numpy(), 4.0) for image_map in raw])
    scores = method.score(images, ["a", "a"])
    np.testing.assert_allclose(scores["anomaly_map"], expected, rtol=1e-3)
    np.testing.assert_allclose(scores["image_score"], expected.max(axis=(1, 2)), rtol=1e-3)
    # With mean 0 and standard deviation 1, normalised pixels give the same map.
    again = method.score(images / 255, ["a", "a"])["anomaly_map"]
    assert_close(again, scores["anomaly_map"], atol=1e-3, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.score(images, ["a", "a"])["anomaly_map"]
    assert_close(mixed, scores["anomaly_map"], atol=1e-4, rtol=1e-5)


def test_each_image_is_compared_with_its_own_category(method: RegAD) -> None:
    rng = np.random.default_rng(5)
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 64, 64), dtype=np.uint8))
    method.remember(images[1:], "b")
    scores = method.score(images, ["a", "b", "a"])["image_score"]
    for row, name in enumerate(("a", "b", "a")):
        alone = method.score(images[row : row + 1], [name])["image_score"]
        assert_close(scores[row : row + 1], alone, atol=1e-2, rtol=1e-4)
    with pytest.raises(ValueError, match="RegAD has no reference images of 'c'"):
        method.score(images[:1], ["c"])
    with pytest.raises(ValueError, match="expected images of 64 x 64 pixels"):
        method.score(images[..., :32, :32], ["a", "b", "a"])


def test_augmented_pixels_are_normalised_by_the_backbone(backbone: CNNBackbone) -> None:
    other = CNNBackbone(weights="random", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    method = RegAD(other, image_size=64).eval()
    inputs: list[Tensor] = []

    def stages(pixels: Tensor) -> list[Tensor]:
        inputs.append(pixels)
        return [torch.zeros(len(pixels), 1, 4, 4)]

    method.network.stages = stages  # type: ignore[method-assign]
    rng = np.random.default_rng(5)
    images = torch.from_numpy(rng.integers(0, 256, (1, 3, 64, 64), dtype=np.uint8))
    method.remember(images, "a")
    expected = (augment(images / 255) - other.mean) / other.std
    assert_close(torch.cat(inputs), expected)
    assert_close(method.pixels(images), expected[:1])


# -- averages ------------------------------------------------------------------------------------


def results(value: float | None) -> Results:
    metrics = dict.fromkeys(METRICS, value)
    return Results(mean=dict(metrics), categories={"a": dict(metrics)}, intervals={})


def test_rounds_are_averaged_with_their_spread() -> None:
    means = averaged([results(0.5), results(0.8), results(0.8)])
    assert means["mean"]["image_auroc"] == pytest.approx(0.7)
    assert means["categories"]["a"]["pixel_pro"] == pytest.approx(0.7)
    deviations = spread([results(v)["mean"] for v in (0.5, 0.8, 0.8)])
    assert deviations["image_auroc"] == pytest.approx(np.sqrt(0.03))
    undefined = averaged([results(None), results(None)])
    assert undefined["mean"]["image_auroc"] is None
    assert spread([results(None)["mean"]] * 2)["image_auroc"] is None
    assert spread([results(0.5)["mean"]])["image_auroc"] is None
    assert spread([])["image_auroc"] is None
    assert averaged([results(0.5)]) == results(0.5)


def test_the_bounds_of_rounds_are_averaged() -> None:
    uncertain = results(0.5)
    uncertain["intervals"] = {"a": {"pixel_ap": (0.4, 0.7)}}
    means = averaged([results(0.8), uncertain])
    assert set(means["intervals"]["a"]) == {"pixel_ap"}
    assert means["intervals"]["a"]["pixel_ap"] == pytest.approx((0.6, 0.75))
    assert means["intervals"]["mean"]["pixel_ap"] == pytest.approx((0.6, 0.75))
    assert averaged([results(0.8), results(0.5)])["intervals"] == {}


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def three(mvtec_root: Path) -> Path:
    return three_categories(mvtec_root)


def state_of(runs: Path, number: int = 1) -> dict[str, Tensor]:
    path = runs / "RegAD" / f"{number}-fit" / "checkpoints" / "last.ckpt"
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
def test_fit_and_test_from_the_checkpoint_alone(three: Path, tmp_path: Path) -> None:
    assert main(words("fit", three, tmp_path / "runs", *ONE)) == 0
    checkpoint = tmp_path / "runs" / "RegAD" / "1-fit" / "checkpoints" / "last.ckpt"
    state = state_of(tmp_path / "runs")
    heads = {name.split(".")[0] for name in state}
    assert heads == {"network", "encoder", "predictor", "trained"}  # no Gaussians, no frozen parts
    # Two epochs of two batches, with a query and support images in each.
    assert int(state["network.stem.1.num_batches_tracked"]) == 2 * 2 * 2
    line = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "test")]
    assert main([*line, "--output.maps", "true"]) == 0
    [run] = (tmp_path / "test").glob("*/1-*")
    metrics = json.loads((run / "metrics.json").read_text())
    protocol = metrics["run"]["protocol"]
    expected = {"shots": 2, "rounds": 2, "select": "last", "train_categories": "others"}
    assert {name: protocol[name] for name in expected} == expected
    assert protocol["complete"]
    assert len((run / "scores.csv").read_text().splitlines()) == 5
    assert len(list((run / "maps").rglob("*.png"))) == 4
    [paths] = json.loads((run / "references.json").read_text()).values()
    assert len(paths) == 2 * 2
    assert paths[:2] != paths[2:]
    # Compute the same results without the command, round by round.
    loaded = RegAD.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    data = MVTecAD(str(three), categories=["bottle"], image_size=64, num_workers=0)
    by_hand = []
    for number in range(2):
        loaded.take_references(data, "bottle", number)
        evaluator = Evaluator(["bottle"])
        for batch in data.test_dataloader():
            evaluator.update(loaded.score(batch["image"], batch["category"]), batch)
        by_hand.append(evaluator.compute()["mean"])
    assert protocol["by_round"] == [
        pytest.approx(metrics_of_round, abs=1e-4) for metrics_of_round in by_hand
    ]
    for name in METRICS:
        values = [float(metrics_of_round[name]) for metrics_of_round in by_hand]  # type: ignore[arg-type]
        assert metrics["mean"][name] == pytest.approx(np.mean(values), abs=1e-4)
        assert protocol["spread"][name] == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    line = ["predict", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "predict")]
    assert main([*line, "--output.maps", "false"]) == 0
    [scores] = (tmp_path / "predict").rglob("scores.csv")
    # The scores of a predict are those of the first round of the test.
    assert scores.read_text() == (run / "scores.csv").read_text()
    # A test may change the number of rounds of the checkpoint.
    line = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "single")]
    assert main([*line, "--model.rounds", "1"]) == 0
    [single] = (tmp_path / "single").rglob("metrics.json")
    again = json.loads(single.read_text())
    assert again["mean"] == pytest.approx(protocol["by_round"][0])
    assert again["run"]["protocol"]["spread"]["image_auroc"] is None


def test_the_learning_rate_follows_the_official_schedule(backbone: CNNBackbone) -> None:
    class Trainer:
        max_epochs = 5

    method = RegAD(backbone, image_size=64, lr=1.0)
    method._trainer = Trainer()  # type: ignore[assignment]
    configured = method.configure_optimizers()
    rates = []
    for _ in range(5):
        rates.append(configured["lr_scheduler"].get_last_lr()[0])
        configured["optimizer"].step()
        configured["lr_scheduler"].step()
    expected = [0.5 * (1 + np.cos(np.pi * epoch / 5)) for epoch in range(1, 6)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)
    assert configured["optimizer"].defaults["momentum"] == 0.9


@pytest.mark.parametrize("place", [0, 2, 3])
def test_initial_weights_depend_on_the_seed_alone(place: int, backbone: CNNBackbone) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(place)
        return RegAD(backbone, image_size=64, seed=seed).encoder.state_dict()

    first = start(1)
    torch.rand(place)
    assert_close(start(1), first, atol=0, rtol=0)
    assert not torch.equal(start(2)["0.weight"], first["0.weight"])


@pytest.mark.slow
def test_a_resumed_fit_equals_the_uninterrupted_one(three: Path, tmp_path: Path) -> None:
    """This holds in the middle of an epoch of two steps, and with a data loader worker."""
    options = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    kept = json.dumps({"class_path": "ModelCheckpoint", "init_args": options})
    line = words("fit", three, tmp_path, *ONE, "--trainer.callbacks+", kept)
    assert main(line) == 0
    for number, (step, workers) in enumerate(((2, "0"), (3, "1")), start=2):
        between = str(tmp_path / "RegAD" / "1-fit" / "checkpoints" / f"step={step}.ckpt")
        assert main([*line, "--ckpt_path", between, "--data.num_workers", workers]) == 0
        assert_close(state_of(tmp_path, number), state_of(tmp_path), atol=0, rtol=0)


@pytest.mark.slow
def test_two_processes_learn_together_and_test_as_one(three: Path, tmp_path: Path) -> None:
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "3"]
    class_path = (
        f"{Compared.__module__}.{Compared.__name__}"  # imported, so that a test may name it
    )
    compared = {"class_path": class_path, "init_args": {"file": str(tmp_path / "c")}}

    def run(line: list[str]) -> None:
        done = run_command(line, processes=2)
        assert done.returncode == 0, done.stderr[-2000:]

    run(
        words(
            "fit", three, tmp_path / "f", *ONE, *ddp, "--trainer.callbacks+", json.dumps(compared)
        )
    )
    record = json.loads((tmp_path / "c").read_text())
    assert record["equal"]
    first, second = record["rows"]
    # Each category has four images, in batches of three and one. With two categories, each
    # process gets two batches per epoch.
    assert min(len(first), len(second)) >= 4
    assert sorted(first + second) == sorted(2 * list(range(8)))
    checkpoint = tmp_path / "f" / "RegAD" / "1-fit" / "checkpoints" / "last.ckpt"
    test = ["test", "--ckpt_path", str(checkpoint), "--trainer.callbacks", "null"]
    run([*test, "--output.root", str(tmp_path / "two"), *ddp])
    single = ["--trainer.strategy", "auto", "--trainer.devices", "1"]
    assert main([*test, "--output.root", str(tmp_path / "one"), *single]) == 0
    contents = []
    for name in ("one", "two"):
        [file] = (tmp_path / name).rglob("metrics.json")
        contents.append(json.loads(file.read_text()))
    assert contents[0]["mean"] == pytest.approx(contents[1]["mean"], abs=1e-3)
    assert contents[0]["run"]["protocol"]["by_round"] == [
        pytest.approx(row, abs=1e-3) for row in contents[1]["run"]["protocol"]["by_round"]
    ]


@pytest.mark.slow
def test_select_best_test_tests_the_best_epoch(three: Path, tmp_path: Path) -> None:
    best = ["--model.select", "best_test", "--data.val_split", "test"]
    assert main(words("fit", three, tmp_path / "f", *ONE, *best)) == 0
    [checkpoint] = (tmp_path / "f").glob("RegAD/1-fit/checkpoints/last.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["best"]
    assert 0 < kept["merit"] <= 2
    test = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    assert main([*test, "--model.rounds", "1"]) == 0
    [metrics] = (tmp_path / "t").rglob("metrics.json")
    content = json.loads(metrics.read_text())
    merit = content["mean"]["image_auroc"] + content["mean"]["pixel_auroc"]
    assert merit == pytest.approx(kept["merit"], abs=1e-3)
    assert content["run"]["protocol"]["select"] == "best_test"
    assert content["run"]["protocol"]["selected_epoch"] == kept["epoch"] + 1


@pytest.mark.slow
def test_the_untrained_network_is_a_candidate_as_in_the_public_code(
    three: Path, tmp_path: Path
) -> None:
    """The public code tests before each epoch, so never after the last one."""
    line = words("fit", three, tmp_path, *ONE, "--data.val_split", "test", "--model.rounds", "1")
    line += ["--model.select", "best_test", "--model.candidates", "before_epoch"]
    assert main([*line, "--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "0"]) == 0
    [checkpoint] = tmp_path.glob("RegAD/1-fit/checkpoints/last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    best = saved["best"]
    assert best["epoch"] == -1
    assert best["tie_breaker"] is None
    counter = "network.stem.1.num_batches_tracked"
    assert best["state"][counter] == 0 < saved["state_dict"][counter]
    test = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    assert main(test) == 0
    [metrics] = (tmp_path / "t").rglob("metrics.json")
    content = json.loads(metrics.read_text())
    protocol = content["run"]["protocol"]
    assert (protocol["select"], protocol["selected_epoch"]) == ("best_test", 0)
    assert protocol["candidates"] == "before_epoch"
    merit = content["mean"]["image_auroc"] + content["mean"]["pixel_auroc"]
    assert merit == pytest.approx(best["merit"], abs=1e-6)


@pytest.mark.parametrize(
    ("candidates", "merits", "chosen"),
    [
        ("before_epoch", [1.5, 1.2, 1.6, 1.9], 1),  # 1.9 is that of the network after the last one
        ("before_epoch", [1.7, 1.2, 1.7, 1.9], -1),  # the first of equal ones
        ("after_epoch", [1.9, 1.2, 1.6, 1.7], 2),
    ],
)
def test_the_candidates_of_a_selection(
    backbone: CNNBackbone, candidates: Any, merits: list[float], chosen: int
) -> None:
    method = RegAD(backbone, image_size=64, select="best_test", candidates=candidates)
    for number, merit in enumerate(merits):
        mean: dict[str, float | None] = {"image_auroc": merit - 1, "pixel_auroc": 1.0}
        results = Results(mean=mean, categories={}, intervals={})
        method.evaluator = SimpleNamespace(compute=lambda r=results: r, reset=lambda: None)  # type: ignore[assignment]
        stage = RunningStage.VALIDATING if number else RunningStage.SANITY_CHECKING
        state = SimpleNamespace(stage=stage, fn=TrainerFn.FITTING)
        epoch = max(number - 1, 0)
        method._trainer = SimpleNamespace(state=state, current_epoch=epoch, max_epochs=3)  # type: ignore[assignment]
        method.log_metrics = lambda *_: None  # type: ignore[method-assign]
        method.on_validation_epoch_end()
    assert method._best is not None
    assert method._best["epoch"] == chosen


@pytest.mark.slow
def test_a_resumed_selection_equals_the_uninterrupted_one(three: Path, tmp_path: Path) -> None:
    every = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1}}
    line = words("fit", three, tmp_path, *ONE, "--data.val_split", "test", "--model.rounds", "1")
    line += ["--model.select", "best_test", "--model.candidates", "before_epoch"]
    line += ["--trainer.callbacks+", json.dumps(every)]
    assert main(line) == 0
    [between] = (tmp_path / "RegAD" / "1-fit" / "checkpoints").glob("epoch=0-*.ckpt")
    assert main([*line, "--ckpt_path", str(between)]) == 0
    bests = [
        torch.load(
            tmp_path / "RegAD" / f"{n}-fit" / "checkpoints" / "last.ckpt", weights_only=True
        )["best"]
        for n in ("1", "2")
    ]
    assert bests[0]["epoch"] == bests[1]["epoch"] in (-1, 0)
    assert bests[0]["merit"] == bests[1]["merit"]
    assert_close(bests[0]["state"], bests[1]["state"], atol=0, rtol=0)


@pytest.mark.slow
def test_two_backbones_are_compared(three: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "other.pt")
    line = words("compare", three, tmp_path, *ONE, "--model.rounds", "1")
    at = line.index("--model.backbone.weights")
    line[at : at + 2] = ["--weights", "random", str(tmp_path / "other.pt")]
    at = line.index("--output.root")
    line[at : at + 2] = ["--folder", str(tmp_path / "c")]
    assert main(line) == 0
    content = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert set(content["figures"]["bottle"]) == {"random", "other"}
    assert (tmp_path / "c" / "pictures" / "bottle.png").is_file()
    config = yaml.safe_load((tmp_path / "c" / "other" / "bottle" / "config-fit.yaml").read_text())
    assert config["data"]["init_args"]["categories"] == ["bottle"]
    assert config["data"]["init_args"]["train_categories"] == "others"
    # All other settings are RegAD's defaults, not those of the other detectors.
    assert config["model"]["init_args"]["backbone"]["mean"] == [0.0, 0.0, 0.0]


def test_a_config_that_sets_only_the_weights_keeps_pixels_unnormalised(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"class_path": "RegAD", "init_args": {"backbone": {"weights": "random"}}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump({"model": section}))
    line = ["fit", "--config", str(tmp_path / "few.yaml"), "--data", "MVTecAD"]
    assert main([*line, "--data.root", str(three), "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert (shown["mean"], shown["std"]) == ([0.0] * 3, [1.0] * 3)
