"""Features as a picture: t-SNE to two dimensions, colours for classes, shapes for states.

It is the figure with which TAB's paper shows that a backbone keeps normal and defective images
apart, with numbers beside it that do not depend on how a picture happens to be laid out.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from anomaly_clip.files import atomic_path, write_csv

__all__ = ["LEAST", "PAPER", "Embedding", "Layout", "embed", "write_embeddings"]

Points = NDArray[np.float64]

LEAST = 4
"""So many features are needed."""
SIDE = 480  # pixels of a panel
OVERSAMPLED = 2  # drawn so much larger first, then made smaller, for smooth edges
LINE = 18
INK = (30, 30, 30)
NORMAL, DEFECTIVE = (40, 150, 60), (210, 40, 40)  # of a single class
LEGEND = 12  # classes that are named at most


@dataclass(frozen=True)
class Layout:
    """How t-SNE lays features out.

    Args:
        perplexity: How many neighbours count; a third of the rows at most.
        learning_rate: Of the layout; null: by their number.
        angle: How coarsely far points are taken together.
        init: Where points start.
        iterations: How many steps at most.
        unit: Whether features are brought to length 1 first.
    """

    perplexity: float = 30.0
    learning_rate: float | None = None
    angle: float = 0.5
    init: Literal["pca", "random"] = "pca"
    iterations: int = 1000
    unit: bool = True


PAPER = Layout(10.0, 100.0, 0.3, "random", 20_000, unit=False)
"""That of Figure 5 (section 7 of the specification of the detectors)."""


@dataclass(frozen=True)
class Embedding:
    """Features of one backbone in two dimensions, and how far apart they are in all."""

    name: str
    points: Points
    """``(n, 2)``."""
    classes: list[str]
    defective: NDArray[np.bool_]
    """``(n,)``."""
    silhouettes: dict[str, float | None]
    """In [-1, 1], higher = further apart: of the ``classes``; and of the ``states``, normal and
    defective, the mean over classes. None where there is one group only."""


def embed(
    name: str,
    features: NDArray[np.floating],
    classes: Sequence[str],
    defective: Sequence[bool],
    seed: int = 0,
    layout: Layout = Layout(),
) -> Embedding:
    """Bring features to two dimensions (t-SNE), and measure how far groups are apart (cosine).

    Args:
        name: Of the backbone.
        features: ``(n, C)``, four rows or more.
        classes: What each row shows.
        defective: Whether it is defective.
        seed: Draws the layout.
        layout: How it is made; silhouettes do not depend on it.

    Raises:
        ValueError: If there are too few rows.
    """
    from sklearn.manifold import TSNE  # takes most of a second to import

    rows = np.asarray(features, dtype=np.float64)
    if len(rows) < LEAST:
        raise ValueError(
            f"t-SNE of {name}: {len(rows)} features are too few, {LEAST} or more are needed"
        )
    if layout.unit:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    points = TSNE(
        perplexity=min(layout.perplexity, (len(rows) - 1) / 3),
        learning_rate="auto" if layout.learning_rate is None else layout.learning_rate,
        angle=layout.angle,
        init=layout.init,
        max_iter=layout.iterations,
        random_state=seed,
    ).fit_transform(rows)
    states = np.asarray(defective, dtype=bool)
    names = np.asarray(classes)
    by_class = [_silhouette(rows[names == one], states[names == one]) for one in np.unique(names)]
    known = [value for value in by_class if value is not None]
    silhouettes = {
        "classes": _silhouette(rows, names),
        "states": float(np.mean(known)) if known else None,
    }
    return Embedding(name, points.astype(np.float64), list(classes), states, silhouettes)


def _silhouette(rows: Points, groups: NDArray[np.generic]) -> float | None:
    from sklearn.metrics import silhouette_score

    count = len(np.unique(groups))
    if not 1 < count < len(rows):
        return None
    return float(silhouette_score(rows, groups, metric="cosine"))


def write_embeddings(folder: Path, embeddings: Sequence[Embedding], stem: str = "features") -> Path:
    """Draw embeddings side by side as ``<stem>.png``, and write their points as ``<stem>.csv``.

    Returns:
        The picture.
    """
    rows = (
        [one.name, float(x), float(y), own, "defective" if defective else "normal"]
        for one in embeddings
        for (x, y), own, defective in zip(one.points, one.classes, one.defective, strict=True)
    )
    write_csv(folder / f"{stem}.csv", ["backbone", "x", "y", "class", "state"], rows)
    names = sorted({own for one in embeddings for own in one.classes})
    panels = [_panel(one, names) for one in embeddings]
    legend = _legend(names)
    width = sum(panel.width for panel in panels)
    sheet = Image.new("RGB", (width, panels[0].height + legend.height), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * panel.width, 0))
    sheet.paste(legend, (0, panels[0].height))
    with atomic_path(folder / f"{stem}.png") as temporary:
        sheet.save(temporary)
    return folder / f"{stem}.png"


def _colour(number: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number / count, 0.75, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(one: Embedding, names: Sequence[str]) -> Image.Image:
    """Draw the points: a disc for normal, a cross for defective."""
    side = SIDE * OVERSAMPLED
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    low, high = one.points.min(axis=0), one.points.max(axis=0)
    margin = 0.04
    scaled = (one.points - low) / np.where(high > low, high - low, 1.0)
    places = (margin + (1 - 2 * margin) * scaled) * side
    size = 4 * OVERSAMPLED
    for (x, y), own, defective in zip(places, one.classes, one.defective, strict=True):
        colour = _colour(names.index(own), len(names))
        if len(names) == 1:
            colour = DEFECTIVE if defective else NORMAL
        if defective:
            for slope in (1, -1):
                ends = ((x - size, y - slope * size), (x + size, y + slope * size))
                draw.line(ends, fill=colour, width=OVERSAMPLED * 2)
        else:
            draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    panel = Image.new("RGB", (SIDE, SIDE + 2 * LINE), "white")
    panel.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (0, 2 * LINE))
    found = ", ".join(
        f"{what} {value:.3f}" for what, value in one.silhouettes.items() if value is not None
    )
    font = ImageFont.load_default(LINE - 4)
    words = ImageDraw.Draw(panel)
    words.text((4, 0), one.name, INK, font)
    words.text((4, LINE), f"silhouette: {found or 'of one group there is none'}", INK, font)
    words.rectangle((0, 0, SIDE - 1, SIDE + 2 * LINE - 1), outline=(220, 220, 220))
    return panel


def _legend(names: Sequence[str]) -> Image.Image:
    shown = names[:LEGEND]
    more = [f"and {len(names) - LEGEND} more"] if len(names) > LEGEND else []
    lines = ["disc: normal, cross: defective", *shown, *more]
    legend = Image.new("RGB", (SIDE, LINE * len(lines) + 4), "white")
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(LINE - 4)
    for number, text in enumerate(lines):
        top = number * LINE
        if 0 < number <= len(shown) and len(names) > 1:
            colour = _colour(names.index(text), len(names))
            draw.ellipse((4, top + 4, 4 + LINE - 8, top + LINE - 4), fill=colour)
            draw.text((LINE + 4, top), text, INK, font)
        else:
            draw.text((4, top), text, INK, font)
    return legend
