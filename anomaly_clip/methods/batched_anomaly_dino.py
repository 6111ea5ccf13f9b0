"""Batched zero-shot AnomalyDINO (arXiv 2405.14529): patches compared with those of other images.

The test images of a category are compared with each other: an anomalous patch is far from most
patches of the other images. There are no normal images; see docs/methods/anomaly_dino.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.towers import AnyBackbone, AnySettings
from anomaly_clip.backbones.vit import ViTSettings
from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.maps import gaussian_blur, resize_maps
from anomaly_clip.methods.nearest_patches import batched_distances, check_one_layer, last_patches
from anomaly_clip.methods.object_masks import (
    THRESHOLD,
    MaskShape,
    Switch,
    check_masks,
    fits_threshold,
    has_masks,
    object_masks,
    tell_of_threshold,
)
from anomaly_clip.methods.subspace import top_mean
from anomaly_clip.methods.transductive import BatchedFeatureMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import track

__all__ = ["BatchedAnomalyDINO"]


class BatchedAnomalyDINO(BatchedFeatureMethod):
    """Patches compared with those of all other test images (AnomalyDINO, batched zero-shot).

    Args:
        backbone: A ViT or a CNN or, if ``pretrained`` is given in place of ``weights``, a CLIP
            model. The patches of a transformer are compared after its final norm.
        image_size: Side of the square input images, in pixels; published: 672 for the smaller edge.
        layers: One layer: the 1-based number of a block, default: the last one; or the name of a
            CNN's layer, default: layer4 of a ResNet.
        quantile: Share of the patches of all other images, from the nearest, whose distances are
            averaged.
        masks: Whether patches outside the object have distance 0. auto: as published, for VisA and
            five categories of MVTec-AD; elsewhere not.
        mask_threshold: Value of the first principal component above which a patch belongs to the
            object. The default belongs to DINOv2-S and to no other backbone.
        mask_shape: Arrangement of the patches whose mask is dilated and closed. column: one below
            the other, as in the official code; grid: as in the image.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        evaluator: Settings of the metrics.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer4",)

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = ViTSettings(),
        image_size: int = 672,
        layers: list[int] | list[str] | None = None,
        quantile: float = 0.001,
        masks: Switch = "auto",
        mask_threshold: float = THRESHOLD,
        mask_shape: MaskShape = "column",
        sigma: float = 4.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        check_one_layer(self.layers, "BatchedAnomalyDINO")
        check_between("model.quantile", quantile, 0, 1, open_low=True)
        check_masks(masks, mask_shape)
        check_at_least("model.sigma", sigma, 0)
        self.quantile = quantile
        self.masks = masks
        self.mask_threshold = mask_threshold
        self.mask_shape = mask_shape
        self.sigma = sigma

    def masks_category(self, name: str) -> bool:
        """Return whether patches outside the object have distance 0."""
        fits = self.masks == "on" or fits_threshold(self.mask_threshold, self.backbone)
        return fits and has_masks(self.masks, self.dataset_name, name)

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the distances and of the masks."""
        categories = self.evaluator.categories
        masks = {"threshold": self.mask_threshold, "shape": self.mask_shape}
        return {
            "layers": self.layers,
            "quantile": self.quantile,
            "object_masks": masks if any(map(self.masks_category, categories)) else None,
        }

    def prepare(self, categories: list[str]) -> None:
        """Log a line if the threshold of the masks is not of this backbone."""
        if any(has_masks(self.masks, self.dataset_name, name) for name in categories):
            tell_of_threshold("BatchedAnomalyDINO", self.masks, self.mask_threshold, self.backbone)

    def embed(self, images: Tensor) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches."""
        return last_patches(self.backbone, images, self.layers)

    def patch_distances(self, name: str, patches: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the distances of patches from those of other images; see the base class."""
        units = unit(patches.to(self.device))
        steps = track(rows, f"comparing {len(patches)} images")
        distances = torch.stack([batched_distances(units, r, self.quantile) for r in steps]).cpu()
        if self.masks_category(name):
            for place, row in enumerate(rows):
                tokens = patches[row : row + 1]
                distances[place] *= object_masks(tokens, self.mask_threshold, self.mask_shape)[0]
        return distances

    def image_scores(self, distances: Tensor) -> Tensor:
        """Return the mean of the highest percent of an image's distances; see the base class."""
        return top_mean(distances.flatten(1))

    def full_maps(self, patch_maps: Tensor) -> Tensor:
        """Return blurred maps ``(B, S, S)``; see the base class."""
        size = (self.image_size, self.image_size)
        return gaussian_blur(resize_maps(patch_maps.to(self.device), size), self.sigma)
