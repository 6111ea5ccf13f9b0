"""``metrics.json`` and ``metrics.csv`` of a run, written after a test or merged from several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomaly_clip.files import write_csv, write_json
from anomaly_clip.metric_values import Results, uncertain_metrics, with_means
from anomaly_clip.records import WeightsRecord, source_of, versions
from anomaly_clip.results.folder import METRICS_FILE

__all__ = ["merge_decisions", "merge_metrics", "run_record", "weights_label", "write_metrics"]

PER_CATEGORY = ("images", "anomalous", "words")
"""Protocol entries that hold a value per category."""
OF_ONE_CATEGORY = (
    *("selected_epoch", "spread", "by_round", "trained_on", "fitted_images"),
    *("rotations", "object_masks"),
)
"""Protocol entries of a single test that a merged run keeps per category."""
COUNTS = ("overlap", "anomalous_without_pixels", "listed")
"""Protocol entries that a merged run sums; a sum is None if any summand is unknown."""
COUNTS_ABOVE_ZERO = ("unreadable_images", "unreadable_references", "fitted_without")
"""Protocol entries that a merged run sums, and that are absent where they are zero."""


def weights_label(weights: WeightsRecord) -> str:
    """Return the value of the column ``weights`` in tables: the source, or ``random``."""
    return "random" if weights["random"] else source_of(weights)


def run_record(
    method: str,
    weights: WeightsRecord,
    protocol: Mapping[str, Any],
    checkpoint: str | None,
    seed: int | None,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the section ``run`` of ``metrics.json``: the origin of the metrics."""
    return {
        "method": method,
        "weights": weights,
        "protocol": dict(protocol),
        "checkpoint": checkpoint,
        "seed": seed,
        "versions": versions(),
        **({} if environment is None else {"environment": dict(environment)}),
    }


def write_metrics(
    folder: Path,
    results: Results,
    run: Mapping[str, Any],
    decisions: Mapping[str, Any] | None = None,
) -> None:
    """Write ``metrics.json`` and ``metrics.csv`` into a run's folder.

    The section ``run`` lists pixel metrics with wide bounds under ``uncertain``, by category.

    Args:
        folder: The run's folder.
        results: Metrics of the run.
        run: Origin of the metrics; see :func:`run_record`.
        decisions: Section ``decisions``; None: there is none, because of no calibration.
    """
    uncertain = uncertain_metrics(results)
    run = {**run, **({"uncertain": uncertain} if uncertain else {})}
    section = {} if decisions is None else {"decisions": decisions}
    write_json(folder / METRICS_FILE, {**results, "run": run, **section})
    label = weights_label(run["weights"])
    names = list(results["mean"])
    rows = [*results["categories"].items(), ("mean", results["mean"])]
    table = ([row, *(metrics[name] for name in names), label] for row, metrics in rows)
    write_csv(folder / "metrics.csv", ["category", *names, "weights"], table)


def merge_metrics(
    parts: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> tuple[Results, dict[str, Any]]:
    """Merge the tests of one model, or of one run, per category.

    Args:
        parts: Content of ``metrics.json`` by category.
        failed: Reason of the failure, by category without a test.

    Returns:
        The metrics of all categories with their means, and the section ``run``.
    """
    first = next(iter(parts.values()))["run"]
    protocols = {name: part["run"]["protocol"] for name, part in parts.items()}
    results = with_means(
        {name: part["categories"][name] for name, part in parts.items()},
        {n: part["intervals"][n] for n, part in parts.items() if n in part["intervals"]},
    )
    is_fitted = first["protocol"].get("fitted", True)
    merged = {
        **first["protocol"],
        **({"one_model_a_category": True} if is_fitted else {}),
        "complete": not failed and all(protocol["complete"] for protocol in protocols.values()),
    }
    for key in PER_CATEGORY:
        merged[key] = {}
        for protocol in protocols.values():
            merged[key].update(protocol[key])
    for key in OF_ONE_CATEGORY:
        if key in first["protocol"]:
            merged[key] = {name: protocol.get(key) for name, protocol in protocols.items()}
    for key in COUNTS:
        if key in first["protocol"]:
            counts = [protocol.get(key) for protocol in protocols.values()]
            merged[key] = None if None in counts else sum(counts)
    for key in COUNTS_ABOVE_ZERO:
        total = sum(protocol.get(key, 0) for protocol in protocols.values())
        merged |= {key: total} if total else {}
    run = {
        **{key: value for key, value in first.items() if key != "uncertain"},
        "protocol": merged,
        "checkpoint": {name: part["run"]["checkpoint"] for name, part in parts.items()},
        **_merged_environment(parts),
        "versions": versions(),
        "failed": dict(failed),
    }
    return results, run


def merge_decisions(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Merge the sections ``decisions`` of the tests of one model per category.

    Args:
        parts: Content of ``metrics.json`` by category. A category that was tested without a
            calibration is missing in the result.

    Returns:
        The options of the first section, and the categories of all, each with its ``source``. None
        without any section.
    """
    sections = {name: part["decisions"] for name, part in parts.items() if part.get("decisions")}
    if not sections:
        return None
    return {
        **next(iter(sections.values())),
        "source": f"{len(sections)} calibrations, one per category",
        "categories": {
            name: {**entry, "source": section["source"]}
            for section in sections.values()
            for name, entry in section["categories"].items()
        },
    }


def _merged_environment(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the environment of the first part, with the checkpoint's hash of every part."""
    environments = {name: part["run"].get("environment", {}) for name, part in parts.items()}
    first = next(iter(environments.values()))
    if not first:
        return {}
    key = "checkpoint_sha256"
    return {"environment": {**first, key: {n: e.get(key) for n, e in environments.items()}}}
