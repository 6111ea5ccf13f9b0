from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomaly_clip.metrics import (
    METRICS,
    Evaluator,
    EvaluatorSettings,
    PixelHistogram,
    auroc,
    average_precision,
    f1_max,
    pro,
)
from anomaly_clip.metrics.evaluator import combined
from anomaly_clip.records import Batch, Scores

DEFAULT = EvaluatorSettings()


def make_case(num_images: int = 24, seed: int = 0, size: int = 8) -> tuple[Scores, Batch]:
    rng = torch.Generator().manual_seed(seed)
    label = torch.arange(num_images) % 3 == 0
    mask = torch.rand(num_images, size, size, generator=rng) < 0.2
    mask &= label[:, None, None]
    scores = Scores(
        image_score=torch.rand(num_images, generator=rng),
        anomaly_map=torch.randn(num_images, size, size, generator=rng) + mask,
        score_parts=torch.randn(num_images, 2, generator=rng),
    )
    batch = Batch(
        image=torch.zeros(num_images, 3, 8, 8, dtype=torch.uint8),
        mask=mask,
        label=label,
        category=["cable" if i % 2 else "bottle" for i in range(num_images)],
        path=[f"{i}.png" for i in range(num_images)],
        index=torch.arange(num_images),
    )
    return scores, batch


def rows(record: Any, chosen: list[int]) -> Any:
    """Select images of a record."""
    return {
        k: [v[i] for i in chosen]
        if isinstance(v, list)
        else v[torch.tensor(chosen, dtype=torch.int64)]
        for k, v in record.items()
    }


def evaluate(
    scores: Scores, batch: Batch, *parts: list[int], settings: EvaluatorSettings = DEFAULT
) -> Evaluator:
    evaluator = Evaluator(["bottle", "cable"], settings)
    for part in parts or [list(range(len(batch["path"])))]:
        evaluator.update(rows(scores, part), rows(batch, part))
    return evaluator


@pytest.mark.parametrize("exact", [True, False])
def test_metrics_equal_the_pure_functions(exact: bool) -> None:
    scores, batch = make_case(size=48)  # fewer pixels would be sorted in both cases
    results = evaluate(scores, batch, settings=EvaluatorSettings(exact=exact)).compute()
    cables = torch.tensor([name == "cable" for name in batch["category"]])
    maps, masks = scores["anomaly_map"][cables], batch["mask"][cables]
    metrics = results["categories"]["cable"]
    assert tuple(metrics) == METRICS
    expected = {
        "pixel_auroc": auroc(maps, masks),
        "pixel_ap": average_precision(maps, masks),
        "pixel_f1_max": f1_max(maps, masks),
        "pixel_pro": pro(maps, masks),
    }
    for name, value in expected.items():
        if exact:
            assert metrics[name] == pytest.approx(value, abs=1e-12), name
        else:
            low, high = results["intervals"]["cable"][name]
            assert low <= value <= high, name
            assert low <= (metrics[name] or 0) <= high, name
            assert metrics[name] == pytest.approx(value, abs=1e-4), name
    assert exact == (results["intervals"] == {})
    both = [results["categories"][name]["pixel_pro"] or 0.0 for name in ("bottle", "cable")]
    assert results["mean"]["pixel_pro"] == pytest.approx(np.mean(both))


def test_score_parts_are_scaled_per_category_then_added() -> None:
    scores, batch = make_case()
    results = evaluate(scores, batch).compute()
    bottles = torch.tensor([name == "bottle" for name in batch["category"]])
    parts = scores["score_parts"][bottles].numpy()
    scaled = (parts - parts.min(0)) / (parts.max(0) - parts.min(0))
    expected = roc_auc_score(batch["label"][bottles], scaled.sum(1))
    assert results["categories"]["bottle"]["image_auroc"] == pytest.approx(expected, abs=1e-9)


def test_a_part_can_be_added_as_it_is() -> None:
    parts = torch.tensor([[0.1, 5.0], [0.4, 9.0], [0.4, 6.0], [0.2, 5.0]])
    expected = torch.tensor([0.1, 1.4, 0.65, 0.2])
    torch.testing.assert_close(combined(parts, (False, True)), expected)
    torch.testing.assert_close(combined(parts, (False, False)), parts.sum(dim=1))
    torch.testing.assert_close(combined(parts, (True, True)), combined(parts))
    scores, batch = make_case()
    evaluator = Evaluator(["bottle", "cable"], scaled_parts=(False, True))
    evaluator.update(scores, batch)
    evaluator.compute()
    assert evaluator.images is not None
    bottles = torch.tensor([name == "bottle" for name in evaluator.images.category])
    expected = combined(evaluator.images.parts[bottles], (False, True))
    torch.testing.assert_close(evaluator.images.score[bottles], expected)


