from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from calibrations import PADIM, write_photographs
from helpers import quiet_trainer
from lightning.pytorch import LightningModule
from torch import nn

import anomaly_clip.commands.export as command
from anomaly_clip.cli import main
from anomaly_clip.commands.export import run_export
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.exporter import Exported, ExportSettings
from anomaly_clip.exporting.parity import Difference
from anomaly_clip.exporting.programs import OLDEST_TORCH
from anomaly_clip.methods.base import AnomalyMethod


def test_mistakes_of_an_export(
    tmp_path: Path, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--ckpt_path", str(tmp_path / "none.ckpt")]) == 2
    assert "none.ckpt: there is no such file" in capsys.readouterr().err
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert main(["export", "--ckpt_path", str(tmp_path / "text.ckpt")]) == 2
    assert "not a checkpoint that can be read safely" in capsys.readouterr().err
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "bare.ckpt")
    assert main(["export", "--ckpt_path", str(tmp_path / "bare.ckpt")]) == 2
    assert "contains config-fit.yaml" in capsys.readouterr().err


class Bare(LightningModule):
    """A module without an export."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


class Exporting(Bare):
    """A module that exports its weight and a note."""

    export_name: ClassVar[str] = "weight.pt"

    def export(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "note.txt").write_text("written by a test")
        torch.save(self.weight.detach(), folder / self.export_name)
        return folder / self.export_name


def checkpoint_of(module: LightningModule, folder: Path) -> str:
    """Write a checkpoint and a configuration that names the class; return the checkpoint."""
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    section = {"class_path": f"{__name__}.{type(module).__name__}"}
    (folder / "config-fit.yaml").write_text(yaml.safe_dump({"model": section}))
    return str(folder / "last.ckpt")


def test_weights_are_written_and_files_are_not_overwritten_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Exporting()
    module.weight.data += torch.tensor([1.0, 2.0])
    words = ["export", "--ckpt_path", checkpoint_of(module, tmp_path)]
    words += ["--folder", str(tmp_path / "out")]
    assert run_export(words) == 0
    file = tmp_path / "out" / "weight.pt"
    assert capsys.readouterr().out == f"{file}\n"
    assert torch.load(file, weights_only=True).tolist() == [1.0, 2.0]
    file.unlink()
    with pytest.raises(
        UserError, match=r"note\.txt exists: give another --folder, or add --overwrite"
    ):
        run_export(words)
    assert not file.exists()  # not written either
    assert run_export([*words, "--overwrite"]) == 0
    assert file.is_file()


def test_the_current_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_of(Exporting(), tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_export(["export", "--ckpt_path", path]) == 0
    assert capsys.readouterr().out == "weight.pt\n"
    assert (tmp_path / "here" / "weight.pt").is_file()


def test_a_method_without_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Bare has nothing to export"):
        run_export(["export", "--ckpt_path", checkpoint_of(Bare(), tmp_path)])


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that takes the arguments of exports, which do not run."""
    seen: list[Any] = []

    def export(
        detector: Detector, folder: Path, settings: ExportSettings, method: AnomalyMethod | None
    ) -> Exported:
        seen.append((detector, folder, settings, method))
        record = {
            "program": {"file": "detector.onnx", "bytes": 2_500_000},
            "parity": {"images": 8, "batches": [1, 3, 8]},
        }
        differences = {"onnxruntime": Difference(2e-7, 1e-6, flips=0)}
        return Exported(folder, record, differences, ["it is not calibrated"])

    monkeypatch.setattr(command, "export_detector", export)
    return seen


DEMO = ["--config", "sdp", "--model.backbone.pretrained", "demo"]


