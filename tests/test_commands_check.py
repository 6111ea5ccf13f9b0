"""``anomaly_clip check``: output, options and error messages."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import save_picture
from layouts import Maker, blob, brain_mri, btad, clinic_db, head_ct, ksdd2, mixed_wm38, visa

from anomaly_clip.cli import main
from anomaly_clip.commands.check import run_check
from anomaly_clip.data.info import DATASETS


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """Return a user's labelled folder with masks, for which no counts are published."""
    make = Maker()
    root = tmp_path / "own"
    for name in ("good/a", "good/b", "cut/c", "cut/d"):
        make.picture(root / f"{name}.png")
    for name in ("c", "d"):
        save_picture(root / "ground_truth" / "cut" / f"{name}_mask.png", blob())
    return root


def test_all_findings_as_json(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_root / "good" / "a.png").write_bytes(b"x")
    words = ["check", "--data", "ImageFolder", "--data.root", str(own_root)]
    words += ["--data.category", "plank"]
    assert run_check([*words, "--json", "-"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["problems"][0]["path"] == "good/a.png"
    assert printed["rows"][0]["normal"] == 2
    assert main([*words, "--json", str(own_root / "found.json")]) == 1
    written = json.loads((own_root / "found.json").read_text())
    assert written["problems"] == printed["problems"]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("VisA", visa),
        ("BTAD", btad),
        ("KSDD2", ksdd2),
        ("CVCClinicDB", clinic_db),
        ("HeadCT", head_ct),
        ("BrainMRI", brain_mri),
        ("MixedWM38", mixed_wm38),
    ],
)
def test_the_command_reads_every_layout(
    tmp_path: Path, name: str, make: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "data")
    # Each of these tiny data sets lacks most of the published images.
    assert main(["check", "--data", name, "--data.root", str(root), "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert f"source: {DATASETS[name].url}" in out
    assert f"licence: {DATASETS[name].licence}" in out
    assert len(re.findall("duplicates", out)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data missing"),
        (["--data", "Visa"], "there is no class Visa: did you mean VisA"),
        (["--data", "VisA", "--data.root", "nowhere"], "data.root nowhere: there is no such"),
        (["--data", "Demo", "--workers", "0"], "--workers must be 1 or more"),
        (["--data", "Demo", "--near", "true"], "unknown option --near"),
        (["--data", "Demo", "--data.categories", "[oak]"], "'oak' is not in"),
        (
            ["--data", "Demo", "--data.categories", "[oak wood board, oak wood board]"],
            "occurs twice",
        ),
    ],
)
def test_a_users_mistakes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err


def test_names_that_cannot_be_printed(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_root / "good" / "line\nend \x1b[31m.png").write_bytes(b"x")
    (own_root / "good").joinpath(os.fsdecode(b"\xff\xfe.png")).write_bytes(b"x")
    words = ["check", "--data", "ImageFolder", "--data.root", str(own_root)]
    words += ["--data.category", "plank"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert r"good/line\nend \x1b[31m.png: " in out
    assert r"good/\xff\xfe.png: " in out
    assert main([*words, "--json", str(own_root / "found.json")]) == 1
    paths = [p["path"] for p in json.loads((own_root / "found.json").read_text())["problems"]]
    assert r"good/line\nend \x1b[31m.png" in paths


def test_json_cannot_go_into_a_folder(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--data", "ImageFolder", "--data.root", str(own_root)]
    assert main([*words, "--data.category", "plank", "--json", str(own_root)]) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err


def test_a_section_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = str(Path(__file__).parent.parent / "configs" / "data" / "head_ct.yaml")
    root = head_ct(tmp_path)
    assert main(["check", "--config", section, "--data.root", str(root)]) == 1
    assert "HeadCT" in capsys.readouterr().out
