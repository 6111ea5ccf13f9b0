"""Reader of all files in a run's folder, for the report page.

A run of ``each`` stores scores, curves and images in one folder per category.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.errors import UserError
from anomaly_clip.files import read_csv, safe_name
from anomaly_clip.metric_values import CURVES, CURVES_FILE, Curve, Curves
from anomaly_clip.results.decision_section import Decisions, read_decisions
from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.folder import (
    CONFUSION_FILE,
    DRIFT_FILE,
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
from anomaly_clip.results.warnings import (
    UNCERTAIN_WARNING,
    transductive_remark,
    unreadable_warnings,
    weights_remark,
)

__all__ = ["CategoryScores", "GalleryImage", "ImageRow", "RunFiles", "mapping", "read_files"]

Number = TypeVar("Number", int, float)


class CategoryScores(NamedTuple):
    """The image scores of a category."""

    scores: NDArray[np.float64]
    anomalous: NDArray[np.bool_] | None
    """Labels of the images; None if unknown."""


class ImageRow(NamedTuple):
    """One row of ``scores.csv``."""

    path: str
    category: str
    label: bool | None
    """True if the image is anomalous; None if unknown."""
    score: float
    """The score that decides; NaN if the image could not be read."""
    p_value: float
    """NaN without a calibration."""
    decision: str
    """``normal``, ``anomalous``, or empty."""
    kind: str
    """Kind of the defect; empty if unknown."""
    error: str
    """Reason why the image could not be read; empty otherwise."""
    is_decision_score: bool = False
    """True if the score that decides differs from the one that the metrics are computed from."""
    image_score: float = math.nan
    """The score that the metrics are computed from."""


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
    path: str | None = None
    """Path of the image as in ``scores.csv``; None if not recorded."""
    p_value: float | None = None
    decision: str | None = None
    has_contour: bool = False
    """True if the image or its overlay has the contour of the pixels above the map threshold."""
    has_heat: bool = True
    """True if there is a heat map next to the image."""
    has_overlay: bool = False
    """True if the second panel is the heat map on the image; False of earlier versions' runs."""
    scale: tuple[float, float] | None = None
    """Map values at both ends of the colour scale; None if not recorded."""
    panel: tuple[int, int] | None = None
    """Width and height of each panel in pixels; None if not recorded."""

    @property
    def num_panels(self) -> int:
        """Number of panels side by side: image, overlay, heat map, mask."""
        return 1 + self.has_overlay + self.has_heat + self.has_mask


@dataclass(frozen=True)
class RunFiles:
    """Content of a run's folder; the attribute of a missing file is empty.

    Args:
        folder: The run's folder.
        run: Method, weights, protocol, seed and versions.
        warnings: Warnings to show next to the metrics.
        mean: Means of the metrics over categories; None for predict.
        metrics: Metrics by category.
        rows: Rows of all images, including those that could not be read.
        curves: Curves by category.
        gallery: Images of the gallery.
        configs: Complete configurations by file name.
        confusion: Image file of the confusion matrix; None unless the run is a classification.
        uncertain: Pixel metrics with wide bounds by category, and under ``mean`` those of the mean.
        decisions: Decisions with a calibration; None without one.
        drift: Logarithm (base 10) of the martingale after each image, by category.
        drawings: Drawing of each image in ``maps/``, by path, relative to the run's folder.
        intervals: Intervals of metrics by category and name, as in ``metrics.json``.
    """

    folder: Path
    run: Mapping[str, Any]
    warnings: Sequence[str]
    mean: Mapping[str, float | None] | None
    metrics: Mapping[str, Mapping[str, float | None]]
    rows: Sequence[ImageRow]
    curves: Mapping[str, Curves]
    gallery: Sequence[GalleryImage]
    configs: Mapping[str, str]
    confusion: Path | None
    uncertain: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decisions: Decisions | None = None
    drift: Mapping[str, Sequence[float]] = field(default_factory=dict)
    drawings: Mapping[str, str] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    @cached_property
    def scores(self) -> Mapping[str, CategoryScores]:
        """Image scores by category."""
        rows_by_category: dict[str, list[ImageRow]] = {}
        for row in self.rows:
            if not row.error:
                rows_by_category.setdefault(row.category, []).append(row)
        return {
            category: CategoryScores(
                np.array([row.score for row in rows], dtype=np.float64),
                None
                if any(row.label is None for row in rows)
                else np.array([row.label for row in rows], dtype=bool),
            )
            for category, rows in rows_by_category.items()
        }

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """Path and reason of each image that could not be read."""
        return [(row.path, row.error) for row in self.rows if row.error]

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
    file = folder / METRICS_FILE
    if file.is_file():
        content = read_json(file)
        finished = parse_run(folder, content)
        warnings, uncertain = [tag.long for tag in finished.tags], finished.uncertain
        warnings += [UNCERTAIN_WARNING] if uncertain else []
        mean, metrics = _checked_mean(content, file), content["categories"]
    elif (folder / PREDICT_FILE).is_file():
        file = folder / PREDICT_FILE
        content = read_object(file)
        run = mapping(content.get("run"))
        has_origin = "method" in run and "data" in mapping(run.get("protocol"))
        expect(has_origin, file, "does not name the method and the data set")
        protocol = mapping(run.get("protocol"))
        remarks = weights_remark(mapping(run.get("weights"))), transductive_remark(protocol)
        warnings = [remark for remark in remarks if remark is not None]
        warnings += unreadable_warnings(protocol)
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
        [row for part in parts for row in _read_rows(part / SCORES_FILE)],
        {n: curves for part in parts for n, curves in _read_curves(part / CURVES_FILE).items()},
        [image for part in parts for image in _read_gallery(part, folder)],
        {
            file.name: file.read_text(encoding="utf-8", errors="replace")
            for file in sorted(folder.glob("config-*.yaml"))
        },
        folder / CONFUSION_FILE if (folder / CONFUSION_FILE).is_file() else None,
        uncertain,
        read_decisions(content, file),
        _read_drift(folder / DRIFT_FILE),
        {path: file for part in parts for path, file in _read_drawings(part, folder).items()},
        _read_intervals(content),
    )


