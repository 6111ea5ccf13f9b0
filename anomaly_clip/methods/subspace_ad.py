"""SubspaceAD (arXiv 2602.23013): distance of patches from the subspace of normal patches.

A principal component analysis of the patches of normal images keeps the directions that explain
most of their variance. The score of a patch is its squared distance from that subspace. Conventions
are those of the official code unless stated otherwise; see docs/methods/subspace_ad.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings
from anomaly_clip.backbones.vit import ViTSettings
from anomaly_clip.errors import check_at_least, check_between, check_choice
from anomaly_clip.methods.feature_method import FittedMethod, feature_sums
from anomaly_clip.methods.gaussians import RunningMoments, merged_moments
from anomaly_clip.methods.rotations import in_batches, random_rotations
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
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["SubspaceAD"]


class SubspaceAD(FittedMethod):
    """Principal components of normal patches (SubspaceAD, arXiv 2602.23013).

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
        rotations: Number of copies of each training image, rotated by random angles, that are
            fitted on, too; 30 in the published few-shot setting.
        unrotated: Categories that are fitted on without rotated copies; the default is published.
        seed: Seed of the angles.
        evaluator: Settings of the metrics.
    """

    any_tower: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("layer3",)
    fitted_buffers: ClassVar[tuple[str, ...]] = ("mean", "components", "eigenvalues")
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "distance"})
    mean: Tensor
    """``(C,)`` after the fit."""
    components: Tensor
    """``(C, K)`` after the fit."""
    eigenvalues: Tensor
    """``(K,)`` after the fit."""

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = ViTSettings(),
        image_size: int = 224,
        layers: list[int] | list[str] | None = None,
        combine: Combination = "mean",
        explained: float = 0.99,
        distance: Distance = "reconstruction",
        rotations: int = 0,
        unrotated: Sequence[str] = ("transistor",),
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        check_subspace(self.backbone, self.layers, combine, explained)
        check_choice("model.distance", distance, DISTANCES)
        check_at_least("model.rotations", rotations, 0)
        check_between("model.seed", seed, 0, 2**32 - 1)
        self.combine = combine
        self.explained = explained
        self.distance = distance
        self.rotations = rotations
        self.unrotated = unrotated
        self.seed = seed
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))
        self._moments = RunningMoments()

    def default_blocks(self, num_blocks: int) -> Sequence[int] | Sequence[str]:
        """Return the blocks of the official settings, if they have towers of this depth."""
        return official_blocks(num_blocks)

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the features, the subspace and the distance."""
        rotations = 0 if self.fitted_category in self.unrotated else self.rotations
        return {
            "layers": self.layers,
            "combine": self.combine,
            "explained": self.explained,
            "distance": self.distance,
            "rotations": rotations,
        }

    def on_fit_start(self) -> None:
        """Start from empty statistics."""
        self._moments = RunningMoments()

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add the patches of normal images, and of rotated copies, to the statistics."""
        features = self.embed(batch["image"])
        self._moments.add(features.flatten(0, 1).unsqueeze(1))  # (B * N, 1, C)
        if self.rotations:
            copies = (
                random_rotations(image, self.rotations, self.seed, int(index))
                for image, index, category in zip(
                    batch["image"], batch["index"], batch["category"], strict=True
                )
                if category not in self.unrotated
            )
            for images in in_batches(copies, self.copies_at_once):
                self._moments.add(self.embed(images).flatten(0, 1).unsqueeze(1))
        return {"features": feature_sums(features)}

    def on_train_epoch_end(self) -> None:
        """Compute the subspace from the statistics of all processes."""
        moments = merged_moments(self._moments.take(), self.trainer)
        self.check_finite(patches=moments.scatter)
        self.keep(**principal_subspace(moments, self.explained)._asdict())

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, S, S)`` by the distance of their patches from the subspace."""
        self.check_fitted()
        subspace = Subspace(self.mean, self.components, self.eigenvalues)
        with self.backbone.out_of_autocast():  # distances stay in float32
            distances = subspace.distances(self.embed(images), self.distance)  # (B, N)
            side = math.isqrt(distances.shape[1])
            size = (images.shape[-2], images.shape[-1])
            maps = smoothed_maps(distances.view(-1, side, side), size)
            return Scores(image_score=top_mean(maps.flatten(1)), anomaly_map=maps)

    def embed(self, images: Tensor) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches: the mean, or all, of the layers."""
        return patch_features(self.backbone, images, self.layers, self.combine)
