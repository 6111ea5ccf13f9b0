"""The page of a run, ``report.html``: figures and pictures, for a browser without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader

from anomaly_clip.files import atomic_path
from anomaly_clip.metrics.evaluator import FIGURES, Results
from anomaly_clip.report.tables import percent

__all__ = ["PagePicture", "write_page"]


class PagePicture(NamedTuple):
    """One picture of a page."""

    category: str
    name: str
    file: str
    """Its path from the page, not quoted."""
    score: float
    anomalous: bool | None
    """None if it is not known."""


def write_page(
    path: Path,
    title: str,
    pictures: Sequence[PagePicture],
    *,
    notes: Sequence[str] = (),
    results: Results | None = None,
    has_masks: bool = False,
) -> None:
    """Write a page of pictures, category by category, the highest score first.

    Args:
        path: Where to; the pictures' files are relative to its folder.
        title: The heading.
        pictures: What is shown.
        notes: What a reader must know before the figures.
        results: Figures for a table above the pictures.
        has_masks: Whether the pictures show masks.
    """
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for picture in sorted(pictures, key=lambda picture: -picture.score):
        shown = {**picture._asdict(), "file": quote(picture.file), "score": f"{picture.score:.3g}"}
        by_category.setdefault(picture.category, []).append(shown)
    order = dict.fromkeys(picture.category for picture in pictures)
    rows = []
    if results is not None:
        figures = [*results["categories"].items(), ("mean", results["mean"])]
        rows = [(name, percent(values[figure] for figure in FIGURES)) for name, values in figures]
    environment = Environment(
        loader=PackageLoader("anomaly_clip", "report"), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        title=title,
        notes=notes,
        headings=[name.replace("_", " ") for name in FIGURES],
        rows=rows,
        categories=[(name, by_category[name]) for name in order],
        labelled=any(picture.anomalous is not None for picture in pictures),
        masks=has_masks,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