def _checked_mean(content: Mapping[str, Any], file: Path) -> Mapping[str, float | None]:
    mean = mapping(content.get("mean"))
    for name, value in mean.items():
        problem = f"has {printable(value)} for the mean {printable(name)}, not a fraction"
        expect(is_fraction(value), file, problem)
    return mean


def _read_intervals(content: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the intervals, which :func:`~.run_reader.parse_run` has checked."""
    return {
        category: {name: (float(ends[0]), float(ends[1])) for name, ends in bounds.items()}
        for category, bounds in mapping(content.get("intervals")).items()
    }


def _read_rows(file: Path) -> list[ImageRow]:
    """Read the rows of ``scores.csv``; of a classification, only those of unreadable images."""
    if not file.is_file():
        return []
    try:
        rows = (_parse_row(row) for row in read_csv(file))
        return [row for row in rows if row is not None]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None


def _read_drift(file: Path) -> dict[str, list[float]]:
    if not file.is_file():
        return {}
    values: dict[str, list[float]] = {}
    try:
        for row in read_csv(file):
            values.setdefault(row["category"], []).append(_finite(row["log10_martingale"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None
    return values


def _parse_row(row: Mapping[str, str]) -> ImageRow | None:
    if "path" not in row:
        raise ValueError(f"expected a column 'path', got {list(row)}")
    error = row.get(ERROR_COLUMN, "")
    if error:
        category = row.get("category", "")
        return ImageRow(row["path"], category, None, math.nan, math.nan, "", "", error)
    if "image_score" not in row:
        return None
    label, p_value = row["label"], row.get("p_value")
    return ImageRow(
        row["path"],
        row["category"],
        None if label == "" else label == "1",
        _finite(row.get("decision_score") or row["image_score"]),
        _finite(p_value) if p_value else math.nan,
        row.get("decision", ""),
        row.get("defect", ""),
        "",
        bool(row.get("decision_score")),
        _finite(row["image_score"]),
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected finite values, got {text}")
    return value


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
                    None if entry.get("path") is None else str(entry["path"]),
                    None if entry.get("p_value") is None else float(entry["p_value"]),
                    None if entry.get("decision") is None else str(entry["decision"]),
                    bool(entry.get("contour")),
                    bool(entry.get("heat", True)),
                    bool(entry.get("overlay")),
                    _pair(entry.get("scale"), float),
                    _pair(entry.get("panel"), int),
                )
            )
    except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None
    return images


def _pair(value: Any, kind: Callable[[Any], Number]) -> tuple[Number, Number] | None:
    if value is None:
        return None
    first, second = value
    return kind(first), kind(second)


def _read_drawings(part: Path, folder: Path) -> dict[str, str]:
    """Read which file in ``maps/`` shows an image; empty if the run drew none."""
    file = part / GALLERY / f"{GALLERY}.json"
    if not file.is_file():
        return {}
    place = (part / "maps").relative_to(folder).as_posix()
    try:
        listed = read_object(file).get("drawings", [])
        return {str(path): f"{place}/{name}.png" for path, name in listed}
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}): {REPEAT_TEST}") from None


def mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}
