"""Local sweeps and the sweep files of the repository: errors, sampling, commands and goals."""

from __future__ import annotations

import csv
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from layouts import visa
from sweep_files import COMMAND, GOAL, write_sweep

from anomaly_clip.cli import main
from anomaly_clip.commands import sweep as sweep_module
from anomaly_clip.commands.experiment import run_experiment
from anomaly_clip.commands.sweep import run_sweep
from anomaly_clip.commands.sweep_file import ARGS, read_sweep
from anomaly_clip.commands.sweep_parameter import read_parameter
from anomaly_clip.commands.sweep_record import SweepRecord
from anomaly_clip.data import feature_cache
from anomaly_clip.files import CACHE_VARIABLE, write_json
from anomaly_clip.results.warnings import DEMO_REMARK

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
ON_DISK = [file for file in SWEEPS if file.stem != "demo"]  # demo.yaml has its own test

VALIDATED = ["--data.val_split", "auxiliary"]
AUXILIARY = [*VALIDATED, "--data.auxiliary", "Demo", "--data.auxiliary.seed", "9"]
AUXILIARY += ["--data.auxiliary.categories", "[tan leather]", "--data.auxiliary.num_test", "20"]
AUXILIARY += ["--data.auxiliary.picture_size", "64", "--data.categories", "[red capsule]"]
AUXILIARY += ["--data.num_test", "4", "--data.picture_size", "64"]
NOWHERE = ["--data.auxiliary", "VisA", "--data.auxiliary.root", "nowhere", *VALIDATED]
FEW_WORDS = ["--model.prompts.templates", '["a {}."]', "--model.rvs.method", "mean"]
TINY_ANOMALYCLIP = ["--model.layers", "null", "--model.dense_blocks", "null"]
TINY_ANOMALYCLIP += ["--model.backbone.image_size", "32"]
TINY_APRIL_GAN = ["--model.layers", "null", "--model.prompts.templates", '["a {}."]']
TINY_APRIL_GAN += ["--model.backbone.image_size", "32"]
AUXILIARY_SWEEPS = {
    "sdp_plus": FEW_WORDS,
    "anomalyclip": TINY_ANOMALYCLIP,
    "april_gan": TINY_APRIL_GAN,
}
"""Sweep files of methods that are trained on another data set, with options of a tiny CLIP."""
TINY_CLIP = [*FEW_WORDS, "--model.backbone.name", "demo", "--model.backbone.pretrained", "random"]
TINY_CLIP += ["--model.backbone.image_size", "32"]
FEW_IMAGES = [
    *FEW_WORDS,
    "--model.backbone.image_size",
    "32",
    "--data.categories",
    "[red capsule]",
]
FEW_IMAGES += ["--data.num_test", "4", "--data.auxiliary.categories", "[tan leather]"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
QUIET += ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
QUIET += ["--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"]
QUICK = [*QUIET, "--trainer.max_epochs", "1"]

Row = dict[str, str]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_sweep, tmp_path)


