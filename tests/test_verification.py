"""Comparison of a run with its repetition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report_helpers import metrics, run_writer

from anomaly_clip.reporting.verification import Repetition, verification_report
from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.run_reader import read_run


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    return read_run(run_writer(tmp_path)(categories={"bottle": metrics(0.9), "cap": metrics(0.5)}))


def verified(run: FinishedRun, again: FinishedRun, tolerance: float = 1e-9) -> tuple[str, bool]:
    comparison, differs = verification_report([Repetition(run, again)], tolerance)
    assert any(row[-1] == "no" for row in comparison.data.rows) == differs
    return comparison.table.notes[0].text.partition(": ")[2], differs


def test_equal_runs(run: FinishedRun) -> None:
    assert verified(run, run) == (
        "all 8 metrics are equal (largest difference 0, allowed 1e-09)",
        False,
    )


@pytest.mark.parametrize(
    ("value", "tolerance", "differs"),
    [(0.9 + 2e-9, 1e-9, True), (0.9 + 5e-10, 1e-9, False), (0.8, 0.2, False), (None, 1.0, True)],
)
def test_values_are_equal_within_the_tolerance(
    run: FinishedRun, value: float | None, tolerance: float, differs: bool
) -> None:
    changed = {**run.categories, "bottle": {**run.categories["bottle"], "image_auroc": value}}
    again = replace(run, categories=changed)
    assert verified(run, again, tolerance)[1] == differs
    assert verified(again, run, tolerance)[1] == differs


def test_missing_categories_and_metrics_differ(run: FinishedRun) -> None:
    fewer = replace(run, categories={"bottle": run.categories["bottle"]})
    assert verified(run, fewer)[0].startswith("4 of 8 metrics DIFFER")
    assert verified(fewer, run)[0].startswith("4 of 8 metrics DIFFER")
    some = {name: {"image_auroc": row["image_auroc"]} for name, row in run.categories.items()}
    # A metric that only the repetition has may be newer than the run.
    assert verified(run, replace(run, categories=some))[1]
    assert not verified(replace(run, categories=some), run)[1]


def test_means_are_compared_as_recorded(run: FinishedRun) -> None:
    first, second = (replace(run, means={"image_auroc": value}) for value in (0.7, 0.71))
    assert verified(first, second)[0].startswith("1 of 9 metrics DIFFER (largest difference 0.01")
    table = verification_report([Repetition(first, first)], 0)[0].table
    assert [line.cells[1:4] for line in table.lines] == [
        ("mean over the categories", "image AUROC", "0.700000000")
    ]


def test_what_has_changed_is_listed(run: FinishedRun) -> None:
    then = {"versions": {"torch": "1"}, "environment": {"device": "cuda", "checkpoint_sha256": "a"}}
    now = {"versions": {"torch": "2", "new": "1"}, "environment": {"device": "cpu"}}
    protocol = {**run.protocol, "images": {"bottle": 3}, "pixels": "by keys", "words": {"a": "b"}}
    first = replace(run, record=then, protocol=protocol)
    second = replace(run, record=now, protocol={**run.protocol, "images": {"bottle": 4}}, seed=1)
    notes = verification_report([Repetition(first, second)], 0)[0].table.notes
    assert [note.text for note in notes[1:]] == [
        "the run has no seed, so that random choices differ",
        "bottle (test images): 3 then, 4 now",
        "pixels: by keys then, not recorded now",
        "torch: 1 then, 2 now",
        "device: cuda then, cpu now",
    ]


def test_several_runs_have_letters(run: FinishedRun) -> None:
    other = replace(run, folder=Path("other"), means={"f1": 0.5})
    comparison, differs = verification_report([Repetition(run, run), Repetition(other, run)], 0)
    assert differs
    assert [note.text[:3] for note in comparison.table.notes if note.loud] == ["B: "]
    assert {line.cells[0] for line in comparison.table.lines} == {"B"}
    assert {row[0] for row in comparison.data.rows} == {run.label, "other"}
