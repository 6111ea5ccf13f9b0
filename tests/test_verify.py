"""``report --verify``: runs repeated from their folders by the real command."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import sdp_plus_command, write_mvtec
from layouts import visa
from report_helpers import report, rows_of
from run_folder import TWO, make_run

from anomaly_clip.cli import main
from anomaly_clip.commands.foreign_code import foreign_classes

Hashes = dict[str, str]


def hashes(folder: Path) -> Hashes:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def change(file: Path, edit: Callable[[Any], None]) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))  # also reads JSON
    edit(content)
    dump = json.dumps if file.suffix == ".json" else yaml.safe_dump
    file.write_text(dump(content), encoding="utf-8")


@pytest.fixture
def run(tiny_sdp: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return the folder of a zero-shot test."""
    assert main(["test", *tiny_sdp, "--output.page=false"]) == 0
    capsys.readouterr()
    return tmp_path / "runs" / "sdp" / "1-test"


@pytest.fixture
def detector(mvtec_root: Path, tmp_path: Path) -> list[str]:
    """Return the options of a PaDiM that is fast to fit; its weights are random."""
    words = ["--model", "PaDiM", "--model.image_size", "32", "--model.num_channels", "8"]
    words += ["--model.backbone.weights", "random", "--data", "MVTecAD", "--data.root"]
    words += [str(mvtec_root), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    return [*words, "--output.page", "false", "--output.folder", str(tmp_path / "run")]


def test_a_zero_shot_test_is_repeated_and_not_touched(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(tmp_path / "runs")
    assert report(run, "--verify", "--csv", tmp_path / "verified.csv") == 0
    out = capsys.readouterr()
    assert f"{run}: all 21 metrics are equal (largest difference 0, allowed 1e-09)" in out.out
    assert "then, " not in out.out  # nothing has changed
    assert hashes(tmp_path / "runs") == before
    rows = rows_of(tmp_path / "verified.csv")
    assert len(rows) == 21
    assert {row["equal"] for row in rows} == {"yes"}


def test_differences_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(content: Any) -> None:
        content["categories"]["bottle"]["pixel_ap"] += 2e-6
        content["mean"]["image_auroc"] = None
        content["run"]["versions"]["torch"] = "1.0"
        content["run"]["protocol"]["images"]["bottle"] = 3
        del content["categories"]["bottle"]["image_ap"]  # of an earlier version

    change(run / "metrics.json", edit)
    assert report(run, "--verify") == 1
    out = capsys.readouterr().out
    assert f"{run}: 2 of 20 metrics DIFFER (largest difference 2e-06, allowed 1e-09)" in out
    assert "bottle (test images): 3 then, 4 now" in out
    assert "torch: 1.0 then, " in out
    (line,) = (line for line in out.splitlines() if "pixel AP" in line and "bottle" in line)
    assert line.split()[-1] == "-2e-06"
    change(run / "metrics.json", lambda content: content["mean"].pop("image_auroc"))
    assert report(run, "--verify", "--tolerance", "1e-5") == 0


def test_another_seed_is_a_difference(run: Path) -> None:
    change(run / "config-test.yaml", lambda content: content.update(seed_everything=1))
    assert report(run, "--verify") == 1


def test_a_run_that_cannot_be_repeated_is_refused_in_a_sentence(
    run: Path, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*more: object) -> str:
        assert report(run, "--verify", *more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        prefix = f"anomaly_clip: {run} cannot be repeated: "
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    assert report(run, "--verify", "--data.auxiliary.root", tmp_path) == 2
    assert "no run reads auxiliary data from a folder: leave it out" in capsys.readouterr().err
    moved = mvtec_root.rename(tmp_path / "moved")
    assert refusal().startswith(f"data.root {mvtec_root}: there is no such folder")
    assert report(run, "--verify", "--data.root", moved) == 0
    capsys.readouterr()
    assert "no such folder" in refusal("--data.root", tmp_path / "nowhere")
    moved.rename(mvtec_root)
    change(run / "config-test.yaml", lambda c: c["model"]["init_args"].update(sigma=-1))
    assert refusal() == "model.sigma must be 0 or more, got -1.0"
    (run / "config-test.yaml").write_text("", encoding="utf-8")
    assert "has no model or no data" in refusal()
    (run / "config-test.yaml").write_text("{", encoding="utf-8")
    assert "config-test.yaml cannot be read" in refusal()
    (run / "config-test.yaml").unlink()
    assert "config-test.yaml is missing" in refusal()


def test_other_weights_are_refused(
    tiny_sdp: list[str], tiny_clip: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "clip.pt"
    torch.save(tiny_clip.model.state_dict(), file)
    words = [*tiny_sdp, f"--model.backbone.pretrained={file}", "--output.page=false"]
    assert main(["test", *words]) == 0
    run = tmp_path / "runs" / "sdp" / "1-test"
    assert report(run, "--verify") == 0
    state = tiny_clip.model.state_dict()
    state["logit_scale"] = state["logit_scale"] + 1
    torch.save({key: value * 1.01 for key, value in state.items()}, file)
    capsys.readouterr()
    assert report(run, "--verify") == 2
    message = capsys.readouterr().err
    assert "the weights have SHA-256 " in message
    assert "the weights have SHA-256 " in message.splitlines()[-1]  # after a note on the file


def test_classes_of_others_are_imported_only_if_the_user_names_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_module.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "from anomaly_clip.methods import SDP\n"
        "class Theirs(SDP):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "their_module.Theirs"
    change(run / "config-test.yaml", lambda content: content["model"].update(class_path=name))
    try:
        assert report(run, "--verify") == 2
        assert f"if you trust them, add --allow {name}" in capsys.readouterr().err
        assert not (tmp_path / "imported").exists()
        assert report(run, "--verify", "--allow", name) == 0
        assert (tmp_path / "imported").exists()
    finally:
        sys.modules.pop("their_module", None)


EVIL = {"class_path": "evilmod.Evil"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("trainer.callbacks", json.dumps([EVIL])),
        ("trainer.callbacks", '[{"class\\u005fpath": "evilmod.Evil"}]'),
        ("trainer.callbacks", "LIST"),
        ("trainer.callbacks", ["ONE"]),
        ("trainer.callbacks+", [EVIL]),
        ("trainer.strategy", "ONE"),
        ("trainer.accelerator", "evilmod.Evil"),
        ("model.init_args.backbone", "ONE"),
        ("model.init_args.backbone", "evilmod.Evil"),
        ("model.init_args.prompt", json.dumps(EVIL)),
        ("model.init_args", json.dumps({"backbone": EVIL})),
        ("model.init_args.sigma", "ONE"),
    ],
)
def test_no_form_of_a_class_is_imported(
    option: str,
    value: Any,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = tmp_path / "imported"
    (tmp_path / "evilmod.py").write_text(f"open({str(imported)!r}, 'w')\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"LIST": json.dumps([EVIL]), "ONE": json.dumps(EVIL)}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = {name: str(tmp_path / f"{name}.yaml") for name in texts}
    filled = [paths.get(v, v) if isinstance(v, str) else v for v in [value] if v != ["ONE"]]
    content = filled[0] if filled else [paths["ONE"]]

    def edit(config: Any) -> None:
        *parents, last = option.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = content

    change(run / "config-test.yaml", edit)
    assert report(run, "--verify") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "whose code would be run: if you trust" in line
    assert not imported.exists()


def test_every_place_of_a_class_name_is_seen() -> None:
    config = {
        "model": {"class_path": "anomaly_clip.methods.SDP", "init_args": {"weights": "a.pt"}},
        "data": {"class_path": "VisA", "init_args": {"auxiliary": "a.B", "root": "c.d"}},
        "trainer": {
            "callbacks": ["e.F", {"class_path": "g.H", "init_args": {"strategy": "i.J"}}],
            "strategy": "ddp",
            "plugins": None,
        },
    }
    assert foreign_classes(config) == ["a.B", "e.F", "g.H", "i.J"]
    assert foreign_classes(config, ["e.F"]) == ["a.B", "g.H", "i.J"]


def test_a_logger_is_not_used_again(run: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {}}
    change(run / "config-test.yaml", lambda content: content["trainer"].update(logger=logger))
    assert report(run, "--verify") == 0


@pytest.mark.slow
def test_a_fit_is_repeated_with_its_test(
    tmp_path: Path, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, auxiliary = write_mvtec(tmp_path), visa(tmp_path / "visa")
    words = sdp_plus_command(root, auxiliary, tiny_clip_config, tmp_path / "runs")[1:]
    words += ["--output.folder", str(tmp_path / "run"), "--output.page", "false"]
    words += ["--trainer.max_epochs", "1"]
    assert main(["fit", *words]) == 0
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["test", *words, "--ckpt_path", str(checkpoint)]) == 0
    capsys.readouterr()
    before = hashes(run)
    assert report(run, "--verify") == 0
    assert f"repeating {run}: fit, then test" in capsys.readouterr().err
    assert hashes(run) == before
    # A test in another folder is repeated with its checkpoint, which must be the same file.
    apart = ["--output.folder", str(tmp_path / "apart")]
    assert main(["test", *words, "--ckpt_path", str(checkpoint), *apart]) == 0
    assert report(tmp_path / "apart", "--verify") == 0
    assert f"repeating {tmp_path / 'apart'}: test\n" in capsys.readouterr().err
    # The fit of another folder is not repeated in place of the recorded checkpoint.
    other = tmp_path / "other"
    assert main(["fit", *words, "--seed_everything", "7", "--output.folder", str(other)]) == 0
    again = ["test", *words, "--ckpt_path", str(checkpoint), "--output.folder", str(other)]
    assert main(again) == 0
    capsys.readouterr()
    assert report(other, "--verify") == 0
    assert f"repeating {other}: test\n" in capsys.readouterr().err
    content = checkpoint.read_bytes()
    checkpoint.rename(tmp_path / "away.ckpt")
    assert report(other, "--verify") == 2
    assert "last.ckpt in its folder is not known to be the same" in capsys.readouterr().err
    change(other / "metrics.json", lambda c: c["run"]["environment"].pop("checkpoint_sha256"))
    assert report(other, "--verify") == 2
    assert "last.ckpt in its folder is not known to be the same" in capsys.readouterr().err
    checkpoint.write_bytes(content + b"x")
    assert report(tmp_path / "apart", "--verify") == 2
    assert "has changed since (other SHA-256)" in capsys.readouterr().err
    checkpoint.unlink()
    assert report(tmp_path / "apart", "--verify") == 2
    assert "is not there" in capsys.readouterr().err
    # The folder of the fit does not have the whole fit if it was resumed.
    checkpoint.write_bytes(content)
    change(run / "config-fit.yaml", lambda content: content.update(ckpt_path="earlier.ckpt"))
    assert report(run, "--verify") == 2
    assert "its fit was resumed from earlier.ckpt" in capsys.readouterr().err


@pytest.mark.slow
def test_one_model_per_category_is_repeated(
    detector: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["each", *detector, "--data.categories", "[bottle]"]) == 0
    capsys.readouterr()
    before = hashes(tmp_path / "run")
    assert report(tmp_path / "run", "--verify") == 0
    out = capsys.readouterr()
    assert f"{tmp_path / 'run'}: all 14 metrics are equal" in out.out
    assert f"repeating {tmp_path / 'run'}: each\n" in out.err
    assert hashes(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify"], "report --verify: expected folders of runs"),
        (["RUN", "--verify", "--protocol"], "report --protocol and --verify: give one of them"),
        (["RUN", "--verify", "--table", "tab1"], "shows no published table: leave out --table"),
        (["RUN", "--verify", "--tolerance", "-1"], "report --tolerance must be 0 or more, got -1"),
        (["RUN", "--verify", "--tolerance", "abc"], "expected a number such as 1e-4, got abc"),
        (["RUN", "--verify", "--tolerance", "nan"], "report --tolerance must be 0 or more, got na"),
        (["RUN", "--data.root", "x"], "report --data.root is an option of --verify"),
        (["RUN", "--tolerance", "0"], "report --tolerance is an option of --verify"),
    ],
)
def test_mistakes(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", TWO)
    assert report(*(run if word == "RUN" else word for word in words)) == 2
    assert message in capsys.readouterr().err
