"""Matching of runs to rows of a published table, by method, data, protocol and weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomaly_clip.data.info import dataset_info
from anomaly_clip.reporting.published import PublishedTable, PublishedTables, RunSpec
from anomaly_clip.results.finished_run import FinishedRun, printable

__all__ = ["differences", "mismatch"]

OF_WEIGHTS = ("backbone", "image_size", "layers")
"""Conditions that random and demo weights need not meet."""
VARIANT_CONDITIONS = {"model.backbone.quick_gelu", "model.backbone.positions"}
"""Conditions of rows whose source does not use the weights in the default way."""


def differences(
    spec: RunSpec,
    run: FinishedRun,
    source: PublishedTables,
    weights_kinds: Mapping[Path, str],
) -> list[str]:
    """Return the differences between a run and the run that a row requires; empty if they match.

    Random and demo weights are accepted in place of any weights, with any backbone, image size and
    model options.

    Args:
        spec: The run that the row requires.
        run: The run to match.
        source: All published tables.
        weights_kinds: Names of the weights by file, for files without a provenance record.
    """
    texts = []
    is_transductive = spec.match.get("transductive") is True  # and has nothing to fit
    for key, value in spec.match.items():
        if run.is_stand_in and (key in OF_WEIGHTS or key.startswith("model.")):
            continue
        if key == "each" and (is_transductive or len(run.categories) == 1):
            continue
        run_value = _condition(run, key, source)
        if run_value != value:
            texts.append(_difference_text(key, run_value, value))
    if is_transductive and run.protocol.get("complete", True):
        texts += _image_differences(run)
    if not run.is_stand_in:
        texts += _weights_differences(spec.weights, run, source, weights_kinds)
        if run.variant and not VARIANT_CONDITIONS & spec.match.keys():
            texts.append(f"its weights have {printable(run.variant)}")
    return texts


def _condition(run: FinishedRun, key: str, source: PublishedTables) -> object:
    """Return the value of a run that a condition refers to.

    A run that was made before an option existed counts as having what was then the only behaviour.
    """
    if key.startswith("model."):
        model = run.config.get("model")
        value = _lookup(model.get("init_args") if isinstance(model, dict) else None, key[6:])
        value = source.defaults.get(key) if value is None else value
        # Options with further values, such as auto, are saved as text.
        return value == "true" if value in ("true", "false") else value
    if key == "each":
        return bool(run.protocol.get("one_model_a_category", False))
    fields = {"method": run.method, "data": run.data, "backbone": run.backbone}
    return fields[key] if key in fields else run.protocol.get(key)


def _difference_text(key: str, run_value: object, required: object) -> str:
    if key == "each":
        return f"it has one model {'for all categories' if required else 'per category'}"
    if run_value is None:
        return f"{key} is unset, not {_as_typed(required)}"
    addition = "" if required is None else f", not {_as_typed(required)}"
    return f"{key} is {_as_typed(run_value)}{addition}"


def _image_differences(run: FinishedRun) -> list[str]:
    """Return the first category with another number of test images than the data set has."""
    images, counts = run.protocol.get("images"), dataset_info(run.data).counts
    for category, number in images.items() if isinstance(images, Mapping) else ():
        expected = counts.get(category)
        if expected is not None and number != expected.normal + expected.anomalous:
            total = expected.normal + expected.anomalous
            return [f"{printable(category)} has {printable(number)} images, not {total}"]
    return []


def _as_typed(value: object) -> str:
    """Return a value as on the command line."""
    return str(value).lower() if isinstance(value, bool) else printable(value)


def _weights_differences(
    required: str,
    run: FinishedRun,
    source: PublishedTables,
    weights_kinds: Mapping[Path, str],
) -> list[str]:
    if run.pretrained == required:
        return []
    kind = weights_kinds.get(Path(run.pretrained).expanduser().resolve())
    if kind is not None:
        return [] if kind == required else [f"its weights are {kind}, not {required}"]
    spec = source.weights.get(required)
    if spec is None:
        return [f"its weights are {run.weights}, not {required}"]
    if not run.provenance:
        file = printable(run.pretrained)
        return [
            f"its weights {file} have no provenance record (if these are the right weights, pass "
            f"--weights {required}={file})"
        ]
    return [
        f"{key} of its weights is {printable(recorded)}, not {printable(value)}"
        for key, value in spec.provenance.items()
        if (recorded := _lookup(run.provenance, key)) != value
    ]


def _lookup(content: Any, key: str) -> object:
    """Return the value at a dotted path of keys; None if there is none."""
    for part in key.split("."):
        if not isinstance(content, Mapping):
            return None
        content = content.get(part)
    return content


def mismatch(
    table: PublishedTable,
    run: FinishedRun,
    source: PublishedTables,
    weights_kinds: Mapping[Path, str],
) -> str:
    """Explain why a run matches no row, with its differences from the closest row.

    Args:
        table: The published table.
        run: A run that matches none of its rows.
        source: All published tables.
        weights_kinds: Names of the weights by file, as in :func:`differences`.
    """
    start = f"{run.label} matches no row of {table.id}"
    method = printable(run.method)
    candidates = [row for row in table.rows if row.run and row.run.match["method"] == run.method]
    if not candidates:
        return f"{start}: no row has {method}"
    candidates = [row for row in candidates if row.data == run.data]
    if not candidates:
        return f"{start}: no row has {method} on {printable(run.data)}"
    reasons = [
        (texts, row.method)
        for row in candidates
        if row.run and (texts := differences(row.run, run, source, weights_kinds))
    ]
    texts, nearest = min(reasons, key=_distance)
    return f"{start}: the closest row is {nearest}, but {', '.join(texts)}"


def _distance(reason: tuple[list[str], str]) -> tuple[int, int]:
    """Return the number of a row's differences, and of those not only in an option of the model."""
    texts, _ = reason
    return len(texts), sum(not text.startswith("model.") for text in texts)
