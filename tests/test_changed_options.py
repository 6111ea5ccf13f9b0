"""Options of a resumed fit that differ from those of its checkpoint are expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_clip.cli import main
from anomaly_clip.commands.changed_options import changed_options

FIT = """
seed_everything: 0
trainer: {precision: null, max_epochs: 2, devices: auto}
data:
  class_path: anomaly_clip.data.MVTecAD
  init_args: {root: a, batch_size: 4, num_workers: 4, synthesis: {recipe: nsa, share: 0.5}}
"""


def changed(tmp_path: Path, config: str, saved: str = FIT) -> list[str]:
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    (tmp_path / "run" / "config-fit.yaml").write_text(saved)
    return changed_options(file, config)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("batch_size: 4", "batch_size: 2", ["data.batch_size 4 (now 2)"]),
        ("precision: null", "precision: 16-mixed", ["trainer.precision null (now 16-mixed)"]),
        ("share: 0.5", "share: 1.0", ["data.synthesis.share 0.5 (now 1.0)"]),
        ("everything: 0", "everything: 1", ["seed_everything 0 (now 1)"]),
        ("MVTecAD", "VisA", ["data MVTecAD (now VisA)"]),
        ("max_epochs: 2", "max_epochs: 5", []),  # raised on purpose
        ("root: a", "root: b", []),  # images are compared by their content
        ("num_workers: 4", "num_workers: 0", []),
        ("anomaly_clip.data.MVTecAD", "MVTecAD", []),
    ],
)
def test_what_is_told(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in FIT
    assert changed(tmp_path, FIT.replace(old, new)) == expected


@pytest.mark.parametrize("saved", ["", "[1, 2]", "a: [", "data: 3", "trainer: x"])
def test_an_unusual_configuration_tells_nothing(tmp_path: Path, saved: str) -> None:
    assert changed(tmp_path, FIT, saved) == []


def test_a_checkpoint_without_its_configuration_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    assert changed_options(tmp_path / "last.ckpt", FIT) == []


def test_a_resumed_fit_tells_and_a_lower_limit_is_refused_in_one_line(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--model=SimpleNet", "--model.backbone.name=mobilenet_v3_small"]
    words += ["--model.backbone.weights=random", "--model.layers=[features.1]"]
    words += ["--model.image_size=32", "--model.pretrain_dim=8", "--model.target_dim=8"]
    words += ["--model.hidden=8", "--data=MVTecAD", f"--data.root={mvtec_root}"]
    words += ["--data.categories=[bottle]", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    words += ["--trainer.log_every_n_steps=1"]
    first = ["--output.folder", str(tmp_path / "a"), "--trainer.max_epochs=2"]
    assert main([*words, *first, "--data.batch_size=1"]) == 0
    capsys.readouterr()
    again = ["--ckpt_path", str(tmp_path / "a"), "--data.batch_size=2"]
    assert (
        main([*words, *again, "--trainer.max_epochs=3", f"--output.folder={tmp_path / 'b'}"]) == 0
    )
    assert "last.ckpt differ: data.batch_size 1 (now 2)" in capsys.readouterr().err
    assert (
        main([*words, *again, "--trainer.max_epochs=1", f"--output.folder={tmp_path / 'c'}"]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "nothing is left to train, as trainer.max_epochs is 1, and 2 are done" in error
    assert not (tmp_path / "c").exists()
