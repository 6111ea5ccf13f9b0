from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_golden import fill_by_shape, golden_images, write_network
from helpers import near, quiet_trainer, state_of
from safetensors.torch import load_file
from torch.testing import assert_close

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.maps import gaussian_blur
from anomaly_clip.methods import RD4AD
from anomaly_clip.methods.rd4ad import level_maps, reverse_distillation_loss
from anomaly_clip.testing.processes import run_command

ONE = ("--data.categories", "[bottle]")
RANDOM_NETWORK = CNNSettings(weights="random")


def words(verb: str, root: Path, runs: Path, *more: str) -> list[str]:
    line = [verb, "--model", "RD4AD", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "64", "--data", "MVTecAD", "--data.root", str(root)]
    line += ["--data.num_workers", "0", "--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    if verb == "fit":
        line += ["--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "2"]
    return [*line, "--output.root", str(runs), *more]


@pytest.mark.golden
def test_golden_rd4ad(golden: Callable[[str], Any], tmp_path: Path) -> None:
    case = golden("detectors")
    arrays, meta = load_file(case.folder / "rd4ad.safetensors"), case.meta
    settings = CNNSettings(weights=write_network(tmp_path, meta))
    images, few, side = golden_images(meta), meta["num_train"], meta["image_size"]
    method = RD4AD(settings, image_size=side).eval()
    fill_by_shape(method.bottleneck)
    fill_by_shape(method.student)
    method.on_fit_start()
    with torch.no_grad():
        teacher, student = method.features(images)
        near(method.bottleneck(teacher)[few:], arrays["bottleneck_out"], 1e-3)
    for number, level in enumerate(student, start=1):
        near(level[few:], arrays[f"decoder_layer{number}"], 1e-3)
    loss = reverse_distillation_loss(teacher, student)
    assert_close(loss, arrays["loss_all_images"], atol=1e-5, rtol=1e-5)
    mixed = [0.8 * a + 0.2 * b for a, b in zip(teacher, student, strict=True)]
    loss = reverse_distillation_loss(teacher, mixed)
    assert_close(loss, arrays["loss_mix"], atol=1e-5, rtol=1e-5)
    tested = [level[few:] for level in teacher]
    maps = level_maps(tested, [level[few:] for level in mixed], (side, side))
    near(maps, arrays["level_maps_mix"], 1e-5)

    def mixing(images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return tested, [level[few:] for level in mixed]

    near(maps.sum(dim=1), arrays["sum_map_mix"], 1e-5)
    method.features = mixing  # type: ignore[method-assign]
    scores = method.score(images[few:], ["a"] * meta["num_test"])
    near(scores["anomaly_map"], arrays["smoothed_sum_map_mix"], 1e-5)
    near(scores["image_score"], arrays["score_mix"], 1e-5)
    method.amap_mode, method.sigma = "multiply", 0.0
    scores = method.score(images[few:], ["a"] * meta["num_test"])
    near(scores["anomaly_map"], arrays["mul_map_mix"], 1e-5)


@pytest.mark.golden
def test_parameter_counts_are_those_of_the_public_code(golden: Callable[[str], Any]) -> None:
    counts = json.loads((golden("detectors").folder / "architectures.json").read_text())
    method = RD4AD(RANDOM_NETWORK)
    unused = 1024 * 512 + 2 * 512  # the public bottleneck has an unused convolution
    squeezed = sum(p.numel() for p in method.bottleneck.parameters())
    assert squeezed == counts["bottleneck_params"] - unused
    assert sum(p.numel() for p in method.student.parameters()) == counts["decoder_params"]


def test_the_loss_has_one_cosine_per_image_and_level() -> None:
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 2, 2, 3, 4, 4))
    expected = 0.0
    for level in range(2):
        cosines = []
        for image in range(2):
            a, b = teacher[level, image].ravel(), student[level, image].ravel()
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        expected += 1 - np.mean(cosines)
    levels = [[torch.from_numpy(level) for level in side] for side in (teacher, student)]
    assert float(reverse_distillation_loss(*levels)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "wide_resnet50_2"])
