"""Reader of published results, with error messages that name invalid entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_clip.report.published import PublishedTable
from anomaly_clip.report.published_reader import FILE, load_published, read_published

ROOT = Path(__file__).parent.parent


PACKAGED = ROOT / "anomaly_clip" / "report" / FILE


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
            r"tab1: row 1 .*expected a number or \[value, deviation\], got x",
        ),
        (
            FIRST,
            "values: [null, null, null]",
            r"tab1: row 1 .*expected a value, got \[None, None, None\]",
        ),
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
    assert sum(len(table) for table in tables) == 836
