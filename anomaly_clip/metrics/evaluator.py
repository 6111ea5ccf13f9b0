"""All metrics of a test, per category and averaged, as one torchmetrics metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from anomaly_clip.errors import check_at_least
from anomaly_clip.metric_values import (
    PIXEL_METRICS,
    Bounds,
    Curves,
    MetricValues,
    Results,
    with_means,
)
from anomaly_clip.metrics.curves import image_curves
from anomaly_clip.metrics.image import auroc, average_precision, bootstrap_auroc, f1_max
from anomaly_clip.metrics.pixel import (
    Defects,
    PixelHistogram,
    PixelResult,
    concatenated,
    defects_of,
    gather_any,
)
from anomaly_clip.metrics.pro import check_pro_options
from anomaly_clip.metrics.ranking import PixelRanking
from anomaly_clip.records import Batch, Scores

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing since Python 3.11

__all__ = [
    "Evaluator",
    "EvaluatorSettings",
]


@dataclass(frozen=True)
class EvaluatorSettings:
    """Settings of the evaluation.

    Args:
        pro_steps: Number of equally spaced thresholds of PRO (200 in zero-shot papers); null for
            the exact PRO over all thresholds.
        fpr_limit: False positive rate up to which PRO is integrated.
        exact: Keep all pixels and rank them exactly (at most 12 bytes per pixel), instead of
            keeping histograms of the scores (usually 0.8 MiB per category, at most 8 MiB; metrics
            are reported with bounds).
        fine: Use histograms with 2^20 bins instead of 2^15: narrower bounds, 25 MiB per category
            and more.
        bootstrap: Number of bootstrap resamples of the images of a category, for a 95 % interval
            of the image AUROC; null for no interval.
        bootstrap_seed: Seed of the resampling.
    """

    pro_steps: int | None = None
    fpr_limit: float = 0.3
    exact: bool = False
    fine: bool = False
    bootstrap: int | None = None
    bootstrap_seed: int = 0

    @property
    def pixels(self) -> str:
        """Description of the ranking of pixels."""
        if self.exact:
            return "exactly"
        return f"in histograms of 2^{20 if self.fine else 15} bins"

    def __post_init__(self) -> None:
        check_pro_options(self.fpr_limit, self.pro_steps)
        if self.exact and self.fine:
            raise ValueError(
                "model.evaluator.fine and model.evaluator.exact are both true, but exclude each "
                "other: set one to false"
            )
        if self.bootstrap is not None:
            check_at_least("model.evaluator.bootstrap", self.bootstrap, 1)


@dataclass(frozen=True)
class ImageScores:
    """Label and score of every evaluated image, sorted by index."""

    index: Tensor
    """int64 ``(n,)``, rows of the data set's listing."""
    category: list[str]
    label: Tensor
    """bool ``(n,)``."""
    score: Tensor
    """float32 ``(n,)``, after the score parts have been combined."""
    parts: Tensor
    """float32 ``(n, P)``, as returned by the method; ``P`` may be 0."""


