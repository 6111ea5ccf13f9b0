"""Every table marks metrics of transductive methods, which score images by each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import Writer, compared, lines_of, metrics, report, rows_of, run_writer
from run_folder import TWO, make_run

from anomaly_clip.commands.each import _write_merged
from anomaly_clip.data.info import DATASETS
from anomaly_clip.files import write_json
from anomaly_clip.recording.metrics_record import table_title
from anomaly_clip.reporting.comparison import compare_runs
from anomaly_clip.reporting.page import PAGE, write_page
from anomaly_clip.reporting.protocol import protocol_report
from anomaly_clip.reporting.published_reader import load_published
from anomaly_clip.results.run_reader import find_runs
from anomaly_clip.results.warnings import TRANSDUCTIVE_REMARK

MVTEC = DATASETS["MVTecAD"].counts
PROTOCOL = {
    "transductive": True,
    "scoring": "batch",
    "layers": [6, 12, 18, 24],
    "r_list": [1, 3, 5],
    "interval": [0, 0.3],
    "k_list": [1, 2, 3],
    "grid": None,
    "images": {name: counts.normal + counts.anomalous for name, counts in MVTEC.items()},
}
GELU = {"quick_gelu": "false", "positions": "bicubic"}


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def write_musc(write: Writer, name: str = "musc", **protocol: Any) -> Path:
    """Write a run of MuSc as in the paper."""
    base = {"image_size": 518, "one_model_a_category": False, **PROTOCOL}
    folder = write(
        name, method="MuSc", backbone="ViT-L-14-336", weights="openai", **{**base, **protocol}
    )
    config = {"model": {"class_path": "MuSc", "init_args": {"backbone": GELU}}}
    write_json(folder / "config-test.yaml", config)
    return folder


class Method:
    evaluation_note = ""

    def __init__(self, protocol: dict[str, Any]) -> None:
        self.protocol = self.recorded_protocol = lambda: protocol


class Data:
    dataset_name = "MVTecAD"


@pytest.mark.parametrize("marked", [True, False])
def test_the_table_of_a_test(marked: bool) -> None:
    method, data = Method(PROTOCOL if marked else {}), Data()
    title = table_title(method, data, {"listed": 4}, 4)  # type: ignore[arg-type]
    lines = ["Method on MVTecAD, test", TRANSDUCTIVE_REMARK]
    assert title.splitlines() == lines[: 1 + marked]


@pytest.mark.parametrize("marked", [True, False])
def test_the_table_of_each(
    tmp_path: Path, marked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = {"data": "Demo", "split": "test", "complete": True, "words": {}, "fitted": True}
    protocol |= {**(PROTOCOL if marked else {}), "images": {"nut": 4}, "anomalous": {"nut": 2}}
    run = make_run(tmp_path / "nut", {"nut": TWO["nut"]}, protocol=protocol)
    part = json.loads((run / "metrics.json").read_text())
    _write_merged(tmp_path, {"nut": part}, {})
    assert ("TRANSDUCTIVE" in capsys.readouterr().out) == marked
    merged = json.loads((tmp_path / "metrics.json").read_text())["run"]["protocol"]
    assert merged.get("transductive", False) == marked


def test_a_table_of_one_run(write: Writer) -> None:
    marked, other = write_musc(write), write("padim")
    for folder, has_mark in ((marked, True), (other, False)):
        table = compare_runs(find_runs([folder])).table
        assert any(n.loud and n.text == TRANSDUCTIVE_REMARK for n in table.notes) == has_mark
    *_, note = compare_runs(find_runs([marked])).data.rows[0]
    assert note == TRANSDUCTIVE_REMARK


def test_a_comparison_says_which_runs_are_transductive(write: Writer) -> None:
    musc, padim, second = write_musc(write), write("padim"), write_musc(write, "second")
    table = compare_runs(find_runs([padim, musc])).table
    texts = [note.text for note in table.notes if note.loud]
    assert texts == [
        f"B: {TRANSDUCTIVE_REMARK}",
        "A: not transductive, so that the settings of the runs differ",
    ]
    assert "transductive" not in table.headings[1]
    assert table.headings[2].endswith("B\ntransductive")
    both = compare_runs(find_runs([musc, second])).table
    assert [note.text for note in both.notes if note.loud] == [f"A, B: {TRANSDUCTIVE_REMARK}"]


def test_the_protocol_for_a_paper(write: Writer) -> None:
    table = protocol_report(find_runs([write_musc(write)])).table
    items = {line.cells[1]: line.cells[2] for line in table.lines}
    assert items["sides of the neighbourhoods, in patches"] == "1, 3, 5"
    assert items["nearest images whose distances are averaged"] == "0, 0.3"
    assert items["side of the grid of compared patches"] == "none"
    assert items["activation"] == "that of the model name"
    assert "seed of the order of the images" not in items
    assert "other settings" not in [line.cells[0] for line in table.lines]
    assert "The method is transductive: each image was scored by comparison" in table.notes[0].text
    cnn = write_musc(write, "cnn", layers=["layer2", "layer3"], scoring="online", order_seed=0)
    items = {line.cells[1]: line.cells[2] for line in protocol_report(find_runs([cnn])).table.lines}
    assert "activation" not in items
    assert items["seed of the order of the images"] == "0"
    padim = protocol_report(find_runs([write("padim")])).table
    assert "transductive" not in padim.notes[0].text
    assert "side of the grid of compared patches" not in [line.cells[1] for line in padim.lines]


@pytest.mark.parametrize("marked", [True, False])
def test_the_page(tmp_path: Path, marked: bool) -> None:
    protocol = {"data": "MVTecAD", "split": "test", "complete": True, "images": {}, "anomalous": {}}
    run = make_run(tmp_path / "run", TWO, protocol={**protocol, "transductive": marked})
    text = write_page(run).read_text(encoding="utf-8")
    assert (TRANSDUCTIVE_REMARK in text) == marked
    (run / PAGE).unlink()
    content = json.loads((run / "metrics.json").read_text())
    write_json(run / "predict.json", {"run": content["run"]})
    (run / "metrics.json").unlink()
    assert (TRANSDUCTIVE_REMARK in write_page(run).read_text(encoding="utf-8")) == marked


def test_every_published_row_of_a_transductive_method_is_marked() -> None:
    rows = [row for table in load_published().tables.values() for row in table.rows]
    musc = [r for r in rows if "MuSc" in r.method or (r.run and r.run.match["method"] == "MuSc")]
    assert len(musc) > 30
    assert all(row.transductive for row in musc)
    others = [r for r in rows if r not in musc and r.transductive]
    batched = load_published().tables["subspace_ad_batched"].rows
    assert all(row.transductive for row in batched)
    others = [row for row in others if row not in batched]
    assert all(row.method.startswith(("ViT", "DINO")) for row in others)


def test_a_published_table(write: Writer, tmp_path: Path) -> None:
    folder = write_musc(write)
    table = compared("musc", folder)
    published, ours, difference = lines_of(table, "MuSc, MVTec-AD")
    assert published.cells[0] == "MuSc, MVTec-AD [1]"
    assert any(note.text == f"[1] {TRANSDUCTIVE_REMARK}" for note in table.legend)
    assert ours.cells[2] == "88.00\ntransductive"
    assert difference.cells[2] == "-9.80 / -9.77"
    assert any(note.loud and note.text == TRANSDUCTIVE_REMARK for note in table.notes)
    assert report(folder, "--table", "musc", "--csv", tmp_path / "a.csv") == 0
    assert all(TRANSDUCTIVE_REMARK in row["note"] for row in rows_of(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [6, 12]}, "layers is [6, 12], not [6, 12, 18, 24]"),
        ({"r_list": [1]}, "r_list is [1], not [1, 3, 5]"),
        ({"interval": [0, 0.5]}, "interval is [0, 0.5], not [0, 0.3]"),
        ({"k_list": [0]}, "k_list is [0], not [1, 2, 3]"),
        ({"grid": 16}, "grid is 16"),
        ({"scoring": "online"}, "scoring is online, not batch"),
        ({"transductive": None}, "transductive is unset, not true"),
        ({"images": {"bottle": 20}}, "bottle has 20 images, not 83"),
        ({"one_model_a_category": True}, None),
        ({"images": {"bottle": 20}, "complete": False}, None),
    ],
)
def test_settings_that_are_compared_with_a_publication(
    write: Writer, changes: dict[str, Any], reason: str | None
) -> None:
    table = compared("musc", write_musc(write, **changes))
    texts = [note.text for note in table.legend if "matches no row" in note.text]
    assert [text.partition(", but ")[2] for text in texts] == ([reason] if reason else [])


@pytest.mark.parametrize("method", ["MuSc", "PaDiM"])
def test_a_data_set_of_ones_own_is_in_no_publication(write: Writer, method: str) -> None:
    folder = write(method=method, data="MyParts", categories={"bolt": metrics(0.9)}, **PROTOCOL)
    table = compared("musc", folder)
    [text] = [note.text for note in table.legend if "matches no row" in note.text]
    assert f"no row has {method}" in text


def test_demo_weights_have_layers_of_their_own(write: Writer) -> None:
    folder = write(
        method="MuSc", weights="demo", **{**PROTOCOL, "layers": [2, 4, 6, 8], "image_size": 160}
    )
    ours = lines_of(compared("musc", folder), "MuSc, MVTec-AD")[1]
    assert ours.cells[2] == "88.00\ndemo,\ntransductive"


def test_a_run_of_an_earlier_version_is_not_marked(write: Writer) -> None:
    table = compare_runs(find_runs([write(categories={"a": metrics(0.9)}, data="Demo")])).table
    assert not any(note.loud for note in table.notes)
