"""The images of the report page: embedded files, margins, and the legend above them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from anomaly_clip.reporting.decisions_view import number_text
from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import GalleryImage, RunFiles

__all__ = ["GalleryView", "build_gallery", "embed_image"]

MARGINS = {
    "calibrated": "the calibrated threshold",
    "f1": "the threshold with the highest F1",
    "highest": "the highest score (there is no threshold)",
}
"""Origins of a margin."""
LABELLED = ("false_alarm", "miss", "hit")
DECIDED = ("anomalous", "closest", "marked")


class GalleryView(NamedTuple):
    """The images, as the page shows them."""

    images: dict[str, list[dict[str, Any]]]
    """By kind, worst first."""
    left_out: int
    """Number of images beyond the size limit."""
    ranges: list[tuple[int, str, str, str]]
    """Index and name of each category, and both ends of its colour scale."""
    margins: str
    """Origin of the margins; empty without margins."""
    shown: set[str]
    """Keys that have a value for at least one image."""
    has_panels: bool
    """True if heat maps or masks are hidden until they are asked for."""


def build_gallery(files: RunFiles, names: Sequence[str], num_bytes: int) -> GalleryView:
    """Return the images of the page with all that is written about them.

    Args:
        files: Files of the run.
        names: Categories in the order of the page.
        num_bytes: Maximum total size of the embedded images in bytes.
    """
    numbers = {name: number for number, name in enumerate(names)}
    by_kind: dict[str, list[GalleryImage]] = {}
    for image in sorted(files.gallery, key=lambda image: -image.gap):
        by_kind.setdefault(image.kind, []).append(image)
    # The worst of each kind, then the second worst and so on, so that no kind uses up the limit.
    ranks = zip_longest(*by_kind.values())
    by_rank = [image for rank in ranks for image in rank if image is not None]
    embedded: dict[str, list[dict[str, Any]]] = {}
    left_out = number = 0
    ranges: dict[str, tuple[float, float]] = {}
    bases = {name: _margin_base(files, name) for name in {image.category for image in by_rank}}
    for image in by_rank:
        num_bytes -= image.file.stat().st_size
        if num_bytes < 0:
            left_out += 1
            continue
        if image.scale is not None and image.has_heat:
            ranges.setdefault(image.category, image.scale)
        embedded.setdefault(image.kind, []).append(
            {
                "number": number,
                "data": embed_image(image.file),
                "name": image.name,
                "of": image.category,
                "path": image.path,
                "category": numbers.get(image.category, -1),
                "label": image.label,
                "score": image.score,
                "score_text": number_text(image.score),
                "margin": _margin(image, bases[image.category]),
                "p_value": image.p_value,
                "decision": image.decision,
                "has_mask": image.has_mask,
                "has_contour": image.has_contour,
                "has_heat": image.has_heat,
                "has_overlay": image.has_overlay,
                "shape": _shape(image),
                "full": None if image.full is None else quote(image.full),
            }
        )
        number += 1
    cards = [card for cards in embedded.values() for card in cards]
    used = {bases[card["of"]] for card in cards if card["margin"]}
    return GalleryView(
        embedded,
        left_out,
        [
            (numbers.get(name, -1), printable(name), number_text(low), number_text(high))
            for name, (low, high) in sorted(
                ranges.items(), key=lambda item: numbers.get(item[0], -1)
            )
        ],
        " or ".join(text for base, text in MARGINS.items() if base in used),
        {key for card in cards for key, value in card.items() if value},
        any(card["has_overlay"] for card in cards),
    )


def embed_image(file: Path) -> str:
    """Return an image file as a data URL."""
    kind = file.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def _margin_base(files: RunFiles, category: str) -> str:
    """Return a key of `MARGINS`; empty if the order of a category's images is that of the scores.

    It is what ``gap`` was measured from when the images were selected; see
    :class:`~anomaly_clip.results.selection.SelectedImage`.
    """
    if files.decisions is not None and category in files.decisions.categories:
        return "calibrated"
    scores = files.scores.get(category)
    if scores is None or scores.anomalous is None:
        return ""
    has_both = scores.anomalous.any() and not scores.anomalous.all()
    return "f1" if has_both else "highest"


def _margin(image: GalleryImage, base: str) -> str | None:
    """Return the sort key of an image in percent: negative below the threshold."""
    if not base or image.kind not in (*LABELLED, *(DECIDED if base == "calibrated" else ())):
        return None
    return f"{-100 * image.gap if image.kind == 'miss' else 100 * image.gap:+.1f} %"


def _shape(image: GalleryImage) -> tuple[float, float, bool] | None:
    """Return the aspect ratios of the front panels and of all panels, and whether there is one.

    The front panels are the image and its overlay; heat map and mask repeat what is in the overlay.
    None for a run of an earlier version, whose panels are all shown.
    """
    if image.panel is None:
        return None
    width, height = image.panel
    with Image.open(image.file) as sheet:
        all_width = sheet.width
    count = image.num_panels
    gap = (all_width - count * width) / (count - 1) if count > 1 else 0.0
    front = 2 * width + gap if image.has_overlay else all_width
    return round(front / height, 4), round(all_width / height, 4), count == 1
