"""Comparison of runs in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from report_helpers import MVTEC, Writer, compared, lines_of, metrics, report, rows_of, run_writer

from anomaly_clip.reporting.comparison import compare_runs
from anomaly_clip.reporting.option_differences import differing_options
from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.run_reader import find_runs


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def test_a_mean_over_a_failed_category_is_refused(write: Writer) -> None:
    some = {"a": metrics(0.9), "b": metrics(0.8)}
    folder = write(categories=some, failed={"c": "no image"}, data="Demo", complete=False)
    comparison = compare_runs(find_runs([folder]))
    assert [line.cells[1] for line in comparison.table.lines] == [
        "90.0",
        "80.0",
        "failed",
        "incomplete\n(2 of 3)",
    ]
    mean = comparison.data.rows[-1]
    assert mean[0] == "mean"
    assert mean[6] is None
    assert "image_auroc incomplete (2 of 3)" in str(mean[-1])


def test_categories_without_anomalous_images_have_dashes(write: Writer) -> None:
    undefined = {"a": metrics(None, None), "b": metrics(None, None)}
    table = compare_runs(find_runs([write(categories=undefined, data="Demo")])).table
    assert all(set(line.cells[1:]) == {"–"} for line in table.lines)
    partial = {"a": metrics(0.7), "b": metrics(None)}
    table = compare_runs(find_runs([write("partial", categories=partial, data="Demo")])).table
    assert table.lines[-1].cells[1] == "incomplete\n(1 of 2)"
    assert table.lines[-1].cells[3] == "50.0"
    published = compared("tab1", write("c", categories={c: metrics(None) for c in MVTEC}))
    assert lines_of(published, "PaDiM, ImageNet")[1].cells[2:] == ("–", "–", "–")


def test_runs_stand_side_by_side(
    write: Writer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    some = {"a": metrics(0.9, 0.8), "b": metrics(0.7, 0.6)}
    others = {"a": metrics(0.5), "b": metrics(0.5)}
    write("several/one", some, data="Demo")
    write("several/two", others, data="Demo", weights="random")
    assert report(tmp_path / "several", "--csv", tmp_path / "x" / "a.csv") == 0
    out = capsys.readouterr().out
    assert "PaDiM on Demo: 2 categories, percent" in out
    assert "B: RANDOM WEIGHTS: these metrics are meaningless" in out
    mean = next(line for line in out.splitlines() if line.strip().startswith("mean"))
    assert mean.split() == ["mean", "80.0", "50.0", "-30.0", "70.0", "50.0", "-20.0"]
    rows = rows_of(tmp_path / "x" / "a.csv")
    assert [(row["category"], row["image_auroc"]) for row in rows] == [
        ("a", "0.9"),
        ("a", "0.5"),
        ("a", "-0.4"),
        ("b", "0.7"),
        ("b", "0.5"),
        ("b", str(0.5 - 0.7)),
        ("mean", str((0.9 + 0.7) / 2)),
        ("mean", "0.5"),
        ("mean", str(0.5 - (0.9 + 0.7) / 2)),
    ]
    assert [row["run"] for row in rows[2::3]] == ["B - A"] * 3


def with_options(folder: Path, **options: Any) -> Path:
    """Write the configuration of a run: options of data, and others by name."""
    content = {
        "seed_everything": options.pop("seed", 0),
        "model": {"class_path": f"anomaly_clip.methods.{options.pop('model', 'PaDiM')}"},
        "data": {"class_path": "anomaly_clip.data.Demo", "init_args": options},
        "output": {"root": str(folder)},
        "trainer": {"logger": str(folder), "precision": "32-true"},
    }
    (folder / "config-test.yaml").write_text(yaml.safe_dump(content))
    return folder


def two_runs(write: Writer, first: dict[str, Any], second: dict[str, Any]) -> list[FinishedRun]:
    some = {"a": metrics(0.9, 0.8), "b": metrics(None, 0.6)}
    others = {"a": metrics(0.85, 0.9), "b": metrics(0.5, 0.6)}
    folders = [write("first", some, data="Demo"), write("second", others, data="Demo")]
    return find_runs([with_options(f, **o) for f, o in zip(folders, (first, second), strict=True)])


def test_two_runs_name_the_option_that_differs(write: Writer) -> None:
    first = {"resize": {"rule": "shorter_crop", "size": None}, "shots": None}
    second = {"resize": {"rule": "square", "size": None}, "shots": None}
    runs = two_runs(write, first, second)
    assert differing_options(runs) == [("data.resize.rule", ("shorter_crop", "square"))]
    comparison = compare_runs(runs)
    table = comparison.table
    assert table.notes[0].text == "data.resize.rule: A shorter_crop | B square"
    assert [heading.split("\n")[-1] for heading in table.headings[1:4]] == [
        "shorter_crop",
        "square",
        "B - A",
    ]
    assert [line.cells[3] for line in table.lines] == ["-5.0", "–", "–"]
    row = dict(zip(comparison.data.header, comparison.data.rows[0], strict=True))
    assert row["options"] == "data.resize.rule shorter_crop"
    for text in (table.text(), table.markdown(), table.html()):
        assert "shorter" in text
        assert "B - A" in text or "B \\- A" in text


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, []),
        ({"seed": 1}, {"seed": 2}, [("seed_everything", ("1", "2"))]),
        ({"shots": None}, {"shots": 4}, [("data.shots", ("null", "4"))]),
        ({"model": "PaDiM"}, {"model": "SDP"}, [("model", ("PaDiM", "SDP"))]),
        ({"new": 1}, {}, []),  # of another version
        ({"augment": [{"p": 1}]}, {"augment": []}, [("data.augment", ('[{"p": 1}]', "[]"))]),
        ({"words": {"a": "x"}}, {"words": {"a": "y"}}, [("data.words.a", ("x", "y"))]),
    ],
)
def test_options_that_differ(
    first: dict[str, Any], second: dict[str, Any], expected: list[object], write: Writer
) -> None:
    assert differing_options(two_runs(write, first, second)) == expected


def test_many_options_are_listed_above_the_table_only(write: Writer) -> None:
    first, second = ({f"o{n:02}": n + shift for n in range(15)} for shift in (0, 1))
    table = compare_runs(two_runs(write, first, second)).table
    assert table.notes[0].text == "data.o00: A 0 | B 1"
    assert table.notes[12].text == "other options that differ: data.o12, data.o13, data.o14"
    assert table.headings[1].endswith("\nA")


def test_three_runs_have_no_difference(write: Writer) -> None:
    runs = [write(name, {"a": metrics(0.5)}, data="Demo") for name in "abc"]
    for shots, folder in enumerate(runs):
        with_options(folder, shots=shots)
    table = compare_runs(find_runs(runs)).table
    assert table.notes[0].text == "data.shots: A 0 | B 1 | C 2"
    assert not any("B - A" in heading for heading in table.headings)


def test_without_configurations_nothing_differs(write: Writer) -> None:
    runs = [write(name, {"a": metrics(0.5)}, data="Demo") for name in "ab"]
    assert differing_options(find_runs(runs)) == []
    assert differing_options(find_runs(runs[:1])) == []
