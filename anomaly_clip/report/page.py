"""The page of a run, ``report.html``: one file that needs neither network nor other files.

Everything is in it: styles, script, the pictures of the gallery, all image scores (so that a
threshold can be moved), curves and the complete configuration. It is made of what the run's folder
holds and can be made again at any time.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from anomaly_clip.files import atomic_path
from anomaly_clip.metrics.curves import Curve
from anomaly_clip.report.metrics_table import HEADINGS, percent, rounds_remark
from anomaly_clip.results.finished_run import plain
from anomaly_clip.results.run_files import Listed, RunFiles, ScoresOf, mapping, read_files
from anomaly_clip.results.selection import KINDS, best_threshold

__all__ = ["CHARTS", "PAGE", "lowest", "write_page"]

PAGE = "report.html"
MOST_SCORES = 1_000_000
"""Images whose scores are embedded, 5.4 bytes each; with more the threshold is left out."""
MOST_PICTURES = 9_000_000
"""Bytes of pictures that are embedded, which take a third more there."""
MOST_BYTES = 19_000_000
"""Of the page; one that is larger goes without pictures."""
MOST_LETTERS = 200_000
"""Of a configuration."""
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
    page = _render(files, MOST_PICTURES)
    if len(page) > MOST_BYTES:  # of very many or very long names
        page = _render(files, 0)
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_bytes(page)
    return folder / PAGE


def _render(files: RunFiles, room: int) -> bytes:
    """Return the page, with pictures of so many bytes at most."""
    # Figures, scores or both: a classification has no scores, a predict no figures.
    names = list(dict.fromkeys([*files.figures, *files.scores]))
    environment = Environment(
        loader=PackageLoader("anomaly_clip", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pictures, left_out = _pictures(files.pictures, names, room)
    has_scores = sum(len(one.scores) for one in files.scores.values()) <= MOST_SCORES
    run, protocol = files.run, mapping(files.run.get("protocol"))
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
        linked=any(one["full"] for of_kind in pictures.values() for one in of_kind),
        confusion=None if files.confusion is None else _picture_data(files.confusion),
        protocol=_flat(_told(protocol)),
        weights=_flat(mapping(run.get("weights"))),
        seed=run.get("seed"),
        checkpoint=_words(run.get("checkpoint")),
        versions=mapping(run.get("versions")),
        configs={name: text[:MOST_LETTERS] for name, text in files.configs.items()},
        most_letters=MOST_LETTERS,
        width=WIDTH,
        height=HEIGHT,
    )
    return page.encode("utf-8")


def _title(files: RunFiles) -> str:
    protocol = mapping(files.run.get("protocol"))
    stage = "predict" if files.mean is None else "test"
    method, data = (plain(value) for value in (files.run.get("method"), protocol.get("data")))
    return f"{method} on {data}, {stage}"


def _facts(files: RunFiles) -> str:
    """Return what was tested with what, in one line."""
    weights, protocol = (mapping(files.run.get(key)) for key in ("weights", "protocol"))
    images = _sum(protocol.get("images")) or sum(len(one.scores) for one in files.scores.values())
    found = [
        _counted(images, "image", "images"),
        _counted(len(files.figures or files.scores), "category", "categories"),
        _named(weights),
    ]
    if protocol.get("one_model_a_category"):
        found.append("one model a category")
    if files.run.get("seed") is not None:
        found.append(f"seed {files.run['seed']}")
    return plain("  ·  ".join(found))


def _sum(counts: object) -> int:
    """Return the sum of counts by category, 0 where they are not known."""
    return sum(count for count in mapping(counts).values() if isinstance(count, int))


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _named(weights: Mapping[str, Any]) -> str:
    backbone, kind = weights.get("backbone"), weights.get("pretrained")
    return f"{kind} weights" if backbone == kind else f"{backbone}, weights {kind}"


def _notes(files: RunFiles) -> list[str]:
    """Return what a reader must know before the figures."""
    protocol = mapping(files.run.get("protocol"))
    notes = list(files.said)
    if _rounds(files) > 1:
        spread = rounds_remark(protocol) if not protocol.get("one_model_a_category") else None
        notes.append(spread or f"means of {_rounds(files)} rounds")
        notes.append("Curves, scores, counts and pictures are those of the first round")
    failed = mapping(files.run.get("failed"))
    notes += [f"FAILED: {name}: {failed[name]}" for name in list(failed)[:MOST_NAMES]]
    if len(failed) > MOST_NAMES:
        notes.append(f"FAILED: {len(failed) - MOST_NAMES:,} more categories")
    labels = [one.anomalous for one in files.scores.values() if one.anomalous is not None]
    if files.mean is not None and labels:
        found = np.concatenate(labels)
        for kind, there in (("anomalous", found.any()), ("normal", not found.all())):
            if not there:
                notes.append(f"No {kind} image was scored: most figures are not defined")
    return [plain(note) for note in notes]


def _rounds(files: RunFiles) -> int:
    """Return of how many rounds the figures are means."""
    rounds = mapping(files.run.get("protocol")).get("rounds")
    return rounds if isinstance(rounds, int) else 1


def _rows(files: RunFiles) -> list[tuple[str, int | None, int | None, list[str]]]:
    """Return name, number of images and of anomalous ones, and figures of each category."""
    protocol = mapping(files.run.get("protocol"))
    images, anomalous = (mapping(protocol.get(key)) for key in ("images", "anomalous"))
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


def lowest(files: RunFiles, key: str) -> dict[str, Curve]:
    """Return the curves of a kind by category; of very many, those with the lowest figures."""
    figure = CHARTS[key][-1]
    found = {name: curves[key] for name, curves in files.curves.items() if key in curves}
    values = {name: mapping(files.figures.get(name)).get(figure) for name in found}
    ranked = sorted(found, key=lambda name: (values[name] is None, values[name] or 0.0))
    kept = set(ranked[:MOST_LINES])
    return {name: curve for name, curve in found.items() if name in kept}


def _chart(key: str, files: RunFiles, names: Sequence[str]) -> Chart:
    title, x_label, y_label, figure = CHARTS[key]
    found = lowest(files, key)
    numbers = {name: number for number, name in enumerate(names)}
    reach = max((curve.x[-1] for curve in found.values()), default=1.0) or 1.0
    lines = []
    for name, curve in found.items():
        # A mean of rounds is not the area under the curve of the first.
        value = None if _rounds(files) > 1 else mapping(files.figures.get(name)).get(figure)
        told = name if value is None else f"{name} {percent([value])[0]}"
        if name in numbers:
            lines.append(Line(numbers[name], _points(curve, reach), told))
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
    pictures: Sequence[Listed], names: Sequence[str], room: int
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the gallery by kind, the worst first, and how many pictures there was no room for."""
    numbers = {name: number for number, name in enumerate(names)}
    by_kind: dict[str, list[Listed]] = {}
    for one in sorted(pictures, key=lambda one: -one.gap):
        by_kind.setdefault(one.kind, []).append(one)
    # The worst of each kind, then the next ones: no kind takes the room of another.
    rounds = zip_longest(*by_kind.values())
    in_turn = [one for of_round in rounds for one in of_round if one is not None]
    shown: dict[str, list[dict[str, Any]]] = {}
    left_out = 0
    for one in in_turn:
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


def _told(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Put a protocol into words.

    What the table of figures tells is left out, as are words that are the categories' own names.
    """
    told = {name: one for name, one in protocol.items() if name not in ("images", "anomalous")}
    words = mapping(protocol.get("words"))
    if words and all(name == said for name, said in words.items()):
        told["words"] = "the names of the categories"
    if "overlap" in told and told["overlap"] is None:
        told["overlap"] = "not checked"
    if told.get("borrowed") and told.get("auxiliary") is None:
        told["auxiliary"] = "not known"
    return told


def _flat(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a record as pairs of words."""
    return [(plain(name).replace("_", " "), _words(value)) for name, value in record.items()]


def _words(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        value = [f"{name}: {_words(one)}" for name, one in value.items()]
    if isinstance(value, list):
        between = "; " if any(isinstance(one, Mapping) for one in value) else ", "
        shown = [one if isinstance(one, str) else _words(one) for one in value[:MOST_NAMES]]
        more = f"{between}and {len(value) - MOST_NAMES:,} more" if len(value) > MOST_NAMES else ""
        return plain(between.join(shown) + more) or "none"
    return plain(value)
