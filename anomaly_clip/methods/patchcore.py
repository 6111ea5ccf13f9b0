"""PatchCore (arXiv 2106.08265): how far patches are from the nearest ones of normal images.

A memory bank of patch features, thinned out to a greedy k-centre coreset; a patch's score is the
distance to its nearest row. Conventions are anomalib's, where not said otherwise (section 5 of the
specification).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.maps import gaussian_blur, resize_maps
from anomaly_clip.memory import available_memory
from anomaly_clip.methods.cnn_method import FittedMethod
from anomaly_clip.methods.coreset import k_centre_greedy, project, projected_width
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import say
from anomaly_clip.records import Batch, Scores

__all__ = ["PatchCore", "nearest_rows"]

AT_ONCE = 1 << 24
"""Distances computed at once, 64 MiB in float32."""
ROOM = 0.8
"""Share of the free memory that a fit may take."""
GB = 1e9


class PatchCore(FittedMethod):
    """A memory bank of patches of normal images (PatchCore, section 5 of the specification).

    Args:
        backbone: Which CNN; the layers below are taken of it, unless it names others.
        image_size: Side of its images, in pixels.
        layers: Whose features are joined, finest first, each averaged over 3 x 3 patches.
        coreset: Share of all training patches that the bank keeps.
        projection_eps: Of the random projection in which the coreset is chosen: how far squared
            distances may be off; 0 chooses without.
        bank_type: Numbers of the bank: float32, or float16, half as large.
        num_neighbours: Rows near to the nearest one that reweigh the image score; 1 for the plain
            largest distance, as the original code does.
        upsampling: Of the map: bilinear as the original, or nearest as anomalib.
        sigma: Gaussian blur of the map, in pixels.
        blur_border: edge: the border is reflected with its edge (SciPy's); inner: without
            (anomalib's).
        seed: Draws the projection and the first patch.
        evaluator: How figures are computed.
    """

    fitted_buffers: ClassVar[tuple[str, ...]] = ("bank",)
    free_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "sigma", "blur_border", "upsampling", "num_neighbours"}
    )
    bank: Tensor
    """``(K, C)`` once fitted."""

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone = CNNSettings(),
        image_size: int = 224,
        layers: Sequence[str] = ("layer2", "layer3"),
        coreset: float = 0.1,
        projection_eps: float = 0.9,
        bank_type: Literal["float32", "float16"] = "float32",
        num_neighbours: int = 9,
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
        sigma: float = 4.0,
        blur_border: Literal["edge", "inner"] = "edge",
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        for name, value, least, most in (
            ("coreset", coreset, 1e-9, 1),
            ("projection_eps", projection_eps, 0, 0.999),
            ("num_neighbours", num_neighbours, 1, math.inf),
            ("sigma", sigma, 0, math.inf),
            ("seed", seed, 0, math.inf),
        ):
            if not least <= value <= most:
                bounds = f"{least:g} or more" if most == math.inf else f"in ({least:g}, {most:g}]"
                raise ValueError(f"model.{name} must be {bounds}, got {value}")
        self.coreset = coreset
        self.projection_eps = projection_eps
        self.num_neighbours = num_neighbours
        self.upsampling = upsampling
        self.sigma = sigma
        self.blur_border = blur_border
        self.seed = seed
        self.bank_type = getattr(torch, bank_type)
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(
            {"backbone": asdict(self.asked_backbone), "layers": list(self.layers)}
        )
        self._parts: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self) -> None:
        """Say what it will take, and refuse what does not fit.

        Raises:
            ValueError: If memory is too small.
        """
        self._parts = []
        data = self.data
        if data is None:
            return
        num_images = len(data.fit_samples())
        patch = self.embed(torch.zeros(1, 3, self.image_size, self.image_size, device=self.device))
        per_image, width = patch.shape[1:]
        rows = num_images * per_image
        kept = max(1, round(self.coreset * rows))
        eps = self.projection_eps
        narrow = projected_width(rows, width, eps) if eps > 0 else width
        size = self.bank_type.itemsize
        needed = rows * (width * size + narrow * 4 * 2) + kept * width * size
        free = available_memory(torch.device("cpu"))
        seconds = kept * _seconds_a_centre(rows, narrow)
        say(
            f"PatchCore: {num_images} images, {rows} patches of {width} numbers, of which {kept} "
            f"are kept; about {needed / GB:.2g} GB, and {_duration(seconds)} to choose them"
        )
        if free is not None and needed > ROOM * free:
            raise ValueError(
                f"PatchCore needs about {needed / GB:.3g} GB for {rows} patches, and "
                f"{free / GB:.3g} GB are free: lower data.fraction, model.image_size or "
                f"model.coreset, or set model.bank_type float16"
            )

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the patches of a batch of normal images."""
        features = self.embed(batch["image"]).to(self.bank_type).cpu()
        self._parts.append((batch["index"].cpu(), features))

    def on_train_epoch_end(self) -> None:
        """Choose the bank among the patches of all processes: on the first, for all."""
        index = torch.cat([rows for rows, _ in self._parts])
        features = torch.cat([part for _, part in self._parts])
        self._parts = []
        gathered: list[Any] | None = None
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size if self.trainer.is_global_zero else None
            torch.distributed.gather_object((index, features), gathered)
            if gathered is not None:
                index = torch.cat([rows for rows, _ in gathered])
                features = torch.cat([part for _, part in gathered])
        bank = None
        if self.trainer.is_global_zero:
            bank = self.choose(features[index.argsort()].flatten(0, 1))
        bank = self.trainer.strategy.broadcast(bank)
        assert bank is not None
        self.bank = bank.to(self.device)

    def choose(self, patches: Tensor) -> Tensor:
        """Return the coreset ``(K, C)`` of patches ``(M, C)``."""
        count = max(1, round(self.coreset * len(patches)))
        if count == len(patches):
            return patches
        points = patches.float().to(self.device)
        if self.projection_eps > 0:
            points = project(points, self.seed, self.projection_eps)
        generator = torch.Generator().manual_seed(self.seed)
        start = int(torch.randint(len(points), (), generator=generator))
        return patches[k_centre_greedy(points, count, start)]

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)``: the distance of each patch from the bank."""
        self.check_fitted()
        with self.backbone.out_of_autocast():  # distances stay in float32
            features = self.embed(images)
            distances, rows = nearest_rows(features.flatten(0, 1), self.bank)
            distances, rows = distances.view(len(images), -1), rows.view(len(images), -1)
            side = math.isqrt(distances.shape[1])
            grid = distances.view(-1, side, side)
            size = (images.shape[-2], images.shape[-1])
            if self.upsampling == "bilinear":
                maps = resize_maps(grid, size)
            else:
                maps = F.interpolate(grid[:, None], size, mode="nearest")[:, 0]
            return Scores(
                image_score=self.image_scores(features, distances, rows),
                anomaly_map=gaussian_blur(maps, self.sigma, border=self.blur_border),
            )

    def embed(self, images: Tensor) -> Tensor:
        """Return features ``(B, N, C)`` of all patches of the finest layer."""
        features = self.backbone(images)
        parts: list[Tensor] = []
        for layer in self.layers:
            pooled = F.avg_pool2d(features[layer].float(), 3, stride=1, padding=1)
            if parts and pooled.shape != parts[0].shape:
                size = parts[0].shape[-2:]
                pooled = F.interpolate(pooled, size, mode="bilinear", align_corners=False)
            parts.append(pooled)
        return torch.cat(parts, dim=1).flatten(2).mT

    def image_scores(self, features: Tensor, distances: Tensor, rows: Tensor) -> Tensor:
        """Return image scores ``(B,)``: the largest distance, less where rows are scarce.

        Args:
            features: ``(B, N, C)``.
            distances: ``(B, N)`` from the nearest row.
            rows: ``(B, N)``, which that is.
        """
        largest, at = distances.max(dim=1)
        if self.num_neighbours == 1:
            return largest
        images = torch.arange(len(features), device=features.device)
        patch, row = features[images, at], rows[images, at]
        bank = self.bank.float()
        near = torch.cdist(bank[row], bank).topk(min(self.num_neighbours, len(bank)), largest=False)
        to_near = torch.linalg.vector_norm(patch.unsqueeze(1) - bank[near.indices], dim=-1)
        own = torch.linalg.vector_norm(patch - bank[row], dim=-1)
        # The softmax's entry of the nearest row, whatever its place among its neighbours.
        share = (own - to_near.logsumexp(dim=1)).exp()
        return (1 - share) * largest


def nearest_rows(features: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance and number of the nearest row of a bank, block by block.

    Products find the row; the distance is then taken of the difference itself, which loses no
    digits.

    Args:
        features: ``(n, C)``.
        bank: ``(K, C)``.

    Returns:
        ``(n,)`` float32 and ``(n,)`` int64.
    """
    features, known = features.float(), bank.float()
    half_lengths = known.square().sum(dim=1) / 2
    step = max(1, AT_ONCE // len(known))
    found = [
        torch.addmm(half_lengths, part, known.T, alpha=-1).argmin(dim=1)
        for part in features.split(step)
    ]
    rows = torch.cat(found)
    return torch.linalg.vector_norm(features - known[rows], dim=1), rows


def _seconds_a_centre(rows: int, width: int) -> float:
    """Measure a product with a few of the rows, and scale it up."""
    few = torch.zeros(min(rows, 20_000), width)
    vector = torch.zeros(width)
    begun = time.perf_counter()
    for _ in range(3):
        torch.mv(few, vector)
    return (time.perf_counter() - begun) / 3 * rows / len(few)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"
