from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from anomaly_clip.metrics.evaluator import FIGURES, Results
from anomaly_clip.report.page import PagePicture, write_page


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(str(dict(attrs)["src"]))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # all that is opened is closed, in order

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def read(path: Path) -> Seen:
    seen = Seen()
    seen.feed(path.read_text(encoding="utf-8"))
    assert seen.open == []
    return seen


PICTURES = [
    PagePicture("nut & bolt", "nut/good/1", "maps/nut/good/1.png", 0.1, False),
    PagePicture("nut & bolt", "nut/cut #2/<1>", "maps/nut/cut #2/1 %.png", 0.9, True),
    PagePicture("cap", "cap/good/7", "maps/cap/good/7.png", 0.5, False),
]


def test_pictures_are_sorted_by_score_and_named_safely(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, "SDP on <Demo>", PICTURES, notes=["a & b"], has_masks=True)
    seen = read(path)
    assert [unquote(source) for source in seen.images] == [
        "maps/nut/cut #2/1 %.png",
        "maps/nut/good/1.png",
        "maps/cap/good/7.png",
    ]
    assert "#" not in "".join(seen.images)
    assert seen.texts["h1"] == ["SDP on <Demo>"]
    assert seen.texts["h2"] == ["nut & bolt", "cap"]
    assert "a & b" in seen.texts["p"]
    assert "td" not in seen.texts
    text = path.read_text(encoding="utf-8")
    assert text.count('class="anomalous"') == 1
    assert "mask" in text


def test_the_table_shows_percent_and_dashes(tmp_path: Path) -> None:
    figures = dict.fromkeys(FIGURES, 0.5) | {"image_auroc": 0.875, "pixel_pro": None}
    results = Results(mean=figures, categories={"cap": figures})  # type: ignore[typeddict-item]
    path = tmp_path / "report.html"
    write_page(path, "t", PICTURES, results=results)
    cells = read(path).texts["td"]
    assert cells[:8] == ["cap", "87.5", "50.0", "50.0", "50.0", "50.0", "50.0", "–"]
    assert cells[8] == "mean"


def test_without_labels_nothing_is_framed(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, "t", [PagePicture("cap", "a", "maps/a.png", 0.5, None)])
    text = path.read_text(encoding="utf-8")
    assert "coloured frame" not in text
    assert 'class="anomalous"' not in text