def test_a_constant_part_counts_as_zero() -> None:
    scores, batch = make_case()
    scores["score_parts"][:, 0] = 5.0
    evaluator = evaluate(scores, batch)
    evaluator.compute()
    assert evaluator.images is not None
    assert evaluator.images.score.max() == 1.0


def test_without_parts_the_image_score_is_used() -> None:
    scores, batch = make_case()
    del scores["score_parts"]
    evaluator = evaluate(scores, batch)
    evaluator.compute()
    assert evaluator.images is not None
    torch.testing.assert_close(evaluator.images.score, scores["image_score"])


@pytest.mark.parametrize("exact", [True, False])
def test_order_batches_and_repetition_change_nothing(exact: bool) -> None:
    scores, batch = make_case()
    settings = EvaluatorSettings(exact=exact)
    whole = evaluate(scores, batch, settings=settings).compute()
    shuffled = np.random.default_rng(0).permutation(len(batch["path"])).tolist()
    parts = [shuffled[:5], shuffled[5:6], [*shuffled[6:], shuffled[7]], shuffled[:3]]
    again = evaluate(scores, batch, *parts, settings=settings).compute()
    assert again["mean"] == pytest.approx(whole["mean"], abs=1e-12)
    for name, metrics in whole["categories"].items():
        assert again["categories"][name] == pytest.approx(metrics, abs=1e-12)


def test_without_masks_pixel_metrics_are_missing() -> None:
    scores, batch = make_case()
    del batch["mask"]
    results = evaluate(scores, batch).compute()
    assert results["mean"]["pixel_auroc"] is None
    assert results["mean"]["image_auroc"] is not None


def test_a_single_class_is_undefined_and_left_out_of_the_mean() -> None:
    scores, batch = make_case()
    batch["label"] &= torch.tensor([name == "cable" for name in batch["category"]])
    results = evaluate(scores, batch).compute()
    assert results["categories"]["bottle"]["image_auroc"] is None
    assert results["mean"]["image_auroc"] == results["categories"]["cable"]["image_auroc"]


def test_settings_reach_pro() -> None:
    scores, batch = make_case()
    batch["category"] = ["bottle"] * len(batch["path"])
    expected = pro(scores["anomaly_map"], batch["mask"], pro_steps=50, fpr_limit=0.2)
    for exact, tolerance in ((True, 1e-12), (False, 1e-3)):
        settings = EvaluatorSettings(pro_steps=50, fpr_limit=0.2, exact=exact)
        evaluator = Evaluator(["bottle"], settings)
        evaluator.update(scores, batch)
        value = evaluator.compute()["mean"]["pixel_pro"]
        assert value == pytest.approx(expected, abs=tolerance)


def test_an_image_seen_by_two_processes_is_refused() -> None:
    scores, batch = make_case()
    evaluator = evaluate(scores, batch)
    evaluator.pixel_index.append(torch.tensor([3]))  # as if another process had seen it
    with pytest.raises(ValueError, match="image 3 was scored by two processes"):
        evaluator.compute()


def test_no_maps_are_kept() -> None:
    evaluator = evaluate(*make_case(60, size=48))
    assert isinstance(evaluator.pixels, PixelHistogram)
    tables = [table for row in range(2) for table in evaluator.pixels._separate(row)]
    assert sum(map(len, tables)) < 60 * 48 * 48 / 4
    states = [getattr(evaluator, name) for name in evaluator._defaults]
    assert sum(t.numel() for state in states for t in state) == 60 * 7  # 7 numbers per image


@pytest.mark.parametrize("exact", [True, False])
def test_forward_and_merging_lose_nothing(exact: bool) -> None:
    scores, batch = make_case()
    settings = EvaluatorSettings(exact=exact)
    whole = evaluate(scores, batch, settings=settings).compute()
    left, right = (Evaluator(["bottle", "cable"], settings) for _ in range(2))
    left(rows(scores, list(range(5))), rows(batch, list(range(5))))
    left(rows(scores, list(range(5, 11))), rows(batch, list(range(5, 11))))
    right(rows(scores, list(range(11, 24))), rows(batch, list(range(11, 24))))
    left.merge_state(right)
    merged = left.compute()
    for name, metrics in whole["categories"].items():
        assert merged["categories"][name] == pytest.approx(metrics, abs=1e-12)
    with pytest.raises(ValueError, match="has seen the same images"):
        left.merge_state(right)


