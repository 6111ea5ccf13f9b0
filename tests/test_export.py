from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anomaly_clip.cli import main


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
    assert "no config-fit.yaml" in capsys.readouterr().err
