from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.commands.each import run_each
from anomaly_clip.commands.experiment import run_experiment
from anomaly_clip.errors import UserError
from anomaly_clip.methods import PaDiM


@pytest.fixture
def root(mvtec_root: Path) -> Path:
    """Write a data set in MVTec-AD's layout: two categories with four training images each."""
    rng = np.random.default_rng(0)
    for category in ("bottle", "metal_nut"):
        for number in range(2):
            array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
            save_picture(mvtec_root / category / "train" / "good" / f"{100 + number}.png", array)
    return mvtec_root


def words(root: Path, runs: Path, *more: str) -> list[str]:
    line = ["each", "--model", "PaDiM", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "32", "--model.num_channels", "8", "--output.name", "padim"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    return [*line, "--trainer.accelerator", "cpu", "--output.root", str(runs), *more]


def test_each_category_gets_a_model_and_one_table_has_all(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(root, tmp_path)) == 0
    run = tmp_path / "padim" / "1-each"
    merged = json.loads((run / "metrics.json").read_text())
    assert list(merged["categories"]) == ["bottle", "metal_nut"]
    for category in merged["categories"]:
        metrics = json.loads((run / category / "metrics.json").read_text())
        assert merged["categories"][category] == metrics["categories"][category]
        assert (run / category / "checkpoints" / "last.ckpt").is_file()
        assert {p.name for p in (run / category).glob("config-*")} == {
            "config-fit.yaml",
            "config-test.yaml",
        }
        assert merged["intervals"].get(category) == metrics["intervals"].get(category)
    for name, value in merged["mean"].items():
        both = [merged["categories"][category][name] for category in ("bottle", "metal_nut")]
        assert value == pytest.approx(sum(both) / 2)
    assert merged["run"]["protocol"]["images"] == {"bottle": 4, "metal_nut": 4}
    assert merged["run"]["failed"] == {}
    out = capsys.readouterr().out
    assert out.count("PaDiM on MVTecAD") == 1  # one table, not three
    assert "metal_nut" in out
    assert len((run / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_category_that_fails_does_not_stop_the_others(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = root / "bottle" / "train" / "good" / "100.png"
    intact = broken.read_bytes()
    broken.write_bytes(b"not an image")
    assert main(words(root, tmp_path)) == 1
    run = tmp_path / "padim" / "1-each"
    captured = capsys.readouterr()
    assert "failed: bottle: " in captured.err
    assert "100.png" in captured.err
    title = captured.out.index("PaDiM on MVTecAD, one model per category, test")
    assert title < captured.out.index("WITHOUT bottle")
    merged = json.loads((run / "metrics.json").read_text())
    assert list(merged["categories"]) == ["metal_nut"]
    assert "100.png" in merged["run"]["failed"]["bottle"]
    assert not merged["run"]["protocol"]["complete"]
    # After the repair, --resume runs only the failed category.
    broken.write_bytes(intact)
    before = (run / "metal_nut" / "metrics.json").stat().st_mtime_ns
    assert main(["each", "--resume", str(run)]) == 0
    assert (run / "metal_nut" / "metrics.json").stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().err
    merged = json.loads((run / "metrics.json").read_text())
    assert list(merged["categories"]) == ["bottle", "metal_nut"]
    assert merged["run"]["protocol"]["complete"]


def test_an_interrupted_run_resumes_where_it_stopped(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = run_experiment
    done: list[tuple[str, str]] = []

    def interrupted(line: list[str]) -> int:
        if len(done) == 3:
            raise KeyboardInterrupt
        code = original(line)
        done.append((line[0], line[line.index("--output.folder") + 1].rpartition("/")[2]))
        return code

    monkeypatch.setattr("anomaly_clip.commands.batch.run_experiment", interrupted)
    assert main(words(root, tmp_path)) == 130
    run = tmp_path / "padim" / "1-each"
    assert f"resume with anomaly_clip each --resume {run}" in capsys.readouterr().err
    assert done == [("fit", "bottle"), ("test", "bottle"), ("fit", "metal_nut")]
    done.clear()
    assert main(["each", f"--resume={run}"]) == 0
    assert done == [("test", "metal_nut")]


@pytest.mark.slow
def test_distributed_experiments_run_in_processes_of_their_own(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.categories", "[bottle]"]
    assert main(words(root, tmp_path, *ddp)) == 0
    merged = json.loads((tmp_path / "padim" / "1-each" / "metrics.json").read_text())
    assert merged["run"]["protocol"]["images"] == {"bottle": 4}
    err = capsys.readouterr().err
    assert err.count("fit PaDiM | ") == err.count("test PaDiM | ") == 1


def test_messages_of_several_processes_are_printed_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fake Python executable prints the output of two processes with the same error."""
    stand_in = tmp_path / "python"
    lines = ["fit PaDiM | so and so", "", *2 * ["anomaly_clip: there are 3 images, not 9"]]
    text = "".join(f"{line}\\n" for line in lines)
    stand_in.write_text(f"#!/bin/sh\nprintf '{text}' >&2\nexit 2\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.categories", "[bottle]"]
    assert main(words(root, tmp_path, *ddp)) == 1
    err = capsys.readouterr().err
    assert err.count("bottle failed: there are 3 images, not 9") == 1
    assert err.count("fit PaDiM | so and so\n") == 1
    assert "anomaly_clip: " not in err


@pytest.mark.slow
def test_a_zero_shot_method_is_only_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = ["--data", "Demo", "--data.categories", "[steel nut, red capsule]"]
    demo += ["--data.num_test", "4", "--data.picture_size", "64"]
    line = ["each", "--model", "SDP", "--model.backbone.pretrained", "demo", *demo]
    assert main([*line, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("anomaly_clip test --model SDP") == 2
    assert main(line) == 0
    run = tmp_path / "runs" / "SDP" / "1-each"
    together = json.loads((run / "metrics.json").read_text())
    assert set(together["categories"]) == {"steel nut", "red capsule"}
    assert "one run per category" in capsys.readouterr().out
    assert not list(run.glob("*/checkpoints"))
    assert main(["each", "--resume", str(run)]) == 0
    assert capsys.readouterr().err.count("already finished") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["each", "--resume", "nowhere"], "--resume nowhere: expected a run folder of each"),
        (["each", "--resume"], "expected a run folder of each"),
        (["each", "--model", "Contrastive", "--data", "Demo"], "Contrastive scores no images"),
        (["each", "--model.image_sise", "3"], "image_sise"),
        (
            [
                "each",
                "--model",
                "PaDiM",
                "--model.backbone.weights",
                "random",
                "--data",
                "MVTecAD",
                "--data.root",
                "nowhere",
            ],
            "nowhere",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_is_run(
    line: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "Demo" in line:
        line = [*line, "--model.backbone.pretrained", "demo"]
    assert main(line) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_run_is_resumed_with_its_original_options(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(root, tmp_path, "--data.categories", "[bottle]")) == 0
    run = tmp_path / "padim" / "1-each"
    assert main(["each", "--resume", str(run), "--model.sigma", "2"]) == 2
    assert "leave out --model.sigma" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_does_not_need_its_original_configuration_file(
    root: Path, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: {class_path: PaDiM, init_args: {sigma: 2.0}}\n", encoding="utf-8")
    line = words(root, tmp_path, "--data.categories", "[bottle]")
    assert main([line[0], "--config", str(config), *line[3:]]) == 0
    run = tmp_path / "padim" / "1-each"
    config.unlink()
    (run / "bottle" / ".tested").unlink()
    assert main(["each", "--resume", str(run)]) == 0
    assert "sigma: 2.0" in (run / "bottle" / "config-test.yaml").read_text()


@pytest.mark.slow
def test_the_checkpoint_of_an_interrupted_fit_is_replaced(root: Path, tmp_path: Path) -> None:
    line = words(root, tmp_path, "--data.categories", "[bottle]")
    assert main(line) == 0
    run = tmp_path / "padim" / "1-each"
    before = json.loads((run / "metrics.json").read_text())["mean"]
    for name in (".fitted", ".tested", "metrics.json"):
        (run / "bottle" / name).unlink()
    (run / "bottle" / "checkpoints" / "last.ckpt").write_text("half a checkpoint")
    assert main(["each", "--resume", str(run)]) == 0
    assert json.loads((run / "metrics.json").read_text())["mean"] == before


def test_the_help_names_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["each", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


def test_the_class_declares_one_model_per_category() -> None:
    assert PaDiM.one_category


@pytest.mark.slow
def test_a_later_test_leaves_the_run_of_each_alone(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "PaDiM", "--model.backbone.weights", "random", "--model.image_size", "32"]
    words += ["--model.num_channels", "8", "--data", "MVTecAD", "--data.root", str(mvtec_root)]
    words += ["--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    words += ["--output.root", str(tmp_path)]
    for category in ("bottle", "metal_nut"):
        good = mvtec_root / category / "train" / "good"
        first = sorted(good.iterdir())[0]
        (good / f"again{first.suffix}").write_bytes(first.read_bytes())
    assert main(["each", *words]) == 0
    run = tmp_path / "PaDiM" / "1-each"
    before = (run / "bottle" / "metrics.json").read_bytes()
    checkpoint = str(run / "bottle" / "checkpoints" / "last.ckpt")
    later = ["test", "--ckpt_path", checkpoint, "--data.categories", "[metal_nut]"]
    assert main([*later, "--output.root", str(tmp_path / "later")]) == 0
    assert (run / "bottle" / "metrics.json").read_bytes() == before
    assert list((tmp_path / "later").rglob("metrics.json"))
    # Metrics copied from another category do not count as results.
    (run / "bottle" / "metrics.json").write_bytes((run / "metal_nut" / "metrics.json").read_bytes())
    capsys.readouterr()
    assert main(["each", "--resume", str(run)]) == 1
    assert "metrics.json contains metal_nut instead of" in capsys.readouterr().err


def test_categories_that_would_share_a_folder_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "bottle").rename(root / "a:Nut")
    (root / "metal_nut").rename(root / "a_nut")
    with pytest.raises(UserError, match="categories a:Nut and a_nut would share the folder a_nut"):
        run_each(words(root, tmp_path / "runs"))
    assert not list((tmp_path / "runs").glob("*/*"))


def test_resume_takes_only_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: expected a run folder of each"):
        run_each(["each", "--resume", "nowhere"])
    (tmp_path / "config-each.yaml").touch()
    with pytest.raises(UserError, match="leave out --data"):
        run_each(["each", f"--resume={tmp_path}", "--data", "MVTecAD"])
