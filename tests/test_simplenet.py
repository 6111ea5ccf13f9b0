from __future__ import annotations

import json
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detector_golden import fill_by_shape, golden_images, write_network
from helpers import near, quiet_trainer, state_of
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import SimpleNet
from anomaly_clip.methods.simplenet import hinge_loss
from anomaly_clip.testing.processes import run_command

ONE = ("--data.categories", "[bottle]")
SMALL: dict[str, Any] = {"image_size": 64, "pretrain_dim": 24, "target_dim": 16, "hidden": 8}


def words(verb: str, root: Path, runs: Path, *more: str) -> list[str]:
    line = [verb, "--model", "SimpleNet", "--model.backbone.weights", "random"]
    for name, value in SMALL.items():
        line += [f"--model.{name}", str(value)]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    line += ["--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    if verb == "fit":
        line += ["--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "2"]
    return [*line, "--output.root", str(runs), *more]


def small(**more: Any) -> SimpleNet:
    torch.manual_seed(0)
    method = SimpleNet(CNNSettings(weights="random"), **{**SMALL, **more})
    method.on_fit_start()
    return method.eval()


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "pretrain_dim"), [("small", 192), ("official", 1536)])
def test_golden_simplenet(
    golden: Callable[[str], Any], tmp_path: Path, kind: str, pretrain_dim: int
) -> None:
    """``pretrain_dim`` is a parameter here, as only the golden README states its values."""
    case = golden("detectors")
    arrays, meta = load_file(case.folder / "simplenet.safetensors"), case.meta
    counts = json.loads((case.folder / "architectures.json").read_text())
    settings = CNNSettings(weights=write_network(tmp_path, meta))
    images = golden_images(meta)[meta["num_train"] :]
    [width] = {v.shape[1] for k, v in arrays.items() if k.startswith(f"{kind}_projected")}
    # A hidden unit has its weights, a bias, two BatchNorm parameters and an output weight.
    hidden = counts[f"simplenet_{kind}_discriminator_params"] // (width + 4)
    options: dict[str, Any] = {"target_dim": width, "hidden": hidden, "pretrain_dim": pretrain_dim}
    if kind == "official":
        defaults = signature(SimpleNet).parameters
        assert all(defaults[name].default == value for name, value in options.items())
    method = SimpleNet(settings, image_size=meta["image_size"], **options).eval()
    size = sum(parameter.numel() for parameter in method.discriminator.parameters())
    assert size == counts[f"simplenet_{kind}_discriminator_params"]
    fill_by_shape(method.adaptor)
    fill_by_shape(method.discriminator)
    method.on_fit_start()
    patches = method.embed(images).flatten(0, 1)
    with torch.no_grad():
        projected = method.adaptor(patches)
        logits = method.discriminator(projected)
    for name, rows in (("embedding", patches), ("projected", projected)):
        [key] = [key for key in arrays if key.startswith(f"{kind}_{name}")]
        near(rows[: len(arrays[key])], arrays[key], 1e-3)
    near(logits.view(len(images), -1), arrays[f"{kind}_logits"], 1e-3)
    scores = method.score(images, ["a"] * len(images))
    near(scores["image_score"], arrays[f"{kind}_image_score"], 1e-3)
    near(scores["anomaly_map"], arrays[f"{kind}_map"], 1e-3)


def test_the_embedding_equals_a_plain_computation() -> None:
    """Neighbourhoods are computed by hand, and the coarse layer is upsampled before pooling."""
    method = small()
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    features = method.backbone(images.byte())
    levels = []
    for layer in ("layer2", "layer3"):
        padded = F.pad(features[layer], (1, 1, 1, 1)).numpy()
        size = padded.shape[-1] - 2
        around = np.stack(
            [padded[:, :, r : r + size, c : c + size] for r in range(3) for c in range(3)], axis=2
        )
        patches = torch.from_numpy(around.reshape(2, -1, size, size))  # channel, row, column
        large = F.interpolate(patches, (8, 8), mode="bilinear", align_corners=False)
        vectors = large.flatten(2).mT
        levels.append(F.adaptive_avg_pool1d(vectors, 24))
    expected = F.adaptive_avg_pool1d(torch.stack(levels, dim=2).flatten(2), 16)
    assert_close(method.embed(images.byte()), expected, atol=1e-5, rtol=1e-5)


def test_map_and_score() -> None:
    method = small()
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    scores = method.score(images.byte(), ["a", "a"])
    with torch.no_grad():
        logits = method.discriminator(method.adaptor(method.embed(images.byte()).flatten(0, 1)))
    patches = -logits.view(2, 1, 8, 8)
    assert_close(scores["image_score"], patches.amax(dim=(1, 2, 3)))  # the maximum before the blur
    plain = F.interpolate(patches, (64, 64), mode="bilinear")[:, 0].numpy()
    blurred = np.stack([gaussian_filter(image_map, 4.0) for image_map in plain])
    assert_close(scores["anomaly_map"], torch.from_numpy(blurred), atol=1e-5, rtol=1e-5)


