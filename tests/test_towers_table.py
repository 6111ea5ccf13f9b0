"""The table of methods and backbones: the page states what the code does."""

from __future__ import annotations

import re

import pytest
import torch
import towers_table as table

from anomaly_clip import methods
from anomaly_clip.methods import AnomalyMethod

SMALL = ("ViT", "CLIP", "SigLIP", "PE-Core", "MobileCLIP-S")
"""Backbones that are built within milliseconds."""
KINDS = (
    *("ResNet", "other CNN", "ViT", "no class token", "DINOv2", "DINOv3"),
    *("CLIP", "SigLIP", "MobileCLIP-B", "PE-Core", "MobileCLIP-S"),
)
ROWS = [table.PLAIN, *(name for name in methods.__all__ if name != "AnomalyMethod")]


@pytest.fixture(scope="module")
def text() -> str:
    return table.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cells(text: str) -> dict[tuple[str, str], str]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header = next(line for line in lines if line[-1] == "MobileCLIP-S")
    kinds = header[-len(KINDS) :]
    return {
        (line[0].strip("`"), kind): cell
        for line in lines
        if len(line) == len(kinds) + 1
        for kind, cell in zip(kinds, line[1:], strict=True)
    }


@pytest.fixture(scope="module")
def notes(text: str) -> dict[int, str]:
    listed = text.partition(table.START)[2].partition(table.END)[0]
    return {int(n): note for n, note in re.findall(r"^(\d+)\. (.+)$", listed, re.MULTILINE)}


def check_cell(row: str, kind: str, cell: str, notes: dict[int, str]) -> None:
    """Compare a cell of the page with the outcome of building the method with the backbone."""
    outcome = table.build(row, kind)
    mark, _, number = cell.partition(" ")
    assert mark == ("yes" if outcome.runs else "no")
    note = notes[int(number.strip("()"))].replace("\\", "") if number else ""
    assert note == outcome.message


def test_all_methods_and_kinds_are_in_the_table(cells: dict[tuple[str, str], str]) -> None:
    assert set(cells) == {(row, kind) for row in ROWS for kind in KINDS}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("row", ROWS)
def test_small_backbones(
    row: str, kind: str, cells: dict[tuple[str, str], str], notes: dict[int, str]
) -> None:
    check_cell(row, kind, cells[row, kind], notes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SMALL])
def test_all_other_backbones(
    kind: str, cells: dict[tuple[str, str], str], notes: dict[int, str]
) -> None:
    for row in ROWS:
        check_cell(row, kind, cells[row, kind], notes)


@pytest.mark.slow
def test_the_page_is_renewed(text: str) -> None:
    assert table.page(text) == text
    head, _, rest = text.partition(table.START)
    end = rest.partition(table.END)[2]
    assert table.page(f"{head}{table.START}{end}") == text  # without the second mark


def test_notes_are_used_and_name_a_way_out(
    cells: dict[tuple[str, str], str], notes: dict[int, str]
) -> None:
    used = {int(n) for cell in cells.values() for n in re.findall(r"\d+", cell)}
    assert used == set(notes) == set(range(1, len(notes) + 1))
    for note in notes.values():
        assert not re.search(r"[a-z)]\. ", note)  # one sentence
        assert re.search(r"[:;] (give|choose|use|its layers)|such as resnet18", note), note


NEARLY_EQUAL = "BatchedAnomalyDINO", "MobileCLIP-S"
"""A pair whose maps may be 0: with random weights, the few patches of a FastViT nearly agree."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_what_runs_is_fitted_and_tested(row: str, kind: str) -> None:
    if not table.build(row, kind).runs:
        pytest.skip("refused, see the table")
    subject = table.subject(row, kind)
    if not issubclass(subject.kind, AnomalyMethod):
        assert subject.fitted.is_dir()
        return
    scores = subject.scorer.score()
    assert torch.isfinite(scores["image_score"]).all()
    size = subject.scorer.images.shape[-2:]
    assert scores["anomaly_map"].shape[-2:] == size
    if (row, kind) != NEARLY_EQUAL:
        assert scores["anomaly_map"].std() > 0
