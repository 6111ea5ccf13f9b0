"""Protocol and other records of a run as pairs of name and text, for the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import mapping

__all__ = ["LABELS", "MAX_ENTRIES", "protocol_text", "record_text", "unset_last", "value_text"]

MAX_ENTRIES = 60
"""Maximum number of entries of a list or table that are shown."""
NONE = "none"
"""Text of None and of empty lists and tables."""
LABELS = {
    "words": "category names",
    "one_model_a_category": "one model per category",
    "transductive": "each image is compared with the other images of its category",
    "r_list": "sides of the neighbourhoods, in patches",
    "interval": "nearest images whose distances are averaged",
    "k_list": "similar images over which scores are averaged",
    "grid": "side of the grid of compared patches",
    "memory": "images before an image that it is compared with",
    "start": "first images that are compared with each other",
    "order_seed": "seed of the order of the images",
    "combine": "combination of the layers",
    "explained": "share of the variance that the subspace explains",
    "num_neighbours": "nearest patches whose distances are averaged",
    "quantile": "share of the nearest patches whose distances are averaged",
    "rotations": "rotated copies of each training image",
    "object_masks": "masks of the object",
    "anomalous_without_pixels": "anomalous images with an empty mask",
    "candidates": "networks that best_test selects from",
    "unreadable": "images that cannot be read",
    "unreadable_images": "images that could not be read",
    "unreadable_references": "reference images that could not be read",
    "fitted_without": "images left out of the fit, as they could not be read",
}
"""Labels of protocol entries whose key alone is hard to understand."""


def protocol_text(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a protocol as pairs of name and text, with an explanation of unknown values.

    Counts are left out, because the table of metrics shows them. Category
    names, as used in prompts, are listed only if they differ from the categories.
    """
    shown = {k: value for k, value in protocol.items() if k not in ("images", "anomalous")}
    names = mapping(protocol.get("words"))
    if names and all(category == name for category, name in names.items()):
        shown["words"] = "same as the categories"
    if "overlap" in shown and shown["overlap"] is None:
        shown["overlap"] = "not checked"
    if shown.get("borrowed") and shown.get("auxiliary") is None:
        shown["auxiliary"] = "unknown"
    return record_text({LABELS.get(key, key): value for key, value in shown.items()})


def record_text(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a record as pairs of name and text."""
    return [(printable(key).replace("_", " "), value_text(value)) for key, value in record.items()]


def unset_last(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return pairs of name and text, with the names of those without a value in a last pair.

    Example:
        >>> from anomaly_clip.reporting.protocol_text import unset_last
        >>> unset_last([("shots", "none"), ("split", "test"), ("fold", "none")])
        [('split', 'test'), ('not set', 'shots, fold')]
    """
    unset = ", ".join(name for name, text in pairs if text == NONE)
    shown = [(name, text) for name, text in pairs if text != NONE]
    return [*shown, ("not set", unset)] if unset else shown


def value_text(value: object) -> str:
    """Format any value of a record as text, with long lists truncated.

    Example:
        >>> from anomaly_clip.reporting.protocol_text import value_text
        >>> value_text({"a": 0.25, "b": None}), value_text([]), value_text(True)
        ('a: 0.25, b: none', 'none', 'yes')
    """
    if value is None:
        return NONE
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
        return printable(between.join(shown) + more) or NONE
    return printable(value)
