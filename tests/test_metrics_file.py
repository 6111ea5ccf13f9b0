from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from anomaly_clip.metric_values import PIXEL_METRICS, Results
from anomaly_clip.records import WeightsRecord, versions
from anomaly_clip.results.metrics_file import (
    merge_decisions,
    merge_metrics,
    run_record,
    weights_label,
    write_metrics,
)

OPENAI = WeightsRecord(backbone="ViT-B-16", pretrained="openai", random=False, sha256="ab")


def part(category: str, auroc: float | None = 0.5, **protocol: Any) -> dict[str, Any]:
    """Return the content of ``metrics.json`` for the test of one category."""
    settings = {
        "complete": True,
        "images": {category: 4},
        "anomalous": {category: 2},
        "words": {category: category.replace("_", " ")},
        "listed": 4,
        "overlap": 0,
        "image_size": 32,
        **protocol,
    }
    run = run_record("PaDiM", OPENAI, settings, f"{category}.ckpt", 3)
    metrics = {"image_auroc": auroc, "pixel_ap": 0.25}
    return {"mean": metrics, "categories": {category: metrics}, "intervals": {}, "run": run}


def merged(parts: dict[str, Any], failed: dict[str, str] | None = None) -> dict[str, Any]:
    _, run = merge_metrics(parts, failed or {})
    protocol: dict[str, Any] = run["protocol"]
    return protocol


def test_the_label_of_weights_is_their_source_or_random() -> None:
    assert weights_label(OPENAI) == "openai"
    assert weights_label({**OPENAI, "pretrained": "random", "random": True}) == "random"
    assert weights_label({**OPENAI, "random": True}) == "random"


def test_a_run_records_the_origin_of_its_metrics() -> None:
    protocol = {"split": "test"}
    record = run_record("SDP", OPENAI, protocol, None, None)
    assert record == {
        "method": "SDP",
        "weights": OPENAI,
        "protocol": {"split": "test"},
        "checkpoint": None,
        "seed": None,
        "versions": versions(),
    }
    assert record["protocol"] is not protocol


def test_both_files_hold_the_same_metrics(tmp_path: Path) -> None:
    rows: dict[str, dict[str, float | None]] = {
        "b, c": {"image_auroc": 0.75, "pixel_ap": None},
        "a": {"image_auroc": 0.25, "pixel_ap": 0.125},
    }
    mean: dict[str, float | None] = {"image_auroc": 0.5, "pixel_ap": 0.125}
    results = Results(mean=mean, categories=rows, intervals={})
    run = run_record("SDP", OPENAI, {}, None, 0)
    write_metrics(tmp_path, results, run)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {**results, "run": run}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table == [
        ["category", "image_auroc", "pixel_ap", "weights"],
        ["b, c", "0.75", "", "openai"],
        ["a", "0.25", "0.125", "openai"],
        ["mean", "0.5", "0.125", "openai"],
    ]


def test_means_are_of_the_categories_in_which_a_metric_is_defined() -> None:
    parts = {"b": part("b", 1.0), "a": part("a", None), "c": part("c", 0.25)}
    results, run = merge_metrics(parts, {})
    assert list(results["categories"]) == ["b", "a", "c"]
    assert results["mean"] == {"image_auroc": 0.625, "pixel_ap": 0.25}
    assert run["checkpoint"] == {"b": "b.ckpt", "a": "a.ckpt", "c": "c.ckpt"}
    assert (run["method"], run["seed"], run["failed"]) == ("PaDiM", 3, {})


def test_entries_per_category_are_merged() -> None:
    protocol = merged({"nut_b": part("nut_b"), "a": part("a", images={"a": 7})})
    assert protocol["images"] == {"nut_b": 4, "a": 7}
    assert protocol["anomalous"] == {"nut_b": 2, "a": 2}
    assert protocol["words"] == {"nut_b": "nut b", "a": "a"}
    assert protocol["one_model_a_category"] is True
    assert protocol["image_size"] == 32


