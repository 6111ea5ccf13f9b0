"""Decisions of a test as tables for the terminal: recall and false alarms, kinds of defect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from anomaly_clip.files import printable

__all__ = ["decision_tables", "interval", "share_percent"]

Share = Mapping[str, Any]
MAX_NAMES = 3
"""Number of categories that a remark names."""
INTERVALS = "in percent, with 95 % intervals (Clopper-Pearson)"


def decision_tables(section: Mapping[str, Any]) -> list[Table]:
    """Return a table of recall and false alarms per category, and one of the kinds of defect.

    Args:
        section: Section ``decisions`` of ``metrics.json``.
    """
    rate = "false discovery rate" if section["fdr"] is not None else "false-alarm rate"
    limit = section["alpha"] if section["fdr"] is None else section["fdr"]
    rates = _table(f"decisions, {rate} {_number(limit)} %")
    rates.caption = Text("\n".join([INTERVALS, *_remarks(section)]))
    rates.add_column("category", overflow="fold", min_width=len("category"))
    for name in ("normal\nimages", "false\nalarms", "95 %", "anoma-\nlous", "recall", "95 %"):
        rates.add_column(name, justify="right", no_wrap=True)
    kinds = _table("recall by kind of defect")
    kinds.add_column("category", overflow="fold", min_width=len("category"))
    kinds.add_column("kind", overflow="fold", min_width=len("kind"))
    for name in ("images", "recall", "95 %"):
        kinds.add_column(name, justify="right", no_wrap=True)
    for category, entry in section["categories"].items():
        label = Text(printable(category))
        alarms, recall = entry.get("false_alarms"), entry.get("recall")
        rates.add_row(label, *_cells(alarms), *_cells(recall))
        for kind, share in entry.get("kinds", {}).items():
            kinds.add_row(label, Text(printable(kind)), *_cells(share))
    return [rates, kinds] if kinds.row_count else [rates]


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=title,
        title_style="bold",
        caption=INTERVALS,
        caption_style="italic",
    )


def _remarks(section: Mapping[str, Any]) -> list[str]:
    """Return why the rate in the title is not that of some categories, if it is not."""
    if section["fdr"] is not None:
        return []
    entries: Mapping[str, Mapping[str, Any]] = section["categories"]
    few = [name for name, entry in entries.items() if not entry.get("as_asked", True)]
    kind = "cross_validation"
    estimated = [name for name, entry in entries.items() if entry.get("kind") == kind]
    remarks = []
    if few:
        alpha = f"{_number(section['alpha'])} %"
        remarks.append(f"the smallest rate instead of {alpha}, of too few images: {_names(few)}")
    if estimated:
        remarks.append(f"rate estimated by cross-validation: {_names(estimated)}")
    return remarks


def _names(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = len(names) - MAX_NAMES
    listed = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return f"{listed} and {more} more" if more > 0 else listed


def _cells(share: Share | None) -> tuple[str, str, str]:
    total = "0" if share is None else str(share["total"])
    return total, share_percent(share), interval(share)


def share_percent(share: Share | None) -> str:
    """Return a share in percent, a dash for no images.

    Example:
        >>> from anomaly_clip.reporting.decision_tables import share_percent
        >>> share_percent({"value": 0.125}), share_percent(None)
        ('12.5', '–')
    """
    return "–" if share is None else f"{100 * share['value']:.1f}"


def interval(share: Share | None) -> str:
    """Return the interval of a share in percent, a dash for no images.

    Example:
        >>> from anomaly_clip.reporting.decision_tables import interval
        >>> interval({"low": 0.0, "high": 0.3085})
        '0.0–30.9'
    """
    return "–" if share is None else f"{100 * share['low']:.1f}–{100 * share['high']:.1f}"


def _number(rate: float) -> str:
    return f"{100 * rate:.4g}"
