"""All figures of a test, per category and their mean, as one torchmetrics metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from anomaly_clip.metrics.image import (
    auroc_from_counts,
    average_precision_from_counts,
    f1_max_from_counts,
    threshold_counts,
)
from anomaly_clip.metrics.pro import check_pro_options, pro
from anomaly_clip.records import Batch, Scores

__all__ = ["FIGURES", "Evaluator", "EvaluatorSettings", "Figures", "Results"]

FIGURES = (
    "image_auroc",
    "image_ap",
    "image_f1_max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1_max",
    "pixel_pro",
)
"""The names under which figures are logged, saved and printed, in their order."""

Figures = dict[str, float | None]
"""One value a name, fractions in 0..1; None where a figure is undefined (one class only)."""

Track = Callable[[Iterable[str], str], Iterable[str]]
"""Wraps an iteration in a progress bar with a title."""


@dataclass(frozen=True)
class EvaluatorSettings:
    """How figures are computed.

    Args:
        pro_steps: null for the exact PRO, or the number of equally spaced thresholds (200 is what
            zero-shot papers report).
        fpr_limit: False positive rate up to which PRO is integrated.
    """

    pro_steps: int | None = None
    fpr_limit: float = 0.3

    def __post_init__(self) -> None:
        check_pro_options(self.fpr_limit, self.pro_steps)


class Results(TypedDict):
    """The figures of one evaluation."""

    mean: Figures
    """Unweighted mean over the categories in which a figure is defined."""
    categories: dict[str, Figures]
    intervals: dict[str, dict[str, tuple[float, float]]]
    """Certified bounds by category and name; empty, as all figures are exact."""


@dataclass(frozen=True)
class ImageScores:
    """What was evaluated of each image, sorted by index."""

    index: Tensor
    """int64 ``(n,)``, rows of the data set's listing."""
    category: list[str]
    label: Tensor
    """bool ``(n,)``."""
    score: Tensor
    """float32 ``(n,)``, score parts combined."""
    parts: Tensor
    """float32 ``(n, P)``, as the method gave them; ``P`` may be 0."""


