"""The experiment verbs, called in the test process with a user's arguments."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from PIL import Image

import anomaly_clip.methods
from anomaly_clip.backbones.surgery import check_stages
from anomaly_clip.cli import main
from anomaly_clip.commands.experiment import arrange, class_of_checkpoint, known_options
from anomaly_clip.commands.library_messages import summary_options
from anomaly_clip.errors import UserError
from anomaly_clip.testing.processes import run_command

CONFIGS = Path(__file__).parent.parent / "configs"

Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny_sdp: list[str]) -> Command:
    """Return a builder of command lines with the tiny CLIP on the tiny data set."""
    return lambda verb, *more: [verb, *tiny_sdp, *more]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_brackets_are_not_markup(
    command: Command, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mvtec_root / "bottle").rename(mvtec_root / "[red]x[b]")
    assert main(command("test", "--output.name=[/x]")) == 0
    out = capsys.readouterr()
    assert "[red]x[b]" in out.out
    assert "[/x]" in out.err


def test_the_published_settings_of_sdp() -> None:
    config = yaml.safe_load((CONFIGS / "sdp.yaml").read_text())
    assert config["model"]["init_args"] == {
        "backbone": {"name": "ViT-B-16-plus-240", "pretrained": "laion400m_e31"},
        "rvs": {"method": "dbscan"},
        "stages": None,
        "stage_tokens": "official",
        "sigma": 8.0,
        "evaluator": {"pro_steps": 200},
    }
    assert config["data"]["init_args"]["batch_size"] == 16
    assert check_stages(None, 12) == [3, 6, 9, 12]  # as published, for 12 blocks


def test_the_same_seed_gives_the_same_numbers(command: Command, tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        assert main(command("test", f"--seed_everything={seed}")) == 0
    runs = tmp_path / "runs" / "sdp"
    first, second, other = ((runs / f"{n}-test" / "scores.csv").read_text() for n in "123")
    assert first == second != other


def test_the_saved_configuration_repeats_the_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command("test")) == 0
    saved = tmp_path / "runs" / "sdp" / "1-test" / "config-test.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config["model"]["init_args"]["prompts"]["states_normal"][0] == "flawless {}"
    assert main(["test", "--config", str(saved)]) == 0
    again = tmp_path / "runs" / "sdp" / "2-test" / "metrics.json"
    assert json.loads(again.read_text()) == json.loads(saved.with_name("metrics.json").read_text())


def test_a_printed_configuration_is_accepted_again(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("test", "--print_config")) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert main(["test", "--config", str(printed)]) == 0
    assert (tmp_path / "runs" / "printed" / "1-test" / "metrics.json").is_file()


@pytest.mark.parametrize("exact", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_two_processes_give_the_same_metrics_and_images(
    command: Command, tmp_path: Path, exact: str
) -> None:
    more = ["--output.maps=true", "--data.batch_size=3", f"--model.evaluator.exact={exact}"]
    assert main(command("test", *more)) == 0
    words = command("test", *more, "--output.name=two")
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    done = run_command([*words, *ddp], processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "runs" / "two" / "2-test").exists()  # the processes share one folder
    single, double = tmp_path / "runs" / "sdp" / "1-test", tmp_path / "runs" / "two" / "1-test"
    alone, shared = (json.loads((run / "metrics.json").read_text()) for run in (single, double))
    for category, metrics in alone["categories"].items():
        assert shared["categories"][category] == pytest.approx(metrics, abs=1e-9), category
    assert len(read_csv(double / "scores.csv")) == 8
    images = [{p.relative_to(run) for p in run.rglob("*.png")} for run in (single, double)]
    assert images[0] == images[1]


def test_more_processes_than_images(command: Command, mvtec_root: Path, tmp_path: Path) -> None:
    for category in ("bottle", "metal_nut"):
        for name in ("test/good/001", "test/scratch/001", "ground_truth/scratch/001_mask"):
            (mvtec_root / category / f"{name}.png").unlink()
    words = command("test", "--data.categories=[bottle]", "--trainer.strategy=ddp")
    done = run_command([*words, "--trainer.devices=3"], processes=3)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "anomaly_clip: 2 images cannot be shared by 3 processes" in done.stderr
    assert not list((tmp_path / "runs").glob("*/1-*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.sigmma=3"], "model.sigmma: SDP has no such option: did you mean sigma?"),
        (["--model.sig=3"], "model.sig: SDP has no such option: did you mean sigma?"),
        (["--model.sigma=wide"], "model.sigma: expected float, got wide"),
        (
            ["--model.rvs.method=mode"],
            "model.rvs.method: expected one of 'mean', 'pca', 'kde', 'dbscan'",
        ),
        (["--model.rvs.epps=1"], "model.rvs.epps: there is no such option"),
        (["--model.stages=[1,7]"], "stages [1, 7]: expected an ascending choice"),
        (["--model.stages=[1,x]"], "model.stages: expected"),
        (["--model.backbone.image_size=33"], "backbone.image_size 33 is not a multiple"),
        (["--model=SPD"], "model: there is no class SPD: did you mean SDP"),
        (["--data=MVTec"], "data: there is no class MVTec: did you mean MVTecAD or MVTecAD2?"),
        (["--data.categories=[cable]"], "data.categories: 'cable' is not in"),
        (["--data.root=/nowhere"], "data.root /nowhere: there is no such folder"),
        (["--data.image_size=99"], "data.image_size 99 differs from the model's"),
        (["--trainer.max_epoch=1"], "unknown option --trainer.max_epoch: did you mean"),
        (["--trainer.precision=8"], "trainer.precision: expected"),
        (["--config=missing.yaml"], "--config"),
        (["--ckpt_path=x.ckpt"], "--ckpt_path x.ckpt: SDP is zero-shot and has no checkpoints"),
        (["spare"], "unexpected argument spare: options begin with --"),
        (["--model.prompts.templates=[]"], "prompts.templates is empty"),
        (["--model.sigma=-1"], "model.sigma must be 0 or more"),
        (["--model.evaluator.pro_steps=1"], "model.evaluator.pro_steps must be null, or 2 or more"),
        (["--model.evaluator.fpr_limit=2"], "model.evaluator.fpr_limit must be in (0, 1]"),
        (["--trainer.precision=transformer-engine"], ""),
        (["--output.root=/dev/null"], "output.root /dev/null: cannot create a run folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_files(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(command("test", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"anomaly_clip: {message}")
    assert not any("Traceback" in line for line in lines)
    assert not list((tmp_path / "runs").rglob("*.*"))
    assert not list((tmp_path / "runs").glob("*/1-*"))


def _spoil(root: Path, what: str) -> None:
    """Damage a data set in one of the usual ways."""
    bottle = root / "bottle"
    image, mask = bottle / "test/scratch/000.png", bottle / "ground_truth/scratch/000_mask.png"
    if what == "no mask":
        mask.unlink()
    elif what == "no image":
        image.unlink()
    elif what == "mask of another size":
        Image.fromarray(np.zeros((7, 9), dtype=np.uint8)).save(mask)
    elif what == "empty file":
        image.write_bytes(b"")
    elif what == "no image at all":
        image.write_text("hello")
    elif what == "broken mask":
        mask.write_bytes(mask.read_bytes()[:30])
    elif what == "empty category":
        for file in bottle.glob("test/*/*"):
            file.unlink()
        shutil.rmtree(bottle / "ground_truth")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no mask", "scratch/000.png: its mask is missing, expected"),
        ("no image", "000_mask.png: a mask without an image"),
        (
            "mask of another size",
            "000_mask.png: the mask is 9 x 7 pixels, but its image 000.png is 48",
        ),
        ("empty file", "scratch/000.png: an empty file"),
        ("no image at all", "scratch/000.png: not an image in a known format"),
        ("broken mask", "000_mask.png: the image cannot be decoded"),
        ("empty category", "category 'bottle' has no test images"),
    ],
)
def test_a_mistake_in_the_data_is_one_line(
    command: Command,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    message: str,
) -> None:
    _spoil(mvtec_root, what)
    assert main(command("test")) == 2
    err = capsys.readouterr().err
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not list((tmp_path / "runs").glob("*/1-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "model: {class_path: SDP, init_args: {sigmma: 3}}",
            "model.sigmma: SDP has no such option",
        ),
        ("model: {class_path: SDP, init_args: {sigma: wide}}", "model.sigma: expected float"),
        ("model: {class_path: SPD}", "model: there is no class SPD: did you mean SDP"),
        ("mdl: {class_path: SDP}", "mdl.class_path: there is no such option"),
        ("trainer: {max_epoch: 3}", "trainer.max_epoch: there is no such option: did you mean"),
        ("model: [", "--config {file}, line 2: not valid YAML (did not find"),
        ("just words", "--config {file} holds a single value: expected sections"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_line(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    verb, first, *words = command("test")
    assert main([verb, first, "--config", str(file), *words]) == 2
    err = capsys.readouterr().err
    expected = message.replace("{file}", str(file))
    assert err.strip().splitlines()[-1].startswith(f"anomaly_clip: {expected}")
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named(
    command: Command,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    broken = mvtec_root / "metal_nut" / "test" / "scratch" / "001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    more = [f"--data.num_workers={workers}", "--data.batch_size=2", "--output.maps=true"]
    assert main(command("test", *more)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"anomaly_clip: {broken}: the image cannot be decoded")
    assert not list((tmp_path / "runs").glob("*/1-*"))


@pytest.fixture
def toy(tiny_clip_config: str, mvtec_root: Path, tmp_path: Path) -> Command:
    """Return a builder of command lines for a method that can be fitted."""

    def words(verb: str, *more: str) -> list[str]:
        config = tmp_path / "toy.yaml"
        backbone = {"name": tiny_clip_config, "pretrained": "random"}
        data = {"root": str(mvtec_root), "num_workers": 0}
        config.write_text(
            yaml.safe_dump(
                {
                    "model": {"class_path": "toy.Toy", "init_args": {"backbone": backbone}},
                    "data": {"class_path": "MVTecAD", "init_args": data},
                    "trainer": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1},
                    "output": {"root": str(tmp_path / "runs")},
                }
            )
        )
        return [verb, "--config", str(config), *more]

    return words


@pytest.fixture
def checkpoint(toy: Command, tmp_path: Path) -> Path:
    assert main(toy("fit")) == 0
    (path,) = (tmp_path / "runs" / "toy" / "1-fit" / "checkpoints").glob("*.ckpt")
    assert (tmp_path / "runs" / "toy" / "1-fit" / "config-fit.yaml").is_file()
    return path


def test_a_checkpoint_without_frozen_weights_suffices_for_a_test(
    checkpoint: Path, tmp_path: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    assert set(saved["state_dict"]) == {"offset"}
    assert saved["state_dict"]["offset"] > 0.1
    assert main(["test", "--ckpt_path", str(checkpoint)]) == 0
    metrics = json.loads((tmp_path / "runs" / "toy" / "2-test" / "metrics.json").read_text())
    assert metrics["run"]["protocol"]["fitted"] is True
    assert metrics["run"]["checkpoint"] == str(checkpoint)


def test_a_checkpoint_of_other_weights_or_options_names_both(
    checkpoint: Path, toy: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"--ckpt_path={checkpoint}"
    assert main(toy("test", path, "--model.lr=0.25")) == 2
    assert "model.lr is 0.25, but" in capsys.readouterr().err
    assert main(toy("test", path, "--seed_everything=1")) == 2  # the random weights differ
    assert "the checkpoint was trained with" in capsys.readouterr().err
    assert main(["test", "--config", str(CONFIGS / "sdp.yaml"), path]) == 2
    assert "is a checkpoint of toy.Toy, but the model is" in capsys.readouterr().err
    assert main(toy("test", path, "--model.evaluator.pro_steps=50")) == 0


def test_a_method_to_be_fitted_needs_a_checkpoint(
    toy: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("test", "predict"):
        assert main(toy(verb)) == 2
        assert "Toy must be fitted first: give a checkpoint" in capsys.readouterr().err
    assert main(["test", "--ckpt_path=nowhere.ckpt"]) == 2
    assert "--ckpt_path nowhere.ckpt: there is no such file" in capsys.readouterr().err
    torch.save({"a": object}, tmp_path / "bad.ckpt")
    assert main(toy("test", f"--ckpt_path={tmp_path / 'bad.ckpt'}")) == 2
    assert "not a checkpoint that can be read safely" in capsys.readouterr().err
    torch.save({"a": 1}, tmp_path / "poor.ckpt")
    assert main(["test", f"--ckpt_path={tmp_path / 'poor.ckpt'}"]) == 2
    assert "its folder nor the parent folder contains config-fit.yaml" in capsys.readouterr().err
    assert main(toy("test", f"--ckpt_path={tmp_path / 'poor.ckpt'}")) == 2
    assert "not a checkpoint of a fit" in capsys.readouterr().err


def test_options_before_the_configuration_are_not_overridden(
    command: Command, tmp_path: Path
) -> None:
    verb, *words = command("test")
    early = ["--seed_everything=7", f"--data.root={tmp_path / 'mvtec'}", "--data.batch_size", "3"]
    assert main([verb, *early, *words]) == 0
    config = yaml.safe_load((tmp_path / "runs/sdp/1-test/config-test.yaml").read_text())
    assert config["seed_everything"] == 7
    assert config["data"]["init_args"]["batch_size"] == 3


def test_the_start_line_describes_the_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command("test"), "--model.backbone.quick_gelu=true"]
    assert main(words) == 0
    line = capsys.readouterr().err.splitlines()[0]
    overrides = sum(not word.startswith("--config") for word in words[1:])
    for part in (
        "test SDP",
        f"sdp.yaml + {overrides} overrides",
        "8 images (4 anomalous) in 2 categories",
        "weights RANDOM, QuickGELU |",
        "seed 0",
        str(tmp_path / "runs" / "sdp" / "1-test"),
    ):
        assert part in line


def test_verbs_that_sdp_does_not_support(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("fit")) == 2
    assert "SDP is zero-shot and has nothing to fit" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/1-*"))
    assert main(command("validate")) == 2
    assert "MVTecAD has no validation split" in capsys.readouterr().err


def test_options_before_their_class_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--data.root=x", "--data=MVTecAD"]) == 2
    assert "give --config or --data NAME before its options" in capsys.readouterr().err


def test_a_traceback_is_shown_on_request(command: Command) -> None:
    from anomaly_clip.errors import UserError

    with pytest.raises(UserError, match="sigmma"):
        main(command("test", "--model.sigmma=3", "--traceback"))


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--help"]) == 0
    out = capsys.readouterr()
    assert "--output.maps" in out.out
    assert not out.err


def test_an_interrupted_run_ends_with_130_and_leaves_nothing(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from anomaly_clip.methods import SDP

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SDP, "score", interrupt)
    assert main(command("test")) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "anomaly_clip: interrupted: run the same command again"
    assert not list((tmp_path / "runs").glob("*/1-*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["test", "--a", "1", "--config=x.yaml"], ["test", "--config=x.yaml", "--a", "1"]),
        (
            ["fit", "-c", "x.yaml", "--a", "--config", "y.yaml"],
            ["fit", "-c", "x.yaml", "--config", "y.yaml", "--a"],
        ),
        (["fit", "--a", "--config"], ["fit", "--a", "--config"]),  # the parser reports it
        (["fit", "--ckpt_path", "none"], ["fit", "--ckpt_path", "none"]),  # a fit is resumed
        (
            ["test", "--ckpt_path=none", "--model", "SDP"],
            ["test", "--ckpt_path=none", "--model", "SDP"],
        ),
    ],
)
def test_configurations_come_first_in_their_order(words: list[str], expected: list[str]) -> None:
    assert arrange(words) == expected


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_lone_checkpoint_adds_the_configuration_of_its_fit(tmp_path: Path, below: str) -> None:
    checkpoint = tmp_path / below / "last.ckpt"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    with pytest.raises(
        UserError, match=r"neither its folder nor the parent folder contains config-fit\.yaml"
    ):
        arrange(["test", "--ckpt_path", str(checkpoint)])
    config = tmp_path / "config-fit.yaml"
    config.touch()
    before = ["test", "--config", str(config), "--output.folder", "null"]
    before += ["--calibration.alpha", "null", "--calibration.confidence", "null"]
    assert arrange(["test", f"--ckpt_path={checkpoint}"]) == [*before, f"--ckpt_path={checkpoint}"]


def test_the_class_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(UserError, match="there is no such file"):
        class_of_checkpoint(path)
    saved = {"_class_path": "anomaly_clip.methods.PaDiM"}
    torch.save({"state_dict": {}, "hyper_parameters": saved}, path)
    assert class_of_checkpoint(path) is anomaly_clip.methods.PaDiM
    torch.save({"state_dict": {}}, path)  # written without the command line
    (tmp_path / "config-fit.yaml").write_text("model: {class_path: anomaly_clip.methods.SDP}")
    assert class_of_checkpoint(path) is anomaly_clip.methods.SDP


def test_options_of_all_verbs_are_known() -> None:
    options = known_options()
    assert {"--config", "--data", "--output.maps", "--trainer.max_epochs"} <= set(options)
    assert len(set(options)) == len(options)


@pytest.mark.parametrize(
    ("configured", "callbacks", "expected"),
    [
        (None, [], {"enable_model_summary": False}),
        (True, [], {}),
        (False, [], {}),
        (None, [ModelSummary()], {}),
        (None, [RichModelSummary()], {}),
    ],
)
def test_the_model_summary_is_off_unless_requested(
    configured: bool | None, callbacks: list[object], expected: dict[str, bool]
) -> None:
    assert summary_options({"enable_model_summary": configured}, callbacks) == expected
