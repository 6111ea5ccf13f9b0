"""``anomaly_clip report``: commands for missing runs, pages, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_helpers import MVTEC, Writer, metrics, report, run_writer
from run_folder import TWO, make_run

from anomaly_clip.cli import main
from anomaly_clip.commands.report import run_report
from anomaly_clip.reporting.page import PAGE
from anomaly_clip.reporting.published_reader import load_published


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def test_missing_repetitions_of_a_run_are_listed(
    write: Writer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "runs/winclip_1shot-laion400m_e31"
    for seed in (0, 3):
        write(
            f"{name}/{seed}",
            {c: metrics(0.9) for c in MVTEC},
            method="WinCLIP",
            backbone="ViT-B-16-plus-240",
            weights="laion400m_e31",
            shots=1,
            image_size=240,
            one_model_a_category=False,
            data_seed=seed,
        )
    assert report(name, "--table", "winclip_mvtec", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    missing = [line for line in lines if "winclip_1shot" in line and "anomaly_clip test" in line]
    assert [line[-1] for line in missing] == ["1", "2", "4"]
    assert lines[-1].count("winclip_1shot") == 3  # two existing runs and the folder of the others


def test_the_runs_of_a_table_are_listed(write: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report(["report", "--table", "tab6", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 2 + 1
    assert len(set(lines)) == len(lines)
    assert lines[-1].startswith("anomaly_clip report runs/padim-tab_perlin ")
    assert lines[-1].endswith(" --table tab6")
    # Existing runs are not repeated.
    assert report("--table", "tab1", "--dry-run") == 0
    before = capsys.readouterr().out.splitlines()
    folder = write("with a blank")
    assert report(folder, "--table", "tab1", "--dry-run") == 0
    after = capsys.readouterr().out.splitlines()
    assert after[:-1] == before[1:-1]
    assert f"'{folder}'" in after[-1]
    assert report("--table", "nsa", "--dry-run") == 0
    assert capsys.readouterr().out == ""


def test_a_published_table_is_shown_without_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for name in load_published().tables:
        assert report("--table", name) == 0
    assert "not run" in capsys.readouterr().out


def test_other_mistakes_are_reported_on_one_line(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*words: object) -> str:
        assert report(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    folder = write()
    other = write("other", {"a": metrics(0.5)})
    assert "there is no such folder" in mistake(tmp_path / "nowhere")
    assert "give folders of runs" in mistake()
    assert "no such table; did you mean" in mistake("--table", "tab11")
    assert "--dry-run lists the runs that a published table needs" in mistake("--dry-run", folder)
    assert "--weights tib=x: expected KIND=FILE" in mistake(folder, "--weights", "tib=x")
    assert "is a folder: name a file in it" in mistake(folder, "--csv", tmp_path)
    (tmp_path / "file").touch()
    message = mistake(folder, "--html", tmp_path / "file" / "a.html")
    assert "cannot be written" in message
    message = mistake(folder, other)
    assert "have different categories" in message
    assert "; )" not in message
    assert f"only {folder} has bottle, cable, capsule and 12 more" in message
    assert report(folder, other, "--table", "tab1") == 0


def test_pages_are_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, TWO) for name in ("a", "b")]
    assert main(["report", *map(str, runs), "--page"]) == 0
    assert all((run / PAGE).is_file() for run in runs)
    assert capsys.readouterr().err.count("written: ") == 2
    assert main(["report", "--page"]) == 2
    assert main(["report", str(runs[0]), "--page", "--table", "tab1"]) == 2
    assert "leave out --table" in capsys.readouterr().err