class Evaluator(Metric):
    """Collect scores of labelled images and compute their figures per category.

    Each image counts once, whichever process saw it and however often. Score parts are min-max
    scaled over all images of a category and added (CLIP-AD, section 5 of the specification; our
    choice: a part that is constant counts as zero).

    Maps and masks are kept on the CPU until the figures are computed.

    Args:
        categories: Names, one row each, the same on all ranks.
        settings: How figures are computed.

    Raises:
        ValueError: If there is no category or one occurs twice.
    """

    full_state_update = False
    index: list[Tensor]
    row: list[Tensor]
    label: list[Tensor]
    score: list[Tensor]
    parts: list[Tensor]
    maps: list[Tensor]
    masks: list[Tensor]

    def __init__(
        self, categories: Sequence[str], settings: EvaluatorSettings = EvaluatorSettings()
    ) -> None:
        super().__init__(dist_sync_fn=_gather_any, compute_on_cpu=True)
        if not categories or len(set(categories)) != len(categories):
            raise ValueError(f"Evaluator: expected distinct categories, got {list(categories)}")
        self.categories = list(categories)
        self.settings = settings
        self.images: ImageScores | None = None
        """What the last figures were computed from."""
        self.track: Track = _untracked
        """Set it to show progress while figures are computed."""
        for name in ("index", "row", "label", "score", "parts", "maps", "masks"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Scores, batch: Batch) -> None:
        """Add a batch.

        Raises:
            ValueError: If a score is not finite, a category is unknown, or shapes differ.
        """
        image_score = scores["image_score"].detach().float()
        num_images = len(batch["path"])
        parts = scores.get("score_parts", image_score.new_zeros(num_images, 0)).detach().float()
        self._check_finite(torch.cat([image_score[:, None], parts], dim=1), batch)
        unknown = sorted(set(batch["category"]) - set(self.categories))
        if unknown:
            raise ValueError(
                f"Evaluator: unknown category {unknown[0]!r}; known: {self.categories}"
            )
        rows = torch.tensor([self.categories.index(name) for name in batch["category"]])
        self.index.append(batch["index"].cpu())
        self.row.append(rows)
        self.label.append(batch["label"].cpu())
        self.score.append(image_score.cpu())
        self.parts.append(parts.cpu())
        if "anomaly_map" not in scores or "mask" not in batch:
            return
        maps, masks = scores["anomaly_map"].detach().float(), batch["mask"]
        if maps.shape != masks.shape:
            raise ValueError(
                f"Evaluator: maps {tuple(maps.shape)} and masks {tuple(masks.shape)} differ in "
                "shape"
            )
        self._check_finite(maps.flatten(1), batch)
        self.maps.append(maps.cpu())
        self.masks.append(masks.cpu())

    def compute(self) -> Results:
        """Return the figures of all images seen, by all processes.

        Raises:
            ValueError: If no image was seen.
        """
        seen = self._unique()
        maps, masks = _joined(self.maps), _joined(self.masks)
        images = self.images = self._image_scores()
        categories: dict[str, Figures] = {}
        rows = _joined(self.row)[seen]
        for name in self.track(self.categories, "computing figures"):
            members = rows == self.categories.index(name)
            if not members.any():
                continue
            figures = dict.fromkeys(FIGURES)
            label, score = images.label[members], images.score[members]
            figures.update(_ranking_figures("image", score, label))
            if len(maps):
                chosen = seen[members]
                figures.update(self._pixel_figures(maps[chosen], masks[chosen]))
            categories[name] = figures
        return Results(mean=_mean(categories.values()), categories=categories, intervals={})

    def _image_scores(self) -> ImageScores:
        seen = self._unique()
        rows, parts = _joined(self.row)[seen], _joined(self.parts)[seen]
        score = _joined(self.score)[seen]
        if parts.shape[1]:
            for row in rows.unique():
                members = rows == row
                score[members] = _min_max(parts[members]).sum(dim=1)
        return ImageScores(
            index=_joined(self.index)[seen],
            category=[self.categories[row] for row in rows],
            label=_joined(self.label)[seen],
            score=score,
            parts=parts,
        )

    def _unique(self) -> Tensor:
        """Return where each image was seen first, in the order of the listing."""
        index = _joined(self.index)
        if not len(index):
            raise ValueError("Evaluator: no image was evaluated, so there are no figures")
        _, inverse = index.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(index))
        return first.scatter_reduce(0, inverse, torch.arange(len(index)), "amin")

    def _pixel_figures(self, maps: Tensor, masks: Tensor) -> Figures:
        overlap = pro(
            maps, masks, fpr_limit=self.settings.fpr_limit, pro_steps=self.settings.pro_steps
        )
        return {**_ranking_figures("pixel", maps, masks), "pixel_pro": _defined(overlap)}

    @staticmethod
    def _check_finite(values: Tensor, batch: Batch) -> None:
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            path = batch["path"][int((~finite).nonzero()[0])]
            raise ValueError(f"Evaluator: the method gave {path} a score that is NaN or infinite")


def _untracked(items: Iterable[str], title: str) -> Iterable[str]:
    return items


def _ranking_figures(level: str, scores: Tensor, target: Tensor) -> Figures:
    counts = threshold_counts(scores, target)
    return {
        f"{level}_auroc": _defined(auroc_from_counts(*counts)),
        f"{level}_ap": _defined(average_precision_from_counts(*counts)),
        f"{level}_f1_max": _defined(f1_max_from_counts(*counts)),
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(rows: Iterable[Figures]) -> Figures:
    rows = list(rows)
    mean: Figures = {}
    for name in FIGURES:
        values = [value for row in rows if (value := row[name]) is not None]
        mean[name] = math.fsum(values) / len(values) if values else None
    return mean


def _min_max(parts: Tensor) -> Tensor:
    """Scale each column to ``[0, 1]``; a constant one becomes zeros."""
    low, high = parts.amin(dim=0), parts.amax(dim=0)
    width = high - low
    return torch.where(width > 0, (parts - low) / width.where(width > 0, 1.0), 0.0)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """Return a state as one tensor; torchmetrics keeps it as a list until it is synchronised."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0)


def _gather_any(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather tensors of any shape and type from all ranks; those without an element are left out.

    torchmetrics' own gathering wants equal types and numbers of axes, which a rank that saw no
    image cannot know.
    """
    gathered: list[Tensor] = [tensor] * dist.get_world_size(group)
    dist.all_gather_object(gathered, tensor.cpu(), group)
    return [part for part in gathered if part.shape[0]] or [tensor.cpu()]
