from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomaly_clip.metrics import FIGURES, Evaluator, EvaluatorSettings, auroc, f1_max, pro
from anomaly_clip.records import Batch, Scores


def make_case(num_images: int = 24, seed: int = 0) -> tuple[Scores, Batch]:
    rng = torch.Generator().manual_seed(seed)
    label = torch.arange(num_images) % 3 == 0
    mask = torch.rand(num_images, 8, 8, generator=rng) < 0.2
    mask &= label[:, None, None]
    scores = Scores(
        image_score=torch.rand(num_images, generator=rng),
        anomaly_map=torch.randn(num_images, 8, 8, generator=rng) + mask,
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
    """Take some images of a record."""
    return {
        k: [v[i] for i in chosen] if isinstance(v, list) else v[torch.tensor(chosen)]
        for k, v in record.items()
    }


def evaluate(scores: Scores, batch: Batch, *parts: list[int]) -> Evaluator:
    evaluator = Evaluator(["bottle", "cable"])
    for part in parts or [list(range(len(batch["path"])))]:
        evaluator.update(rows(scores, part), rows(batch, part))
    return evaluator


def test_figures_are_those_of_the_pure_functions() -> None:
    scores, batch = make_case()
    results = evaluate(scores, batch).compute()
    of = torch.tensor([name == "cable" for name in batch["category"]])
    maps, masks = scores["anomaly_map"][of], batch["mask"][of]
    figures = results["categories"]["cable"]
    assert tuple(figures) == FIGURES
    assert figures["pixel_auroc"] == auroc(maps, masks)
    assert figures["pixel_f1_max"] == f1_max(maps, masks)
    assert figures["pixel_pro"] == pro(maps, masks)
    both = [results["categories"][name]["pixel_pro"] or 0.0 for name in ("bottle", "cable")]
    assert results["mean"]["pixel_pro"] == pytest.approx(np.mean(both))


def test_score_parts_are_scaled_per_category_then_added() -> None:
    scores, batch = make_case()
    results = evaluate(scores, batch).compute()
    of = torch.tensor([name == "bottle" for name in batch["category"]])
    parts = scores["score_parts"][of].numpy()
    scaled = (parts - parts.min(0)) / (parts.max(0) - parts.min(0))
    expected = roc_auc_score(batch["label"][of], scaled.sum(1))
    assert results["categories"]["bottle"]["image_auroc"] == pytest.approx(expected, abs=1e-9)


def test_a_constant_part_counts_as_zero() -> None:
    scores, batch = make_case()
    scores["score_parts"][:, 0] = 5.0
    evaluator = evaluate(scores, batch)
    evaluator.compute()
    assert evaluator.images is not None
    assert evaluator.images.score.max() == 1.0


def test_without_parts_the_image_score_counts() -> None:
    scores, batch = make_case()
    del scores["score_parts"]
    evaluator = evaluate(scores, batch)
    evaluator.compute()
    assert evaluator.images is not None
    torch.testing.assert_close(evaluator.images.score, scores["image_score"])


def test_order_split_and_repetition_change_nothing() -> None:
    scores, batch = make_case()
    whole = evaluate(scores, batch).compute()
    shuffled = np.random.default_rng(0).permutation(len(batch["path"])).tolist()
    parts = [shuffled[:5], shuffled[5:6], shuffled[6:], shuffled[:3]]
    assert evaluate(scores, batch, *parts).compute() == whole


def test_without_masks_pixel_figures_are_missing() -> None:
    scores, batch = make_case()
    del batch["mask"]
    results = evaluate(scores, batch).compute()
    assert results["mean"]["pixel_auroc"] is None
    assert results["mean"]["image_auroc"] is not None


def test_one_class_alone_is_missing_and_left_out_of_the_mean() -> None:
    scores, batch = make_case()
    batch["label"] &= torch.tensor([name == "cable" for name in batch["category"]])
    results = evaluate(scores, batch).compute()
    assert results["categories"]["bottle"]["image_auroc"] is None
    assert results["mean"]["image_auroc"] == results["categories"]["cable"]["image_auroc"]


def test_settings_reach_pro() -> None:
    scores, batch = make_case()
    batch["category"] = ["bottle"] * len(batch["path"])
    evaluator = Evaluator(["bottle"], EvaluatorSettings(pro_steps=50, fpr_limit=0.2))
    evaluator.update(scores, batch)
    expected = pro(scores["anomaly_map"], batch["mask"], pro_steps=50, fpr_limit=0.2)
    assert evaluator.compute()["mean"]["pixel_pro"] == expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets() -> None:
    evaluator = evaluate(*make_case())
    evaluator.reset()
    with pytest.raises(ValueError, match="no image was evaluated"):
        evaluator.compute()


def test_a_nan_names_its_image() -> None:
    scores, batch = make_case()
    scores["anomaly_map"][7, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"7\.png a score that is NaN or infinite"):
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
