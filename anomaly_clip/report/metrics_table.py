"""Figures as tables: for the terminal (percent) and for programs (fractions)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from anomaly_clip.metrics.evaluator import Results
from anomaly_clip.records import DEMO

__all__ = [
    "DEMO_REMARK",
    "HEADINGS",
    "RANDOM_WARNING",
    "figures_rows",
    "figures_table",
    "percent",
    "remark_on",
    "rounds_remark",
    "selection_warning",
]

RANDOM_WARNING = "RANDOM WEIGHTS: these figures mean nothing"
DEMO_REMARK = "demo weights, which know pictures made by code only: not CLIP's figures"

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
"""What figures are called above columns, if not by their names."""


def figures_table(
    results: Results,
    title: str,
    counts: dict[str, tuple[int, int]],
    random_weights: bool,
    remark: str | None = None,
) -> Table:
    """Return the figures in percent, one row a category and the mean; undefined ones as a dash.

    Args:
        results: The figures.
        title: What was tested on what.
        counts: Number of images and of anomalous ones by category.
        random_weights: Whether to say, above and below, that the figures mean nothing.
        remark: One line below.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,  # ten columns fit into 80 characters; the box sets them apart
        title=Text(f"{title}\n{RANDOM_WARNING}" if random_weights else title),
        caption=RANDOM_WARNING if random_weights else remark,
        title_style="bold red" if random_weights else "bold",
        caption_style="bold red" if random_weights else "italic",
    )
    table.add_column("category", overflow="fold")
    names = list(results["mean"])
    for heading in ("images", "anoma-\nlous", *(HEADINGS.get(name, name) for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for category, figures in results["categories"].items():
        images, anomalous = counts[category]
        cells = percent(figures[name] for name in names)
        table.add_row(Text(category), str(images), str(anomalous), *cells)
    table.add_section()
    images, anomalous = (sum(column) for column in zip(*counts.values(), strict=True))
    table.add_row(
        "mean", str(images), str(anomalous), *percent(results["mean"].values()), style="bold"
    )
    return table


def remark_on(weights: Mapping[str, object]) -> str | None:
    """Return what must be said of the weights beside every figure."""
    if weights.get("random"):
        return RANDOM_WARNING
    return DEMO_REMARK if weights.get("pretrained") == DEMO else None


def selection_warning(protocol: Mapping[str, object]) -> str | None:
    """Return what must be said beside figures whose epoch was chosen by the test images."""
    if protocol.get("select") != "best_test":
        return None
    return "EPOCH CHOSEN BY THE TEST IMAGES (select best_test): the figures are too good"


def rounds_remark(protocol: Mapping[str, Any]) -> str | None:
    """Return of how many rounds figures are the mean, and how far these are apart."""
    rounds = protocol.get("rounds") or 1
    if rounds < 2:
        return None
    spread = protocol.get("spread") or {}
    found = [
        f"{name.replace('_auroc', '')} AUROC {100 * spread[name]:.1f}"
        for name in ("image_auroc", "pixel_auroc")
        if spread.get(name) is not None
    ]
    apart = f"; standard deviation of {', '.join(found)}" if found else ""
    return f"means of {rounds} rounds{apart}"


def figures_rows(results: Results) -> Iterator[list[str | float | None]]:
    """Yield one row a category and the mean: its name, then the fractions in their order."""
    for category, figures in [*results["categories"].items(), ("mean", results["mean"])]:
        yield [category, *(figures[name] for name in results["mean"])]


def percent(values: Iterable[float | None]) -> list[str]:
    """Return fractions as percent, undefined ones as a dash."""
    return ["–" if value is None else f"{100 * value:.1f}" for value in values]
