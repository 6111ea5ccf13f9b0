"""Section ``decisions`` of ``predict.json`` and ``metrics.json``, and its lines on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomaly_clip.decisions.calibration import ANOMALOUS, NORMAL
from anomaly_clip.decisions.conformal import binomial_interval
from anomaly_clip.decisions.sentences import guarantee, percent
from anomaly_clip.files import printable
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.progress import number_of
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.results.map_store import Rows

__all__ = ["decision_lines", "decisions_record", "no_decisions", "num_anomalous", "share"]


def num_anomalous(rows: Rows) -> int:
    """Return the number of images that were called anomalous."""
    return sum(row.get("decision") == ANOMALOUS for row in rows.values())


def share(count: int, total: int) -> dict[str, Any] | None:
    """Return a share of images with its Clopper-Pearson interval; None of no images."""
    if not total:
        return None
    low, high = binomial_interval(count, total)
    return {"count": count, "total": total, "value": count / total, "low": low, "high": high}


def decisions_record(
    decisions: Decisions,
    rows: Rows,
    highest: Mapping[int, float],
    kinds: Mapping[int, str] | None = None,
    drift: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the section ``decisions``: options, and counts per category.

    Args:
        decisions: The decisions of the run.
        rows: Rows of all images, with their decisions.
        highest: Highest map value of each image that has a map.
        kinds: Kind of defect of each image of a test; None: there are no labels to compare with.
        drift: Entry ``drift`` by category; None without one.
    """
    categories = {}
    for name, record in decisions.records.items():
        level = decisions.levels[name]
        chosen = {index: row for index, row in rows.items() if row["category"] == name}
        marks = record.map_threshold
        marked = [i for i in chosen if marks is not None and highest.get(i, marks) > marks]
        categories[name] = {
            "num_images": len(chosen),
            "num_anomalous": num_anomalous(chosen),
            "n": record.num_images,
            "k": level.k,
            "threshold": level.threshold,
            "map_threshold": record.map_threshold,
            "average": level.average,
            "guaranteed": level.guaranteed,
            "as_asked": level.is_as_asked,
            "kind": record.kind,
            "sentence": _sentence(decisions, name),
            "normal_with_marked_pixels": sum(chosen[i]["decision"] == NORMAL for i in marked),
            "drift": None if drift is None else drift.get(name),
            **({} if kinds is None else _rates(chosen, kinds)),
        }
    return {
        "alpha": decisions.alpha,
        "confidence": decisions.confidence,
        "fdr": decisions.fdr,
        "source": decisions.source,
        "categories": categories,
    }


def _rates(rows: Rows, kinds: Mapping[int, str]) -> dict[str, Any]:
    """Return recall, false alarms, and recall by kind of defect."""

    def share_of(indices: Sequence[int]) -> dict[str, Any] | None:
        return share(sum(rows[i]["decision"] == ANOMALOUS for i in indices), len(indices))

    anomalous = [index for index, row in rows.items() if row["label"] == 1]
    normal = [index for index, row in rows.items() if row["label"] == 0]
    names = sorted({kinds[index] for index in anomalous})
    return {
        "recall": share_of(anomalous),
        "false_alarms": share_of(normal),
        "kinds": {kind: share_of([i for i in anomalous if kinds[i] == kind]) for kind in names},
    }


def _sentence(decisions: Decisions, name: str) -> str:
    """Return what the decisions of a category guarantee."""
    record = decisions.records[name]
    if decisions.fdr is None:
        return guarantee(record, decisions.levels[name])
    if record.kind == "cross_validation":
        return (
            f"By Benjamini-Hochberg over all images of the run, at {percent(decisions.fdr)}, with "
            f"p-values estimated by cross-validation on {number_of(record.num_images, 'image')}. "
            f"This is no guarantee."
        )
    number = number_of(record.num_images, "calibration image")
    return (
        f"By Benjamini-Hochberg over all images of the run, with {number}: of the images called "
        f"anomalous, at most {percent(decisions.fdr)} are expected to be normal."
    )


def no_decisions(checkpoint: str | Path | None, method: EvaluatedModule) -> str:
    """Return the line on the screen for a run of predict without a calibration.

    Args:
        checkpoint: Checkpoint of the run; None for a method without a fit.
        method: The method.
    """
    if method.transductive:
        name = type(method).__name__
        return (
            f"no image is called normal or anomalous, because {name} scores images by "
            f"each other: look at the highest scores first; those of other folders are not "
            f"comparable"
        )
    makes = "--data.root FOLDER makes one from a folder of normal images"
    if checkpoint:
        way = f"anomaly_clip calibrate --ckpt_path {shlex.quote(str(checkpoint))} {makes}"
    else:
        way = f"anomaly_clip calibrate with the same options and {makes}, for --calibration.file"
    return f"no image is called normal or anomalous, because there is no calibration: {way}"


def decision_lines(section: Mapping[str, Any]) -> list[str]:
    """Return the lines on the screen: one per category, and one for each warning.

    Args:
        section: See :func:`decisions_record`.
    """
    lines = []
    categories: Mapping[str, Mapping[str, Any]] = section["categories"]
    for name, entry in categories.items():
        number = number_of(entry["num_images"], "image")
        counted = f"{printable(name)}: {entry['num_anomalous']} of {number} anomalous"
        lines.append(f"{counted}. {entry['sentence']}")
    marked = sum(entry["normal_with_marked_pixels"] for entry in categories.values())
    if marked:
        images = number_of(marked, "normal image")
        lines.append(
            f"{images} {'has' if marked == 1 else 'have'} marked pixels: the image score alone "
            f"decides, the map threshold only draws"
        )
    for name, entry in categories.items():
        drift = entry["drift"]
        if drift is not None and drift["alarm"]:
            bound = "without a change, it passes 100 in at most 1 % of runs"
            if entry["kind"] == "cross_validation":
                bound = "by cross-validation, so the alarm has no proven bound"
            lines.append(
                f"{printable(name)}: images differ from the calibration images since "
                f"{printable(drift['at'])}: they have drifted, or many are defective (martingale "
                f"{drift['largest']:.3g} in drift.csv; {bound})"
            )
    return lines
