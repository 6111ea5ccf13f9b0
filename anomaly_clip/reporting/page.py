"""Report page of a run, ``report.html``: one file that needs neither network nor other files.

It embeds the styles, the script, the gallery images, all image scores (for the movable threshold),
the curves and the complete configuration. It is generated from the files in the run's folder and
can be regenerated at any time.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_clip.files import atomic_path
from anomaly_clip.records import source_of
from anomaly_clip.reporting.charts import HEIGHT, MAX_LINES, WIDTH, build_charts, build_legend
from anomaly_clip.reporting.decisions_view import build_view, missing_calibration
from anomaly_clip.reporting.drift_chart import build_drift_chart
from anomaly_clip.reporting.gallery_view import build_gallery, embed_image
from anomaly_clip.reporting.image_table import build_image_table, short_name
from anomaly_clip.reporting.metrics_table import heading
from anomaly_clip.reporting.metrics_view import MetricsView, interval_text
from anomaly_clip.reporting.page_paths import without_folders
from anomaly_clip.reporting.protocol_text import (
    MAX_ENTRIES,
    protocol_text,
    record_text,
    unset_last,
    value_text,
)
from anomaly_clip.reporting.templates import render
from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import RunFiles, mapping, read_files
from anomaly_clip.results.selection import HEADINGS_BY_KIND, best_threshold
from anomaly_clip.results.warnings import rounds_remark

__all__ = ["PAGE", "write_page"]

PAGE = "report.html"
MAX_SCORES = 1_000_000
"""Maximum number of embedded image scores (5.4 bytes each); larger runs get no threshold slider."""
MAX_IMAGE_BYTES = 9_000_000
"""Total size of the embedded images in bytes, before base 64 adds a third."""
MAX_PAGE_BYTES = 19_000_000
"""Size of the page in bytes above which it is rendered without images."""
FEW_IMAGES = 10
"""Number of normal or of anomalous images below which a warning calls the metrics uncertain."""
MAX_CONFIG = 200_000
"""Number of characters after which a configuration is truncated."""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Args:
        folder: Folder of a finished run of ``test``, ``each`` or ``predict``.

    Raises:
        UserError: If the folder is not the folder of a finished run, or contains a damaged file.
    """
    files = without_folders(read_files(folder))
    page = _render(files, MAX_IMAGE_BYTES)
    if len(page) > MAX_PAGE_BYTES:  # if there are very many names, or very long ones
        page = _render(files, 0)
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_bytes(page)
    return folder / PAGE


def _render(files: RunFiles, image_bytes: int) -> bytes:
    """Return the page, with at most ``image_bytes`` bytes of images."""
    # A category has metrics, scores or both: classification has no scores, predict no metrics.
    names = list(dict.fromkeys([*files.metrics, *files.scores]))
    gallery = build_gallery(files, names, image_bytes)
    images = [image for images in gallery.images.values() for image in images]
    has_scores = sum(len(category.scores) for category in files.scores.values()) <= MAX_SCORES
    cards = {(image["of"], image["path"]): image["number"] for image in images if image["path"]}
    has_two_scores = any(row.is_decision_score for row in files.rows)
    table = build_image_table(files.rows, names, cards, files.drawings) if files.scores else None
    metrics = MetricsView(files, names)
    decisions, drift, run = files.decisions, build_drift_chart(files.drift, names), files.run
    page = render(
        "page.html.jinja",
        title=_title(files),
        facts=_facts(files),
        notes=_notes(files, metrics),
        decisions=None if decisions is None else build_view(decisions, files.mean is not None),
        command=missing_calibration(files),
        # The images come first where they were to be decided, and the metrics of a test.
        by_decision=decisions is not None and files.mean is None,
        table=table,
        headings=[heading(name) for name in files.mean or ()],
        metrics=metrics,
        names=names,
        scores=[_embed_scores(files, name) for name in names] if has_scores else [],
        has_two_scores=has_two_scores,
        fdr=None if decisions is None else decisions.fdr,
        transductive=mapping(run.get("protocol")).get("transductive") is True,
        too_many=not has_scores,
        charts=build_charts(files, names),
        legend=build_legend(files, names),
        drift=drift,
        drift_legend=[(e.category, names[e.category], e.style) for e in drift[0].lines]
        if drift
        else [],
        num_lines=min(MAX_LINES, len(files.curves)),
        num_curves=len(files.curves),
        kinds=HEADINGS_BY_KIND,
        gallery=gallery.images,
        gallery_view=gallery,
        left_out=gallery.left_out,
        linked=any(image["full"] for image in images) or bool(table and table["drawings"]),
        shown=gallery.shown,
        unreadable=[
            (short_name(path), printable(reason)) for path, reason in files.unreadable[:MAX_ENTRIES]
        ],
        num_unreadable=len(files.unreadable),
        confusion=None if files.confusion is None else embed_image(files.confusion),
        protocol=unset_last(protocol_text(mapping(run.get("protocol")))),
        weights=unset_last(record_text(mapping(run.get("weights")))),
        seed=run.get("seed"),
        checkpoint=value_text(run.get("checkpoint")),
        versions=mapping(run.get("versions")),
        configs={name: text[:MAX_CONFIG] for name, text in files.configs.items()},
        max_config=MAX_CONFIG,
        width=WIDTH,
        height=HEIGHT,
    )
    return page.encode("utf-8")


