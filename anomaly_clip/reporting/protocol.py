"""Protocol of finished runs, as a paragraph and a table for a paper, from ``metrics.json`` alone.

Nothing is inferred: what the file lacks is shown as not recorded, and entries that this module does
not know are listed at the end, under the names they have in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from anomaly_clip.data.info import DATASETS
from anomaly_clip.reporting.comparison import (
    ComparisonTable,
    TableRows,
    label_runs,
    run_legend,
    run_warnings,
)
from anomaly_clip.reporting.protocol_text import LABELS, value_text
from anomaly_clip.reporting.table import ReportTable, TableLine, TableNote
from anomaly_clip.results.finished_run import FinishedRun, printable
from anomaly_clip.results.run_files import mapping

__all__ = ["NOT_RECORDED", "protocol_report"]

NOT_RECORDED = "not recorded"
INAPPLICABLE = "does not apply"
"""Text next to an item of another run, such as one of pixel metrics for a classification."""
HEADER = ["run", "section", "item", "value"]
"""Columns of the machine-readable table."""
Entry = tuple[str, Any]
"""Dotted path of an entry in section ``run`` of ``metrics.json``, and its value."""
OTHER = "other settings"
"""Section of the entries that this module does not know."""


class Item(NamedTuple):
    """One line of the table.

    Args:
        section: Heading that the item belongs to.
        name: Name of the item.
        path: Dotted path of its value in section ``run`` of ``metrics.json``.
        text: Returns the value as text; the value is in the file, but may be null.
    """

    section: str
    name: str
    path: str
    text: Callable[[Any], str] = value_text


def _overlap(value: Any) -> str:
    return "not checked" if value is None else value_text(value)


def _pixels(value: Any) -> str:
    return f"{value} x {value} pixels" if isinstance(value, int) else value_text(value)


def _resize(value: Any) -> str:
    """Return the rule of resizing, which is recorded as the text of a dataclass."""
    match = re.fullmatch(r"Resize\(rule='(\w+)', size=(\w+), filter='(\w+)'\)", str(value))
    if match is None:
        return value_text(value)
    rule, size, kind = match.groups()
    before = "" if size == "None" else f", {size} pixels before the crop"
    return f"rule {rule}{before}, filter {kind}"


def _steps(value: Any) -> str:
    return "all thresholds" if value is None else f"{value_text(value)} equally spaced thresholds"


def _names(value: Any) -> str:
    names = mapping(value)
    if names and all(category == name for category, name in names.items()):
        return "same as the categories"
    return value_text(value)


TRANSDUCTIVE_ITEMS = (
    *("transductive", "scoring", "layers", "r_list", "interval", "k_list", "grid"),
    *("memory", "start", "order_seed"),
)
"""Keys of the protocol of transductive methods."""
PATCH_ITEMS = (
    *("combine", "explained", "distance", "num_neighbours", "quantile"),
    *("rotations", "object_masks"),
)
"""Keys of the protocol of SubspaceAD and AnomalyDINO, besides layers."""
ITEMS = (
    Item("data", "data set", "protocol.data"),
    Item("data", "folder", "protocol.root"),
    Item("data", "split", "protocol.split"),
    Item("data", "complete", "protocol.complete"),
    Item("data", "test images listed", "protocol.listed"),
    Item("data", "normal and anomalous test images", "images"),
    Item("data", "category names in prompts", "protocol.words", _names),
    Item("data", "one model per category", "protocol.one_model_a_category"),
    Item("data", "test images among the training images", "protocol.overlap", _overlap),
    Item("data", "different images of the fit", "protocol.fitted_images"),
    Item("data", "failed categories", "failed"),
    Item("data", "categories trained on", "protocol.train_categories"),
    Item("data", "auxiliary data set", "protocol.auxiliary"),
    Item("data", "normal images per category (few-shot)", "protocol.shots"),
    Item("data", "fraction of the training images", "protocol.fraction"),
    Item("data", "synthetic defects", "protocol.synthesis"),
    Item("data", "validation split", "protocol.val_split"),
    Item("method", "method", "method"),
    *(Item("method", LABELS.get(key, key), f"protocol.{key}") for key in TRANSDUCTIVE_ITEMS),
    *(Item("method", LABELS.get(key, key), f"protocol.{key}") for key in PATCH_ITEMS),
    Item("method", "checkpoint", "checkpoint"),
    Item("method", "SHA-256 of the checkpoint", "environment.checkpoint_sha256"),
    Item("method", "trained layers or prompts from elsewhere", "protocol.borrowed"),
    Item("method", "trained layers or prompts that the fit started from", "protocol.started_from"),
    Item("weights", "backbone", "weights.backbone"),
    Item("weights", "kind of backbone", "weights.kind"),
    Item("weights", "weights", "weights.pretrained"),
    Item("weights", "activation", "weights.activation"),
    Item("weights", "interpolation of positional embeddings", "weights.positions"),
    Item("weights", "untrained", "weights.random"),
    Item("weights", "SHA-256 of the weights", "weights.sha256"),
    Item("images", "image size", "protocol.image_size", _pixels),
    Item("images", "resize", "protocol.resize", _resize),
    Item("images", "mask size", "protocol.mask_size", _pixels),
    Item("images", "filter of masks", "protocol.mask_filter"),
    Item("images", "threshold of resized masks", "protocol.mask_threshold"),
    Item("images", "values of masks", "protocol.mask_values"),
    Item("metrics", "ranking of pixels", "protocol.pixels"),
    Item("metrics", "thresholds of PRO", "protocol.pro_steps", _steps),
    Item("metrics", "false positive rate limit of PRO", "protocol.fpr_limit"),
    Item("metrics", "pixel metrics with wide bounds", "uncertain"),
    Item("metrics", "average", "protocol.conventions.average"),
    Item("metrics", "pixels", "protocol.conventions.pixels"),
    Item("metrics", "regions of PRO", "protocol.conventions.regions"),
    Item("seeds", "seed of the run", "seed"),
    Item("seeds", "seed of the data", "protocol.data_seed"),
    Item("software", "device", "environment.device"),
    Item("software", "precision", "environment.precision"),
    Item("software", "processes", "environment.processes"),
    Item("software", "threads", "environment.threads"),
)
"""Items that a paper must state; those that a file lacks are shown as well."""
DEFAULTS = {
    "weights.activation": "that of the model name",
    "weights.positions": "bicubic_antialias (default)",
}
"""Values of items that a file has only if they are not these defaults; see `WeightsRecord`."""
CNN_METHODS = (
    *("LinearProbe", "PaDiM", "PatchCore", "RD4AD", "RegAD", "SimpleNet"),
    *("AnomalyDINO", "BatchedAnomalyDINO", "BatchedSubspaceAD", "SubspaceAD"),
)
"""Methods whose backbones have neither of the `DEFAULTS`."""
OPTIONAL = (
    *("protocol.one_model_a_category", "protocol.started_from", "failed", "weights.kind"),
    *(f"protocol.{key}" for key in (*TRANSDUCTIVE_ITEMS, *PATCH_ITEMS)),
)
"""Paths of items that are absent where they do not apply."""
OF_PIXELS = (
    "protocol.mask_",
    "protocol.pixels",
    "protocol.pro_steps",
    "protocol.fpr_limit",
    "protocol.conventions.pixels",
    "protocol.conventions.regions",
    "uncertain",
)
"""Starts of the paths of items that are shown only for runs with pixel metrics."""
SHOWN_OTHERWISE = ("protocol.images", "protocol.anomalous", "versions")
"""Paths of entries that are shown without an item of their own."""


def protocol_report(runs: Sequence[FinishedRun]) -> ComparisonTable:
    """Return a paragraph per run above a table with one column per run.

    Args:
        runs: Finished runs, of any methods and data sets.
    """
    runs_by_letter = label_runs(runs)
    by_run = {letter: _items(run) for letter, run in runs_by_letter.items()}
    names = list(dict.fromkeys(name for items in by_run.values() for name in items))
    order = {section: n for n, section in enumerate(dict.fromkeys(item.section for item in ITEMS))}
    names.sort(key=lambda name: order.get(name[0], len(order)))
    lines, section = [], None
    for name in names:
        # A run has all items that apply to it, but only those other settings that are in its file.
        absent = NOT_RECORDED if name[0] in (OTHER, "software") else INAPPLICABLE
        texts = (items.get(name, absent) for items in by_run.values())
        first = name[0] != section
        section = name[0]
        lines.append(TableLine((section if first else "", name[1], *texts), "item", first))
    several = len(runs) > 1
    paragraphs = [
        TableNote(f"{letter}: {_paragraph(run)}" if several else _paragraph(run))
        for letter, run in runs_by_letter.items()
    ]
    table = ReportTable(
        title="Protocol, as recorded in metrics.json",
        notes=[*paragraphs, *run_warnings(runs_by_letter)],
        headings=["", "item", *(runs_by_letter if several else ["value"])],
        lines=lines,
        legend=run_legend(runs_by_letter),
        num_names=2 + len(runs),
    )
    rows: list[list[object]] = [
        [run.label, section, item, None if text == NOT_RECORDED else text]
        for letter, run in runs_by_letter.items()
        for (section, item), text in by_run[letter].items()
    ]
    return ComparisonTable(table, TableRows(HEADER, rows))


# -- items of one run ------------------------------------------------------------------------------


def _items(run: FinishedRun) -> dict[tuple[str, str], str]:
    """Return the texts of a run by section and item, in the order of ``ITEMS``."""
    texts: dict[tuple[str, str], str] = {}
    for item in ITEMS:
        if item.path == "images":
            texts[item.section, item.name] = _counts_text(_counts(run, list(run.categories)))
            if len(run.categories) > 1:
                for category in run.categories:
                    name = f"normal and anomalous test images, {printable(category)}"
                    texts[item.section, name] = _counts_text(_counts(run, [category]))
            continue
        is_optional = item.path in OPTIONAL or (item.path in DEFAULTS and _has_no_texts(run))
        if is_optional and not _is_recorded(run, item.path):
            continue
        if item.path.startswith(OF_PIXELS) and not _has_pixel_metrics(run):
            continue
        texts[item.section, item.name] = _item_text(run, item)
    versions = mapping(run.record.get("versions"))
    if not versions:
        texts["software", "versions"] = NOT_RECORDED
    for package, version in versions.items():
        texts["software", printable(package)] = value_text(version)
    shown = {*(item.path for item in ITEMS), *SHOWN_OTHERWISE}
    for path, value in _entries(run.record, shown):
        key = path.removeprefix("protocol.") if "." in path else f"run.{path}"
        name = LABELS.get(key, printable(key).replace("_", " "))
        texts[OTHER, name] = value_text(value)
    return texts


def _entries(record: Mapping[str, Any], shown: set[str], start: str = "") -> Iterator[Entry]:
    """Yield path and value of the entries that are not shown; parts of sections one by one."""
    for key, value in record.items():
        path = f"{start}{key}"
        if path in shown:
            continue
        if isinstance(value, Mapping) and any(other.startswith(f"{path}.") for other in shown):
            yield from _entries(value, shown, f"{path}.")
        else:
            yield path, value


def _item_text(run: FinishedRun, item: Item) -> str:
    if item.path == "uncertain":
        texts = [f"{printable(row)}: {', '.join(m)}" for row, m in run.uncertain.items()]
        return "; ".join(texts) or "none"
    if item.path == "protocol.train_categories":
        return _trained_categories(run)
    if item.path in DEFAULTS and not _is_recorded(run, item.path):
        return DEFAULTS[item.path]
    return _text(run, item.path, item.text)


def _trained_categories(run: FinishedRun) -> str:
    """Return the categories of the fit: the recorded option, unless others make it irrelevant."""
    recorded, value = _lookup(run, "protocol.train_categories")
    if not recorded:
        return NOT_RECORDED
    if run.protocol.get("borrowed"):
        return "unknown, as the trained layers or prompts are from elsewhere"
    if run.protocol.get("fitted") is False:
        return "none (the method was not trained)"
    if run.protocol.get("auxiliary"):
        return "those of the auxiliary data set"
    if value not in ("same", "others"):
        return value_text(value)
    each = run.protocol.get("one_model_a_category") is True
    tested = "the tested category of each model" if each else "the tested categories"
    return tested if value == "same" else f"all but {tested}"


def _has_no_texts(run: FinishedRun) -> bool:
    """Return whether the backbone is a ViT, or a CNN, whose layers have names."""
    layers = run.protocol.get("layers")
    named = isinstance(layers, list) and any(isinstance(layer, str) for layer in layers)
    is_vit = mapping(run.record.get("weights")).get("kind") == "ViT"
    return named or is_vit or run.method in CNN_METHODS


def _has_pixel_metrics(run: FinishedRun) -> bool:
    return any(
        name.startswith("pixel") and value is not None
        for metrics in run.categories.values()
        for name, value in metrics.items()
    )


def _lookup(run: FinishedRun, path: str) -> tuple[bool, Any]:
    """Return whether the file has an entry, and its value."""
    value: Any = run.record
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False, None
        value = value[key]
    return True, value


def _is_recorded(run: FinishedRun, path: str) -> bool:
    return _lookup(run, path)[0]


def _text(run: FinishedRun, path: str, text: Callable[[Any], str] = value_text) -> str:
    recorded, value = _lookup(run, path)
    return text(value) if recorded else NOT_RECORDED


def _counts(run: FinishedRun, categories: Sequence[str]) -> tuple[int, int] | None:
    """Return the numbers of normal and of anomalous test images; None if any is not recorded."""
    images, anomalous = mapping(run.protocol.get("images")), mapping(run.protocol.get("anomalous"))
    pairs = [(images.get(category), anomalous.get(category)) for category in categories]
    if not all(isinstance(number, int) for pair in pairs for number in pair):
        return None
    defective = sum(number for _, number in pairs)  # type: ignore[misc]
    return sum(number for number, _ in pairs) - defective, defective  # type: ignore[misc]


def _counts_text(counts: tuple[int, int] | None) -> str:
    return NOT_RECORDED if counts is None else f"{counts[0]:,} and {counts[1]:,}"


# -- the paragraph ---------------------------------------------------------------------------------


def _paragraph(run: FinishedRun) -> str:
    """Return the protocol in prose; missing items are marked in brackets."""

    def value(path: str, text: Callable[[Any], str] = value_text) -> str:
        if _is_recorded(run, path):
            return _text(run, path, text)
        return f"[{path.rpartition('.')[2].replace('_', ' ')} {NOT_RECORDED}]"

    data = DATASETS[run.data].title if run.data in DATASETS else printable(run.data)
    counts = _counts(run, list(run.categories))
    images = "[number of images not recorded]"
    if counts is not None:
        images = f"{sum(counts):,} images, {counts[1]:,} of them anomalous"
    number = len(run.categories)
    categories = "1 category" if number == 1 else f"{number} categories"
    each = ", with one model per category" * (run.protocol.get("one_model_a_category") is True)
    weights = "untrained weights"
    if not run.random:
        sha256 = _text(run, "weights.sha256")
        is_recorded = sha256 not in (NOT_RECORDED, "none")
        weights = f"weights {run.weights}, SHA-256 {sha256 if is_recorded else '[not recorded]'}"
    sentences = [
        f"{printable(run.method)} was tested on the {value('protocol.split')} split of {data} "
        f"({categories}; {images}){each}",
        f"The backbone was {printable(run.backbone)} ({weights})",
        f"Images were resized to {value('protocol.image_size', _pixels)} "
        f"({value('protocol.resize', _resize)})",
    ]
    if run.protocol.get("transductive") is True:
        sentences.append(
            "The method is transductive: each image was scored by comparison with the other test "
            "images of its category"
        )
    shots, auxiliary = run.protocol.get("shots"), run.protocol.get("auxiliary")
    if shots:
        sentences.append(f"Normal images per category: {value_text(shots)}")
    if auxiliary:
        sentences.append(f"It was trained on {printable(auxiliary)}")
    if _has_pixel_metrics(run):
        sentences += [
            f"Masks were resized to {value('protocol.mask_size', _pixels)} "
            f"(filter {value('protocol.mask_filter')}, threshold "
            f"{value('protocol.mask_threshold')})",
            f"PRO was computed over {value('protocol.pro_steps', _steps)} up to a false positive "
            f"rate of {value('protocol.fpr_limit')}",
        ]
    wide = dict.fromkeys(name for names in run.uncertain.values() for name in names)
    if wide:
        sentences.append(
            f"Of these metrics, {', '.join(wide)} may differ from the exact values by more than "
            f"0.1 (intervals in metrics.json)"
        )
    if number > 1:
        sentences.append(
            f"Metrics over several categories: {value('protocol.conventions.average')}"
        )
    versions = mapping(run.record.get("versions"))
    software = ", ".join(
        f"{package} {printable(versions[package])}"
        for package in ("anomaly_clip", "torch")
        if package in versions
    )
    sentences += [
        f"The seed was {value('seed')}, that of the data {value('protocol.data_seed')}",
        f"Software: {software or '[versions not recorded]'}",
    ]
    return ". ".join(sentences) + "."
