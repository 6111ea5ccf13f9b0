"""Metrics of a run as a table for the terminal, in percent."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from anomaly_clip.files import printable
from anomaly_clip.metrics.evaluator import Results
from anomaly_clip.results.warnings import RANDOM_WARNING

__all__ = ["HEADINGS", "build_table", "heading", "percent"]

HEADINGS = {
    "image_auroc": "image\nAUROC",
    "image_ap": "image\nAP",
    "image_f1_max": "image\nF1-max",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1_max": "pixel\nF1-max",
    "pixel_pro": "pixel\nPRO",
    "f1": "F1",
}
"""Column headings that differ from the name of the metric."""


def build_table(
    results: Results,
    title: str,
    counts: dict[str, tuple[int, int]],
    random_weights: bool,
    remark: str | None = None,
) -> Table:
    """Return a table in percent: one row per category, and the mean; a dash if undefined.

    Args:
        results: The metrics.
        title: The method and its data.
        counts: Number of images and number of anomalous images, by category.
        random_weights: Whether to warn above and below the table that the metrics are meaningless.
        remark: One line below the table.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,  # so that ten columns fit into 80 characters; the box separates them
        title=Text(f"{title}\n{RANDOM_WARNING}" if random_weights else title),
        caption=RANDOM_WARNING if random_weights else remark,
        title_style="bold red" if random_weights else "bold",
        caption_style="bold red" if random_weights else "italic",
    )
    table.add_column("category", overflow="fold")
    names = list(results["mean"])
    for column in ("images", "anoma-\nlous", *map(heading, names)):
        table.add_column(column, justify="right", no_wrap=True)
    for category, metrics in results["categories"].items():
        images, anomalous = counts[category]
        cells = percent(metrics[name] for name in names)
        table.add_row(Text(printable(category)), str(images), str(anomalous), *cells)
    table.add_section()
    images, anomalous = (sum(column) for column in zip(*counts.values(), strict=True))
    table.add_row(
        "mean", str(images), str(anomalous), *percent(results["mean"].values()), style="bold"
    )
    return table


def heading(metric: str) -> str:
    """Return the column heading of a metric, in up to two lines."""
    return HEADINGS.get(metric, metric)


def percent(values: Iterable[float | None]) -> list[str]:
    """Format fractions as percent, and undefined values as a dash."""
    return ["–" if value is None else f"{100 * value:.1f}" for value in values]
