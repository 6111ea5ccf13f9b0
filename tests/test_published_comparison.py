"""Comparison of runs with a published table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import save_picture
from report_helpers import MVTEC, Writer, compared, lines_of, metrics, report, rows_of, run_writer

import anomaly_clip.reporting
from anomaly_clip.cli import main
from anomaly_clip.reporting.comparison import compare_runs
from anomaly_clip.reporting.published_comparison import compare_with_published
from anomaly_clip.reporting.published_reader import FILE, load_published, read_published
from anomaly_clip.results.run_reader import find_runs

PACKAGED = Path(anomaly_clip.reporting.__path__[0]) / FILE


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def test_our_values_and_differences_are_below_the_published_ones(write: Writer) -> None:
    publication, ours, difference = lines_of(compared("tab1", write()), "PaDiM, ImageNet")
    assert publication.cells[1:] == ("published", "96.40 [1]", "87.63", "90.55")
    # The mean of five times 0.92 and ten times 0.86 is 0.88.
    assert ours.cells[1:] == ("ours", "92.00", "86.00", "88.00")
    assert difference.cells[2:] == ("-4.40", "-1.63", "-2.55")


def test_draws_of_one_experiment_are_averaged(write: Writer, tmp_path: Path) -> None:
    folders = [
        write(f"sample {seed}", {c: metrics(level) for c in MVTEC}, data_seed=seed)
        for seed, level in enumerate((0.80, 0.86, 0.92))
    ]
    lines = lines_of(compared("tab1", *folders), "PaDiM, ImageNet")
    mean, difference = lines[-2:]
    deviation = 100 * np.std([0.80, 0.86, 0.92], ddof=1)
    assert mean.cells[1:] == ("mean of 3", *[f"86.00\n±{deviation:.2f}"] * 3)
    assert difference.cells[4] == "-4.55"
    assert report(*folders, "--table", "tab1", "--csv", tmp_path / "t.csv") == 0
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["our_deviation"]]
    assert {round(float(row["our_deviation"]), 4) for row in rows} == {round(deviation / 100, 4)}
    assert rows[0]["run"].count("sample") == 3


@pytest.mark.parametrize(("other", "averaged"), [(7, True), (8, False)])
def test_runs_with_other_settings_are_not_averaged(
    write: Writer, other: int, averaged: bool
) -> None:
    folders = []
    for seed, dimensions in enumerate((7, other)):
        folder = write(f"run {seed}", data_seed=seed)
        options = {"seed": seed, "dimensions": dimensions}
        config = {"model": {"init_args": options}, "data": {"init_args": {"seed": seed}}}
        (folder / "config-test.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        folders.append(folder)
    lines = lines_of(compared("tab1", *folders), "PaDiM, ImageNet")
    assert any(line.cells[1] == "mean of 2" for line in lines) == averaged


def test_runs_with_the_same_seed_or_missing_metrics_have_no_mean(write: Writer) -> None:
    twice = [write(f"again {number}", data_seed=0) for number in range(2)]
    lines = lines_of(compared("tab1", *twice), "PaDiM, ImageNet")
    assert not any(line.cells[1].startswith("mean") for line in lines)
    part = write("part", {c: metrics(0.9) for c in MVTEC[:14]}, data_seed=1)
    mean, difference = lines_of(compared("tab1", twice[0], part), "PaDiM, ImageNet")[-2:]
    assert mean.cells[1] == "mean of 2"
    assert mean.cells[4] == "1 of 2\nruns"
    assert difference.cells[4] == "–"


def test_rows_without_a_run_are_labelled(write: Writer) -> None:
    table = compared("tab1", write())
    assert lines_of(table, "PaDiM, TAB")[1].cells[1:] == ("ours", *["not run"] * 3)
    text = compared("clip_ada_mvtec").legend[0].text
    assert text == "For reference only: no run of this project corresponds to a row."


@pytest.mark.parametrize(
    ("weights", "label", "warning"),
    [("random", "random", "RANDOM WEIGHTS"), ("demo", "demo", "demo weights, trained on")],
)
def test_metrics_of_random_and_demo_weights_are_labelled_and_not_compared(
    write: Writer, weights: str, label: str, warning: str, tmp_path: Path
) -> None:
    folder = write(weights=weights, backbone="demo", image_size=64)
    table = compared("tab1", folder)
    _, ours, difference = lines_of(table, "PaDiM, ImageNet")
    assert ours.cells[2:] == tuple(f"{v}\n{label}" for v in ("92.00", "86.00", "88.00"))
    assert difference.cells[2:] == ("–", "–", "–")
    assert any(note.loud and warning in note.text for note in table.notes)
    assert report(folder, "--table", "tab1", "--csv", tmp_path / "a.csv") == 0
    ours_rows = [row for row in rows_of(tmp_path / "a.csv") if row["run"]]
    assert ours_rows
    assert all(warning in row["note"] and row["difference"] == "" for row in ours_rows)
    alone = compare_runs(find_runs([folder])).table
    assert any(warning in note.text and note.loud for note in alone.notes)


def test_a_mean_of_fewer_categories_is_refused(write: Writer) -> None:
    some = {c: metrics(0.9) for c in MVTEC if c != "bottle"}
    folder = write(categories=some)
    _, ours, difference = lines_of(compared("tab1", folder), "PaDiM, ImageNet")
    assert ours.cells[2:] == ("90.00", "9 of 10\ncategories", "14 of 15\ncategories")
    assert difference.cells[2:] == ("-6.40", "–", "–")
    alone = compare_runs(find_runs([folder])).table.lines[-1]
    assert alone.cells[:2] == ("mean", "incomplete\n(14 of 15)")


def test_partial_runs_and_training_on_test_images_are_labelled(write: Writer) -> None:
    for label, protocol in (("partial", {"complete": False}), ("overlap", {"overlap": 3})):
        table = compared("tab1", write(label, **protocol))
        _, ours, difference = lines_of(table, "PaDiM, ImageNet")
        assert ours.cells[4] == f"88.00\n{label}"
        assert difference.cells[4] == "–"


def test_an_epoch_selected_on_test_images_is_labelled_and_compared(write: Writer) -> None:
    folder = write(method="SimpleNet", image_size=288, select="best_test")
    table = compared("tab1", folder)
    _, ours, difference = lines_of(table, "SimpleNet, ImageNet")
    assert (ours.cells[4], difference.cells[4]) == ("88.00\nbest_test", "-8.60")
    assert any("EPOCH SELECTED ON THE TEST IMAGES" in note.text for note in table.notes)


def test_a_run_of_one_category_fills_only_its_row(write: Writer) -> None:
    folder = write(categories={"screw": metrics(0.75)}, one_model_a_category=False)
    table = compared("padim_categories", folder)
    assert lines_of(table, "PaDiM, screw")[2].cells[2] == "+0.5"
    assert lines_of(table, "PaDiM, bottle")[1].cells[2] == "not run"
    assert lines_of(table, "PaDiM, textures")[1].cells[2] == "not run"
    assert table.lines[-2].cells[2] == "1 of 15\ncategories"


def test_other_images_in_the_layout_of_a_data_set_are_not_that_data_set(write: Writer) -> None:
    table = compared("tab1", write(categories={"mug": metrics(0.9)}))
    assert lines_of(table, "PaDiM, ImageNet")[1].cells[4] == "other\ncategories"


def test_fractions_are_compared_as_percent(write: Writer) -> None:
    values = {"accuracy": 0.225, "precision": 0.34, "recall": 0.28, "f1": 0.25}
    protocol = {"data": "MixedWM38", "frozen": True, "targets": "single"}
    folder = write(method="LinearProbe", categories={"wafer map": values}, **protocol)
    publication, ours, difference = lines_of(compared("tab3", folder), "frozen, ImageNet")
    assert publication.cells[2] == "22"
    assert (ours.cells[2], difference.cells[2]) == ("22.5", "+0.5")


def test_several_runs_of_a_row_are_listed_below_each_other(write: Writer) -> None:
    table = compared("tab1", write("a"), write("b"))
    assert [line.cells[1] for line in lines_of(table, "PaDiM, ImageNet")] == [
        "published",
        "ours A",
        "difference",
        "ours B",
        "difference",
    ]


def test_all_values_of_a_cell_are_shown_and_compared(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PACKAGED.read_text(encoding="utf-8")
    old, new = "values: [96.40, 87.63, 90.55]", "values: [96.40, 87.63, {87.5: tab, 88.25: nsa}]"
    file = tmp_path / PACKAGED.name
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    source = read_published(file)
    runs = find_runs([write()])
    comparison = compare_with_published(source.tables["tab1"], runs, source)
    publication, _, difference = lines_of(comparison.table, "PaDiM, ImageNet")
    assert publication.cells[4] == "87.50 / 88.25 [2]"
    assert difference.cells[4] == "+0.50 / -0.25"
    assert comparison.table.legend[1].text == (
        "[2] sources disagree: 87.50: TAB: Text-Align Anomaly Backbone (arXiv 2312.09480); "
        "88.25: NSA (arXiv 2109.15222)"
    )
    rows = [dict(zip(comparison.data.header, row, strict=True)) for row in comparison.data.rows]
    first, second = (r for r in rows if r["method"] == "PaDiM, ImageNet" and r["of"] == "all")
    assert (first["published"], second["published"]) == (0.875, 0.8825)
    assert (first["difference"], second["difference"]) == (
        pytest.approx(0.005),
        pytest.approx(-0.0025),
    )
    assert str(first["source"]).startswith("TAB")
    assert str(second["source"]).startswith("NSA")
    assert first["doubt"] == second["doubt"] == "sources disagree"
    # Without a run, both values are in the file as well.
    alone = compare_with_published(source.tables["tab1"], [], source).data.rows
    assert [row[5] for row in alone[2:4]] == [0.875, 0.8825]


@pytest.mark.parametrize("option", ["markdown", "html"])
def test_files_hold_all_values_of_a_cell(tmp_path: Path, option: str) -> None:
    file = tmp_path / "table"
    assert report("--table", "clip_ad_mvtec", f"--{option}", file) == 0
    text = file.read_text(encoding="utf-8")
    assert "91.5 / 91.6 / 91.9" in text
    assert "91.9: listed by others, source not named" in text


def test_rows_on_other_data_sets_say_so() -> None:
    table = compared("clip_ad_again_other")
    (line,) = lines_of(table, "CLIP-AD, BrainMRI with masks")
    number = line.cells[0][-4:].strip()
    (note,) = (note.text for note in table.legend if note.text.startswith(number))
    assert "it has masks: another data set than BrainMRI of this project" in note


@pytest.mark.slow
def test_a_real_run_of_random_weights(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for category in ("bottle", "metal_nut"):
        array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        save_picture(mvtec_root / category / "train" / "good" / "100.png", array)
    folder = tmp_path / "run"
    words = ["--model", "PaDiM", "--model.image_size", "32", "--model.num_channels", "8"]
    words += ["--model.backbone.weights", "random", "--data", "MVTecAD", "--data.root"]
    words += [str(mvtec_root), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["each", *words, "--output.folder", str(folder)]) == 0
    capsys.readouterr()
    content = json.loads((folder / "metrics.json").read_text())["categories"]
    table = compared("padim_categories", folder)
    _, ours, difference = lines_of(table, "PaDiM, bottle")
    value = content["bottle"]["image_auroc"]
    assert ours.cells[2] == f"{100 * value:.1f}\nrandom"
    assert difference.cells[2] == "–"
    assert report(folder) == 0
    out = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in out
    assert "(2 of 15)" in out


def test_machine_readable_rows_are_fractions(write: Writer) -> None:
    source = load_published()
    run = write(weights="random")
    comparison = compare_with_published(source.tables["tab1"], find_runs([run]), source)
    rows = [dict(zip(comparison.data.header, row, strict=True)) for row in comparison.data.rows]
    ours = [row for row in rows if row["run"] and row["method"] == "PaDiM, ImageNet"]
    assert [row["ours"] for row in ours] == pytest.approx([0.92, 0.86, 0.88])
    assert [row["published"] for row in ours] == pytest.approx([0.9640, 0.8763, 0.9055])
    assert all(row["difference"] is None and "RANDOM WEIGHTS" in str(row["note"]) for row in ours)
    missing = [row for row in rows if row["method"] == "RD4AD, ImageNet"]
    assert {row["note"] for row in missing} == {"not run"}
