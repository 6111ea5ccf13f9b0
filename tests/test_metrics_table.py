from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from anomaly_clip.metric_values import with_means
from anomaly_clip.metrics import METRICS, Results
from anomaly_clip.reporting.metrics_table import build_table
from anomaly_clip.results.warnings import RANDOM_WARNING

RESULTS = Results(
    mean={**dict.fromkeys(METRICS, 0.5), "pixel_pro": None},
    categories={
        "metal_nut": {**dict.fromkeys(METRICS, 0.25), "pixel_pro": None},
        "bottle": {**dict.fromkeys(METRICS, 0.75), "pixel_pro": None},
    },
    intervals={},
)
COUNTS = {"metal_nut": (12, 7), "bottle": (30, 10)}


def printed(table: Table) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue()


def test_percent_counts_and_dashes_in_80_columns() -> None:
    text = printed(build_table(RESULTS, "SDP on MVTecAD", COUNTS, random_weights=False))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert lines["metal_nut"] == ["12", "7", *["25.0"] * 6, "–"]
    assert lines["mean"] == ["42", "17", *["50.0"] * 6, "–"]
    assert "…" not in text
    assert RANDOM_WARNING not in text


def test_random_weights_are_named_above_and_below() -> None:
    text = printed(build_table(RESULTS, "SDP on MVTecAD", COUNTS, random_weights=True))
    assert text.count(RANDOM_WARNING) == 2


def test_metrics_with_wide_bounds_are_marked() -> None:
    values: dict[str, float | None] = {"image_auroc": 0.9, "pixel_auroc": 0.8, "pixel_ap": None}
    bounds = {"pixel_auroc": (0.7985, 0.8005)}
    results = with_means({"cable": dict(values), "nut": dict(values)}, {"cable": bounds})
    table = build_table(results, "title", {"cable": (2, 1), "nut": (2, 1)}, False, "remark")
    assert list(table.columns[4].cells) == ["~80.0", "80.0", "80.0"]
    assert list(table.columns[5].cells) == ["–", "–", "–"]
    caption = str(table.caption)
    assert caption.startswith("remark\n~ MARKS PIXEL METRICS")
    assert "--model.evaluator.exact true" in caption
    certain = with_means({"cable": values}, {"cable": {"pixel_auroc": (0.7995, 0.8005)}})
    assert build_table(certain, "title", {"cable": (2, 1)}, False).caption is None
