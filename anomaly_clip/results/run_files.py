"""Reader of all files in a run's folder, for the report page.

A run of ``each`` stores scores, curves and images in one folder per category.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.errors import UserError
from anomaly_clip.files import read_csv, safe_name
from anomaly_clip.metrics.curves import CURVES, CURVES_FILE, Curve, Curves
from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.folder import (
    CONFUSION_FILE,
    ERROR_COLUMN,
    GALLERY,
    METRICS_FILE,
    PREDICT_FILE,
    SCORES_FILE,
)
from anomaly_clip.results.run_reader import (
    REPEAT_TEST,
    expect,
    is_fraction,
    parse_run,
    read_json,
    read_object,
)
from anomaly_clip.results.selection import HEADINGS_BY_KIND, Kind
from anomaly_clip.results.warnings import UNCERTAIN_WARNING, unreadable_warnings, weights_remark

__all__ = ["CategoryScores", "GalleryImage", "RunFiles", "mapping", "read_files"]


class CategoryScores(NamedTuple):
    """The image scores of a category."""

    scores: NDArray[np.float32]
    anomalous: NDArray[np.bool_] | None
    """Labels of the images; None if unknown."""


class GalleryImage(NamedTuple):
    """One image of the gallery, with its heat map and mask."""

    file: Path
    name: str
    kind: Kind
    category: str
    label: bool | None
    score: float
    gap: float
    """Sort key, highest first; see :class:`~anomaly_clip.results.selection.SelectedImage`."""
    has_mask: bool
    full: str | None
    """Path of the full-size image relative to the run's folder; None if there is none."""


@dataclass(frozen=True)
class RunFiles:
    """Content of a run's folder; the attribute of a missing file is empty.

    Args:
        folder: The run's folder.
        run: Method, weights, protocol, seed and versions.
        warnings: Warnings to show next to the metrics.
        mean: Means of the metrics over categories; None for predict.
        metrics: Metrics by category.
        scores: Image scores by category.
        curves: Curves by category.
        gallery: Images of the gallery.
        configs: Complete configurations by file name.
        confusion: Image file of the confusion matrix; None unless the run is a classification.
        unreadable: Path and reason of each image that could not be read.
        uncertain: Pixel metrics with wide bounds by category, and under ``mean`` those of the mean.
    """

    folder: Path
    run: Mapping[str, Any]
    warnings: Sequence[str]
    mean: Mapping[str, float | None] | None
    metrics: Mapping[str, Mapping[str, float | None]]
    scores: Mapping[str, CategoryScores]
    curves: Mapping[str, Curves]
    gallery: Sequence[GalleryImage]
    configs: Mapping[str, str]
    confusion: Path | None
    unreadable: Sequence[tuple[str, str]] = ()
    uncertain: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def num_rounds(self) -> int:
        """Number of rounds over which the metrics are averaged."""
        rounds = mapping(self.run.get("protocol")).get("rounds")
        return rounds if isinstance(rounds, int) else 1


def read_files(folder: Path) -> RunFiles:
    """Read a run of test, each or predict.

    Raises:
        UserError: If the folder is not the folder of a finished run, or contains a damaged file.
    """
    mean: Mapping[str, float | None] | None = None
    metrics: Mapping[str, Mapping[str, float | None]] = {}
    uncertain: Mapping[str, Sequence[str]] = {}
    if (folder / METRICS_FILE).is_file():
        content = read_json(folder / METRICS_FILE)
        finished = parse_run(folder, content)
        warnings, uncertain = [tag.long for tag in finished.tags], finished.uncertain
        warnings += [UNCERTAIN_WARNING] if uncertain else []
        mean, metrics = _checked_mean(content, folder / METRICS_FILE), content["categories"]
    elif (folder / PREDICT_FILE).is_file():
        content = read_object(folder / PREDICT_FILE)
        run = mapping(content.get("run"))
        has_origin = "method" in run and "data" in mapping(run.get("protocol"))
        expect(has_origin, folder / PREDICT_FILE, "does not name the method and the data set")
        remark = weights_remark(mapping(run.get("weights")))
        warnings = [] if remark is None else [remark]
        warnings += unreadable_warnings(mapping(run.get("protocol")))
    else:
        raise UserError(
            f"{folder} contains neither {METRICS_FILE} nor {PREDICT_FILE}: name the folder of a "
            f"finished run of test, each or predict"
        )
    parts = [folder, *(folder / safe_name(name) for name in metrics)]
    parts = [part for part in parts if part == folder or (part / METRICS_FILE).is_file()]
    return RunFiles(
        folder,
        content["run"],
        warnings,
        mean,
        metrics,
        {n: scores for part in parts for n, scores in _read_scores(part / SCORES_FILE).items()},
        {n: curves for part in parts for n, curves in _read_curves(part / CURVES_FILE).items()},
        [image for part in parts for image in _read_gallery(part, folder)],
        {
            file.name: file.read_text(encoding="utf-8", errors="replace")
            for file in sorted(folder.glob("config-*.yaml"))
        },
        folder / CONFUSION_FILE if (folder / CONFUSION_FILE).is_file() else None,
        [image for part in parts for image in _read_unreadable(part / SCORES_FILE)],
        uncertain,
    )


