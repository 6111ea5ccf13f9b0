"""Batched zero-shot SubspaceAD (arXiv 2602.23013): the subspace of the test images themselves.

The subspace is fitted on all test images of a category, in which anomalies are a minority. There
are no normal images and no rotated copies; see docs/methods/subspace_ad.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings
from anomaly_clip.backbones.vit import ViTSettings
from anomaly_clip.errors import check_choice
from anomaly_clip.methods.gaussians import RunningMoments
from anomaly_clip.methods.subspace import (
    DISTANCES,
    Combination,
    Distance,
    Subspace,
    check_subspace,
    official_blocks,
    patch_features,
    principal_subspace,
    smoothed_maps,
    top_mean,
)
from anomaly_clip.methods.transductive import BatchedFeatureMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings

__all__ = ["BatchedSubspaceAD"]

IMAGES_AT_ONCE = 16


class BatchedSubspaceAD(BatchedFeatureMethod):
    """Principal components of the test images of a category (SubspaceAD, batched zero-shot).

    Args:
        backbone: A ViT or a CNN or, if ``pretrained`` is given in place of ``weights``, a CLIP
            model.
        image_size: Side of the square input images, in pixels.
        layers: 1-based numbers of the blocks whose patches are averaged; default: the blocks of the
            official code for towers of 12, 24 and 40 blocks, otherwise the last block of the third
            quarter. Of a CNN: names of layers, finest first; default: layer3 of a ResNet.
        combine: mean of the layers, or concat, which layers of different sizes need.
        explained: Share of the variance that the subspace explains.
        distance: Distance of a patch: reconstruction (the paper), mahalanobis, euclidean or cosine.
        evaluator: Settings of the metrics.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer3",)

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = ViTSettings(),
        image_size: int = 224,
        layers: list[int] | list[str] | None = None,
        combine: Combination = "mean",
        explained: float = 0.99,
        distance: Distance = "reconstruction",
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        check_subspace(self.backbone, self.layers, combine, explained)
        check_choice("model.distance", distance, DISTANCES)
        self.combine = combine
        self.explained = explained
        self.distance = distance

    def default_blocks(self, num_blocks: int) -> Sequence[int] | Sequence[str]:
        """Return the blocks of the official settings, if they have towers of this depth."""
        return official_blocks(num_blocks)

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the features, the subspace and the distance."""
        return {
            "layers": self.layers,
            "combine": self.combine,
            "explained": self.explained,
            "distance": self.distance,
        }

    def embed(self, images: Tensor) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches: the mean, or all, of the layers."""
        return patch_features(self.backbone, images, self.layers, self.combine)

    def patch_distances(self, name: str, patches: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the distances of patches from the subspace of all images; see the base class."""
        moments = RunningMoments()
        for block in patches.split(IMAGES_AT_ONCE):
            moments.add(block.to(self.device).flatten(0, 1).unsqueeze(1))  # (n N, 1, C)
        subspace = principal_subspace(moments.take(), self.explained)
        subspace = Subspace(*(part.to(self.device, patches.dtype) for part in subspace))
        blocks = (patches[some] for some in torch.as_tensor(rows).split(IMAGES_AT_ONCE))
        parts = [subspace.distances(part.to(self.device), self.distance).cpu() for part in blocks]
        return torch.cat(parts)

    def image_scores(self, distances: Tensor) -> Tensor:
        """Return the mean of the highest percent of each map; see the base class."""
        return top_mean(self.full_maps(distances).flatten(1))

    def full_maps(self, patch_maps: Tensor) -> Tensor:
        """Return maps ``(B, S, S)``, smoothed a little; see the base class."""
        return smoothed_maps(patch_maps.to(self.device), (self.image_size, self.image_size))
