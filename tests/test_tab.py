from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import Golden, save_picture
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torchvision.models import resnet18, resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.methods import TAB
from anomaly_clip.methods.tab_heads import ProjectionHead, alignment_logits
from anomaly_clip.methods.tab_optim import TABOptim
from anomaly_clip.testing.processes import run_command

RANDOM_NETWORK = CNNSettings("resnet18", "random")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Return a folder with one folder of normal images per class."""
    rng = np.random.default_rng(0)
    for name in ("Metal_Nut", "Wood", "Leather"):
        for number in range(4):
            image = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
            save_picture(tmp_path / "classes" / name / f"{number}.png", image)
    return tmp_path / "classes"


def words(root: Path, clip: str, runs: Path, *more: str) -> list[str]:
    line = ["fit", "--model", "TAB", "--model.backbone.weights", "random"]
    line += ["--model.text.name", clip, "--model.text.pretrained", "random"]
    line += ["--model.image_size", "32", "--model.optim.passes", "1"]
    line += ["--data", "IndustrialFolders", "--data.root", str(root), "--data.num_workers", "0"]
    line += ["--data.batch_size", "4", "--data.synthesis.recipe", "nsa"]
    line += ["--data.synthesis.mode", "pair", "--trainer.accelerator", "cpu"]
    line += ["--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "2"]
    return [*line, "--output.root", str(runs), *more]


@pytest.mark.golden
def test_golden_losses(golden: Callable[[str], Golden]) -> None:
    arrays = load_file(golden("detectors").folder / "tab.safetensors")
    method = TAB(RANDOM_NETWORK)
    method.normal, method.abnormal = arrays["T_n"], arrays["T_a"]
    method.normal_head = method.abnormal_head = torch.nn.Identity()
    with torch.no_grad():
        method.logit_scale.copy_(arrays["logit_scale"])
        for side, texts, features in (("n", "T_n", "V_n"), ("a", "T_a", "V_a")):
            logits = alignment_logits(arrays[features], arrays[texts], method.scale())
            assert_close(logits, arrays[f"logits_{side}"], atol=1e-5, rtol=1e-5)
        total, metrics = method.losses(arrays["V_n"], arrays["V_a"], arrays["labels"])
    assert_close(total, arrays["loss"], atol=1e-5, rtol=1e-5)
    assert_close(metrics["loss_normal"], arrays["loss_n"], atol=1e-5, rtol=1e-5)
    assert_close(metrics["loss_abnormal"], arrays["loss_a"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_similar_texts_are_reported(
    classes: Path, tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(classes, tiny_clip_config, tmp_path, "--trainer.max_epochs", "1")
    line += ["--model.text.name", "demo", "--model.text.pretrained", "demo"]
    assert main(line) == 0
    assert "text vectors of the 3 classes are almost the same" in capsys.readouterr().err
    assert main([*line, "--model.prompts.centered", "sides"]) == 0
    assert "almost the same" not in capsys.readouterr().err


def test_the_baseline_tells_classes_and_states_apart() -> None:
    method = TAB(RANDOM_NETWORK, loss="classification")
    method.categories = ["a", "b", "c"]
    method.classifier = torch.nn.Linear(512, 6)
    features = torch.randn(2, 4, 512, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 2, 1, 1])
    total, _ = method.losses(features[0], features[1], target)
    normal, abnormal = method.classifier(features)
    expected = F.cross_entropy(normal, target) + F.cross_entropy(abnormal, target + 3)
    assert_close(total, expected)
    assert not method.logit_scale.requires_grad
    method.classification_targets, method.classifier = "binary", torch.nn.Linear(512, 2)
    total, _ = method.losses(features[0], features[1], target)
    logits = method.classifier(features)
    states = torch.tensor([[0] * 4, [1] * 4])
    expected = F.cross_entropy(logits[0], states[0]) + F.cross_entropy(logits[1], states[1])
    assert_close(total, expected)


@pytest.mark.slow
def test_fit_exports_a_resnet_that_torchvision_and_timm_can_load(
    classes: Path, tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(classes, tiny_clip_config, tmp_path / "runs")) == 0
    run = tmp_path / "runs" / "TAB" / "1-fit"
    file = run / "tab_resnet18.safetensors"
    assert f"weights: {file}" in capsys.readouterr().err
    state = load_file(file)
    pickled = torch.load(run / "tab_resnet18.pt", weights_only=True)
    assert_close(state, pickled, atol=0, rtol=0)
    plain = resnet18(weights=None)
    plain.load_state_dict(state)  # strict: no key is missing or unexpected
    other = timm.create_model("resnet18", pretrained=False)
    other.load_state_dict(state)
    method = TAB.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    images = torch.randint(
        0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)
    ).byte()
    backbone = CNNBackbone("resnet18", str(file))
    pixels = (images / 255 - backbone.mean) / backbone.std
    with torch.no_grad():
        expected = backbone(images)
        assert_close(expected["pooled"], method.eval().pooled(images), atol=1e-6, rtol=1e-6)
        for network in (plain.eval(), method.encoder, other.eval()):
            stages = create_feature_extractor(network, ["layer1", "layer2", "layer3", "layer4"])
            for name, features in stages(pixels).items():
                assert_close(features, expected[name], atol=1e-6, rtol=1e-6)
    with Image.open(run / "features.png") as plot:
        assert plot.width == 480
    with (run / "features.csv").open() as rows:
        assert len(list(csv.DictReader(rows))) == 48  # two epochs of twelve pairs
    record = json.loads((run / "tab_resnet18.json").read_text())
    assert record["categories"] == ["leather", "metal_nut", "wood"]
    assert record["data"] == "IndustrialFolders"
    with (run / "logs" / "metrics.csv").open() as log:
        logged = {name for row in csv.DictReader(log) for name, value in row.items() if value}
    for name in ("loss", "loss_normal", "loss_abnormal", "top1_normal", "top1_abnormal"):
        assert any(column.startswith(f"train/{name}") for column in logged), name
    assert {"train/logit_scale", "train/cosine", "train/waiting"} <= logged
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_training_changes_the_resnet_but_not_its_classifier(
    classes: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    line = words(classes, tiny_clip_config, tmp_path, "--seed_everything", "5")
    assert main(line) == 0
    state = load_file(tmp_path / "TAB" / "1-fit" / "tab_resnet18.safetensors")
    torch.manual_seed(5)
    start = TAB(RANDOM_NETWORK).encoder.state_dict()
    assert_close(state["fc.weight"], start["fc.weight"], atol=0, rtol=0)
    for name in ("conv1.weight", "layer4.1.conv2.weight", "bn1.running_mean"):
        assert not state[name].equal(start[name])
    assert int(state["bn1.num_batches_tracked"]) == 2 * 2 * 3  # two sides, two epochs, three steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--model.loss", "classification"],
        ["--model.loss", "classification", "--model.classification_targets", "binary"],
        ["--model.loss", "concat"],
        ["--model.align", "normal"],
        ["--model.prompts.preset", "one_class"],
        ["--model.joint_forward", "true", "--model.logit_scale_mode", "exp"],
        ["--model.head", "linear", "--model.optim.scheduler_t_max", "official"],
        [
            "--model.optim.name",
            "adamw",
            "--trainer.precision",
            "bf16-mixed",
            "--trainer.enable_model_summary",
            "false",
        ],
        ["--data.synthesis.recipe", "cutpaste", "--data.synthesis.preset", "tab_cutpaste"],
    ],
)
def test_every_ablation_runs(
    classes: Path, tiny_clip_config: str, tmp_path: Path, options: list[str]
) -> None:
    line = words(classes, tiny_clip_config, tmp_path, *options)
    assert main([*line, "--trainer.max_epochs", "1"]) == 0
    state = load_file(tmp_path / "TAB" / "1-fit" / "tab_resnet18.safetensors")
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(("when", "epochs"), [("epochs", 4), ("official", 4)])
def test_the_rate_follows_the_epochs_of_the_paper(when: Any, epochs: int) -> None:
    method = TAB(RANDOM_NETWORK, optim=TABOptim(lr=1.0, passes=2, scheduler_t_max=when))

    class Trainer:
        max_epochs = 2 * epochs
        estimated_stepping_batches = 2 * epochs * 3

    method._trainer = Trainer()  # type: ignore[assignment]
    configured = method.configure_optimizers()
    schedule = configured["lr_scheduler"]
    rates = []
    for _ in range(2 * epochs):
        rates.append(schedule.get_last_lr()[0])
        configured["optimizer"].step()
        schedule.step()
    length = epochs if when == "epochs" else 6  # steps of two passes
    expected = [0.5 + 0.5 * np.cos(np.pi * (done // 2) / length) for done in range(2 * epochs)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


@pytest.mark.slow
def test_a_resumed_fit_equals_the_uninterrupted_one(
    classes: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    every = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1}}
    line = words(classes, tiny_clip_config, tmp_path, "--trainer.callbacks+", json.dumps(every))
    assert main(line) == 0
    [between] = (tmp_path / "TAB" / "1-fit" / "checkpoints").glob("epoch=0-*.ckpt")
    assert main([*line, "--ckpt_path", str(between)]) == 0
    states = [
        load_file(tmp_path / "TAB" / f"{n}-fit" / "tab_resnet18.safetensors") for n in ("1", "2")
    ]
    assert_close(states[0], states[1], atol=0, rtol=0)


@pytest.mark.slow
def test_two_processes_learn_together(classes: Path, tiny_clip_config: str, tmp_path: Path) -> None:
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "3"]
    compared = {"class_path": "ddp_checks.Compared", "init_args": {"file": str(tmp_path / "c")}}
    ddp += ["--trainer.callbacks+", json.dumps(compared)]
    done = run_command(words(classes, tiny_clip_config, tmp_path, *ddp), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "c").read_text())
    assert record["equal"]
    first, second = record["rows"]
    assert len(first) == len(second) == 12
    assert sorted(first[:6] + second[:6]) == list(range(12))
    assert (tmp_path / "TAB" / "1-fit" / "tab_resnet18.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "statistics", "more"),
    [
        (2, "Fixed", []),
        (3, "Fixed", ["--model.loss", "concat"]),
        (2, "Shared", ["--model.head", "linear"]),
    ],
)
def test_several_processes_equal_one_with_the_same_statistics(
    classes: Path,
    tiny_clip_config: str,
    tmp_path: Path,
    processes: int,
    statistics: str,
    more: list[str],
) -> None:
    """Without statistics per process, nothing depends on how a batch is shared."""
    for name in (
        "Metal_Nut",
        "Wood",
    ):  # 14 images; however many processes, the last two are dropped
        shutil.copy(classes / "Leather" / "0.png", classes / name / "more.png")
    more = [*more, "--trainer.callbacks+", f"ddp_checks.{statistics}Statistics"]
    states = []
    for number in (1, processes):
        ddp = ["--trainer.strategy", "ddp", "--trainer.devices", str(number)] if number > 1 else []
        ddp += ["--data.batch_size", str(6 // number), "--data.shuffle", "true"]
        line = words(classes, tiny_clip_config, tmp_path / str(number), *more, *ddp)
        done = run_command(line, processes=number)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("statistics of its own images" in done.stderr) == (
            number > 1 and statistics == "Shared"  # which the callback computes
        )
        states.append(
            load_file(tmp_path / str(number) / "TAB" / "1-fit" / "tab_resnet18.safetensors")
        )
    # Rounding is amplified by Adam, which scales tiny gradients up, and by the statistics of small
    # batches. With separate statistics the difference is above 1.
    tolerance = 1e-3 if statistics == "Fixed" else 3e-2
    assert_close(states[0], states[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data.categories", "[wood]"],
            "TAB needs at least 2 training categories, got 1 of data.root",
        ),
        (
            ["--model.head", "none"],
            "model.head none needs equal widths, but resnet18 has 512 channels",
        ),
        (["--data.synthesis.mode", "replace"], "got data.synthesis.mode replace: set"),
        (["--model.backbone.name", "squeezenet1_1"], "must be a ResNet for TAB"),
        (["--model.optim.lr", "0"], "model.optim.lr must be above 0"),
        (["--data.categories", "[wood, steel]"], "steel"),
        ([], "category 'empty' has no train images"),
        (
            ["--model.loss", "concat", "--model.align", "normal"],
            "needs normal and abnormal texts, got model.align normal",
        ),
        (["--trainer.max_epochs", "-1"], "set trainer.max_epochs to 1 or more"),
        (["--data.batch_size", "1"], "data.batch_size must be 2 or more"),
        (["--data.val_split", "test"], "set data.val_split to synthetic or none"),
    ],
)
def test_mistakes_end_in_an_error_message(
    classes: Path,
    tiny_clip_config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    if not options:
        (classes / "Empty").mkdir()
    assert main(words(classes, tiny_clip_config, tmp_path / "runs", *options)) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.slow
def test_a_wider_resnet_is_trained_through_a_head(
    classes: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    line = words(classes, tiny_clip_config, tmp_path, "--model.backbone.name", "resnet50")
    line += ["--model.head", "projection", "--trainer.max_epochs", "1", "--data.batch_size", "6"]
    assert main(line) == 0
    state = load_file(tmp_path / "TAB" / "1-fit" / "tab_resnet50.safetensors")
    resnet50(weights=None).load_state_dict(state)  # strict: the file has no key of a head
    assert int(state["bn1.num_batches_tracked"]) == 4


@pytest.mark.slow
def test_the_configuration_runs(
    mvtec_root: Path, tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parent.parent / "configs" / "tab.yaml"
    line = ["fit", "--config", str(config), "--data.root", str(mvtec_root)]
    line += ["--model.backbone.weights", "random", "--model.text.name", tiny_clip_config]
    line += ["--model.text.pretrained", "random", "--model.image_size", "64"]
    line += ["--data.num_workers", "0", "--trainer.max_epochs", "3", "--output.root", str(tmp_path)]
    line += ["--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    assert main([*line, "--trainer.log_every_n_steps", "1"]) == 0
    assert (tmp_path / "tab" / "1-fit" / "tab_resnet18.safetensors").is_file()
    # The export command writes the same files, needs no CLIP, and does not overwrite by default.
    checkpoint = tmp_path / "tab" / "1-fit" / "checkpoints" / "last.ckpt"
    export = ["export", "--ckpt_path", str(checkpoint), "--folder", str(tmp_path / "out")]
    assert main(export) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "tab_resnet18.safetensors")
    records = [
        json.loads((folder / "tab_resnet18.json").read_text())
        for folder in (tmp_path / "out", checkpoint.parents[1])
    ]
    assert records[0] == records[1]
    assert records[0]["epochs"] == 3
    assert (records[0]["data"], records[0]["run_seed"]) == ("MVTecAD", 42)
    assert records[0]["synthesis"]["recipe"] == "nsa"
    again = load_file(tmp_path / "out" / "tab_resnet18.safetensors")
    assert_close(again, load_file(checkpoint.parents[1] / "tab_resnet18.safetensors"))
    assert json.loads((tmp_path / "out" / "tab_resnet18.json").read_text())["method"] == "TAB"
    assert main(export) == 2
    assert "tab_resnet18.json exists: give another --folder" in capsys.readouterr().err
    assert main([*export, "--overwrite"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["align", "classification", "concat"])
def test_the_loss_of_held_out_pairs_is_logged(
    classes: Path, tiny_clip_config: str, tmp_path: Path, loss: str
) -> None:
    line = words(classes, tiny_clip_config, tmp_path, "--model.loss", loss)
    line += ["--data.val_split", "synthetic", "--data.val_share", "0.5", "--data.batch_size", "3"]
    line += ["--data.synthesis.recipe", "erasing"]  # NSA leaves such small noise unchanged
    assert main(line) == 0
    with (tmp_path / "TAB" / "1-fit" / "logs" / "metrics.csv").open() as log:
        rows = [row for row in csv.DictReader(log) if row.get("val/loss")]
    assert len(rows) == 2
    total = float(rows[0]["val/loss_normal"]) + float(rows[0]["val/loss_abnormal"])
    assert float(rows[0]["val/loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_an_export_of_another_fit_is_not_replaced(
    classes: Path, tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(classes, tiny_clip_config, tmp_path, "--output.folder", str(tmp_path / "own"))
    assert main([*line, "--trainer.max_epochs", "1"]) == 0
    shutil.rmtree(tmp_path / "own" / "logs")  # the logger warns of logs that it overwrites
    before = (tmp_path / "own" / "tab_resnet18.safetensors").read_bytes()
    assert main([*line, "--trainer.max_epochs", "1"]) == 2
    assert "tab_resnet18.safetensors exists: give another" in capsys.readouterr().err
    assert (tmp_path / "own" / "tab_resnet18.safetensors").read_bytes() == before
    shutil.rmtree(tmp_path / "own" / "logs", ignore_errors=True)
    # Overwriting checkpoints warns, too.
    (tmp_path / "own" / "checkpoints").rename(tmp_path / "kept")
    last = str(tmp_path / "kept" / "last.ckpt")
    assert main([*line, "--ckpt_path", last]) == 0  # resumes


def test_the_dropout_of_a_projection_differs_in_every_batch(
    classes: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    """Batches accumulated into one optimiser step differ too, although the step is the same."""
    line = words(classes, tiny_clip_config, tmp_path, "--model.head", "projection")
    line += ["--trainer.accumulate_grad_batches", "3", "--trainer.max_epochs", "1"]
    states: list[str] = []
    forward = ProjectionHead.forward

    def recorded(head: ProjectionHead, features: Tensor, rng: Any = None) -> Tensor:
        states.append(str(rng.rng.bit_generator.state["state"]))
        return forward(head, features, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProjectionHead, "forward", recorded)
        assert main(line) == 0
    assert len(states) == len(set(states)) == 6
