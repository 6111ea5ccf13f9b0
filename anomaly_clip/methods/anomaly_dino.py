"""AnomalyDINO (arXiv 2405.14529): cosine distance of patches from their nearest normal patches.

The rows of the memory are all patches of a few normal images, and of rotated copies. Conventions
are those of the official code unless stated otherwise; see docs/methods/anomaly_dino.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.towers import AnyBackbone, AnySettings
from anomaly_clip.backbones.vit import ViTSettings
from anomaly_clip.errors import check_at_least, check_choice
from anomaly_clip.maps import gaussian_blur, patches_to_map
from anomaly_clip.methods.feature_method import FittedMethod, feature_sums
from anomaly_clip.methods.rotations import regular_rotations
from anomaly_clip.methods.subspace_ad import top_mean
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["AnomalyDINO", "cosine_distances", "grid_object_mask", "object_mask"]

Switch = Literal["auto", "on", "off"]
MaskShape = Literal["column", "grid"]
AT_ONCE = 1 << 24
"""Cosines computed at once, 64 MiB in float32."""
CENTRE = 0.2, 0.8
"""Rows and columns of the central area, as shares of the grid."""
LEAST_IN_CENTRE = 0.35
"""Share of the central area that an object covers at least."""
TEXTURES = {"MVTecAD": ("carpet", "grid", "leather", "tile", "wood")}
MASKED = {"MVTecAD": ("capsule", "hazelnut", "pill", "screw", "toothbrush"), "VisA": None}
"""Categories with object masks; None: all."""


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
        rotations: Whether eight rotated copies of each training image are in the memory. auto: as
            published ("agnostic"), for all objects of MVTec-AD and VisA; elsewhere not.
        masks: Whether patches outside the object have distance 0. auto: as published, for VisA and
            five categories of MVTec-AD; elsewhere not.
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
    masked: Tensor
    """True if the fit was on a category that is published with object masks."""

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = ViTSettings(),
        image_size: int = 448,
        layers: list[int] | list[str] | None = None,
        num_neighbours: int = 1,
        rotations: Switch = "auto",
        masks: Switch = "auto",
        mask_threshold: float = 10.0,
        mask_shape: MaskShape = "column",
        sigma: float = 4.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        if len(self.layers) != 1:
            raise ValueError(
                f"model.layers {self.layers}: AnomalyDINO compares patches of one layer; give one"
            )
        check_at_least("model.num_neighbours", num_neighbours, 1)
        check_choice("model.rotations", rotations, ("auto", "on", "off"))
        check_choice("model.masks", masks, ("auto", "on", "off"))
        check_choice("model.mask_shape", mask_shape, ("column", "grid"))
        check_at_least("model.sigma", sigma, 0)
        self.num_neighbours = num_neighbours
        self.rotations = rotations
        self.masks = masks
        self.mask_threshold = mask_threshold
        self.mask_shape = mask_shape
        self.sigma = sigma
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))
        self.register_buffer("masked", torch.tensor(False))
        self._parts: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self) -> None:
        """Start from an empty memory; note whether the category is published with object masks."""
        self._parts = []
        categories = [] if self.data is None else self.data.train_categories
        published = MASKED.get(self.dataset_name or "", ())
        self.masked.fill_(
            self.dataset_name in MASKED and (published is None or categories[0] in published)
        )

    def rotates(self, category: str) -> bool:
        """Return whether rotated copies of the images of a category are in the memory."""
        if self.rotations != "auto":
            return self.rotations == "on"
        name = self.dataset_name or ""
        return name in MASKED and category not in TEXTURES.get(name, ())

    @property
    def has_masks(self) -> bool:
        """True if patches outside the object have distance 0."""
        return bool(self.masked) if self.masks == "auto" else self.masks == "on"

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Keep the patches of a batch of normal images; return sums of features."""
        parts = []
        for image, category in zip(batch["image"], batch["category"], strict=True):
            copies = regular_rotations(image) if self.rotates(category) else image.unsqueeze(0)
            parts.append(self.embed(copies).flatten(0, 1))  # (8 * N, C)
        features = torch.stack(parts)
        self._parts.append((batch["index"].cpu(), features.cpu()))
        return {"features": feature_sums(features)}

    def on_train_epoch_end(self) -> None:
        """Gather the patches of all processes, in the order of the images."""
        parts, self._parts = self._parts, []
        bank = self.trainer.strategy.broadcast(self.gathered(parts))
        assert bank is not None
        self.check_finite(bank=bank)
        self.bank = bank.to(self.device)

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, S, S)`` by the distance of their patches from the memory."""
        self.check_fitted()
        with self.backbone.out_of_autocast():  # distances stay in float32
            tokens = self.embed(images, scaled=False)  # (B, N, C)
            distances = cosine_distances(unit(tokens), self.bank, self.num_neighbours)
            if self.has_masks:
                settings = self.mask_threshold, self.mask_shape
                masks = torch.stack([object_mask(patches, *settings) for patches in tokens])
                distances = distances * masks
            size = (images.shape[-2], images.shape[-1])
            maps = gaussian_blur(patches_to_map(distances, size), self.sigma)
            return Scores(image_score=top_mean(distances), anomaly_map=maps)

    def embed(self, images: Tensor, *, scaled: bool = True) -> Tensor:
        """Return the features ``(B, N, C)`` of all patches, by default of unit length."""
        (maps,) = self.backbone.feature_maps(images, self.layers, norm=True)
        patches = maps.flatten(2).mT.float()
        return unit(patches) if scaled else patches


def cosine_distances(patches: Tensor, bank: Tensor, num_neighbours: int = 1) -> Tensor:
    """Return the mean cosine distance ``(B, N)`` of patches from their nearest rows.

    Args:
        patches: ``(B, N, C)``, of unit length.
        bank: ``(M, C)``, of unit length.
        num_neighbours: Number of rows whose distances are averaged; all of a smaller bank.
    """
    flat = patches.flatten(0, 1)
    count = min(num_neighbours, len(bank))
    # The number of patches is unknown while a graph is traced.
    compiling = torch.compiler.is_compiling()
    blocks = [flat] if compiling else flat.split(max(1, AT_ONCE // len(bank)))
    parts = [1 - (block @ bank.mT).topk(count, dim=1).values.mean(dim=1) for block in blocks]
    return torch.cat(parts).view(patches.shape[:2])


def object_mask(tokens: Tensor, threshold: float = 10.0, shape: MaskShape = "column") -> Tensor:
    """Return whether each patch of an image belongs to the object, bool ``(N,)``.

    The first principal component of the patches separates the object from the background. Its
    sign is turned if too little of the centre of the image would belong to the object.

    Args:
        tokens: ``(N, C)``, patches after the final norm, row by row of a square grid.
        threshold: Value of the component above which a patch belongs to the object.
        shape: Arrangement in which the mask is dilated and closed by 3 x 3 patches.
    """
    side = round(len(tokens) ** 0.5)
    return grid_object_mask(tokens, (side, side), threshold, shape)


def grid_object_mask(
    tokens: Tensor, grid: tuple[int, int], threshold: float, shape: MaskShape
) -> Tensor:
    """Return :func:`object_mask` of a grid of any number of rows and columns."""
    centred = tokens.double() - tokens.double().mean(dim=0)
    component = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
    component = component * component[component.abs().argmax()].sign()  # scikit-learn's rule
    values = centred @ component
    rows, columns = (slice(*(int(share * n) for share in CENTRE)) for n in grid)
    mask = values > threshold
    if mask.view(grid)[rows, columns].double().mean() <= LEAST_IN_CENTRE:
        mask = -values > threshold
    mask = mask.view(1, 1, *(grid if shape == "grid" else (-1, 1))).double()
    mask = _dilated(_dilated(mask))
    return ~_dilated(1 - mask).bool().flatten()


def _dilated(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask, 3, stride=1, padding=1)
