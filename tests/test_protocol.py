"""``report --protocol``: what a paper must say of a run, from ``metrics.json`` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import Writer, metrics, report, rows_of, run_writer
from run_folder import TWO, make_run

from anomaly_clip.cli import main
from anomaly_clip.report.protocol import NOT_RECORDED, protocol_report
from anomaly_clip.results.run_reader import find_runs

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "0.1.0"


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def items(*folders: Path) -> dict[str, str]:
    """Return the texts of the first run by item."""
    lines = protocol_report(find_runs(folders)).table.lines
    return {line.cells[1]: line.cells[2] for line in lines}


def paragraph(folder: Path) -> str:
    return protocol_report(find_runs([folder])).table.notes[0].text


def test_a_real_run_says_everything(
    tiny_sdp: list[str], mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test", *tiny_sdp, "--output.page=false", "--data.mask_threshold", "0.25"]
    assert main([*words, "--seed_everything", "7"]) == 0
    run = tmp_path / "runs" / "sdp" / "1"
    texts = items(run)
    assert NOT_RECORDED not in texts.values()
    expected = {
        "data set": "MVTecAD",
        "folder": str(mvtec_root),
        "split": "test",
        "normal and anomalous test images": "4 and 4",
        "normal and anomalous test images, metal_nut": "2 and 2",
        "image size": "32 x 32 pixels",
        "resize": "rule square, filter bicubic",
        "threshold of resized masks": "0.25",
        "values of masks": "values above 0 are defects",
        "thresholds of PRO": "200 equally spaced thresholds",
        "regions of PRO": "8-connected components of the masks",
        "seed of the run": "7",
        "seed of the data": "0",
        "device": "cpu",
        "untrained": "yes",
        "SHA-256 of the weights": "none",
        "checkpoint": "none",
    }
    assert {name: texts[name] for name in expected} == expected
    text = paragraph(run)
    assert "not recorded" not in text
    assert "(2 categories; 8 images, 4 of them anomalous)" in text
    assert "200 equally spaced thresholds up to a false positive rate of 0.3" in text
    assert "The seed was 7, that of the data 0" in text
    # The files have the same as the screen.
    files = {name: tmp_path / f"protocol.{name}" for name in ("markdown", "html", "csv")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    capsys.readouterr()
    assert report(run, "--protocol", *options) == 0
    out = capsys.readouterr().out
    for shown in (out, files["markdown"].read_text(), files["html"].read_text()):
        assert "200 equally spaced thresholds" in shown
        assert "RANDOM WEIGHTS" in shown
    rows = {row["item"]: row["value"] for row in rows_of(files["csv"])}
    assert rows == texts


def test_what_the_file_lacks_is_not_guessed(write: Writer) -> None:
    folder = write(categories={"bottle": metrics(0.9)})  # has no seed, versions or counts
    texts = items(folder)
    for name in (
        "folder",
        "split",
        "normal and anomalous test images",
        "resize",
        "mask size",
        "thresholds of PRO",
        "seed of the run",
        "seed of the data",
        "versions",
        "device",
    ):
        assert texts[name] == NOT_RECORDED, name
    text = paragraph(folder)
    assert "[number of images not recorded]" in text
    assert "SHA-256 [not recorded]" in text
    assert "The seed was [seed not recorded]" in text
    assert "[versions not recorded]" in text
    content = json.loads((folder / "metrics.json").read_text())
    content["run"]["protocol"]["resize"] = "Resize(new=1)"
    content["run"]["protocol"]["images"] = {"bottle": "many"}
    (folder / "metrics.json").write_text(json.dumps(content))
    assert items(folder)["resize"] == "Resize(new=1)"
    assert items(folder)["normal and anomalous test images"] == NOT_RECORDED


def test_null_and_missing_entries_differ(write: Writer) -> None:
    texts = items(write(shots=None, pro_steps=None, data_seed=None, overlap=None))
    assert texts["normal images per category (few-shot)"] == "none"
    assert texts["thresholds of PRO"] == "all thresholds"
    assert texts["seed of the data"] == "none"
    assert texts["test images among the training images"] == "not checked"
    assert texts["fraction of the training images"] == NOT_RECORDED


def test_other_settings_are_listed(write: Writer) -> None:
    texts = items(write(patch_norm=False, evaluator={"exact": True}))
    assert texts["patch norm"] == "no"
    assert texts["evaluator"] == "exact: yes"


def test_several_runs_stand_side_by_side(write: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write("a", shots=4), write("b", weights="tab.pt", patch_norm=True)
    table = protocol_report(find_runs([first, second])).table
    assert [*table.headings] == ["", "item", "A", "B"]
    by_item = {line.cells[1]: line.cells[2:] for line in table.lines}
    assert by_item["weights"] == ("imagenet", "tab.pt")
    assert by_item["normal images per category (few-shot)"] == ("4", NOT_RECORDED)
    assert by_item["patch norm"] == (NOT_RECORDED, "yes")
    sections = [line.cells[0] for line in table.lines if line.cells[0]]
    assert len(sections) == len(set(sections))
    assert [note.text[:3] for note in table.notes[:2]] == ["A: ", "B: "]
    assert report(first, second, "--protocol") == 0
    assert "tab.pt" in capsys.readouterr().out


def test_warnings_are_repeated(write: Writer) -> None:
    notes = protocol_report(find_runs([write(select="best_test")])).table.notes
    assert any(note.loud and "EPOCH SELECTED" in note.text for note in notes)


@pytest.mark.parametrize("method", ["sdp", "linear_probe", "regad", "each/disc"])
def test_runs_of_an_earlier_version(method: str) -> None:
    folder = GOLDEN / method / ("" if "/" in method else "test")
    texts = items(folder)
    assert texts["anomaly_clip"] == "0.1.0"
    assert texts["folder"] == NOT_RECORDED
    assert ("thresholds of PRO" in texts) == (method != "linear_probe")


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    protocol: dict[str, Any] = {"data": "My\x1b[31mData", "ro\x1bot": "\x1b]0;x"}
    run = make_run(tmp_path / "run", TWO, protocol=protocol)
    table = protocol_report(find_runs([run])).table
    texts = [note.text for note in table.notes] + [c for line in table.lines for c in line.cells]
    assert not any("\x1b" in text for text in texts)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(*words: object) -> str:
        assert report(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "report --protocol: expected folders of runs" in mistake("--protocol")
    assert "contains no metrics.json" in mistake(tmp_path, "--protocol")
    run = make_run(tmp_path / "run", TWO)
    assert "leave out --table" in mistake(run, "--protocol", "--table", "tab1")
    assert "give one of them at a time" in mistake(run, "--protocol", "--page")
