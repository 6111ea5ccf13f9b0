"""Metrics of a run as a table for the terminal, in percent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from anomaly_clip.files import printable
from anomaly_clip.metric_values import Results, uncertain_metrics
from anomaly_clip.results.warnings import MARK, RANDOM_WARNING, uncertain_warning

__all__ = ["HEADINGS", "build_table", "heading", "marked_percent", "percent"]

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

    Pixel metrics with wide bounds are marked.

    Args:
        results: The metrics.
        title: The method and its data.
        counts: Number of images and number of anomalous images, by category.
        random_weights: Whether to warn above and below the table that the metrics are meaningless.
        remark: One line below the table.
    """
    uncertain = uncertain_metrics(results)
    caption = RANDOM_WARNING if random_weights else remark
    if warning := uncertain_warning(uncertain):
        caption = f"{caption}\n{warning}" if caption else warning
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,  # so that ten columns fit into 80 characters; the box separates them
        title=Text(f"{title}\n{RANDOM_WARNING}" if random_weights else title),
        caption=caption,
        title_style="bold red" if random_weights else "bold",
        caption_style="bold red" if random_weights else "italic",
    )
    table.add_column("category", overflow="fold", min_width=len("category"))
    names = list(results["mean"])
    for column in ("images", "anoma-\nlous", *map(heading, names)):
        table.add_column(column, justify="right", no_wrap=True)
    for category, metrics in results["categories"].items():
        images, anomalous = counts[category]
        cells = marked_percent(metrics, names, uncertain.get(category, ()))
        table.add_row(Text(printable(category)), str(images), str(anomalous), *cells)
    table.add_section()
    images, anomalous = (sum(column) for column in zip(*counts.values(), strict=True))
    means = marked_percent(results["mean"], names, uncertain.get("mean", ()))
    table.add_row("mean", str(images), str(anomalous), *means, style="bold")
    return table


def heading(metric: str) -> str:
    """Return the column heading of a metric, in up to two lines."""
    return HEADINGS.get(metric, metric)


def percent(values: Iterable[float | None]) -> list[str]:
    """Format fractions as percent, and undefined values as a dash."""
    return ["–" if value is None else f"{100 * value:.1f}" for value in values]


def marked_percent(
    values: Mapping[str, float | None], names: Sequence[str], uncertain: Collection[str]
) -> list[str]:
    """Format the named metrics as percent, and mark those with wide bounds."""
    return [
        f"{MARK}{text}" if name in uncertain else text
        for name, text in zip(names, percent(values.get(n) for n in names), strict=True)
    ]
