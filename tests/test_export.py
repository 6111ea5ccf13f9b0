from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from helpers import quiet_trainer
from lightning.pytorch import LightningModule
from torch import nn

from anomaly_clip.cli import main
from anomaly_clip.commands.export import run_export
from anomaly_clip.errors import UserError


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