def test_the_loss_is_zero_beyond_the_margin() -> None:
    real, noisy = torch.tensor([0.6, 0.5, 0.1, -1.0]), torch.tensor([-0.6, -0.5, 0.0, 2.0])
    expected = (0 + 0 + 0.4 + 1.5) / 4 + (0 + 0 + 0.5 + 2.5) / 4
    assert float(hinge_loss(real, noisy)) == pytest.approx(expected)


def test_noise_has_its_deviation_and_depends_on_seed_epoch_and_batch() -> None:
    method = small(noise=0.2)
    like = torch.zeros(200, 50)
    noise = method.draw_noise(like, 3)
    assert float(noise.std()) == pytest.approx(0.2, rel=0.05)
    assert abs(float(noise.mean())) < 0.01
    torch.manual_seed(99)
    assert noise.equal(method.draw_noise(like, 3))
    assert not noise.equal(method.draw_noise(like, 4))
    for name in ("current_epoch", "global_rank"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SimpleNet, name, 1)
            assert not noise.equal(method.draw_noise(like, 3))
    assert not noise.equal(small(noise=0.2, seed=1).draw_noise(like, 3))


@pytest.mark.slow
def test_training_separates_features_from_noisy_ones(mvtec_root: Path) -> None:
    method = small(noise=3.0, adaptor_lr=1e-2, discriminator_lr=1e-2)
    before = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    data = MVTecAD(str(mvtec_root), categories=["bottle"], num_workers=0, batch_size=2)
    trainer = quiet_trainer(max_epochs=60)
    right: list[float] = []
    method.log = lambda name, value, **_: right.append(float(value)) if "right" in name else None  # type: ignore[method-assign]
    trainer.fit(method, data)
    assert np.mean(right[-5:]) > 0.7 > right[0]
    assert_close(method.backbone.state_dict(), before, atol=0, rtol=0)


@pytest.mark.slow
def test_fit_and_test_from_the_checkpoint_alone(mvtec_root: Path, tmp_path: Path) -> None:
    assert main(words("fit", mvtec_root, tmp_path / "runs", *ONE)) == 0
    [checkpoint] = (tmp_path / "runs" / "SimpleNet" / "1-fit" / "checkpoints").iterdir()
    kept = state_of(tmp_path / "runs")
    assert {name.partition(".")[0] for name in kept} == {"adaptor", "discriminator", "trained"}
    for verb in ("test", "predict"):
        line = [verb, "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / verb)]
        assert main(line) == 0
    (metrics,) = (tmp_path / "test").rglob("metrics.json")
    assert json.loads(metrics.read_text())["run"]["protocol"]["select"] == "last"
    assert list((tmp_path / "predict").rglob("scores.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("select", ["last", "best_test"])
def test_a_resumed_fit_equals_the_uninterrupted_one(
    mvtec_root: Path, tmp_path: Path, select: str
) -> None:
    every = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1}}
    line = words("fit", mvtec_root, tmp_path, *ONE, "--trainer.callbacks+", json.dumps(every))
    line += ["--data.batch_size", "1", "--model.select", select, "--trainer.max_epochs", "3"]
    if select == "best_test":
        line += ["--data.val_split", "test"]
    assert main(line) == 0
    [between] = (tmp_path / "SimpleNet" / "1-fit" / "checkpoints").glob("epoch=0-*.ckpt")
    assert main([*line, "--ckpt_path", str(between)]) == 0
    assert_close(state_of(tmp_path), state_of(tmp_path, 2), atol=0, rtol=0)
    bests = [
        torch.load(
            tmp_path / "SimpleNet" / f"{n}-fit" / "checkpoints" / "last.ckpt", weights_only=True
        )["best"]
        for n in ("1", "2")
    ]
    assert (bests[0] is None) == (select == "last")
    if select == "best_test":
        assert bests[0]["epoch"] == bests[1]["epoch"]
        assert_close(bests[0]["state"], bests[1]["state"], atol=0, rtol=0)


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
        ((), "SimpleNet is one model per category, but data.root"),
        ((*ONE, "--model.layers", "[layer3, layer2]"), "must list the finest layer first"),
        ((*ONE, "--model.target_dim", "0"), "model.target_dim must be 1 or more"),
        ((*ONE, "--model.noise", "0"), "model.noise must be above 0"),
        ((*ONE, "--model.sigma", "-1"), "model.sigma must be 0 or more"),
        ((*ONE, "--model.select", "best_test"), "set data.val_split to test, or model.select to"),
        ((*ONE, "--data.synthesis.recipe", "perlin"), "on normal images only: leave out data.syn"),
        ((*ONE, "--trainer.accumulate_grad_batches", "2"), "accumulate_grad_batches"),
        ((*ONE, "--trainer.gradient_clip_val", "1"), "gradient_clip_val"),
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


def test_an_unfitted_method_is_not_tested(mvtec_root: Path) -> None:
    method = SimpleNet(CNNSettings(weights="random"), **SMALL)
    data = MVTecAD(str(mvtec_root), categories=["bottle"], num_workers=0)
    with pytest.raises(ValueError, match="SimpleNet must be fitted first"):
        quiet_trainer().test(method, data, verbose=False)