def _checked_mean(content: Mapping[str, Any], file: Path) -> Mapping[str, float | None]:
    mean = mapping(content.get("mean"))
    for name, value in mean.items():
        problem = f"has {printable(value)} for the mean {printable(name)}, not a fraction"
        expect(is_fraction(value), file, problem)
    return mean


def _read_scores(file: Path) -> dict[str, CategoryScores]:
    """Read image scores by category; a classification run has none."""
    if not file.is_file():
        return {}
    rows_by_category: dict[str, list[tuple[float, str]]] = {}
    try:
        for row in read_csv(file):
            if "path" not in row:
                raise ValueError(f"expected a column 'path', got {list(row)}")
            if "image_score" not in row:
                return {}
            if row.get(ERROR_COLUMN):
                continue
            score = float(row["image_score"])
            if not math.isfinite(score):
                raise ValueError(f"expected finite scores, got {row['image_score']}")
            rows_by_category.setdefault(row["category"], []).append((score, row["label"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None
    return {
        category: CategoryScores(
            np.array([score for score, _ in rows], dtype=np.float32),
            None
            if any(label == "" for _, label in rows)
            else np.array([label == "1" for _, label in rows]),
        )
        for category, rows in rows_by_category.items()
    }


def _read_unreadable(file: Path) -> list[tuple[str, str]]:
    """Read path and reason of the images that could not be read."""
    if not file.is_file():
        return []
    try:
        rows = list(read_csv(file))
        return [(row["path"], row[ERROR_COLUMN]) for row in rows if row.get(ERROR_COLUMN)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None


def _read_curves(file: Path) -> dict[str, Curves]:
    if not file.is_file():
        return {}
    try:
        return {
            category: {key: _parse_curve(curves[key]) for key in CURVES if key in curves}
            for category, curves in read_object(file).items()
        }
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None


def _parse_curve(points: Any) -> Curve:
    x, y = ([float(value) for value in axis] for axis in points)
    if not x or len(x) != len(y) or not all(map(math.isfinite, [*x, *y])):
        raise ValueError(f"expected finite pairs of x and y, got {len(x)} x and {len(y)} y")
    return Curve(x, y)


def _read_gallery(part: Path, folder: Path) -> list[GalleryImage]:
    """Read the gallery from a run's folder, or from the folder of one of its categories."""
    file = part / GALLERY / f"{GALLERY}.json"
    if not file.is_file():
        return []
    images = []
    try:
        for entry in read_object(file)["pictures"]:
            image = (part / GALLERY / entry["picture"]).resolve()
            full = part / "maps" / f"{entry['name']}.png"
            inside = image.is_relative_to(
                (part / GALLERY).resolve()
            )  # embed no file from elsewhere
            if entry["kind"] not in HEADINGS_BY_KIND or not inside or not image.is_file():
                continue
            images.append(
                GalleryImage(
                    image,
                    str(entry["name"]),
                    entry["kind"],
                    str(entry["category"]),
                    None if entry["label"] is None else bool(entry["label"]),
                    float(entry["score"]),
                    float(entry["gap"]),
                    bool(entry["mask"]),
                    full.relative_to(folder).as_posix() if entry["full"] else None,
                )
            )
    except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None
    return images


def mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}
