"""A run's protocol and other records as pairs of texts, for its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import mapping

__all__ = ["MAX_ENTRIES", "protocol_text", "record_text", "value_text"]

MAX_ENTRIES = 60
"""Entries of a list or table that are shown."""


def protocol_text(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a protocol as pairs of texts, with reasons where a value is unknown.

    Counts, which the table of metrics has, are left out, as are names that are the categories' own.
    """
    shown = {k: value for k, value in protocol.items() if k not in ("images", "anomalous")}
    names = mapping(protocol.get("words"))
    if names and all(category == name for category, name in names.items()):
        shown["words"] = "the names of the categories"
    if "overlap" in shown and shown["overlap"] is None:
        shown["overlap"] = "not checked"
    if shown.get("borrowed") and shown.get("auxiliary") is None:
        shown["auxiliary"] = "not known"
    return record_text(shown)


def record_text(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a record as pairs of texts."""
    return [(printable(key).replace("_", " "), value_text(value)) for key, value in record.items()]


def value_text(value: object) -> str:
    """Return any value of a record as a text, long lists cut.

    Example:
        >>> from anomaly_clip.report.protocol_text import value_text
        >>> value_text({"a": 0.25, "b": None}), value_text([]), value_text(True)
        ('a: 0.25, b: none', 'none', 'yes')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        value = [f"{key}: {value_text(entry)}" for key, entry in value.items()]
    if isinstance(value, list):
        between = "; " if any(isinstance(entry, Mapping) for entry in value) else ", "
        shown = [e if isinstance(e, str) else value_text(e) for e in value[:MAX_ENTRIES]]
        hidden = len(value) - MAX_ENTRIES
        more = f"{between}and {hidden:,} more" if hidden > 0 else ""
        return printable(between.join(shown) + more) or "none"
    return printable(value)
