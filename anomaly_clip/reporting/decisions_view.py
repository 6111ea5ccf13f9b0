"""Decisions of a run in words and tables, for the beginning of the report page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from anomaly_clip.results.decision_section import CategoryDecisions, Decisions, Share
from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import RunFiles

__all__ = ["DecisionsView", "build_view", "missing_calibration", "number_text", "rate_text"]

MAX_GUARANTEES = 3
"""Number of different guarantees up to which all are shown without a click."""
MAX_NAMES = 20
"""Number of categories that a warning names."""


class DecisionsView(NamedTuple):
    """The decisions, as the page shows them."""

    num_anomalous: int
    num_images: int
    warnings: list[str]
    """Limits of the guarantees."""
    guarantees: list[str]
    """Guarantees in plain words, each with the names of its categories if there are several."""
    is_long: bool
    """True if there are too many guarantees to show all of them at once."""
    remarks: list[str]
    """Further facts about the decisions."""
    rates: list[tuple[str, str, str]]
    """Recall and false alarms of the test of a single category: value, name and interval."""
    header: list[str]
    rows: list[list[str]]
    """Table with a row per category; empty for a single one."""
    kinds_header: list[str]
    kinds: list[list[str]]
    """Table of the recall by kind of defect."""


def build_view(decisions: Decisions, is_test: bool) -> DecisionsView:
    """Return the decisions of a run as text.

    Args:
        decisions: The decisions.
        is_test: Whether the run is a test, whose labels give recall and false alarms.
    """
    categories = decisions.categories
    # A sentence is a warning if it promises less than was asked for.
    sound = [name for name, entry in categories.items() if _is_sound(entry)]
    doubtful = [name for name in categories if name not in sound]
    kinds = [
        [printable(name), printable(kind), *_share_cells(share)]
        for name, entry in categories.items()
        for kind, share in entry.kinds.items()
    ]
    has_table = len(categories) > 1
    skipped = 0 if has_table else 1
    guarantees = _guarantees(decisions, sound)
    return DecisionsView(
        decisions.num_anomalous,
        decisions.num_images,
        [*_guarantees(decisions, doubtful), *_drift(decisions)],
        guarantees,
        len(guarantees) > MAX_GUARANTEES,
        _remarks(decisions),
        [] if has_table else [rate for entry in categories.values() for rate in _rates(entry)],
        _header(decisions, is_test),
        [_cells(name, entry, is_test) for name, entry in categories.items()] if has_table else [],
        ["category", "kind of defect", "detected", "images", "recall", "95 % interval"][skipped:],
        [row[skipped:] for row in kinds],
    )


def missing_calibration(files: RunFiles) -> str | None:
    """Return the command that leads to decisions; None if the run has them, or cannot have any."""
    is_predict = files.mean is None
    if not is_predict or files.decisions is not None or not files.scores:
        return None
    source = "--ckpt_path RUN" if files.run.get("checkpoint") else "--config CONFIGURATION"
    return f"anomaly_clip calibrate {source} --data.root GOOD_IMAGES"


def rate_text(rate: float) -> str:
    """Return a fraction as a percentage of three digits.

    Example:
        >>> from anomaly_clip.reporting.decisions_view import rate_text
        >>> rate_text(0.05), rate_text(0.14583), rate_text(1.0)
        ('5 %', '14.6 %', '100 %')
    """
    return f"{100 * rate:.3g} %"


def number_text(value: float) -> str:
    """Return a score with four digits, or with all digits before the point.

    Example:
        >>> from anomaly_clip.reporting.decisions_view import number_text
        >>> number_text(0.123456), number_text(81234.5), number_text(1e-7)
        ('0.1235', '81234', '1e-07')
    """
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _is_sound(entry: CategoryDecisions) -> bool:
    return entry.is_as_asked and entry.is_guaranteed


def _guarantees(decisions: Decisions, names: Sequence[str]) -> list[str]:
    """Return the guarantees of some categories; categories with the same one share a sentence."""
    by_sentence: dict[str, list[str]] = {}
    for name in names:
        by_sentence.setdefault(decisions.categories[name].sentence, []).append(name)
    if len(by_sentence) == 1 and len(names) == len(decisions.categories):
        return [printable(sentence) for sentence in by_sentence]
    return [
        f"{_names(members)}: {printable(sentence)}" for sentence, members in by_sentence.items()
    ]


def _drift(decisions: Decisions) -> list[str]:
    """Return a warning if the images of a category are unlike those of its calibration."""
    alarms = {name: e.drift for name, e in decisions.categories.items() if e.drift is not None}
    if not alarms:
        return []
    where = "" if len(decisions.categories) == 1 else f" of {_names(list(alarms))}"
    return [
        f"Drift: the scores{where} are unlike those of the calibration images (the martingale "
        f"reached {number_text(max(alarms.values()))}, and the alarm is at 100). Many defective "
        f"images also raise it. If the camera, the light or the product has changed, the guarantee "
        f"does not hold: calibrate again."
    ]


def _remarks(decisions: Decisions) -> list[str]:
    remarks = []
    if decisions.fdr is not None:
        remarks.append(
            f"The decisions are corrected for the number of images: of the images called "
            f"anomalous, at most {rate_text(decisions.fdr)} are expected to be normal (false "
            f"discovery rate, Benjamini-Hochberg). They may differ from the thresholds."
        )
    marked = sum(entry.num_marked for entry in decisions.categories.values())
    if marked:
        images = "1 image" if marked == 1 else f"{marked:,} images"
        text = (
            f"{images} called normal {'has' if marked == 1 else 'have'} marked pixels: the score "
        )
        text += "of the image decides, not its pixels."
        remarks.append(text)
    sources = []
    if len(decisions.categories) == 1 and decisions.fdr is None:
        (entry,) = decisions.categories.values()
        sources.append(
            f"An image is anomalous if its score is above {number_text(entry.threshold)}."
        )
    if decisions.source:
        sources.append(f"Calibration: {printable(decisions.source)}")
    return [*remarks, " ".join(sources)] if sources else remarks


def _rates(entry: CategoryDecisions) -> list[tuple[str, str, str]]:
    named = (("recall", entry.recall), ("false alarms", entry.false_alarms))
    return [
        (
            rate_text(share.value),
            f"{name} ({share.count:,} of {share.total:,})",
            f"95 % interval: {_interval(share)}",
        )
        for name, share in named
        if share is not None and share.value is not None
    ]


def _header(decisions: Decisions, is_test: bool) -> list[str]:
    confidence = 0.95 if decisions.confidence is None else decisions.confidence
    header = ["category", "anomalous", "images", "threshold", "false alarms\nexpected"]
    header += [f"with {100 * confidence:.12g} %\nconfidence", "calibration\nimages"]
    return [*header, "recall", "false alarms"] if is_test else header


def _cells(name: str, entry: CategoryDecisions, is_test: bool) -> list[str]:
    cells = [
        printable(name),
        f"{entry.num_anomalous:,}",
        f"{entry.num_images:,}",
        number_text(entry.threshold),
        rate_text(entry.average),
        rate_text(entry.guaranteed) if entry.is_guaranteed else "–",
        f"{entry.num_calibration:,}",
    ]
    return (
        [*cells, _share_text(entry.recall), _share_text(entry.false_alarms)] if is_test else cells
    )


def _share_text(share: Share | None) -> str:
    if share is None or share.value is None:
        return "–"
    return f"{rate_text(share.value)}\n{_interval(share)}"


def _share_cells(share: Share) -> list[str]:
    value = "–" if share.value is None else rate_text(share.value)
    return [f"{share.count:,}", f"{share.total:,}", value, _interval(share)]


def _interval(share: Share) -> str:
    if share.low is None or share.high is None:
        return "–"
    return f"{100 * share.low:.1f} to {100 * share.high:.1f} %"


def _names(names: Sequence[str]) -> str:
    listed = ", ".join(printable(name) for name in names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    return listed if more <= 0 else f"{listed} and {more:,} more"
