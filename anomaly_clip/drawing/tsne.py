"""t-SNE plot of features in two dimensions, with colours for classes and shapes for states.

Figure 5 of the TAB paper (arXiv 2312.09480) uses such a plot to show that a backbone separates
normal from defective images. The silhouettes above the plot do not depend on the layout.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from anomaly_clip.drawing.draw import INK, Colour, add_caption, font, grid, save_drawing
from anomaly_clip.files import atomic_path, printable, write_csv

__all__ = ["MIN_SAMPLES", "TAB_LAYOUT", "Embedding", "Layout", "tsne", "write_embeddings"]

Points = NDArray[np.float64]

MIN_SAMPLES = 4
"""Minimum number of features for a layout."""
SIDE = 480  # pixels of a panel
OVERSAMPLING = 2  # panels are drawn larger by this factor, then reduced, for smooth edges
LINE_HEIGHT = 18
NORMAL, DEFECTIVE = (40, 150, 60), (210, 40, 40)  # colours of the states if there is one class
MAX_LEGEND = 12  # maximum number of classes in the legend


@dataclass(frozen=True)
class Layout:
    """Settings of t-SNE.

    Args:
        perplexity: Effective number of neighbours; reduced to a third of the samples if these are
            few.
        learning_rate: Learning rate; null: chosen from the number of samples.
        angle: Barnes-Hut angle; larger values summarise distant points more coarsely.
        init: Initialisation of the points.
        iterations: Maximum number of iterations.
        unit: Whether to normalise features to length 1 first.
    """

    perplexity: float = 30.0
    learning_rate: float | None = None
    angle: float = 0.5
    init: Literal["pca", "random"] = "pca"
    iterations: int = 1000
    unit: bool = True


TAB_LAYOUT = Layout(10.0, 100.0, 0.3, "random", 20_000, unit=False)
"""Layout of Figure 5 of the TAB paper (arXiv 2312.09480); see ``docs/methods/tab.md``."""


@dataclass(frozen=True)
class Embedding:
    """Features of one backbone in two dimensions, with their silhouettes in all dimensions."""

    name: str
    points: Points
    """``(n, 2)``."""
    classes: list[str]
    defective: NDArray[np.bool_]
    """``(n,)``."""
    silhouettes: dict[str, float | None]
    """Mean silhouettes in [-1, 1], higher = better separated. ``classes``: all images, grouped by
    class. ``states``: images of a class, grouped into normal and defective; averaged over classes.
    None if there is only one group."""


def tsne(
    name: str,
    features: NDArray[np.floating],
    classes: Sequence[str],
    defective: Sequence[bool],
    seed: int = 0,
    layout: Layout = Layout(),
) -> Embedding:
    """Reduce features to two dimensions by t-SNE, and compute cosine silhouettes in all dimensions.

    Args:
        name: Name of the backbone.
        features: Features of the samples, ``(n, C)`` with ``n >= 4``.
        classes: Class of each sample.
        defective: Whether each sample is defective.
        seed: Random seed of the layout.
        layout: Settings of the layout; silhouettes do not depend on it.

    Raises:
        ValueError: If there are fewer than `MIN_SAMPLES` samples.
    """
    from sklearn.manifold import TSNE  # takes almost a second to import

    rows = np.asarray(features, dtype=np.float64)
    if len(rows) < MIN_SAMPLES:
        raise ValueError(
            f"t-SNE of {name}: {len(rows)} features are too few, give {MIN_SAMPLES} or more"
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
    members = [names == class_name for class_name in np.unique(names)]
    by_class = [
        _silhouette(rows[rows_of_class], states[rows_of_class]) for rows_of_class in members
    ]
    defined = [value for value in by_class if value is not None]
    silhouettes = {
        "classes": _silhouette(rows, names),
        "states": float(np.mean(defined)) if defined else None,
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
        The path of the image.
    """
    rows = (
        [embedding.name, float(x), float(y), class_name, "defective" if defective else "normal"]
        for embedding in embeddings
        for (x, y), class_name, defective in zip(
            embedding.points, embedding.classes, embedding.defective, strict=True
        )
    )
    write_csv(folder / f"{stem}.csv", ["backbone", "x", "y", "class", "state"], rows)
    names = sorted({name for embedding in embeddings for name in embedding.classes})
    panels = grid([_panel(embedding, names) for embedding in embeddings], len(embeddings))
    legend = _legend(names)
    sheet = Image.new("RGB", (panels.width, panels.height + legend.height), "white")
    sheet.paste(panels, (0, 0))
    sheet.paste(legend, (0, panels.height))
    with atomic_path(folder / f"{stem}.png") as temporary:
        save_drawing(sheet, temporary)
    return folder / f"{stem}.png"


def _colour(number: int, count: int) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(number / count, 0.75, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(embedding: Embedding, names: Sequence[str]) -> Image.Image:
    """Draw normal images as discs and defective ones as crosses."""
    side = SIDE * OVERSAMPLING
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    low, high = embedding.points.min(axis=0), embedding.points.max(axis=0)
    margin = 0.04
    scaled = (embedding.points - low) / np.where(high > low, high - low, 1.0)
    positions = (margin + (1 - 2 * margin) * scaled) * side
    size = 4 * OVERSAMPLING
    for (x, y), class_name, defective in zip(
        positions, embedding.classes, embedding.defective, strict=True
    ):
        colour = _colour(names.index(class_name), len(names))
        if len(names) == 1:
            colour = DEFECTIVE if defective else NORMAL
        if defective:
            for slope in (1, -1):
                ends = ((x - size, y - slope * size), (x + size, y + slope * size))
                draw.line(ends, fill=colour, width=OVERSAMPLING * 2)
        else:
            draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    silhouettes = ", ".join(
        f"{groups} {value:.3f}"
        for groups, value in embedding.silhouettes.items()
        if value is not None
    )
    lines = [embedding.name, f"silhouette: {silhouettes or 'undefined (only one group)'}"]
    smooth = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    panel = add_caption(smooth, [(line, INK) for line in lines], LINE_HEIGHT)
    frame = (0, 0, panel.width - 1, panel.height - 1)
    ImageDraw.Draw(panel).rectangle(frame, outline=(220, 220, 220))
    return panel


def _legend(names: Sequence[str]) -> Image.Image:
    shown = names[:MAX_LEGEND]
    more = [f"and {len(names) - MAX_LEGEND} more"] if len(names) > MAX_LEGEND else []
    lines = ["disc: normal, cross: defective", *shown, *more]
    legend = Image.new("RGB", (SIDE, LINE_HEIGHT * len(lines) + 4), "white")
    draw, letters = ImageDraw.Draw(legend), font(LINE_HEIGHT - 4)
    for number, text in enumerate(lines):
        top = number * LINE_HEIGHT
        if 0 < number <= len(shown) and len(names) > 1:
            colour = _colour(names.index(text), len(names))
            draw.ellipse((4, top + 4, 4 + LINE_HEIGHT - 8, top + LINE_HEIGHT - 4), fill=colour)
            draw.text((LINE_HEIGHT + 4, top), printable(text), INK, letters)
        else:
            draw.text((4, top), printable(text), INK, letters)
    return legend
