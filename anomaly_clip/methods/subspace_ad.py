"""SubspaceAD (arXiv 2602.23013): distance of patches from the subspace of normal patches.

A principal component analysis of the patches of normal images keeps the directions that explain
most of their variance. The score of a patch is its squared distance from that subspace. Conventions
are those of the official code unless stated otherwise; see docs/methods/subspace_ad.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings
from anomaly_clip.backbones.vit import ViTSettings
from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.maps import gaussian_blur, patches_to_map
from anomaly_clip.methods.feature_method import FittedMethod, feature_sums
from anomaly_clip.methods.gaussians import Moments, RunningMoments, merged_moments
from anomaly_clip.methods.rotations import random_rotations
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["Distance", "Subspace", "SubspaceAD", "principal_subspace", "top_mean"]

Distance = Literal["reconstruction", "mahalanobis", "euclidean", "cosine"]
BLUR_SIGMA, BLUR_TRUNCATE = 4.0, 0.25
"""A Gaussian of 3 x 3 pixels, which is nearly their mean."""
PUBLISHED_BLOCKS = {12: [8, 9], 24: [14, 15, 16, 17, 18], 40: [23, 24, 25, 26, 27, 28, 29]}
"""Blocks of the official settings, by the number of blocks of the tower."""


class Subspace(NamedTuple):
    """Mean of patches, and the principal components that explain most of their variance."""

    mean: Tensor
    """``(C,)``."""
    components: Tensor
    """``(C, K)``, orthonormal columns."""
    eigenvalues: Tensor
    """``(K,)``, variance along each component, descending."""

    def distances(self, patches: Tensor, distance: Distance = "reconstruction") -> Tensor:
        """Return the distances ``(...)`` of patches ``(..., C)``.

        ``reconstruction``: squared distance from the subspace (the paper). ``mahalanobis`` and
        ``euclidean``: squared distance from the mean within the subspace, with and without
        division by the variances. ``cosine``: 1 minus the cosine of a patch and its projection.
        """
        centred = patches.to(self.mean.dtype) - self.mean
        inside = centred @ self.components  # (..., K)
        if distance == "mahalanobis":
            return (inside.square() / (self.eigenvalues + 1e-6)).sum(dim=-1)
        if distance == "euclidean":
            return inside.square().sum(dim=-1)
        projected = inside @ self.components.mT
        if distance == "cosine":
            return 1 - F.cosine_similarity(patches.to(self.mean.dtype), projected + self.mean, -1)
        return (centred - projected).square().sum(dim=-1)


def principal_subspace(moments: Moments, explained: float) -> Subspace:
    """Return the smallest subspace that explains a share of the variance, in float64.

    Args:
        moments: Mean ``(1, C)`` and scatter ``(1, C, C)`` of at least 2 patches.
        explained: Share of the variance, above 0 and at most 1.
    """
    variances, vectors = torch.linalg.eigh(moments.scatter[0] / (moments.num_images - 1))
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    shares = variances.cumsum(0) / variances.sum()
    kept = min(int((shares < explained).sum()) + 1, len(variances))
    return Subspace(moments.mean[0], vectors[:, :kept], variances[:kept])


def top_mean(scores: Tensor, share: float = 0.01) -> Tensor:
    """Return the mean ``(B,)`` of the highest ``int(share * n)`` scores of ``(B, n)``, at least 1.

    Rounding down is that of the official code, unlike that of ``maps.image_score``.
    """
    return scores.topk(max(1, int(share * scores.shape[1])), dim=1).values.mean(dim=1)


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
            fitted on, too; 30 in the published few-shot setting, except for transistor.
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
        combine: Literal["mean", "concat"] = "mean",
        explained: float = 0.99,
        distance: Distance = "reconstruction",
        rotations: int = 0,
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        check_between("model.explained", explained, 0, 1, open_low=True)
        check_at_least("model.rotations", rotations, 0)
        check_between("model.seed", seed, 0, 2**32 - 1)
        shapes = {(self.backbone.channels[n], self.backbone.strides[n]) for n in self.layers}
        if combine == "mean" and len(shapes) > 1:
            raise ValueError(
                f"model.layers {self.layers} have different sizes, so they have no mean: set "
                f"model.combine to concat, or choose one of them"
            )
        self.combine = combine
        self.explained = explained
        self.distance = distance
        self.rotations = rotations
        self.seed = seed
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))
        self._moments = RunningMoments()

    def default_blocks(self, num_blocks: int) -> Sequence[int] | Sequence[str]:
        """Return the blocks of the official ablation, if it has towers of this depth."""
        return PUBLISHED_BLOCKS.get(num_blocks) or super().default_blocks(num_blocks)

    def on_fit_start(self) -> None:
        """Start from empty statistics."""
        self._moments = RunningMoments()

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add the patches of normal images, and of rotated copies, to the statistics."""
        features = self.embed(batch["image"])
        self._moments.add(features.flatten(0, 1).unsqueeze(1))  # (B * N, 1, C)
        if self.rotations:
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                copies = random_rotations(image, self.rotations, self.seed, index)
                self._moments.add(self.embed(copies).flatten(0, 1).unsqueeze(1))
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
            maps = patch_maps(distances, (images.shape[-2], images.shape[-1]))
            return Scores(image_score=top_mean(maps.flatten(1)), anomaly_map=maps)

    def embed(self, images: Tensor) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches: the mean, or all, of the layers."""
        maps = self.backbone.feature_maps(images, self.layers)
        if self.combine == "concat":
            size = maps[0].shape[-2:]
            maps = [torch.cat([_at_size(part.float(), size) for part in maps], dim=1)]
        return (sum(part.float() for part in maps) / len(maps)).flatten(2).mT  # type: ignore[union-attr]


def patch_maps(distances: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps ``(B, *size)`` of patch distances ``(B, N)``, smoothed a little."""
    maps = patches_to_map(distances, size)
    return gaussian_blur(maps, BLUR_SIGMA, truncate=BLUR_TRUNCATE, border="inner")


def _at_size(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
