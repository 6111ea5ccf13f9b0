"""What a run's folder holds, read for its page.

A run of ``each`` keeps scores, curves and pictures in the folders of its categories.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.errors import UserError
from anomaly_clip.files import safe_name
from anomaly_clip.metrics.curves import CURVES, CURVES_FILE, Curve, Curves
from anomaly_clip.recording.gallery import GALLERY
from anomaly_clip.report.metrics_table import remark_on
from anomaly_clip.results.finished_run import (
    AGAIN,
    METRICS,
    expect,
    is_fraction,
    plain,
    read_json,
    read_run,
)
from anomaly_clip.results.selection import KINDS, Kind

__all__ = ["PREDICTED", "Listed", "RunFiles", "ScoresOf", "mapping", "read_files"]

PREDICTED = "predict.json"
"""What a predict keeps in the place of figures: where its scores come from."""
SCORES = "scores.csv"
CONFUSION = "confusion.png"


class ScoresOf(NamedTuple):
    """The image scores of a category."""

    scores: NDArray[np.float32]
    anomalous: NDArray[np.bool_] | None
    """None without labels."""


class Listed(NamedTuple):
    """A picture of the gallery."""

    file: Path
    name: str
    kind: Kind
    category: str
    label: bool | None
    score: float
    gap: float
    """How far it is on the wrong side of its category's threshold; the worst come first."""
    has_mask: bool
    full: str | None
    """The picture in its full size, its path from the run's folder; None if there is none."""


@dataclass(frozen=True)
class RunFiles:
    """What is known of a run; what its folder lacks is empty.

    Args:
        folder: The run's.
        run: Method, weights, protocol, seed and versions.
        said: What must be said beside its figures.
        mean: Mean figures; None of a predict.
        figures: Figures by category.
        scores: Image scores by category.
        curves: By category.
        pictures: The gallery.
        configs: The complete configurations by their files' names.
        confusion: What a classification takes for what, as a picture.
    """

    folder: Path
    run: Mapping[str, Any]
    said: Sequence[str]
    mean: Mapping[str, float | None] | None
    figures: Mapping[str, Mapping[str, float | None]]
    scores: Mapping[str, ScoresOf]
    curves: Mapping[str, Curves]
    pictures: Sequence[Listed]
    configs: Mapping[str, str]
    confusion: Path | None


def read_files(folder: Path) -> RunFiles:
    """Read a run of test, each or predict.

    Raises:
        UserError: If it is none, or a file of it is damaged.
    """
    if (folder / METRICS).is_file():
        said = [tag.long for tag in read_run(folder).tags]  # or one sentence on what is wrong
        content = read_json(folder / METRICS)
        mean, figures = mapping(content.get("mean")), content["categories"]
        wrong = next((name for name in mean if not is_fraction(mean[name])), None)
        expect(wrong is None, folder / METRICS, f"has a mean {plain(wrong)} that is no fraction")
    elif (folder / PREDICTED).is_file():
        content, mean, figures = _object(folder / PREDICTED), None, {}
        run = mapping(content.get("run"))
        right = "method" in run and "data" in mapping(run.get("protocol"))
        expect(right, folder / PREDICTED, "does not say what was run on what")
        weights = mapping(run.get("weights"))
        said = [remark] if (remark := remark_on(weights)) is not None else []
    else:
        raise UserError(
            f"{folder}: there is neither {METRICS} nor {PREDICTED} in it: name the folder of a "
            f"finished run of test, each or predict"
        )
    parts = [folder, *(folder / safe_name(name) for name in figures)]
    parts = [part for part in parts if part == folder or (part / METRICS).is_file()]
    return RunFiles(
        folder,
        content["run"],
        said,
        mean,
        figures,
        {name: scores for part in parts for name, scores in _scores(part / SCORES).items()},
        {name: curves for part in parts for name, curves in _curves(part / CURVES_FILE).items()},
        [one for part in parts for one in _pictures(part, folder)],
        {
            file.name: file.read_text(encoding="utf-8", errors="replace")
            for file in sorted(folder.glob("config-*.yaml"))
        },
        folder / CONFUSION if (folder / CONFUSION).is_file() else None,
    )


def _scores(file: Path) -> dict[str, ScoresOf]:
    """Return image scores by category; a classification has none."""
    if not file.is_file():
        return {}
    found: dict[str, list[tuple[float, str]]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            table = csv.DictReader(opened)
            if "path" not in (table.fieldnames or ()):
                raise ValueError("it is no table of images")
            if "image_score" not in (table.fieldnames or ()):
                return {}
            for row in table:
                score = float(row["image_score"])
                if not math.isfinite(score):
                    raise ValueError(f"a score is {row['image_score']}")
                found.setdefault(row["category"], []).append((score, row["label"]))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{file}: damaged ({error}): {AGAIN}") from None
    return {
        name: ScoresOf(
            np.array([score for score, _ in rows], dtype=np.float32),
            None
            if any(label == "" for _, label in rows)
            else np.array([label == "1" for _, label in rows]),
        )
        for name, rows in found.items()
    }


def _curves(file: Path) -> dict[str, Curves]:
    if not file.is_file():
        return {}
    try:
        return {
            name: {key: _curve(curves[key]) for key in CURVES if key in curves}
            for name, curves in _object(file).items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}): {AGAIN}") from None


def _curve(points: Any) -> Curve:
    x, y = ([float(value) for value in axis] for axis in points)
    if not x or len(x) != len(y) or not all(map(math.isfinite, [*x, *y])):
        raise ValueError("a curve has no points, or some without a partner")
    return Curve(x, y)


def _pictures(part: Path, folder: Path) -> list[Listed]:
    """Return the pictures of a run's folder, or of one of its categories."""
    file = part / GALLERY / f"{GALLERY}.json"
    if not file.is_file():
        return []
    found = []
    try:
        for one in _object(file)["pictures"]:
            picture = (part / GALLERY / one["picture"]).resolve()
            full = part / "maps" / f"{one['name']}.png"
            inside = picture.is_relative_to((part / GALLERY).resolve())  # nothing else is embedded
            if one["kind"] not in KINDS or not inside or not picture.is_file():
                continue
            found.append(
                Listed(
                    picture,
                    str(one["name"]),
                    one["kind"],
                    str(one["category"]),
                    None if one["label"] is None else bool(one["label"]),
                    float(one["score"]),
                    float(one["gap"]),
                    bool(one["mask"]),
                    full.relative_to(folder).as_posix() if one["full"] else None,
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}): {AGAIN}") from None
    return found


def mapping(value: object) -> Mapping[str, Any]:
    """Return a part of a record, nothing where it is of another form."""
    return value if isinstance(value, Mapping) else {}


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged, it is not an object: {AGAIN}")
    return content
