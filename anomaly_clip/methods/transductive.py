"""Base classes of zero-shot methods that score the images of a category by each other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, settings_of, tower_of
from anomaly_clip.errors import check_at_least
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.feature_method import chosen_layers
from anomaly_clip.methods.image_features import (
    ImageFeatures,
    check_count,
    names_of_all,
    warn_of_few,
)
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.metrics.image import is_finite
from anomaly_clip.records import Batch, Scores, UseOfShots

__all__ = ["BatchedFeatureMethod", "TransductiveMethod"]

PATCHES = "patches"
MAPS_AT_ONCE = 16
"""Maps upsampled at once."""


class TransductiveMethod(AnomalyMethod, ABC):
    """A method without a fit that scores the images of a category by all of them.

    Before an evaluation scores its first image, :meth:`observe` encodes all images. It scores a
    category as soon as it is complete, so that only the features of one category are in memory.

    Args:
        evaluator: Settings of the metrics.
    """

    must_be_fitted: ClassVar[bool] = False
    can_be_fitted: ClassVar[bool] = False
    transductive: ClassVar[bool] = True
    use_of_shots: ClassVar[UseOfShots] = "none"

    def __init__(self, evaluator: EvaluatorSettings) -> None:
        super().__init__(evaluator)
        self._scored: dict[int, tuple[Tensor, float]] = {}
        """Patch map ``(h, w)`` and image score of each image of the evaluation, by index."""

    @abstractmethod
    def image_encoder(self) -> Callable[[Tensor, str], Mapping[str, Tensor]]:
        """Return a function that encodes images.

        It takes images ``(B, 3, S, S)`` and their description for messages, and returns features
        ``(B, ...)`` by name, on the CPU. It raises a ValueError if they are not finite.
        """

    @abstractmethod
    def compare(
        self, name: str, images: ImageFeatures, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Score some images of a category by all of them.

        Args:
            name: The category.
            images: All images of the category, at least two.
            rows: Images to score.

        Returns:
            Patch maps ``(rows, h, w)`` and image scores ``(rows,)``, on the CPU.
        """

    @abstractmethod
    def full_maps(self, patch_maps: Tensor) -> Tensor:
        """Return maps ``(B, S, S)`` on the device from patch maps ``(B, h, w)``."""

    def observe(self, batches: Iterable[Batch]) -> None:
        """Score all images of an evaluation by each other, category after category.

        Raises:
            ValueError: If a category has a single image, images of a data module are not listed
                category after category, or features are not finite.
        """
        self._scored.clear()
        encode = self.image_encoder()
        waiting = list(self.evaluator.categories) if self.data is not None else []
        complete: set[str] = set()
        parts: dict[str, list[ImageFeatures]] = {}
        for batch in batches:
            if not batch["path"]:  # none of its images could be read
                continue
            for name, images in _features(batch, encode).split(batch["category"]):
                # Images are listed category after category: those before this one are complete.
                while name in waiting and waiting[0] != name:
                    complete.add(waiting[0])
                    self._score_category(waiting[0], parts.pop(waiting.pop(0), []))
                if name in complete:
                    raise ValueError(
                        f"images of {name} follow those of another category: give "
                        f"{type(self).__name__} the images category after category, or use a "
                        f"trainer without a data module"
                    )
                parts.setdefault(name, []).append(images)
        for name in waiting:  # in all processes, also in those that have no image of a category
            self._score_category(name, parts.pop(name, []))
        for name in names_of_all(list(parts)):
            self._score_category(name, parts.get(name, []))

    def _score_category(self, name: str, parts: list[ImageFeatures]) -> None:
        """Score the images of a category that this process has, by those of all processes."""
        mine = ImageFeatures.collected(parts)
        indices = set() if mine is None else set(mine.index.tolist())
        images = ImageFeatures.gathered(mine, self.device)
        del mine  # or an ordered copy of all features would be a second one
        if images is not None:
            self._scored |= self.compare_gathered(name, images, indices)

    def compare_gathered(
        self, name: str, images: ImageFeatures, indices: set[int]
    ) -> dict[int, tuple[Tensor, float]]:
        """Return the patch maps and image scores of this process's images of a category.

        Args:
            name: The category.
            images: Images of all processes, in the order of their index.
            indices: Indices of the images of this process.

        Raises:
            ValueError: If there is a single image.
        """
        self.check_images(name, len(images))
        rows = [row for row, index in enumerate(images.index.tolist()) if index in indices]
        return self._by_index(images, rows, *self.compare(name, images, rows)) if rows else {}

    def check_images(self, name: str, count: int) -> None:
        """Refuse a single image of a category; log a line if there are few.

        Raises:
            ValueError: If there is a single image.
        """
        check_count(count, name, type(self).__name__)
        warn_of_few(count, name, type(self).__name__)

    @staticmethod
    def _by_index(
        images: ImageFeatures, rows: Sequence[int], patch_maps: Tensor, scores: Tensor
    ) -> dict[int, tuple[Tensor, float]]:
        return {
            int(images.index[row]): (patch_map, score)
            for row, patch_map, score in zip(rows, patch_maps, scores.tolist(), strict=True)
        }

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, S, S)`` by each other, category after category.

        Args:
            images: uint8, or floating point and already normalised.
            categories: The category of each image; at least two images of each.

        Raises:
            ValueError: If a category has a single image.
        """
        encoded = dict(self.image_encoder()(images, "the images to score"))
        scored: dict[int, tuple[Tensor, float]] = {}
        for name, part in ImageFeatures(encoded, torch.arange(len(images))).split(categories):
            check_count(len(part), name, type(self).__name__)
            rows = range(len(part))
            scored |= self._by_index(part, rows, *self.compare(name, part, rows))
        return self._scores([scored[place] for place in range(len(images))])

    def score_batch(self, batch: Batch) -> Scores:
        """Return the scores of images that :meth:`observe` has compared."""
        return self._scores([self._scored[index] for index in batch["index"].tolist()])

    def _scores(self, scored: list[tuple[Tensor, float]]) -> Scores:
        maps = self.full_maps(torch.stack([patch_map for patch_map, _ in scored]))
        image_scores = torch.tensor([score for _, score in scored])
        return Scores(image_score=image_scores.to(maps), anomaly_map=maps)


class BatchedFeatureMethod(TransductiveMethod, ABC):
    """A transductive method on the patches of one backbone, kept in float32 for one category.

    Args:
        backbone: A CNN, a ViT or a CLIP model.
        layers: Layers whose features the method uses; None: those of ``stages``.
        image_size: Side of the square input images, in pixels.
        evaluator: Settings of the metrics.
    """

    any_tower: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]]
    """Default layers, as for :class:`~anomaly_clip.methods.feature_method.FeatureMethod`."""
    backbone: AnyBackbone

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone | Mapping[str, Any],
        layers: Sequence[int] | Sequence[str] | None,
        image_size: int,
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(evaluator)
        check_at_least("model.image_size", image_size, 32)
        needed = self.stages if layers is None else layers
        self.backbone = tower_of(backbone, needed, image_size)
        self.layers = chosen_layers(self.backbone, layers, self.stages, self.default_blocks)
        self._image_size = image_size
        given = None if layers is None else list(layers)
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"], logger=False)
        settings = {"backbone": asdict(settings_of(backbone)), "layers": given}
        self.save_hyperparameters(settings, logger=False)

    @property
    def image_size(self) -> int:
        """Side of the square input images of ``score``, in pixels."""
        return self._image_size

    def default_blocks(self, num_blocks: int) -> Sequence[int] | Sequence[str]:
        """Return the blocks of a transformer that are used by default; see ``stages``."""
        return self.stages

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches, in float32."""

    @abstractmethod
    def patch_distances(self, name: str, patches: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the distances ``(rows, N)`` of the patches of some images, on the CPU.

        Args:
            name: The category.
            patches: ``(n, N, C)``, of all images of the category, on the CPU.
            rows: Images to score.
        """

    @abstractmethod
    def image_scores(self, distances: Tensor) -> Tensor:
        """Return image scores ``(B,)`` from patch maps ``(B, h, w)``."""

    def image_encoder(self) -> Callable[[Tensor, str], Mapping[str, Tensor]]:
        """Return a function that encodes images; see the base class."""
        return self._encode

    @torch.no_grad()
    def _encode(self, images: Tensor, source: str) -> dict[str, Tensor]:
        patches = self.embed(images)
        if not is_finite(patches):
            raise ValueError(
                f"features of an image are NaN or infinite, in {source}: give other backbone "
                f"weights, or set trainer.precision 32-true"
            )
        return {PATCHES: patches.cpu()}

    def compare(
        self, name: str, images: ImageFeatures, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Score some images of a category by all of them; see the base class."""
        with self.backbone.out_of_autocast():  # distances stay in float32
            distances = self.patch_distances(name, images.tensors[PATCHES], rows)  # (rows, N)
            side = math.isqrt(distances.shape[1])
            patch_maps = distances.unflatten(1, (side, side))  # (rows, h, w)
            parts = [self.image_scores(part).cpu() for part in patch_maps.split(MAPS_AT_ONCE)]
        return patch_maps, torch.cat(parts)


def _features(batch: Batch, encode: Callable[[Tensor, str], Mapping[str, Tensor]]) -> ImageFeatures:
    """Return the features of a batch, on the CPU."""
    features = batch.get("features")
    if features is None:
        features = encode(batch["image"], f"the batch that starts with {batch['path'][0]}")  # type: ignore[assignment]
    return ImageFeatures(dict(features or {}), batch["index"].cpu())
