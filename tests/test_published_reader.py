"""Reader of published metrics: wrong entries are named."""

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
    ("old", "new", "sentence"),
    [
        (
            FIRST,
            "values: [96.40, 87.63]",
            r"row 1 \(PaDiM, ImageNet\): 2 values, but the table has 3",
        ),
        (FIRST, "values: [964.0, 87.63, 90.55]", "tab1: row 1 .*964.0 is outside 0 to 100"),
        (FIRST, "values: [x, 87.63, 90.55]", "tab1: row 1 .*x is neither a number"),
        (FIRST, "values: [null, null, null]", "tab1: row 1 .*has no figure"),
        ("columns: [accuracy,", "columns: [accuracies,", "tab3: unknown figure accuracies"),
        ("run: padim-imagenet, values", "run: padim, values", "row 1 .*unknown run padim "),
        ("data: BTAD, run: padim_btad", "run: padim_btad", "row 7 .* is on BTAD, the row on KSDD2"),
        ("    source: tab\n", "    source: tub\n", "tab1: unknown source tub"),
        ("    where: Table 1\n", "", "tab1: where is missing"),
        ("    where: Table 1\n", "    where: x\n    were: x\n", "tab1: unknown key were"),
        ("  tab2:\n", "  tab1:\n", "tab1 stands there twice"),
        ("[openai]", "[openai, imagenet]", "no table has the run clip_ada-imagenet"),
        ("image_size: 224, each", "image_sise: 224, each", "padim: unknown condition image_sise"),
        ("of: bottle", "of: bottles", "unknown group or category bottles"),
        ("tables:\n", "tables: 3\nx:\n", "published.yaml: unknown key x"),
        ("sources:", "sources: [", "published.yaml: "),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_published(changed(tmp_path, old, new))


def test_it_comes_with_the_package() -> None:
    assert read_published(PACKAGED) == load_published()
    tables: list[PublishedTable] = list(load_published().tables.values())
    assert sum(len(table) for table in tables) == 836
