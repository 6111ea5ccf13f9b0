"""Report table as text, Markdown and HTML."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_helpers import Writer, metrics, report, rows_of, run_writer

from anomaly_clip.reporting.table import ReportTable, TableLine, TableNote


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


class Cells(HTMLParser):
    """Parser that collects the cell texts and all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = tag == "td"
        if self.inside:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def test_markup_in_names_is_shown_literally_in_every_format(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[bold]x[/bold] <script>alert(1)</script> a|b *c* `d`\x1b[31m"
    folder = write("[red]run[/red] <b>", {name: metrics(0.9)}, data="Demo")
    files = {form: tmp_path / f"a.{form}" for form in ("csv", "markdown", "html")}
    words = [word for form, file in files.items() for word in (f"--{form}", file)]
    assert report(folder, *words) == 0
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in "".join(out.split())
    assert "[red]run[/red] <b>" in out
    assert "\x1b[31m" not in out
    shown = name.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert rows_of(files["csv"])[0]["category"] == shown
    page = files["html"].read_text(encoding="utf-8")
    parsed = Cells()
    parsed.feed(page)
    assert parsed.cells[0] == shown
    assert not {"script", "b"} & parsed.tags
    markdown = files["markdown"].read_text(encoding="utf-8")
    line = next(line for line in markdown.splitlines() if "alert" in line)
    assert line.startswith(
        r"| \[bold\]x\[/bold\] &lt;script&gt;alert(1)&lt;/script&gt; a\|b \*c\* \`d\`"
    )
    assert line.replace(r"\|", "").count("|") == 6
    assert "<b>" not in markdown


def test_the_page_is_self_contained_and_has_two_themes(write: Writer, tmp_path: Path) -> None:
    assert report(write(), "--table", "tab1", "--html", tmp_path / "t.html") == 0
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "color-scheme: light dark" in page
    assert "width=device-width" in page
    assert "http" not in page
    parsed = Cells()
    parsed.feed(page)
    assert parsed.cells[:5] == ["PaDiM, ImageNet", "published", "96.40 [1]", "87.63", "90.55"]
    assert "-2.55" in parsed.cells


def test_files_have_thousands_of_categories_and_the_screen_few(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {f"kind {n:04d}": metrics(1 - n / 4000) for n in range(3000)}
    folder = write(categories=many, data="Demo")
    files = {form: tmp_path / f"a.{form}" for form in ("csv", "markdown", "html")}
    assert report(folder, *[w for form, file in files.items() for w in (f"--{form}", file)]) == 0
    out = capsys.readouterr().out
    assert "the 40 of 3000 categories with the lowest image AUROC" in out
    assert len(out.splitlines()) < 60
    assert "kind 2999" in out
    assert "kind 0000" not in out
    assert "mean" in out
    assert len(rows_of(files["csv"])) == 3001
    assert files["markdown"].read_text().count("| kind ") == 3000
    assert files["html"].read_text().count('<td class="name">kind ') == 3000


TABLE = ReportTable(
    title="A title",
    notes=[TableNote("read this", loud=True)],
    headings=["method", "", "image\nAUROC", "pixel\nAP"],
    lines=[
        TableLine(("PaDiM", "published", "96.4", "40.0"), "published", first=True),
        TableLine(("", "ours", "92.0\n±1.5", ""), "ours"),
        TableLine(("", "difference", "-4.4", "–"), "difference"),
    ],
    legend=[TableNote("a remark")],
    num_names=2,
)


def test_markdown_by_hand() -> None:
    assert TABLE.markdown() == (
        "# A title\n\n**read this**\n\n"
        "| method |  | image AUROC | pixel AP |\n| --- | --- | ---: | ---: |\n"
        "| PaDiM | published | 96.4 | 40.0 |\n"
        "|  | **ours** | **92.0 ±1.5** |  |\n"
        "|  | difference | -4.4 | – |\n\n"
        "- a remark\n"
    )


def test_a_terminal_shows_the_columns_that_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    replace(TABLE, printed=[0, 1, 3]).print()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["A", "title"] in lines
    assert ["PaDiM", "published", "40.0"] in lines
    assert not any("96.4" in line for line in lines)
    assert lines[-1] == ["a", "remark"]


@pytest.mark.parametrize("count", [40, 41])
def test_only_the_lowest_of_many_categories_are_printed(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        TableLine((f"c{n}", f"{n}"), "category", rank=None if n == 7 else n / 100)
        for n in range(count)
    ]
    mean = TableLine(("mean", "0.5"), "mean")
    table = ReportTable("t", [], ["category", "x"], [*lines, mean], [], ranked_by="x")
    table.print()
    out = capsys.readouterr().out.split()
    assert ("c7" in out) == (count == 40)  # undefined values rank last
    assert sum(word.startswith("c") and word[1:].isdecimal() for word in out) == 40
    assert "mean" in out
