"""Reader of published results, with error messages that name invalid entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_clip.reporting.published import PublishedTable
from anomaly_clip.reporting.published_reader import FILE, load_published, read_published

ROOT = Path(__file__).parent.parent


PACKAGED = ROOT / "anomaly_clip" / "reporting" / FILE


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = PACKAGED.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / FILE).write_text(text.replace(old, new, 1), encoding="utf-8")
    return tmp_path / FILE


FIRST = "values: [96.40, 87.63, 90.55]"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            FIRST,
            "values: [96.40, 87.63]",
            r"row 1 \(PaDiM, ImageNet\): expected one value per column \(3\), got 2",
        ),
        (FIRST, "values: [964.0, 87.63, 90.55]", "tab1: row 1 .*expected 0 to 100, got 964.0"),
        (
            FIRST,
            "values: [x, 87.63, 90.55]",
            r"tab1: row 1 .*expected a number, \[value, deviation\] or \{value: source\}, got x",
        ),
        (
            FIRST,
            "values: [null, null, null]",
            r"tab1: row 1 .*expected a value, got \[None, None, None\]",
        ),
        (FIRST, "values: [{96.4: nsa, 99: tub}, 87.63, 90.55]", "row 1 .*unknown source tub"),
        (
            FIRST,
            "values: [{964: nsa}, 87.63, 90.55]",
            "row 1 .*expected 0 to 100, got {964: 'nsa'}",
        ),
        (
            FIRST,
            "values: [{x: nsa}, 87.63, 90.55]",
            "row 1 .*expected a number, .*got {'x': 'nsa'}",
        ),
        (FIRST, "values: [{}, 87.63, 90.55]", "row 1 .*expected {value: source}, got {}"),
        (FIRST, "values: [{96.4: []}, 87.63, 90.55]", "row 1 .*expected a source of each value"),
        (FIRST, "values: [{96.4: nsa, 96.4: tab}, 87.63, 90.55]", "duplicate name 96.4"),
        (FIRST, f"data: Kvasir, {FIRST}", "row 1 .*a run on Kvasir, but run .* is on MVTecAD"),
        ("data: Kvasir, values", "data: Kvasyr, values", "row 5 .*unknown data set Kvasyr"),
        (
            "data: BrainMRI_with_masks, values",
            "data: BrainMRI, values",
            "row 6 .*BrainMRI has no masks, so pixel_auroc is of another data set of this name",
        ),
        ("  Kvasir: not", "  HeadCT: not", "other_data: HeadCT: this project has a data set of"),
        ("columns: [accuracy,", "columns: [accuracies,", "tab3: unknown metric accuracies"),
        ("run: padim-imagenet, values", "run: padim, values", "row 1 .*unknown run padim "),
        (
            "data: BTAD, run: padim_btad",
            "run: padim_btad",
            "row 7 .*expected a run on KSDD2, .* is on BTAD",
        ),
        ("    source: tab\n", "    source: tub\n", "tab1: unknown source tub"),
        ("    where: Table 1\n", "", "tab1: where is missing"),
        ("    where: Table 1\n", "    where: x\n    were: x\n", "tab1: unknown key were"),
        ("  tab2:\n", "  tab1:\n", "duplicate name tab1"),
        ("[openai]", "[openai, imagenet]", "no row uses the run clip_ada-imagenet"),
        (
            "run: musc-openai, transductive: true,",
            "run: musc-openai,",
            r"\(MuSc .*: expected transductive True as for the run, got False",
        ),
        (
            "run: padim-imagenet, values",
            "run: padim-imagenet, transductive: true, values",
            "row 1 .*expected transductive False as for the run, got True",
        ),
        ("image_size: 224, each", "image_sise: 224, each", "padim: unknown condition image_sise"),
        ("of: bottle", "of: bottles", "unknown group or category bottles"),
        ("tables:\n", "tables: 3\nx:\n", "published.yaml: unknown key x"),
        ("sources:", "sources: [", "published.yaml: "),
    ],
)
def test_an_invalid_entry_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_published(changed(tmp_path, old, new))


def test_the_file_comes_with_the_package() -> None:
    assert read_published(PACKAGED) == load_published()
    tables: list[PublishedTable] = list(load_published().tables.values())
    assert sum(len(table) for table in tables) == 1507


def test_a_cell_has_one_value_per_source(tmp_path: Path) -> None:
    values = "values: [{96.5: [tab, nsa], 96.40: uniad}, 87.63, {90.6: nsa}]"
    first, second, third = (
        read_published(changed(tmp_path, FIRST, values)).tables["tab1"].rows[0].cells
    )
    assert first is not None
    assert first.values == (0.965, 0.964)
    assert [sourced.source for sourced in first.sources] == [
        "TAB: Text-Align Anomaly Backbone (arXiv 2312.09480) and NSA (arXiv 2109.15222)",
        "UniAD, results of its authors",
    ]
    assert second is not None
    assert (second.values, second.sources) == ((0.8763,), ())
    assert third is not None
    assert (third.values, third.sources[0].source) == ((0.906,), "NSA (arXiv 2109.15222)")
