"""Charts for the report page: the curves of all categories as SVG polylines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anomaly_clip.metric_values import Curve
from anomaly_clip.reporting.metrics_table import percent
from anomaly_clip.results.run_files import RunFiles, mapping

__all__ = [
    "CHARTS",
    "HEIGHT",
    "MAX_LINES",
    "NUM_COLOURS",
    "WIDTH",
    "Chart",
    "ChartLine",
    "build_charts",
    "build_legend",
    "lowest_curves",
]

MAX_LINES = 40
"""Maximum number of lines in a chart."""
WIDTH, HEIGHT = 260, 200
"""Size of the plot area in SVG units."""
NUM_COLOURS = 8
"""Number of colours of the lines; then they repeat with another dash pattern."""

CHARTS: Mapping[str, tuple[str, str, str, str]] = {
    "image_roc": ("Image-level ROC", "false positive rate", "true positive rate", "image_auroc"),
    "image_pr": ("Image-level precision-recall", "recall", "precision", "image_ap"),
    "pixel_roc": ("Pixel-level ROC", "false positive rate", "true positive rate", "pixel_auroc"),
    "pixel_pr": ("Pixel-level precision-recall", "recall", "precision", "pixel_ap"),
    "pixel_pro": ("Per-region overlap (PRO)", "false positive rate", "mean overlap", "pixel_pro"),
}
"""Title, axis labels and metric of each curve."""


class ChartLine(NamedTuple):
    """The curve of one category."""

    category: int
    """Index of the category on the page."""
    points: str
    """Value of the SVG attribute ``points``, in units of the plot area."""
    title: str
    style: str
    """Colour and dash pattern, as classes of the style sheet; empty if there are too many lines."""


class Chart(NamedTuple):
    """One kind of curve for several categories."""

    key: str
    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[ChartLine]


def build_charts(files: RunFiles, names: Sequence[str]) -> list[Chart]:
    """Return one chart for each kind of curve that a run has.

    Args:
        files: Files of the run.
        names: Categories in the order of the page.
    """
    return [chart for key in CHARTS if (chart := _build_chart(key, files, names)).lines]


def build_legend(files: RunFiles, names: Sequence[str]) -> list[tuple[int, str, str]]:
    """Return index, name and style of each category with a curve; empty if there are too many.

    Args:
        files: Files of the run.
        names: Categories in the order of the page.
    """
    styles = _styles(files)
    return [(n, name, styles[name]) for n, name in enumerate(names) if styles.get(name)]


def _styles(files: RunFiles) -> dict[str, str]:
    names = list(files.curves)
    if not 1 < len(names) <= MAX_LINES:
        return {}
    return {
        name: f"colour-{number % NUM_COLOURS} dash-{number // NUM_COLOURS}"
        for number, name in enumerate(names)
    }


def lowest_curves(files: RunFiles, key: str) -> dict[str, Curve]:
    """Return one kind of curve for the `MAX_LINES` categories with the lowest metric."""
    metric = CHARTS[key][-1]
    all_curves = {name: curves[key] for name, curves in files.curves.items() if key in curves}
    values = {name: mapping(files.metrics.get(name)).get(metric) for name in all_curves}
    ranked = sorted(all_curves, key=lambda name: (values[name] is None, values[name] or 0.0))
    kept = set(ranked[:MAX_LINES])
    return {name: curve for name, curve in all_curves.items() if name in kept}


def _build_chart(key: str, files: RunFiles, names: Sequence[str]) -> Chart:
    title, x_label, y_label, metric = CHARTS[key]
    curves = lowest_curves(files, key)
    numbers = {name: number for number, name in enumerate(names)}
    styles = _styles(files)
    reach = max((curve.x[-1] for curve in curves.values()), default=1.0) or 1.0
    lines = []
    for name, curve in curves.items():
        # The metric is a mean over rounds, so it is not the area under the first round's curve.
        value = None if files.num_rounds > 1 else mapping(files.metrics.get(name)).get(metric)
        line_title = name if value is None else f"{name} {percent([value])[0]}"
        if name in numbers:
            points, style = _svg_points(curve, reach), styles.get(name, "")
            lines.append(ChartLine(numbers[name], points, line_title, style))
    steps = [step / 4 for step in range(5)]
    return Chart(
        key,
        title,
        x_label,
        y_label,
        [(step * WIDTH, f"{100 * step * reach:.4g}") for step in steps],
        [((1 - step) * HEIGHT, f"{100 * step:.0f}") for step in steps],
        lines,
    )


def _svg_points(curve: Curve, reach: float) -> str:
    points = zip(curve.x, curve.y, strict=True)
    return " ".join(f"{x / reach * WIDTH:.1f},{(1 - y) * HEIGHT:.1f}" for x, y in points)
