"""AnomalyDINO (arXiv 2405.14529): cosine distance of patches from their nearest normal patches.

The rows of the memory are all patches of a few normal images, and of rotated copies. Conventions
are those of the official code unless stated otherwise; see docs/methods/anomaly_dino.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.towers import AnyBackbone, AnySettings
from anomaly_clip.backbones.vit import ViTSettings
from anomaly_clip.errors import check_at_least, check_choice
from anomaly_clip.maps import gaussian_blur, patches_to_map
from anomaly_clip.memory import GB, check_room
from anomaly_clip.methods.feature_method import FittedMethod, feature_sums
from anomaly_clip.methods.nearest_patches import check_one_layer, cosine_distances, last_patches
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
from anomaly_clip.methods.rotations import (
    RegularRotations,
    has_rotations,
    in_batches,
    regular_rotations,
)
from anomaly_clip.methods.subspace import top_mean
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import say
from anomaly_clip.records import Batch, Scores

__all__ = ["AnomalyDINO"]

COPIES = 8
"""Rotated copies of an image, one of which is the image."""
OF_FIT = "anomaly_dino"
"""Key of a checkpoint: the settings that belong to the category of the fit."""


class AnomalyDINO(FittedMethod):
    """A memory of unit patches of normal images (AnomalyDINO, arXiv 2405.14529).

    Args:
        backbone: A ViT or a CNN or, if ``pretrained`` is given in place of ``weights``, a CLIP
            model. The patches of a transformer are compared after its final norm.
        image_size: Side of the square input images, in pixels. The official code keeps the aspect
            ratio, which is the same for square images.
        layers: One layer: the 1-based number of a block, default: the last one; or the name of a
            CNN's layer, default: layer4 of a ResNet.
        num_neighbours: Number of nearest rows whose distances are averaged.
        rotations: Whether eight rotated copies of each training image are in the memory. auto: the
            published "agnostic" setting, for all objects of MVTec-AD and VisA, elsewhere not.
            informed: only for hazelnut and screw of MVTec-AD.
        masks: Whether patches outside the object have distance 0. auto: as published, for VisA and
            five categories of MVTec-AD; elsewhere not, nor with a backbone that mask_threshold does
            not belong to.
        mask_threshold: Value of the first principal component above which a patch belongs to the
            object. The default belongs to DINOv2-S and to no other backbone.
        mask_shape: Arrangement of the patches whose mask is dilated and closed. column: one below
            the other, as in the official code; grid: as in the image.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        evaluator: Settings of the metrics.
    """

    any_tower: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("layer4",)
    fitted_buffers: ClassVar[tuple[str, ...]] = ("bank",)
    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "num_neighbours", "masks", "mask_threshold", "mask_shape", "sigma"}
    )
    bank: Tensor
    """``(M, C)`` after the fit, rows of unit length."""

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = ViTSettings(),
        image_size: int = 448,
        layers: list[int] | list[str] | None = None,
        num_neighbours: int = 1,
        rotations: RegularRotations = "auto",
        masks: Switch = "auto",
        mask_threshold: float = THRESHOLD,
        mask_shape: MaskShape = "column",
        sigma: float = 4.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        check_one_layer(self.layers, "AnomalyDINO")
        check_at_least("model.num_neighbours", num_neighbours, 1)
        check_choice("model.rotations", rotations, ("auto", "informed", "on", "off"))
        check_masks(masks, mask_shape)
        check_at_least("model.sigma", sigma, 0)
        self.num_neighbours = num_neighbours
        self.rotations = rotations
        self.masks = masks
        self.mask_threshold = mask_threshold
        self.mask_shape = mask_shape
        self.sigma = sigma
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))
        self.has_rotations = self.is_published_with_masks = False
        """Settings of the category of the fit, which checkpoints keep."""
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def has_masks(self) -> bool:
        """True if patches outside the object have distance 0."""
        fits = fits_threshold(self.mask_threshold, self.backbone)
        published = self.is_published_with_masks and fits
        return published if self.masks == "auto" else self.masks == "on"

    @property
    def not_exportable(self) -> str | None:  # type: ignore[override]
        """Reason why there is no program, if the object is masked."""
        if not self.has_masks:
            return None
        return "masks objects by principal components of each image (model.masks off does not)"

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the memory and of the masks."""
        masks = {"threshold": self.mask_threshold, "shape": self.mask_shape}
        return {
            "layers": self.layers,
            "num_neighbours": self.num_neighbours,
            "rotations": COPIES * self.has_rotations,
            "object_masks": masks if self.has_masks else None,
        }

    def on_fit_start(self) -> None:
        """Start from an empty memory; log its size, and refuse one that is too large.

        Raises:
            ValueError: See :func:`~anomaly_clip.memory.check_room`.
        """
        self._parts = []
        data = self.data
        category = "" if data is None else data.train_categories[0]
        self.has_rotations = has_rotations(self.rotations, self.dataset_name, category)
        self.is_published_with_masks = has_masks("auto", self.dataset_name, category)
        if data is None:
            return
        side = self.image_size
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
        num_patches, width = self.embed(blank).shape[1:]
        num_images = len(data.fit_samples())
        rows = num_images * num_patches * (COPIES if self.has_rotations else 1)
        size = rows * width * 4
        cost = {torch.device("cpu"): size * (3 if self.trainer.world_size > 1 else 1)}
        if self.device.type != "cpu":
            cost[self.device] = size
        say(
            f"AnomalyDINO: the memory has {rows} patches of {num_images} images"
            f"{' and of rotated copies' * self.has_rotations}, {size / GB:.2g} GB"
        )
        check_room(cost, "AnomalyDINO", f"{rows} patches", "lower data.shots or model.image_size")

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Keep the patches of a batch of normal images; return sums of features."""
        images = batch["image"]
        if self.has_rotations:
            copies = in_batches(map(regular_rotations, images), self.copies_at_once)
            features = torch.cat([self.embed(part) for part in copies])
        else:
            features = self.embed(images)
        features = features.unflatten(0, (len(images), -1)).flatten(1, 2)  # (B, 8 N, C)
        self._parts.append((batch["index"].cpu(), features.cpu()))
        return {"features": feature_sums(features)}

    def on_train_epoch_end(self) -> None:
        """Gather the patches of all processes, in the order of the images."""
        parts, self._parts = self._parts, []
        bank = self.trainer.strategy.broadcast(self.gathered(parts))
        assert bank is not None
        self.check_finite(bank=bank)
        self.bank = bank.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the category of the fit, too; see the base class."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[OF_FIT] = {
            "rotations": self.has_rotations,
            "masks": self.is_published_with_masks,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the settings of the category of the fit, too; see the base class."""
        super().on_load_checkpoint(checkpoint)
        of_fit = checkpoint.get(OF_FIT, {})
        self.has_rotations = bool(of_fit.get("rotations"))
        self.is_published_with_masks = bool(of_fit.get("masks"))

    def prepare(self, categories: list[str]) -> None:
        """Log a line if the threshold of the masks is not of this backbone."""
        if self.masks == "on" or self.is_published_with_masks:
            tell_of_threshold("AnomalyDINO", self.masks, self.mask_threshold, self.backbone)

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, S, S)`` by the distance of their patches from the memory."""
        self.check_fitted()
        with self.backbone.out_of_autocast():  # distances stay in float32
            patches = last_patches(self.backbone, images, self.layers)  # (B, N, C)
            units = unit(patches)
            # The bank has half precision with the precision bf16-true.
            distances = cosine_distances(units, self.bank.to(units.dtype), self.num_neighbours)
            if self.has_masks:
                distances = distances * object_masks(patches, self.mask_threshold, self.mask_shape)
            size = (images.shape[-2], images.shape[-1])
            maps = gaussian_blur(patches_to_map(distances, size), self.sigma)
            return Scores(image_score=top_mean(distances), anomaly_map=maps)

    def embed(self, images: Tensor) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches, of unit length."""
        return unit(last_patches(self.backbone, images, self.layers))
