"""``report --protocol``: what a paper must say of a run, from ``metrics.json`` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import Writer, metrics, report, rows_of, run_writer
from run_folder import TWO, make_run

from anomaly_clip import methods
from anomaly_clip.cli import main
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.feature_method import FeatureMethod
from anomaly_clip.methods.transductive import BatchedFeatureMethod
from anomaly_clip.reporting.protocol import CNN_METHODS, NOT_RECORDED, protocol_report
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
    run = tmp_path / "runs" / "sdp" / "1-test"
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


def test_activation_and_positions(tiny_sdp: list[str], mvtec_root: Path, tmp_path: Path) -> None:
    options = ["--model.backbone.quick_gelu", "true", "--model.backbone.positions", "bicubic"]
    words = ["test", *tiny_sdp, "--output.page=false"]
    assert main([*words, *options]) == 0
    assert main(words) == 0
    changed, default = (tmp_path / "runs" / "sdp" / f"{number}-test" for number in "12")
    texts = items(changed)
    assert texts["activation"] == "QuickGELU"
    assert texts["interpolation of positional embeddings"] == "bicubic"
    texts = items(default)
    assert texts["activation"] == "that of the model name"
    assert texts["interpolation of positional embeddings"] == "bicubic_antialias (default)"
    assert report(changed, "--protocol", "--csv", tmp_path / "protocol.csv") == 0
    rows = {row["item"]: row["value"] for row in rows_of(tmp_path / "protocol.csv")}
    assert rows["activation"] == "QuickGELU"
    assert rows["interpolation of positional embeddings"] == "bicubic"


def test_backbones_without_text_have_no_activation_of_clip(write: Writer) -> None:
    assert "activation" not in items(write())
    names = [n for n in methods.__all__ if issubclass(getattr(methods, n), AnomalyMethod)]
    bases = FeatureMethod, BatchedFeatureMethod
    on_cnns = {n for n in names if issubclass(getattr(methods, n), bases)}
    assert {*CNN_METHODS} == on_cnns | {"LinearProbe"}


def test_entries_that_are_not_known_are_listed_at_the_end(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        TWO,
        weights={"backbone": "tiny", "pretrained": "w.pt", "random": False, "new_key": 3},
        environment={"device": "cpu", "device_memory": "80 GiB"},
        protocol={"data": "My", "conventions": {"average": "mean", "ties": "middle"}, "new_key": 4},
        new_key={"a": 1, "b": True},
    )
    lines = protocol_report(find_runs([run])).table.lines
    start = next(n for n, line in enumerate(lines) if line.cells[0] == "other settings")
    assert {line.cells[1]: line.cells[2] for line in lines[start:]} == {
        "weights.new key": "3",
        "environment.device memory": "80 GiB",
        "conventions.ties": "middle",
        "new key": "4",
        "run.new key": "a: 1, b: yes",
    }


@pytest.mark.parametrize(
    ("protocol", "text"),
    [
        ({}, NOT_RECORDED),
        ({"train_categories": "same", "fitted": False}, "none (the method was not trained)"),
        ({"train_categories": "same", "fitted": True}, "the tested category of each model"),
        ({"train_categories": "same", "one_model_a_category": False}, "the tested categories"),
        (
            {"train_categories": "others", "one_model_a_category": False},
            "all but the tested categories",
        ),
        ({"train_categories": ["b", "c"], "fitted": True}, "b, c"),
        ({"train_categories": "same", "auxiliary": "VisA"}, "those of the auxiliary data set"),
        (
            {"train_categories": "same", "fitted": True, "borrowed": {"file": "x"}},
            "unknown, as the trained layers or prompts are from elsewhere",
        ),
    ],
)
def test_categories_trained_on(write: Writer, protocol: dict[str, Any], text: str) -> None:
    assert items(write(**protocol))["categories trained on"] == text


def test_failed_categories(write: Writer) -> None:
    assert items(write("a"))["failed categories"] == "none"
    assert items(write("b", failed={"zipper": "no images"}))["failed categories"] == (
        "zipper: no images"
    )


def test_metrics_with_wide_bounds(write: Writer) -> None:
    folder = write(categories={"bottle": metrics(0.9), "cable": metrics(0.8)})
    assert items(folder)["pixel metrics with wide bounds"] == "none"
    content = json.loads((folder / "metrics.json").read_text())
    content["intervals"] = {"bottle": {"pixel_auroc": [0.4, 0.6]}}
    content["run"]["uncertain"] = {"bottle": ["pixel_auroc"]}
    (folder / "metrics.json").write_text(json.dumps(content))
    texts = items(folder)
    assert texts["pixel metrics with wide bounds"] == "bottle: pixel_auroc"
    assert not any("uncertain" in name for name in texts)
    assert "pixel_auroc may differ from the exact values by more than 0.1" in paragraph(folder)
    notes = protocol_report(find_runs([folder])).table.notes
    assert not any("~" in note.text for note in notes)  # the table has no metrics
    image_only = write("image", {"bottle": metrics(0.9, None)})
    assert "pixel metrics with wide bounds" not in items(image_only)


def test_runs_of_one_description_are_told_apart_by_their_settings(write: Writer) -> None:
    folders = [write("a", patch_norm=True), write("b", patch_norm=False), write("c", weights="x")]
    first, second, third = (n.text for n in protocol_report(find_runs(folders)).table.legend)
    assert first.endswith(", patch norm: yes")
    assert second.endswith(", patch norm: no")
    assert "patch norm" not in third


def test_several_runs_stand_side_by_side(write: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write("a", shots=4), write("b", weights="tab.pt", patch_norm=True)
    table = protocol_report(find_runs([first, second])).table
    assert [*table.headings] == ["", "item", "A", "B"]
    by_item = {line.cells[1]: line.cells[2:] for line in table.lines}
    assert by_item["weights"] == ("imagenet", "tab.pt")
    assert by_item["normal images per category (few-shot)"] == ("4", NOT_RECORDED)
    assert by_item["patch norm"] == (NOT_RECORDED, "yes")
    assert by_item["seed of the run"] == (NOT_RECORDED, NOT_RECORDED)
    sdp = write("c", {"bottle": metrics(0.9, None)}, method="SDP")
    lines = protocol_report(find_runs([first, sdp])).table.lines
    of_two = {line.cells[1]: line.cells[2:] for line in lines}
    assert of_two["activation"] == ("does not apply", "that of the model name")
    assert of_two["thresholds of PRO"] == (NOT_RECORDED, "does not apply")
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