def table(run: Path) -> list[Row]:
    with (run / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- mistakes -------------------------------------------------------------------------------------


BAD: list[tuple[dict[str, Any], str]] = [
    ({"parameter": {}}, "parameter is not a key of a sweep file: did you mean parameters"),
    ({"program": None}, "program is missing: set program: anomaly_clip"),
    ({"program": "train.py"}, "program is train.py: set program: anomaly_clip"),
    ({"command": None}, "command: expected a list of words, such as [${env}, anomaly_clip, fit,"),
    ({"command": ["${env}", "python", "train.py", ARGS]}, "command runs train.py"),
    ({"command": ["${env}", "anomaly_clip", "test", ARGS]}, "command runs anomaly_clip test: exp"),
    ({"command": COMMAND[:-1]}, "command: expected ${args} once"),
    ({"command": [*COMMAND[:-1], "${args_no_hyphens}"]}, "does not support ${args_no_hyphens}"),
    ({"command": [*COMMAND, "${args_json}"]}, "anomaly_clip does not support ${args_json}"),
    ({"command": [*COMMAND, "--config", "a.yaml"]}, "--config comes after ${args}: put"),
    ({"command": [*COMMAND, "${envvar:NOT_SET_AT_ALL}"]}, "variable NOT_SET_AT_ALL is not set"),
    ({"method": "grids"}, "method: expected one of grid, random, bayes, got grids"),
    ({"method": "bayes"}, "sample the runs here with --method random --count N"),
    ({"method": "random"}, "method random has no end: limit the number of runs with --count N"),
    ({"metric": None}, "metric: expected the metric that runs are compared by"),
    ({"metric": {"name": "val/pixel_ap"}}, "metric.goal: expected maximize or minimize, got None"),
    ({"metric": {**GOAL, "name": "test/pixel_ap"}}, "test/pixel_ap is never logged by fit"),
    ({"run_cap": 0}, "run_cap: expected a number of runs, 1 or more, got 0"),
    ({"parameters": None}, "parameters: expected options"),
    ({"parameters": {"a": 3}}, "parameters.a: expected a mapping, such as {value: 3}, got 3"),
    ({"parameters": {"model": {"parameters": {"lr": {}}}}}, "not supported: write model.lr"),
    ({"parameters": {"a": {"values": []}}}, "parameters.a.values: expected a list"),
    ({"parameters": {"a": {"values": [None]}}}, "W&B passes null as None"),
    ({"parameters": {"a": {"values": ["1e-5"]}}}, "1e-5 as text, not as a number: write 1.0e-5"),
    ({"parameters": {"a": {"min": "1e-5", "max": 1}}}, "parameters.a.min: YAML reads 1e-5 as text"),
    ({"parameters": {"a": {"min": 1.0, "max": "2.5e3"}}}, "write 2.5e+3"),
    ({"parameters": {"a": {"min": 2, "max": 1}}}, "parameters.a: min 2 is above max 1"),
    ({"parameters": {"a": {"min": 1}}}, "parameters.a: uniform requires max"),
    ({"parameters": {"a": {"min": 0.1, "max": 1.0}}}, "a is uniform, but a grid needs values"),
    ({"parameters": {"a": {"min": True, "max": 1}}}, "a.min: expected a number, got True"),
    ({"parameters": {"a": {"min": 0, "max": 1, "mu": 1}}}, "int_uniform has no mu: its settings"),
    ({"parameters": {"a": {"distribution": "beta"}}}, "distribution beta is not supported"),
    ({"parameters": {"a": {"mu": 1}}}, "min and max, or distribution, got {'mu': 1}"),
    (
        {"parameters": {"a": {"distribution": "log_unifrom", "min": 1, "max": 2}}},
        "distribution log_unifrom is not supported; did you mean log_uniform",
    ),
    (
        {"parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 2}}},
        "parameters.a.min: log_uniform_values requires more than 0, got 0",
    ),
    (
        {"parameters": {"a": {"distribution": "log_uniform", "min": 0, "max": 2000}}},
        "samples of log_uniform with {'min': 0, 'max': 2000} would overflow: its settings are exp",
    ),
    (
        {"parameters": {"a": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}},
        "parameters.a.q: expected more than 0, got 0",
    ),
    (
        {"parameters": {"a": {"distribution": "int_uniform", "min": 0.5, "max": 1}}},
        "int_uniform requires whole numbers without a decimal point, got 0.5 and 1",
    ),
    (
        {"parameters": {"a": {"values": [1, 2], "probabilities": [0.5, 0.6]}}},
        "parameters.a.probabilities: expected 0 or more, and a sum of 1, got [0.5, 0.6]",
    ),
    (
        {"parameters": {"a": {"values": [1, 2], "probabilities": [1]}}},
        "parameters.a.probabilities: expected a list of 2, one per value, got [1]",
    ),
    ({"parameters": {"output.root": {"value": "x"}}}, "a sweep chooses the folder of each run"),
    (
        {"parameters": {name: {"values": list(range(50))} for name in "abc"}},
        "the grid has 125,000 runs, more than 1,000: run the first N with --count N",
    ),
    # Found by the parser, or when the first run is built:
    ({"parameters": {"lr": {"value": 1}}}, "unknown option --lr"),
    ({"parameters": {"model.lrr": {"value": 1}}}, "model.lrr: SDPPlus has no such option: did you"),
    ({"parameters": {"model.lr": {"value": "x"}}}, "model.lr: expected float, got x"),
    (
        {
            "parameters": {"model.lr": {"values": [1, "x"]}},
            "command": [*COMMAND[:-1], *AUXILIARY, ARGS],
        },
        "run 2 (model.lr=x): model.lr: expected float, got x",
    ),
    ({"command": [*COMMAND[:-1], *NOWHERE, ARGS]}, "nowhere: there is no such"),
    ({}, "these runs have no validation split: add one to the command, such as --data.val_split"),
    (
        {"metric": {**GOAL, "name": "val/pixel_app"}, "command": [*COMMAND[:-1], *AUXILIARY, ARGS]},
        "SDPPlus logs no val/pixel_app; did you mean val/pixel_ap",
    ),
]  # fmt: skip


@pytest.fixture
def complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Return a function that runs a faulty command line and returns the error, a single line.

    The function checks that no run was started.
    """
    monkeypatch.chdir(tmp_path)

    def error_of(line: list[str]) -> str:
        assert main(["sweep", *line]) == 2
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "runs").exists()
        return message

    return error_of


@pytest.mark.parametrize(("keys", "message"), BAD)
def test_mistakes_of_a_file(
    keys: dict[str, Any],
    message: str,
    write: Callable[..., Path],
    complaint: Callable[[list[str]], str],
) -> None:
    assert message in complaint([str(write(**keys)), *TINY_CLIP])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "expected a sweep file first, such as configs/sweeps/demo.yaml, got nothing"),
        (["--count", "3", "FILE"], "expected a sweep file first, such as"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory)"),
        (["."], ".: cannot be read (Is a directory)"),
        (["empty.yaml"], "empty.yaml: expected a sweep file"),
        (["odd.yaml"], "odd.yaml: not valid YAML, line 1"),
        (["FILE", "--count", "0"], "--count 0: expected 1 or more"),
        (["FILE", "--seed", "-1"], "--seed -1: expected 0 or more"),
        (
            ["FILE", "--model.init_args.lr", "3"],
            "--model.init_args.lr: my_sweep.yaml sets this option itself",
        ),
        (["FILE", "--model.lr", "3"], "--model.lr: my_sweep.yaml sets this option itself"),
        (["FILE", "--trainer.logger", "WandbLogger"], "logs into the folder of each run"),
        (["--resume", "nowhere"], "--resume nowhere: expected a run folder of sweep"),
    ],
)
def test_mistakes_of_the_command_line(
    line: list[str],
    message: str,
    write: Callable[..., Path],
    complaint: Callable[[list[str]], str],
) -> None:
    file = write()
    file.with_name("empty.yaml").touch()
    file.with_name("odd.yaml").write_text("a: [1", encoding="utf-8")
    assert message in complaint([file.name if word == "FILE" else word for word in line])


# -- the sweep files of the repository -----------------------------------------------------------


def rendered(file: Path) -> list[str]:
    """Return the command of a run as W&B's agent would start it, with sampled options."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    parameters = {name: read_parameter(name, p) for name, p in content["parameters"].items()}
    options = {name: {"value": p.draw(3, 1, name)} for name, p in parameters.items()}
    macros = create_sweep_command_args({"args": options})
    macros |= {"env": ["/usr/bin/env"], "program": [content["program"]]}
    words: list[str] = []
    for word in create_sweep_command(content["command"]):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_commands_of_wandbs_agent_are_accepted(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = rendered(file)
    assert words[:2] == ["/usr/bin/env", "anomaly_clip"]
    assert main([*words[2:], "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["logger"]["class_path"].endswith("WandbLogger")
    # The local sweep uses the same arguments, apart from the logger, which it adds later.
    sweep = read_sweep(file)
    options = {name: p.draw(3, 1, name) for name, p in sweep.parameters.items()}
    assert sweep.words(options) == words[3:]
    head = file.read_text(encoding="utf-8").split("program:")[0]
    assert f"anomaly_clip sweep sweeps/{file.stem}" in head
    assert f"wandb sweep configs/sweeps/{file.name}" in head


def tiny(file: Path, clip: str, mvtec: Path, tmp_path: Path) -> list[str]:
    """Return options that make the runs of a sweep file tiny."""
    words = ["--output.root", str(tmp_path / "runs"), *QUIET, "--data.root", str(mvtec)]
    if file.stem not in AUXILIARY_SWEEPS:  # they sweep trainer.max_epochs themselves
        words += ["--trainer.max_epochs", "1"]
    if file.stem == "tab":
        words += ["--model.backbone.weights", "random", "--model.text.name", clip]
        words += ["--model.text.pretrained", "random", "--model.prompts.centered", "sides"]
        return [*words, "--data.val_share", "0.25", "--model.image_size", "64"]
    words += ["--model.backbone.name", clip, "--model.backbone.pretrained", "random"]
    if file.stem in AUXILIARY_SWEEPS:
        words += ["--data.val_share", "0.5", *AUXILIARY_SWEEPS[file.stem]]  # half of six images
        return [*words, "--data.auxiliary.root", str(visa(tmp_path / "visa"))]
    words += ["--model.backbone.image_size", "32", "--data.val_share", "0.25"]
    words += ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1"]
    words += ["--trainer.precision", "32-true", "--data.batch_size", "4"]
    return words if "layer" in file.stem else [*words, "--model.feature_layer", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ON_DISK, ids=lambda file: file.stem)
def test_fit_logs_the_goal_of_every_file(
    file: Path,
    mvtec_root: Path,
    tmp_path: Path,
    tiny_clip_config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for category in ("bottle", "metal_nut"):  # add images: otherwise none can be held out
        good = mvtec_root / category / "train" / "good"
        for number, image in enumerate(sorted(good.iterdir())):
            (good / f"more{number}.png").write_bytes(image.read_bytes())
    monkeypatch.chdir(ROOT)
    words = tiny(file, tiny_clip_config, mvtec_root, tmp_path)
    assert main(["sweep", str(file), "--count", "1", *words]) == 0, capsys.readouterr().err
    (row,) = table(tmp_path / "runs" / f"sweep_{file.stem}" / "1-sweep")
    assert row["state"] == "finished"
    sweep = read_sweep(file)
    assert float(row[sweep.metric]) >= 0
    assert list(row)[2 : 2 + len(sweep.parameters)] == list(sweep.parameters)


# -- the runs ------------------------------------------------------------------------------------


def demo(tmp_path: Path, *more: str) -> list[str]:
    words = ["sweep", str(ROOT / "configs" / "sweeps" / "demo.yaml"), *QUICK, *FEW_IMAGES]
    return [*words, "--output.root", str(tmp_path / "runs"), *more]


@pytest.mark.slow
def test_four_runs_share_their_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    original, seen = feature_cache._encoded, []

    def encoded(encoder: Any, images: Any) -> Any:
        seen.append(len(images))
        return original(encoder, images)

    monkeypatch.setattr(feature_cache, "_encoded", encoded)
    assert main(demo(tmp_path)) == 0
    run = tmp_path / "runs" / "sweep_demo" / "1-sweep"
    cached = list((Path(os.environ[CACHE_VARIABLE]) / "features").glob("*/*.safetensors"))
    assert sum(seen) == len(cached) == 20  # images are encoded once, not per run
    out = capsys.readouterr().out
    rows = table(run)
    assert [row["state"] for row in rows] == ["finished"] * 4
    assert [float(row["model.lr"]) for row in rows] == [1e-4, 3e-4, 1e-3, 3e-3]
    goals = {row["run"]: float(row["val/pixel_ap"]) for row in rows}
    assert len(set(goals.values())) > 1
    shown = [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert shown == sorted(goals, key=lambda number: -goals[number])
    assert "the highest val/pixel_ap first" in out
    assert DEMO_REMARK in " ".join(out.split())
    for row in rows:
        log = Path(row["folder"]) / "logs" / "fit" / "metrics.csv"
        with log.open(newline="", encoding="utf-8") as file:
            logged = [entry for entry in csv.DictReader(file) if entry["val/pixel_ap"]]
        assert float(logged[-1]["val/pixel_ap"]) == goals[row["run"]]
        assert (row["epoch"], row["step"]) == (logged[-1]["epoch"], logged[-1]["step"])
        assert float(row["val/image_auroc"]) == float(logged[-1]["val/image_auroc"])
        assert float(row["minutes"]) > 0
        assert (Path(row["folder"]) / "linear_layers.pth").is_file()
    config = yaml.safe_load((run / "2" / "config-fit.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 3e-4
    assert config["output"]["name"] == "sdp_plus_demo"
    assert config["trainer"]["logger"] is None


@pytest.fixture
def small(write: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Return the command line of a sweep with three random runs."""
    command = [*COMMAND[:-1], *AUXILIARY, ARGS]
    law = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    file = write(method="random", run_cap=3, command=command, parameters={"model.lr": law})
    root = ["--output.root", str(tmp_path / "runs")]
    return ["sweep", str(file), *TINY_CLIP, *QUICK, *root, "--seed", "4"]


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_where_it_stopped(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[str] = []

    def interrupted(line: list[str]) -> int:
        if len(done) == 1:
            raise KeyboardInterrupt
        code = run_experiment(line)
        done.append(Path(line[-1]).name)
        return code

    monkeypatch.setattr("anomaly_clip.commands.batch.run_experiment", interrupted)
    assert main(small) == 130
    run = tmp_path / "runs" / "sweep_my_sweep" / "1-sweep"
    assert f"resume with anomaly_clip sweep --resume {run}" in capsys.readouterr().err
    assert [row["state"] for row in table(run)] == ["finished", "not run", "not run"]
    before = table(run)
    sweep = read_sweep(Path(small[1]))
    assert json.loads((run / "sweep.json").read_text())["runs"] == sweep.runs("random", 3, 4)
    assert (run / "sweep.yaml").read_text() == sweep.text
    # The sweep file has changed, and the folder contains an incomplete run.
    Path(small[1]).write_text("changed", encoding="utf-8")
    (run / "2" / "checkpoints").mkdir(parents=True)
    (run / "2" / "checkpoints" / "last.ckpt").write_text("half a checkpoint")
    monkeypatch.setattr("anomaly_clip.commands.batch.run_experiment", run_experiment)
    assert main(["sweep", "--resume", str(run), "--count", "5"]) == 2
    assert "leave out --count" in capsys.readouterr().err
    assert main(["sweep", f"--resume={run}"]) == 0
    assert "already finished" in capsys.readouterr().err
    after = table(run)
    assert after[0] == before[0]
    assert [row["model.lr"] for row in after] == [row["model.lr"] for row in before]
    assert {row["state"] for row in after} == {"finished"}
    for number in (2, 3):
        config = yaml.safe_load((run / str(number) / "config-fit.yaml").read_text())
        assert config["model"]["init_args"]["lr"] == float(after[number - 1]["model.lr"])


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND[:-1], *AUXILIARY, "--data.val_split", "test", ARGS]
    # The parser accepts -1.0, but the method refuses it.
    file = write(parameters={"model.lr": {"values": [0.001, -1.0, 0.002]}}, command=command)
    words = ["sweep", str(file), *TINY_CLIP, *QUICK, "--output.root", str(tmp_path / "runs")]
    assert main(words) == 1
    run = tmp_path / "runs" / "sweep_my_sweep" / "1-sweep"
    rows = table(run)
    assert [row["state"] for row in rows] == ["finished", "failed", "finished"]
    assert rows[1]["why"] == "model.lr must be above 0, got -1.0"
    assert rows[1]["val/pixel_ap"] == rows[1]["minutes"] == ""
    assert {(row["weights"], row["validated on"]) for row in rows} == {("random", "test")}
    assert "val/random_weights" not in rows[0]
    captured = capsys.readouterr()
    # The warning is printed before the first run, and again with the table (below).
    assert "SWEEP METRIC COMPUTED ON THE TEST IMAGES" in captured.err
    assert "2: model.lr=-1 failed: model.lr must be above 0" in captured.err
    assert "RANDOM WEIGHTS" in captured.out
    assert "SWEEP METRIC COMPUTED ON THE TEST IMAGES" in captured.out
    assert captured.out.strip().splitlines()[-1].split() == ["2", "-1", "failed", "–"]


@pytest.mark.slow
def test_a_run_that_does_not_log_the_goal_fails(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND[:-1], *AUXILIARY, ARGS, "--trainer.limit_val_batches", "0"]
    file = write(command=command)
    words = ["sweep", str(file), *TINY_CLIP, *QUICK]
    assert main([*words, "--output.root", str(tmp_path)]) == 1
    row, *others = table(tmp_path / "sweep_my_sweep" / "1-sweep")
    assert row["state"] == "failed"
    assert [other["state"] for other in others] == [
        "not run"
    ]  # they would not log the metric either
    assert (Path(row["folder"]) / "checkpoints" / "last.ckpt").is_file()  # the fit is kept
    assert row["why"].startswith("the fit did not log val/pixel_ap (it logged no val/ metric)")
    assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_random_and_demo_weights_and_test_images_are_labelled(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {
        "data.val_split": {"values": ["auxiliary", "test"]},
        "model.backbone.pretrained": {"values": ["demo", "random"]},
    }
    file = write(parameters=parameters, command=[*COMMAND[:-1], *AUXILIARY, ARGS])
    few = ["--model.backbone.name", "demo", *FEW_WORDS, *QUICK]
    assert main(["sweep", str(file), *few, "--output.root", str(tmp_path), "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["sweep", str(file), *few, "--output.root", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "runs 3, 4: SWEEP METRIC COMPUTED ON THE TEST IMAGES" in out
    assert "runs 2, 4: RANDOM WEIGHTS" in out
    assert "runs 1, 3: demo weights" in out
    origins = [
        (row["weights"], row["validated on"]) for row in table(tmp_path / "sweep_my_sweep/1-sweep")
    ]
    assert origins == [
        ("demo", "auxiliary"),
        ("random", "auxiliary"),
        ("demo", "test"),
        ("random", "test"),
    ]


def test_a_sweep_needs_the_directory_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    record = SweepRecord("SDPPlus on Demo", "/elsewhere", "val/pixel_ap", True, False, [], [])
    write_json(folder / "sweep.json", asdict(record))
    (folder / "1").mkdir()
    assert main(["sweep", "--resume", str(folder)]) == 2
    message = "the run was started in /elsewhere, which does not exist any more"
    assert message in capsys.readouterr().err
    assert (folder / "1").is_dir()


def test_a_dry_run_lists_the_commands(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(
        command=[*COMMAND[:-1], *AUXILIARY, ARGS],
        early_terminate={"type": "hyperband", "min_iter": 3},
    )
    assert run_sweep(["sweep", str(file), *TINY_CLIP, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert not (tmp_path / "runs").exists()
    words = shlex.split(lines[1])
    assert words[:2] == ["anomaly_clip", "fit"]
    assert "--model.lr=0.2" in words
    assert main([*words[1:], "--print_config"]) == 0
    assert read_sweep(file).ignored == ("early_terminate",)


@pytest.mark.parametrize(("count", "reported"), [("2", False), ("3", False), ("4", True)])
def test_a_cap_below_the_count_is_reported(
    count: str,
    reported: bool,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep_module, "_run_all", lambda *_: 0)
    assert main([*small, "--count", count]) == 0
    err = capsys.readouterr().err
    assert ("run_cap 3 of " in err) == reported
    assert f"| random, {min(3, int(count))} runs |" in err