class Evaluator(Metric):
    """Collect scores of labelled images and compute metrics per category.

    Score parts are min-max scaled over all images of a category and added, as in CLIP-AD (arXiv
    2311.00453; see docs/methods/sdp.md). A constant part counts as zero (our choice). A method may
    have some of its parts added as they are, as APRIL-GAN does.

    Only histograms of the maps are kept, so memory does not grow with the number of images (with
    ``exact``, all pixel scores are kept). An image that one process sees repeatedly is counted
    only once. If two processes see the same image, its pixels can no longer be removed from the
    merged histograms, so ``compute`` raises an error if there are pixel metrics.

    Args:
        categories: Names of the categories, in the same order on all ranks.
        settings: Settings of the evaluation.
        scaled_parts: Whether each score part is scaled; empty: all are.

    Raises:
        ValueError: If there is no category, or a category occurs twice.
    """

    full_state_update = False
    index: list[Tensor]
    row: list[Tensor]
    label: list[Tensor]
    score: list[Tensor]
    parts: list[Tensor]
    pixel_index: list[Tensor]

    def __init__(
        self,
        categories: Sequence[str],
        settings: EvaluatorSettings = EvaluatorSettings(),
        scaled_parts: Sequence[bool] = (),
    ) -> None:
        super().__init__(dist_sync_fn=gather_any, compute_on_cpu=True)
        if not categories or len(set(categories)) != len(categories):
            raise ValueError(
                f"Evaluator: expected one or more distinct categories, got {list(categories)}"
            )
        self.categories = list(categories)
        self.settings = settings
        self.scaled_parts = tuple(scaled_parts)
        self.images: ImageScores | None = None
        """Labels and scores of the images of the last ``compute``."""
        self.curves: dict[str, Curves] = {}
        """Curves of the last ``compute``, by category."""
        self.pixels: PixelHistogram | PixelRanking
        options: dict[str, Any] = {"fpr_limit": settings.fpr_limit, "pro_steps": settings.pro_steps}
        if settings.exact:
            self.pixels = PixelRanking(len(categories), **options)
        else:
            self.pixels = PixelHistogram(len(categories), fine=settings.fine, **options)
        self._seen: set[int] = set()
        for name in ("index", "row", "label", "score", "parts", "pixel_index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> Self:
        """Move to a device but keep all dtypes, because half precision would lose counts."""
        super()._apply(lambda value: fn(value).to(value.dtype), *args, **options)
        return self

    def update(self, scores: Scores, batch: Batch) -> None:
        """Add a batch.

        Raises:
            ValueError: If a score is not finite, a category is unknown, or shapes differ.
        """
        has_pixels = "anomaly_map" in scores and "mask" in batch
        defects = None
        if has_pixels and scores["anomaly_map"].device.type != "cpu":
            defects = defects_of(batch["mask"])  # before any score is read: see there
        image_score = scores["image_score"].detach().float()
        num_images = len(batch["path"])
        parts = scores.get("score_parts", image_score.new_zeros(num_images, 0)).detach().float()
        values = torch.cat([image_score[:, None], parts], dim=1).cpu()  # one copy from a device
        self._check_finite(values, batch)
        unknown = sorted(set(batch["category"]) - set(self.categories))
        if unknown:
            raise ValueError(
                f"Evaluator: unknown category {unknown[0]!r}; expected one of {self.categories}"
            )
        numbers = [self.categories.index(name) for name in batch["category"]]
        rows = torch.tensor(numbers, dtype=torch.int64)
        index = batch["index"].cpu()
        if has_pixels:
            self._count_pixels(scores["anomaly_map"].detach(), batch, index, rows, defects)
        self.index.append(index)
        self.row.append(rows)
        self.label.append(batch["label"].cpu())
        self.score.append(values[:, 0])
        self.parts.append(values[:, 1:])

    def _count_pixels(
        self,
        maps: Tensor,
        batch: Batch,
        index: Tensor,
        rows: Tensor,
        defects: list[Defects] | None,
    ) -> None:
        masks = batch["mask"]
        if maps.shape != masks.shape:
            raise ValueError(
                f"Evaluator: maps {tuple(maps.shape)} and masks {tuple(masks.shape)} differ in "
                "shape: resize the maps to the masks"
            )
        seen, fresh = set(self._seen), []
        for place, number in enumerate(index.tolist()):
            if number not in seen:
                seen.add(number)
                fresh.append(place)
        chosen = torch.tensor(fresh, dtype=torch.int64)
        if len(fresh) < len(index):
            maps, masks = (part[chosen.to(part.device)] for part in (maps, masks))
            defects = None if defects is None else [defects[place] for place in fresh]
        names = [batch["path"][place] for place in fresh]
        self.pixels.update(maps, masks, rows[chosen], names, defects)
        self.pixel_index.append(index[chosen])
        self._seen = seen

    def forward(self, scores: Scores, batch: Batch) -> None:
        """Add a batch without computing its metrics."""
        self.update(scores, batch)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the images of another evaluator.

        Raises:
            ValueError: If the argument is not an evaluator, or has seen any of the same images.
        """
        if not isinstance(incoming_state, Evaluator):
            kind = type(incoming_state).__name__
            raise ValueError(f"Evaluator: expected another Evaluator to merge, got {kind}")
        if shared := self._seen & incoming_state._seen:
            raise ValueError(
                "Evaluator: cannot merge an evaluator that has seen the same images, such as "
                f"image {min(shared)}: give each evaluator different images"
            )
        super().merge_state(incoming_state)
        self.pixels.merge_state(incoming_state.pixels)
        self._seen |= incoming_state._seen

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self.pixels.reset()
        self._seen = set()

    def compute(self) -> Results:
        """Return the metrics of all images seen by any process.

        Raises:
            ValueError: If no image was seen, or two processes saw the same image.
        """
        images = self.images = self._image_scores()
        pixel_index = concatenated(self.pixel_index)
        distinct, times = pixel_index.unique(return_counts=True)
        if (times > 1).any():
            twice = int(distinct[times > 1][0])
            raise ValueError(
                f"Evaluator: image {twice} was scored by two processes: use a sampler that does "
                "not repeat images, as the data modules do"
            )
        pixels = self._pixel_results(bool(len(pixel_index)))
        settings = self.settings
        categories: dict[str, MetricValues] = {}
        intervals: dict[str, Bounds] = {}
        self.curves = {}
        places: dict[str, list[int]] = {}
        for place, category in enumerate(images.category):
            places.setdefault(category, []).append(place)
        for row, name in enumerate(self.categories):
            if name not in places:
                continue
            members = torch.tensor(places[name])
            label, score = images.label[members], images.score[members]
            bounds = dict(pixels[row].bounds)
            if settings.bootstrap is not None:
                low, high = bootstrap_auroc(
                    score, label, settings.bootstrap, settings.bootstrap_seed
                )
                if not math.isnan(low):
                    bounds["image_auroc_bootstrap"] = (low, high)
            categories[name] = {
                "image_auroc": _defined(auroc(score, label)),
                "image_ap": _defined(average_precision(score, label)),
                "image_f1_max": _defined(f1_max(score, label)),
                **pixels[row].metrics,
            }
            if bounds:
                intervals[name] = bounds
            curves = image_curves(score.numpy(), label.numpy())
            self.curves[name] = {**curves, **pixels[row].curves}
        return with_means(categories, intervals)

    def _pixel_results(self, any_seen: bool) -> list[PixelResult]:
        if not any_seen:  # no process has seen pixels
            return [PixelResult(dict.fromkeys(PIXEL_METRICS), {})] * len(self.categories)
        with warnings.catch_warnings():
            # A process that has seen no pixels must still take part in the synchronisation.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            return self.pixels.compute()

    def _image_scores(self) -> ImageScores:
        seen = self._unique()
        rows, parts = concatenated(self.row)[seen], concatenated(self.parts)[seen]
        score = concatenated(self.score)[seen]
        if parts.shape[1]:
            for row in rows.unique():
                members = rows == row
                score[members] = combined(parts[members], self.scaled_parts)
        return ImageScores(
            index=concatenated(self.index)[seen],
            category=[self.categories[row] for row in rows],
            label=concatenated(self.label)[seen],
            score=score,
            parts=parts,
        )

    def _unique(self) -> Tensor:
        """Return the first position of each image, in the order of the listing."""
        index = concatenated(self.index)
        if not len(index):
            raise ValueError(
                f"Evaluator: no image of the {len(self.categories)} categories was evaluated, so "
                "there are no metrics: check that the evaluated split has images"
            )
        _, inverse = index.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(index))
        return first.scatter_reduce(0, inverse, torch.arange(len(index)), "amin")

    @staticmethod
    def _check_finite(values: Tensor, batch: Batch) -> None:
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            path = batch["path"][int((~finite).nonzero()[0])]
            raise ValueError(
                f"Evaluator: the method's score of {path} is NaN or infinite: try trainer.precision"
                " 32-true, or fit again with a lower learning rate"
            )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def combined(parts: Tensor, scaled: Sequence[bool] = ()) -> Tensor:
    """Return the image scores ``(n,)`` of the parts ``(n, P)`` of all images of a category.

    Args:
        parts: Parts of the scores.
        scaled: Whether each part is min-max scaled before all are added; empty: all are.
    """
    columns = torch.tensor(scaled or [True] * parts.shape[1], device=parts.device)
    return torch.where(columns, _min_max(parts), parts).sum(dim=1)


def _min_max(parts: Tensor) -> Tensor:
    """Scale each column to ``[0, 1]``; a constant column becomes zeros."""
    low, high = parts.amin(dim=0), parts.amax(dim=0)
    width = high - low
    return torch.where(width > 0, (parts - low) / width.where(width > 0, 1.0), 0.0)