@pytest.mark.parametrize(
    ("first", "second", "total"),
    [(0, 0, 0), (2, 3, 5), (None, 3, None), (3, None, None), (None, None, None)],
)
@pytest.mark.parametrize("key", ["overlap", "anomalous_without_pixels", "listed"])
def test_counts_add_up_and_are_unknown_if_one_is(
    key: str, first: int | None, second: int | None, total: int | None
) -> None:
    protocol = merged({"a": part("a", **{key: first}), "b": part("b", **{key: second})})
    assert protocol[key] == total


def test_a_count_that_a_part_does_not_have_is_unknown() -> None:
    protocol = merged({"a": part("a", anomalous_without_pixels=1), "b": part("b")})
    assert protocol["anomalous_without_pixels"] is None
    assert "anomalous_without_pixels" not in merged({"a": part("a"), "b": part("b")})


def test_entries_of_one_model_are_kept_per_category() -> None:
    spread = [{"image_auroc": 0.1}, {"image_auroc": 0.2}]
    parts = {
        name: part(name, selected_epoch=epoch, spread=deviation, by_round=[], trained_on=["c"])
        for name, epoch, deviation in (("a", 3, spread[0]), ("b", None, spread[1]))
    }
    protocol = merged(parts)
    assert protocol["selected_epoch"] == {"a": 3, "b": None}
    assert protocol["spread"] == dict(zip("ab", spread, strict=True))
    assert protocol["trained_on"] == {"a": ["c"], "b": ["c"]}
    assert "selected_epoch" not in merged({"a": part("a")})


@pytest.mark.parametrize(
    ("complete", "failed", "expected"),
    [
        ((True, True), {}, True),
        ((True, False), {}, False),
        ((False, True), {}, False),
        ((True, True), {"c": "no images"}, False),
    ],
)
def test_a_run_is_complete_if_all_its_parts_are(
    complete: tuple[bool, bool], failed: dict[str, str], expected: bool
) -> None:
    parts = {name: part(name, complete=whole) for name, whole in zip("ab", complete, strict=True)}
    _, run = merge_metrics(parts, failed)
    assert run["protocol"]["complete"] is expected
    assert run["failed"] == failed


def test_bounds_are_kept_and_averaged_for_the_mean() -> None:
    parts = {"a": part("a"), "b": part("b")}
    for content in parts.values():
        [row] = content["categories"].values()
        row |= dict.fromkeys(set(PIXEL_METRICS) - {"pixel_ap"})  # undefined
    parts["a"]["intervals"] = {"a": {"pixel_ap": [0.25, 0.35]}, "mean": {"pixel_ap": [0, 1]}}
    results, _ = merge_metrics(parts, {})
    assert list(results["intervals"]) == ["a", "mean"]
    # b has no bounds, so its value 0.25 is used: (0.25 + 0.25) / 2 and (0.35 + 0.25) / 2.
    assert results["intervals"]["mean"]["pixel_ap"] == pytest.approx((0.25, 0.3))


def test_decisions_are_merged_over_the_categories() -> None:
    def part(name: str, alpha: float) -> dict[str, Any]:
        entries = {name: {"num_images": 3, "sentence": name}}
        section = {"alpha": alpha, "fdr": None, "source": f"{name}.ckpt", "categories": entries}
        return {"decisions": section}

    parts: dict[str, dict[str, Any]] = {"cap": part("cap", 0.1), "nut": {}, "pin": part("pin", 0.1)}
    merged = merge_decisions(parts)
    assert merged is not None
    assert (merged["alpha"], merged["fdr"]) == (0.1, None)
    assert merged["source"] == "2 calibrations, one per category"
    assert merged["categories"] == {
        name: {"num_images": 3, "sentence": name, "source": f"{name}.ckpt"}
        for name in ("cap", "pin")
    }
    assert merge_decisions({"cap": {}}) is None