# -- texts -----------------------------------------------------------------------------------------


def _title(files: RunFiles) -> str:
    protocol = mapping(files.run.get("protocol"))
    stage = "predict" if files.mean is None else "test"
    method, data = (printable(value) for value in (files.run.get("method"), protocol.get("data")))
    return f"{method} on {data}, {stage}"


def _facts(files: RunFiles) -> str:
    """Return the data set size, the weights and the seed in one line."""
    weights, protocol = (mapping(files.run.get(key)) for key in ("weights", "protocol"))
    counts = mapping(protocol.get("images")).values()
    images = sum(count for count in counts if isinstance(count, int))
    images = images or sum(len(category.scores) for category in files.scores.values())
    facts = [
        _counted(images, "image", "images"),
        _counted(len(files.metrics or files.scores), "category", "categories"),
        _weights_name(weights),
    ]
    if protocol.get("one_model_a_category"):
        facts.append("one model per category")
    if files.run.get("seed") is not None:
        facts.append(f"seed {files.run['seed']}")
    return printable("  ·  ".join(facts))


def _counted(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"


def _weights_name(weights: Mapping[str, Any]) -> str:
    backbone, kind = weights.get("backbone"), source_of(weights)
    return f"{kind} weights" if backbone == kind else f"{backbone} with weights {kind}"


def _notes(files: RunFiles, metrics: MetricsView) -> list[str]:
    """Return the warnings to read before the metrics."""
    protocol = mapping(files.run.get("protocol"))
    notes = list(files.warnings)
    if files.num_rounds > 1:
        spread = rounds_remark(protocol) if not protocol.get("one_model_a_category") else None
        notes.append(spread or f"means over {files.num_rounds} rounds")
        notes.append("Curves, scores, counts and images are those of the first round")
    failed = mapping(files.run.get("failed"))
    notes += [f"FAILED: {name}: {failed[name]}" for name in list(failed)[:MAX_ENTRIES]]
    if len(failed) > MAX_ENTRIES:
        notes.append(f"FAILED: {len(failed) - MAX_ENTRIES:,} more categories")
    labels = [s.anomalous for s in files.scores.values() if s.anomalous is not None]
    if files.mean is not None and labels:
        anomalous = np.concatenate(labels)
        counts = {"normal": int((~anomalous).sum()), "anomalous": int(anomalous.sum())}
        few = {kind: count for kind, count in counts.items() if 0 < count < FEW_IMAGES}
        notes += [
            f"No {kind} image was scored: most metrics are undefined"
            for kind, count in counts.items()
            if not count
        ]
        if few and all(counts.values()):
            parts = [
                _counted(count, f"{kind} image", f"{kind} images") for kind, count in few.items()
            ]
            note = f"Only {' and '.join(parts)}: the metrics are uncertain"
            if metrics.mean_interval is not None:
                ends = interval_text(metrics.mean_interval)
                note += f"; the 95 % interval of image AUROC is {ends}"
            if counts["normal"] == 1:
                note += "; all rankings are against this one normal image"
            notes.append(note)
    return [printable(note) for note in notes]


# -- metrics and scores ----------------------------------------------------------------------------


def _embed_scores(files: RunFiles, name: str) -> dict[str, Any] | None:
    """Return a category's scores for the script: sorted little-endian floats in base 64."""
    scores = files.scores.get(name)
    if scores is None:
        return None
    calibrated = None if files.decisions is None else files.decisions.categories.get(name)
    # With a calibration, the counts at its threshold must be those of the decisions.
    is_exact = calibrated is None or bool((scores.scores == scores.scores.astype("<f4")).all())
    entry: dict[str, Any] = {
        "double": not is_exact,
        "calibrated": None if calibrated is None else calibrated.threshold,
    }
    if scores.anomalous is None:
        return {**entry, "all": _base64(scores.scores, is_exact)}
    return {
        **entry,
        "normal": _base64(scores.scores[~scores.anomalous], is_exact),
        "anomalous": _base64(scores.scores[scores.anomalous], is_exact),
        "threshold": best_threshold(scores.scores.tolist(), scores.anomalous.tolist()),
    }


def _base64(scores: np.ndarray, is_single: bool) -> str:
    values = np.sort(scores).astype("<f4" if is_single else "<f8")
    return base64.b64encode(values.tobytes()).decode("ascii")
