"""The page of a run, ``report.html``: one file that needs neither network nor other files.

Everything is in it: styles, script, the pictures of the gallery, all image scores (so that a
threshold can be moved), curves and the complete configuration. It is made of what the run's folder
holds and can be made again at any time.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from anomaly_clip.files import atomic_path
from anomaly_clip.metrics.curves import Curve
from anomaly_clip.records import DEMO
from anomaly_clip.report.chosen import KINDS, best_threshold
from anomaly_clip.report.finished import plain
from anomaly_clip.report.run_files import Listed, RunFiles, ScoresOf, read_files
from anomaly_clip.report.tables import (
    DEMO_REMARK,
    HEADINGS,
    RANDOM_WARNING,
    percent,
    rounds_remark,
    selection_warning,
)

__all__ = ["PAGE", "write_page"]

PAGE = "report.html"
MOST_SCORES = 1_000_000
"""Images whose scores are embedded, 5.4 bytes each; with more the threshold is left out."""
MOST_PICTURES = 9_000_000
"""Bytes of pictures that are embedded, which take a third more there."""
MOST_LINES = 40
"""Lines of a chart."""
MOST_NAMES = 60
"""Words of a record of the protocol that are listed."""
WIDTH, HEIGHT = 260, 200
"""Of a chart's field in its own units."""
SUMMARY = ("image_auroc", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_pro", "accuracy", "f1")
"""Figures whose means stand at the top."""


class Line(NamedTuple):
    """One category's curve."""

    category: int
    """Its number on the page."""
    points: str
    """In the field's units, as SVG takes them."""
    told: str


class Chart(NamedTuple):
    """One kind of curve, of several categories."""

    key: str
    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]


CHARTS: Mapping[str, tuple[str, str, str, str]] = {
    "image_roc": ("Images: ROC", "false alarms", "anomalous images found", "image_auroc"),
    "image_pr": ("Images: precision and recall", "recall", "precision", "image_ap"),
    "pixel_roc": ("Pixels: ROC", "false alarms", "anomalous pixels found", "pixel_auroc"),
    "pixel_pr": ("Pixels: precision and recall", "recall", "precision", "pixel_ap"),
    "pixel_pro": ("Regions: PRO", "false alarms among pixels", "mean part found", "pixel_pro"),
}
"""Title, axes and figure of each curve."""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder and return it.

    Args:
        folder: Of a finished run of test, each or predict.

    Raises:
        UserError: If it is none, or a file in it is damaged.
    """
    files = read_files(folder)
    # Figures, scores or both: a classification has no scores, a predict no figures.
    names = list(dict.fromkeys([*files.figures, *files.scores]))
    environment = Environment(
        loader=PackageLoader("anomaly_clip", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pictures, left_out = _pictures(files.pictures, names)
    has_scores = sum(len(one.scores) for one in files.scores.values()) <= MOST_SCORES
    page = environment.get_template("page.html.jinja").render(
        title=_title(files),
        facts=_facts(files),
        notes=_notes(files),
        headings=[HEADINGS.get(name, name) for name in files.mean or ()],
        rows=_rows(files),
        mean=None if files.mean is None else percent(files.mean.values()),
        summary=_summary(files),
        names=names,
        scores=[_embedded(files.scores.get(name)) for name in names] if has_scores else [],
        too_many=not has_scores,
        charts=[chart for key in CHARTS if (chart := _chart(key, files, names)).lines],
        num_lines=min(MOST_LINES, len(files.curves)),
        num_curves=len(files.curves),
        kinds=KINDS,
        pictures=pictures,
        left_out=left_out,
        confusion=None if files.confusion is None else _picture_data(files.confusion),
        protocol=_flat(_told_once(files.run.get("protocol") or {})),
        weights=_flat(files.run.get("weights") or {}),
        seed=files.run.get("seed"),
        checkpoint=files.run.get("checkpoint"),
        versions=files.run.get("versions") or {},
        configs=files.configs,
        width=WIDTH,
        height=HEIGHT,
    )
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / PAGE


def _title(files: RunFiles) -> str:
    protocol = files.run.get("protocol") or {}
    stage = "predict" if files.mean is None else "test"
    method, data = (plain(value) for value in (files.run.get("method"), protocol.get("data")))
    return f"{method} on {data}, {stage}"


def _facts(files: RunFiles) -> str:
    """Return what was tested with what, in one line."""
    weights, protocol = (files.run.get(key) or {} for key in ("weights", "protocol"))
    counted = protocol.get("images")
    images = sum(counted.values()) if isinstance(counted, dict) else None
    if images is None:
        images = sum(len(one.scores) for one in files.scores.values())
    found = [
        f"{images:,} images",
        f"{len(files.figures or files.scores):,} categories",
        _named(weights),
    ]
    if protocol.get("one_model_a_category"):
        found.append("one model a category")
    if files.run.get("seed") is not None:
        found.append(f"seed {files.run['seed']}")
    return plain("  ·  ".join(found))


def _named(weights: Mapping[str, Any]) -> str:
    backbone, kind = weights.get("backbone"), weights.get("pretrained")
    return f"{kind} weights" if backbone == kind else f"{backbone}, weights {kind}"


def _notes(files: RunFiles) -> list[str]:
    """Return what a reader must know before the figures."""
    weights, protocol = (files.run.get(key) or {} for key in ("weights", "protocol"))
    notes = []
    if weights.get("random"):
        notes.append(RANDOM_WARNING)
    elif weights.get("pretrained") == DEMO:
        notes.append(DEMO_REMARK)
    if not protocol.get("complete", True):
        notes.append("PARTIAL: not all images were scored")
    if protocol.get("overlap"):
        notes.append(f"{protocol['overlap']} TEST IMAGES ARE AMONG THE TRAINING IMAGES")
    notes += [text for of in (selection_warning, rounds_remark) if (text := of(protocol))]
    for name, why in (files.run.get("failed") or {}).items():
        notes.append(f"FAILED: {name}: {why}")
    labels = [one.anomalous for one in files.scores.values() if one.anomalous is not None]
    if files.mean is not None and labels:
        found = np.concatenate(labels)
        for kind, there in (("anomalous", found.any()), ("normal", not found.all())):
            if not there:
                notes.append(f"There is no {kind} image: most figures are not defined")
    return [plain(note) for note in notes]


def _rows(files: RunFiles) -> list[tuple[str, int | None, int | None, list[str]]]:
    """Return name, number of images and of anomalous ones, and figures of each category."""
    protocol = files.run.get("protocol") or {}
    images, anomalous = (protocol.get(key) or {} for key in ("images", "anomalous"))
    names = list(files.mean or ())
    return [
        (name, images.get(name), anomalous.get(name), percent(row.get(one) for one in names))
        for name, row in files.figures.items()
    ]


def _summary(files: RunFiles) -> list[tuple[str, str]]:
    return [
        (HEADINGS.get(name, name).replace("\n", " "), percent([files.mean[name]])[0])
        for name in SUMMARY
        if files.mean is not None and files.mean.get(name) is not None
    ]


def _embedded(scores: ScoresOf | None) -> dict[str, Any] | None:
    """Return a category's scores for the script: sorted, little-endian float32 in base 64."""
    if scores is None:
        return None
    if scores.anomalous is None:
        return {"all": _base64(scores.scores)}
    threshold = best_threshold(scores.scores.tolist(), scores.anomalous.tolist())
    return {
        "normal": _base64(scores.scores[~scores.anomalous]),
        "anomalous": _base64(scores.scores[scores.anomalous]),
        "threshold": threshold,
    }


