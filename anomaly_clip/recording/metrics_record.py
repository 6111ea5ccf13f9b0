"""Protocol of a test in ``metrics.json``, and the title of its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.recording.run_conditions import evaluation_conditions
from anomaly_clip.results.map_store import Rows
from anomaly_clip.results.warnings import (
    overlap_warning,
    rounds_remark,
    selection_warning,
    transductive_remark,
    unreadable_warnings,
)

__all__ = ["image_counts", "protocol_of_test", "table_title"]


def image_counts(rows: Rows, categories: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """Return the number of images and of anomalous images of each category with images."""
    return {
        name: (len(labels), sum(labels))
        for name in categories
        if (labels := [row["label"] for row in rows.values() if row["category"] == name])
    }


def protocol_of_test(
    method: EvaluatedModule,
    data: AnomalyData,
    counts: Mapping[str, tuple[int, int]],
    num_scored: int,
    without_pixels: int,
    unreadable: Mapping[str, int],
) -> dict[str, Any]:
    """Return the protocol of a test.

    Args:
        method: The method.
        data: Data set of the images.
        counts: Number of images and of anomalous images by category.
        num_scored: Number of images that were scored.
        without_pixels: Number of anomalous images whose mask is empty.
        unreadable: Numbers of images that could not be read.
    """
    listed = len(data.listing.listed("test"))
    evaluation = method.evaluation_protocol()
    return {
        "split": "test",
        "complete": num_scored == listed,
        "listed": listed,
        **unreadable,
        **({} if "overlap" in evaluation else {"overlap": _overlap(method, data)}),
        # Anomalous images whose mask is empty, possibly only after resizing or cropping.
        **({"anomalous_without_pixels": without_pixels} if method.is_detector else {}),
        **evaluation,
        **evaluation_conditions(method, data),
        "images": {name: images for name, (images, _) in counts.items()},
        "anomalous": {name: anomalous for name, (_, anomalous) in counts.items()},
    }


def table_title(
    method: EvaluatedModule, data: AnomalyData, protocol: Mapping[str, Any], num_scored: int
) -> str:
    """Return the title of the table of metrics, with its warnings."""
    title = f"{type(method).__name__} on {data.dataset_name}, test{method.evaluation_note}"
    if num_scored < protocol["listed"]:
        title += f"\nPARTIAL: {num_scored} of {protocol['listed']} images"
    remarks = (
        transductive_remark(method.recorded_protocol()),
        *unreadable_warnings(protocol),
        overlap_warning(protocol),
        selection_warning(method.protocol()),
        rounds_remark(method.protocol()),
    )
    return title + "".join(f"\n{remark}" for remark in remarks if remark is not None)


def _overlap(method: EvaluatedModule, data: AnomalyData) -> int | None:
    """Return the number of test images among the training images; None if unknown or untrained."""
    compares = data.has_shots and method.loader_needs.shots == "references"
    if not method.can_be_fitted and not compares:
        return None
    number = data.leakage.num_fitted_on
    try:
        if number is None and (data.auxiliary is not None or not compares):
            number = len(data.overlap())
        if not compares:
            return number
        references = [s for name in data.categories for s in data.shots_of(name)]
        return (number or 0) + len(data.overlap(references))
    except (OSError, ValueError):  # the machine of a test may lack the training images
        return None