def test_a_refused_batch_can_be_added_again() -> None:
    scores, batch = make_case()
    evaluator = Evaluator(["bottle", "cable"])
    with pytest.raises(ValueError, match="bool masks"):
        evaluator.update(scores, {**batch, "mask": batch["mask"].byte()})
    evaluator.update(scores, batch)
    assert evaluator.compute() == evaluate(scores, batch).compute()


def test_an_empty_update_changes_nothing() -> None:
    scores, batch = make_case()
    evaluator = evaluate(scores, batch)
    evaluator.update(rows(scores, []), rows(batch, []))
    assert evaluator.compute() == evaluate(scores, batch).compute()


def test_the_mean_has_bounds_too() -> None:
    results = evaluate(*make_case(size=48)).compute()
    assert tuple(results["intervals"]["mean"]) == METRICS[3:]
    for name, (low, high) in results["intervals"]["mean"].items():
        assert low <= (results["mean"][name] or 0) <= high
        ends = [results["intervals"][category][name] for category in ("bottle", "cable")]
        assert low == pytest.approx(np.mean([end[0] for end in ends]))


def test_bootstrap_is_seeded_and_contains_the_metric() -> None:
    scores, batch = make_case(60)

    def interval(**options: Any) -> tuple[float, float]:
        settings = EvaluatorSettings(bootstrap=200, **options)
        results = evaluate(scores, batch, settings=settings).compute()
        low, high = results["intervals"]["cable"]["image_auroc_bootstrap"]
        assert low < (results["categories"]["cable"]["image_auroc"] or 0) < high
        return low, high

    assert interval() == interval()
    assert interval() != interval(bootstrap_seed=1)


def test_contradictory_settings() -> None:
    with pytest.raises(ValueError, match="are both true, but exclude each other"):
        EvaluatorSettings(exact=True, fine=True)
    with pytest.raises(ValueError, match="bootstrap must be 1 or more"):
        EvaluatorSettings(bootstrap=0)


def test_an_anomalous_image_with_an_empty_mask_counts_as_anomalous() -> None:
    scores, batch = make_case()
    batch["category"] = ["cable"] * len(batch["path"])
    batch["mask"][batch["label"].nonzero()[0]] = False
    metrics = evaluate(scores, batch, settings=EvaluatorSettings(exact=True)).compute()["mean"]
    assert metrics["image_auroc"] == auroc(combined(scores["score_parts"]), batch["label"])
    assert metrics["pixel_auroc"] == auroc(scores["anomaly_map"], batch["mask"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets() -> None:
    evaluator = evaluate(*make_case())
    evaluator.reset()
    with pytest.raises(ValueError, match="no image of the 2 categories was"):
        evaluator.compute()


def test_a_nan_names_its_image() -> None:
    scores, batch = make_case()
    scores["anomaly_map"][7, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"7\.png has a score that is NaN or infinite"):
        evaluate(scores, batch)


def test_unknown_category_and_shape() -> None:
    scores, batch = make_case()
    with pytest.raises(ValueError, match="unknown category 'bottle'"):
        Evaluator(["cable"]).update(scores, batch)
    scores["anomaly_map"] = scores["anomaly_map"][:, :4]
    with pytest.raises(ValueError, match="differ in shape"):
        evaluate(scores, batch)


@pytest.mark.parametrize("categories", [[], ["a", "a"]])
def test_categories_must_be_distinct(categories: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct categories"):
        Evaluator(categories)


def test_counts_survive_half_precision() -> None:
    """For bf16-true, Lightning casts a whole module, including its metrics."""
    evaluator = Evaluator(["a"])
    assert isinstance(evaluator.pixels, PixelHistogram)
    torch.nn.ModuleList([evaluator]).to(torch.bfloat16)
    assert evaluator.pixels.extremes.dtype == torch.float64


def test_the_first_unknown_category_by_name_is_reported() -> None:
    scores, batch = make_case()
    batch["category"] = [f"part {number:02d}" for number in range(len(batch["category"]), 0, -1)]
    with pytest.raises(ValueError, match="unknown category 'part 01'"):
        evaluate(scores, batch)