def test_the_student_mirrors_any_resnet(name: str) -> None:
    method = RD4AD(CNNSettings(name, "random"), image_size=64).eval()
    with torch.no_grad():
        teacher, student = method.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert [level.shape for level in teacher] == [level.shape for level in student]
    # As deep as the teacher, with a transposed convolution for one of 3 x 3 in each stage.
    depth = sum(m.kernel_size == (3, 3) for m in _convolutions(method.student))
    frozen = method.backbone.network
    parts = [m for n, m in frozen.named_modules() if n.startswith(("layer1", "layer2", "layer3"))]
    assert depth == sum(getattr(m, "kernel_size", None) == (3, 3) for m in parts) - 3


def _convolutions(network: torch.nn.Module) -> list[torch.nn.Conv2d]:
    return [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]


def test_another_cnn_can_be_the_teacher() -> None:
    layers = ["features.3", "features.6", "features.13"]
    network = CNNSettings("mobilenet_v2", "random", layers)
    method = RD4AD(network, image_size=64, layers=layers)
    teacher, student = method.features(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    shapes = [tuple(level.shape) for level in teacher]
    assert shapes == [tuple(level.shape) for level in student], shapes


def test_a_perfect_student_detects_nothing() -> None:
    method = RD4AD(RANDOM_NETWORK, image_size=64)
    method.on_fit_start()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    teacher, _ = method.features(images)
    method.features = lambda images: (teacher, [3 * level for level in teacher])  # type: ignore[method-assign]
    scores = method.score(images, ["a", "a"])
    assert_close(scores["anomaly_map"], torch.zeros(2, 64, 64), atol=1e-5, rtol=0)
    other = [level.clone() for level in teacher]
    other[0][:, :, 3, 5] *= -1
    method.features = lambda images: (teacher, other)  # type: ignore[method-assign]
    scores = method.score(images, ["a", "a"])
    place = int(scores["anomaly_map"][0].argmax())
    assert (place // 64 // 4, place % 64 // 4) == (3, 5)
    assert_close(scores["image_score"], scores["anomaly_map"].amax(dim=(1, 2)))
    assert gaussian_blur(scores["anomaly_map"], 0).equal(scores["anomaly_map"])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = RD4AD(RANDOM_NETWORK, image_size=64, seed=4).student.state_dict()
    torch.manual_seed(1)
    second = RD4AD(RANDOM_NETWORK, image_size=64, seed=4).student.state_dict()
    assert_close(first, second, atol=0, rtol=0)
    other = RD4AD(RANDOM_NETWORK, image_size=64, seed=5).student.state_dict()
    assert not first["stages.0.0.path.3.weight"].equal(other["stages.0.0.path.3.weight"])


def test_training_lowers_the_loss(mvtec_root: Path, tmp_path: Path) -> None:
    """The teacher stays unchanged."""
    method = RD4AD(RANDOM_NETWORK, image_size=64, lr=1e-3)
    before = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    data = MVTecAD(str(mvtec_root), categories=["bottle"], num_workers=0, batch_size=2)
    trainer = quiet_trainer(max_epochs=8)
    losses: list[float] = []
    step = method.training_step

    def recorded_step(batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    method.training_step = recorded_step  # type: ignore[method-assign]
    trainer.fit(method, data)
    assert losses[-1] < 0.7 * losses[0]
    assert_close(method.backbone.state_dict(), before, atol=0, rtol=0)


@pytest.mark.slow
def test_fit_and_test_from_the_checkpoint_alone(mvtec_root: Path, tmp_path: Path) -> None:
    assert main(words("fit", mvtec_root, tmp_path / "runs", *ONE)) == 0
    [checkpoint] = (tmp_path / "runs" / "RD4AD" / "1-fit" / "checkpoints").iterdir()
    kept = state_of(tmp_path / "runs")
    assert {name.partition(".")[0] for name in kept} == {"bottleneck", "student", "trained"}
    for verb in ("test", "predict"):
        line = [verb, "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / verb)]
        assert main(line) == 0
    (metrics,) = (tmp_path / "test").rglob("metrics.json")
    run = json.loads(metrics.read_text())["run"]
    assert (run["method"], run["protocol"]["select"]) == ("RD4AD", "last")
    assert list((tmp_path / "predict").rglob("scores.csv"))


@pytest.mark.slow
def test_a_resumed_fit_equals_the_uninterrupted_one(mvtec_root: Path, tmp_path: Path) -> None:
    every = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1}}
    line = words("fit", mvtec_root, tmp_path, *ONE, "--trainer.callbacks+", json.dumps(every))
    line += ["--data.batch_size", "1"]
    assert main(line) == 0
    [between] = (tmp_path / "RD4AD" / "1-fit" / "checkpoints").glob("epoch=0-*.ckpt")
    assert main([*line, "--ckpt_path", str(between)]) == 0
    assert_close(state_of(tmp_path), state_of(tmp_path, 2), atol=0, rtol=0)


@pytest.mark.slow
def test_the_best_epoch_on_test_images_is_kept_and_reported(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.select", "best_test", "--data.val_split", "test"]
    line = words("fit", mvtec_root, tmp_path, *ONE, *options, "--trainer.max_epochs", "4")
    line += ["--model.lr", "0.05", "--data.batch_size", "1"]
    assert main(line) == 0
    checkpoint = tmp_path / "RD4AD" / "1-fit" / "checkpoints" / "last.ckpt"
    best = torch.load(checkpoint, weights_only=True)["best"]
    log = (tmp_path / "RD4AD" / "1-fit" / "logs" / "metrics.csv").read_text().splitlines()
    columns = [log[0].split(",").index(f"val/{name}_auroc") for name in ("image", "pixel")]
    rows = [[row.split(",")[column] for column in columns] for row in log[1:]]
    pairs = [(float(image), float(pixel)) for image, pixel in rows if image]
    values = [image for image, _ in pairs]
    assert len(values) == 4
    assert best["merit"] == pytest.approx(max(values))
    assert best["epoch"] == pairs.index(max(pairs))  # the pixel AUROC decides ties
    capsys.readouterr()
    assert main(["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]) == 0
    assert "EPOCH SELECTED ON THE TEST IMAGES" in " ".join(capsys.readouterr().out.split())
    (metrics,) = (tmp_path / "t").rglob("metrics.json")
    content = json.loads(metrics.read_text())
    assert content["mean"]["image_auroc"] == pytest.approx(max(values))
    protocol = content["run"]["protocol"]
    assert (protocol["select"], protocol["selected_epoch"]) == ("best_test", best["epoch"] + 1)
    # A model that has not loaded the best epoch records the last one.
    assert RD4AD(RANDOM_NETWORK, image_size=64, select="best_test").protocol() == {
        "select": "last",
        "selected_epoch": None,
    }
    loaded = RD4AD.load_from_checkpoint(checkpoint, backbone=RANDOM_NETWORK, strict=False)
    assert loaded.trained


@pytest.mark.slow
def test_two_processes_learn_together(mvtec_root: Path, tmp_path: Path) -> None:
    compared = {"class_path": "ddp_checks.Compared", "init_args": {"file": str(tmp_path / "c")}}
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "1"]
    ddp += ["--trainer.callbacks+", json.dumps(compared)]
    done = run_command(words("fit", mvtec_root, tmp_path, *ONE, *ddp), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "c").read_text())
    assert record["equal"]
    first, second = (set(rows) for rows in record["rows"])
    assert first
    assert second
    assert not first & second


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "RD4AD is one model per category, but data.root"),
        (
            (*ONE, "--model.layers", "[layer2, layer3]"),
            "RD4AD needs three layers, each with half the resolution",
        ),
        ((*ONE, "--model.layers", "[layer1, layer2, pooled]"), r"must name spatial layers"),
        ((*ONE, "--model.image_size", "80"), r"have \[20, 10, 5\] positions per side"),
        (
            (*ONE, "--model.image_size", "32"),
            "the last with an even number of positions per side, 4 or more",
        ),
        ((*ONE, "--model.lr", "0"), "model.lr must be above 0"),
        ((*ONE, "--model.sigma", "-1"), "model.sigma must be 0 or more"),
        ((*ONE, "--model.select", "best_test"), "set data.val_split to test, or model.select to"),
        ((*ONE, "--data.synthesis.recipe", "perlin"), "on normal images only: leave out data.syn"),
        ((*ONE, "--model.backbone.weights", "none.pt"), "none.pt"),
    ],
)
def test_unsupported_options_are_refused(
    mvtec_root: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("fit", mvtec_root, tmp_path / "runs", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "runs").glob("*/*"))


def test_an_unfitted_method_is_not_tested(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("test", mvtec_root, tmp_path, *ONE)) == 2
    assert "RD4AD must be fitted first" in capsys.readouterr().err
    data = MVTecAD(str(mvtec_root), categories=["bottle"], num_workers=0)
    with pytest.raises(ValueError, match="RD4AD must be fitted first"):
        quiet_trainer().test(RD4AD(RANDOM_NETWORK, image_size=64), data, verbose=False)