def _base64(scores: np.ndarray) -> str:
    return base64.b64encode(np.sort(scores).astype("<f4").tobytes()).decode("ascii")


def _chart(key: str, files: RunFiles, names: Sequence[str]) -> Chart:
    """Return the curves of a kind; of very many categories, those with the lowest figures."""
    title, x_label, y_label, figure = CHARTS[key]
    found = {name: curves[key] for name, curves in files.curves.items() if key in curves}
    values = {name: (files.figures.get(name) or {}).get(figure) for name in found}
    ranked = sorted(found, key=lambda name: (values[name] is None, values[name] or 0.0))
    ranked = ranked[:MOST_LINES]
    numbers = {name: number for number, name in enumerate(names)}
    reach = max((found[name].x[-1] for name in ranked), default=1.0) or 1.0
    lines = [
        Line(numbers[name], _points(found[name], reach), f"{name} {percent([values[name]])[0]}")
        for name in found
        if name in ranked and name in numbers
    ]
    steps = [step / 4 for step in range(5)]
    return Chart(
        key,
        title,
        x_label,
        y_label,
        [(step * WIDTH, f"{100 * step * reach:.4g}") for step in steps],
        [((1 - step) * HEIGHT, f"{100 * step:.0f}") for step in steps],
        lines,
    )


def _points(curve: Curve, reach: float) -> str:
    places = zip(curve.x, curve.y, strict=True)
    return " ".join(f"{x / reach * WIDTH:.1f},{(1 - y) * HEIGHT:.1f}" for x, y in places)


def _pictures(
    pictures: Sequence[Listed], names: Sequence[str]
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the gallery by kind, and how many pictures there was no room for."""
    numbers = {name: number for number, name in enumerate(names)}
    shown: dict[str, list[dict[str, Any]]] = {}
    room, left_out = MOST_PICTURES, 0
    for one in pictures:
        room -= one.file.stat().st_size
        if room < 0:
            left_out += 1
            continue
        shown.setdefault(one.kind, []).append(
            {
                "data": _picture_data(one.file),
                "name": one.name,
                "category": numbers.get(one.category, -1),
                "label": one.label,
                "score": one.score,
                "has_mask": one.has_mask,
                "full": None if one.full is None else quote(one.full),
            }
        )
    return shown, left_out


def _picture_data(file: Path) -> str:
    kind = file.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def _told_once(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the table of figures tells, and words that are the categories' own names."""
    words = protocol.get("words")
    if isinstance(words, Mapping) and all(name == said for name, said in words.items()):
        protocol = {**protocol, "words": "the names of the categories"}
    return {name: one for name, one in protocol.items() if name not in ("images", "anomalous")}


def _flat(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a record as pairs of words."""
    return [(plain(name).replace("_", " "), _words(value)) for name, value in record.items()]


def _words(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{name}: {_words(one)}" for name, one in value.items()]
    if isinstance(value, list):
        shown = [one if isinstance(one, str) else _words(one) for one in value[:MOST_NAMES]]
        more = f", and {len(value) - MOST_NAMES} more" if len(value) > MOST_NAMES else ""
        return plain(", ".join(shown) + more) or "none"
    return plain(value)
