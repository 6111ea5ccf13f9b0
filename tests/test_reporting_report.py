"""``anomaly_clip.report``: the tables of the command, from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_helpers import Writer, metrics, report, rows_of, run_writer
from run_folder import TWO, make_run

import anomaly_clip


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / name, TWO) for name in ("a", "b")]


def test_the_text_is_that_of_the_command(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(*runs) == 0
    printed = capsys.readouterr().out
    table = anomaly_clip.report(*runs)
    assert str(table) == printed.rstrip("\n") == repr(anomaly_clip.report(runs))
    assert capsys.readouterr().out == ""


def test_the_files_are_those_of_the_command(runs: list[Path], tmp_path: Path) -> None:
    names = {"csv": "t.csv", "markdown": "t.md", "html": "t.html"}
    words = [part for kind, name in names.items() for part in (f"--{kind}", tmp_path / name)]
    assert report(*runs, *words) == 0
    expected = {name: (tmp_path / name).read_bytes() for name in names.values()}
    given = {kind: str(tmp_path / f"2{name}") for kind, name in names.items()}
    table = anomaly_clip.report(str(runs[0]), runs[1], **given)  # type: ignore[arg-type]
    for name, content in expected.items():
        assert (tmp_path / f"2{name}").read_bytes() == content
        assert table.save(tmp_path / f"3{name}").read_bytes() == content


def test_rows_are_those_of_the_csv_file(runs: list[Path], tmp_path: Path) -> None:
    table = anomaly_clip.report(*runs, csv=tmp_path / "t.csv")
    rows = table.rows
    assert [(row["category"], row["run"]) for row in rows] == [
        (category, str(run)) for category in ("cap", "nut", "mean") for run in (*runs, "B - A")
    ]
    assert rows[0]["image_auroc"] == 0.875
    assert rows[0]["pixel_pro"] is None
    assert len(table) == 9 == len(rows_of(tmp_path / "t.csv"))
    assert list(rows[0]) == table.columns


def test_a_notebook_shows_the_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", {"<b>": TWO["cap"], "nut": TWO["nut"]})
    shown = anomaly_clip.report(run)._repr_html_()
    assert shown.startswith("<div")
    assert "<html" not in shown
    assert "&lt;b&gt;" in shown
    assert shown.count("<tr") == 1 + 3


def test_published_tables_and_protocols(write: Writer, tmp_path: Path) -> None:
    run = write()
    table = anomaly_clip.report(run, table="tab1")
    assert any("difference" in cell for line in table.table.lines for cell in line.cells)
    assert anomaly_clip.report(table="tab1").rows
    assert "protocol" in str(anomaly_clip.report(run, protocol=True)).lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "report: give folders of runs, or the name of a published table"),
        ({"table": "tab99"}, "table=tab99: no such table"),
        ({"table": "tab1", "protocol": True}, "protocol shows no published table: leave out table"),
        ({"weights": {"tab": "a.pt"}}, "weights are only needed with a published table"),
        ({"table": "tab1", "weights": {"x": "a"}}, "weights=x=a: expected KIND=FILE"),
        ({"table": "tab1", "html": "."}, "html=. is a folder: name a file in it"),
        ({"table": "tab1", "csv": "/dev/null/a.csv"}, "csv=/dev/null/a.csv: cannot be written"),
    ],
)
def test_mistakes_are_value_errors_of_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        anomaly_clip.report(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_missing_run_and_an_unknown_format(write: Writer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder; name a run folder"):
        anomaly_clip.report(tmp_path / "none")
    table = anomaly_clip.report(write(categories={"nut": metrics(0.5)}))
    with pytest.raises(ValueError, match=r"t\.xlsx: expected a name that ends with \.csv, \.md"):
        table.save(tmp_path / "t.xlsx")