def test_a_zero_shot_detector_is_exported_by_the_name_of_its_configuration(
    exports: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sdp").mkdir()  # a folder of the same name
    monkeypatch.chdir(tmp_path)
    words = ["export", *DEMO, "--data.category=laser-cut plank", "--model.sigma", "2"]
    assert main([*words, "--folder", str(tmp_path / "out"), "--images", "3"]) == 0
    [(detector, folder, settings, method)] = exports
    assert detector.method.sigma == 2
    assert detector.category == "laser-cut plank"
    assert (folder, method) == (tmp_path / "out", None)
    assert settings == ExportSettings("onnx", num_images=3)
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    assert (
        "detector.onnx in onnxruntime and torch, 8 generated images, batches of 1, 3, 8: maps "
        "differ by at most 1.0e-06 of their range, scores by 2.0e-07; 0 of 8 decisions differ"
    ) in printed.err
    assert "it is not calibrated" in printed.err
    assert "2.5 MB" in printed.err


def test_a_detector_of_another_precision_is_exported_in_float32(
    exports: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", *DEMO, "--data.category", "plank", "--trainer.precision", "bf16-true"]
    assert main(words) == 0
    [(detector, folder, _, method)] = exports
    assert folder == Path("detector")
    assert detector.method.backbone.visual.proj.dtype == torch.bfloat16
    assert method.backbone.visual.proj.dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one detector, a run, --ckpt_path or --config: nothing was given"),
        (["run", "--config", "sdp"], "name one detector, .*: 2 were given"),
        (["none"], "none: there is no such file"),
        (["--ckpt_path", "none", "--model.sigma"], "--model.sigma: the value .* is missing"),
        (["--config", "sdp", "--data.root", "none"], "--data.root none: there is no such folder"),
        (DEMO, "SDP inserts the name of the object .*category="),
        (["--config=padim"], "--config padim: PaDiM must be fitted first: run anomaly_clip fit"),
        (["--config", "sdq"], "did you mean sdp"),
        ([*DEMO, "--data.category", "x", "--opset", "3"], "--opset 3: give a version from 18"),
        ([*DEMO, "--data.category", "x", "--include_images"], "needs --data.root"),
    ],
)
def test_mistakes_in_naming_a_detector(
    words: list[str], message: str, exports: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *words]) == 2
    assert exports == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err), printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_options_of_a_detector_are_refused_where_weights_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_of(Exporting(), tmp_path)
    assert main(["export", path, "--opset", "18"]) == 2
    assert "without --format Exporting writes its weights" in capsys.readouterr().err
    assert main(["export", path, "--model.sigma", "3"]) == 2
    assert "--model.sigma: a checkpoint keeps the settings of its fit" in capsys.readouterr().err
    for option in (["--references", "."], ["--data.category", "plank"], ["--images", "0"]):
        assert main(["export", path, *option]) == 2
        assert f"{option[0]} is for the export of a detector" in capsys.readouterr().err
    assert main(["export", path, "--model.backbone.sigma", "3"]) == 2
    assert "backbone sigma: no such setting" in capsys.readouterr().err
    assert main(["export", path, "--format", "onnx"]) == 2
    assert "Exporting scores no images, so that there is no program" in capsys.readouterr().err


def test_an_exported_detector_is_not_taken_for_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "detector.json").write_text("{}")
    for words in (["export", str(tmp_path)], ["predict", "--ckpt_path", str(tmp_path)]):
        assert main(words) == 2
        assert "is an exported detector, not a run: python" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_exported_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", minversion=OLDEST_TORCH)
    write_photographs(tmp_path / "parts" / "good", 24, seed=0)
    words = ["fit", *PADIM, f"--data.root={tmp_path / 'parts'}", "--calibrate=true"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    words = ["export", str(tmp_path / "run"), "--folder", str(tmp_path / "detector")]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'detector'}\n"
    assert "detector.onnx in onnxruntime and torch, 8 generated images" in printed.err
    assert "0 of 8 decisions differ" in printed.err
    assert main(words) == 2
    assert "give another --folder, or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--format", "torch_export"]) == 0
    names = {path.name for path in (tmp_path / "detector").iterdir()}
    assert names == {"detector.pt2", "detector.json", "detector.py", "README.md", "check"}
