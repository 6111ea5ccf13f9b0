"""PatchCore (arXiv 2106.08265): distance of patches from their nearest normal patches.

The rows of the memory bank are patch features of normal images, reduced to a greedy k-centre
coreset. The score of a patch is its distance from the nearest row. Conventions are anomalib's
unless stated otherwise; see docs/methods/patchcore.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, BackboneSettings
from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.maps import gaussian_blur, resize_maps
from anomaly_clip.memory import GB, check_room
from anomaly_clip.methods.coreset import (
    k_centre_greedy,
    project,
    projected_width,
    seconds_per_centre,
)
from anomaly_clip.methods.feature_method import FittedMethod, feature_sums, in_order
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import duration, say
from anomaly_clip.records import Batch, Scores

__all__ = ["PatchCore", "nearest_rows"]

AT_ONCE = 1 << 24
"""Distances computed at once, 64 MiB in float32."""
MOST_GB = 1e6
"""Largest bound of the memory of a fit, beyond that of any machine."""
PRODUCT_FROM = 25
"""Rows of the bank above which distances between rows are computed by a matrix product."""


class PatchCore(FittedMethod):
    """A memory bank of patches of normal images (PatchCore, arXiv 2106.08265).

    Args:
        backbone: A CNN or a ViT or, if ``pretrained`` is given in place of ``weights``, a CLIP
            model.
        image_size: Side of the square input images, in pixels.
        layers: Layers, finest first: names of a CNN's, or 1-based numbers of blocks, of which
            layer1 to layer4 are the last ones of the four quarters. Their features are averaged
            over 3 x 3 positions and then concatenated.
        coreset: Share of all training patches kept in the bank.
        projection_eps: The coreset is selected from randomly projected patches; this is the
            relative error allowed for their squared distances. 0 turns the projection off.
        bank_type: Data type of the bank: float32, or float16, which takes half the memory.
        num_neighbours: The image score is the largest patch distance, reduced if the bank is dense
            around the row nearest to that patch. The density is measured with this number of rows,
            including the nearest one. 1 turns the reduction off, as in the original code.
        memory_gb: Most memory, in GB, that the fit takes for patches, their selection and the bank.
            Whenever there are more patches, a coreset of half of them is kept. Default: all patches
            of the training images are in memory.
        upsampling: Interpolation of the map: bilinear as in the original code, or nearest as in
            anomalib.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        blur_border: Padding of the map before the blur. edge: reflection that repeats the edge
            pixel (SciPy); inner: reflection that does not (anomalib).
        seed: Seed of the projection and of the first patch selected.
        evaluator: Settings of the metrics.
    """

    any_tower: ClassVar[bool] = True
    fitted_buffers: ClassVar[tuple[str, ...]] = ("bank",)
    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "sigma", "blur_border", "upsampling", "num_neighbours"}
    )
    bank: Tensor
    """``(K, C)`` after the fit."""

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = BackboneSettings(),
        image_size: int = 224,
        layers: Sequence[int] | Sequence[str] = ("layer2", "layer3"),
        coreset: float = 0.1,
        projection_eps: float = 0.9,
        bank_type: Literal["float32", "float16"] = "float32",
        num_neighbours: int = 9,
        memory_gb: float | None = None,
        upsampling: Literal["bilinear", "nearest"] = "bilinear",
        sigma: float = 4.0,
        blur_border: Literal["edge", "inner"] = "edge",
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        check_between("model.coreset", coreset, 0, 1, open_low=True)
        check_between("model.projection_eps", projection_eps, 0, 0.999)
        check_at_least("model.num_neighbours", num_neighbours, 1)
        if memory_gb is not None:
            check_between("model.memory_gb", memory_gb, 0, MOST_GB, open_low=True)
        check_at_least("model.sigma", sigma, 0)
        check_between("model.seed", seed, 0, 2**32 - 1)
        self.coreset = coreset
        self.projection_eps = projection_eps
        self.num_neighbours = num_neighbours
        self.memory_gb = memory_gb
        self.upsampling = upsampling
        self.sigma = sigma
        self.blur_border = blur_border
        self.seed = seed
        self.bank_type = getattr(torch, bank_type)
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._num_seen = 0

    def on_fit_start(self) -> None:
        """Log the expected memory and time, and refuse a fit that needs too much memory.

        Raises:
            ValueError: See :func:`~anomaly_clip.memory.check_room`; or if ``memory_gb`` has no room
                for the patches of two images.
        """
        self._parts = []
        self._num_seen = 0
        data = self.data
        if data is None:
            return
        num_images = len(data.fit_samples())
        side = self.image_size
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
        patch = self.embed(blank)
        per_image, width = patch.shape[1:]
        rows = num_images * per_image
        held, kept = rows, self.num_kept(rows)
        most = self.most_rows(width)
        bounded = ""
        if most is not None and most < rows:
            self._check_bound(most, 2 * per_image * self._num_processes, width)
            held, kept = most, min(kept, most // 2)
            bounded = f", with at most {held} of them in memory"
        cost = self.cost(held, width)
        narrow = self.projected_width(held, width)
        num_centres = kept + (rows - held)  # each half that was kept gives room to another
        seconds = num_centres * seconds_per_centre(held, narrow, self.device)
        say(
            f"PatchCore: {num_images} images have {rows} patches of {width} values, and the bank "
            f"keeps {kept} patches{bounded}; the fit takes about {sum(cost.values()) / GB:.2g} GB, "
            f"and the selection of the bank {duration(max(1, seconds))}"
        )
        smaller = "" if self.bank_type.itemsize == 2 else ", or set model.bank_type float16"
        way_out = f"set model.memory_gb, or lower data.fraction or model.image_size{smaller}"
        if bounded:
            way_out = "lower model.memory_gb"
        check_room(cost, "PatchCore", f"{held} patches", way_out)

    def num_kept(self, rows: int) -> int:
        """Return the number of patches, out of ``rows``, that the bank keeps."""
        return max(1, round(self.coreset * rows))

    def most_rows(self, width: int) -> int | None:
        """Return the number of patches for which ``memory_gb`` has room, None if it is not set."""
        if self.memory_gb is None:
            return None
        limit = self.memory_gb * GB
        rows = range(1, 1 + int(limit) // (width * self.bank_type.itemsize))
        return bisect_right(rows, limit, key=lambda rows: sum(self.cost(rows, width).values()))

    def _check_bound(self, most: int, needed: int, width: int) -> None:
        if most < needed:
            least = 1.01 * sum(self.cost(needed, width).values()) / GB  # not rounded down
            raise ValueError(
                f"model.memory_gb {self.memory_gb} has room for {most} patches, but not for "
                f"{needed}, those of two images in each process: set it to {least:.3g} or more"
            )

    @property
    def _num_processes(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    def projected_width(self, rows: int, width: int) -> int:
        """Return the number of values per patch during the selection of the bank."""
        eps = self.projection_eps
        return projected_width(rows, width, eps) if eps > 0 else width

    def cost(self, rows: int, width: int) -> dict[torch.device, int]:
        """Return the bytes that a fit takes on the host and on the device of the selection.

        Args:
            rows: Number of patches of all training images.
            width: Number of values per patch.
        """
        size = self.bank_type.itemsize
        patches = rows * width * size
        if self._num_processes > 1:
            patches *= 2  # gathered from all processes, then copied into order
        host, device = torch.device("cpu"), self.device
        kept = self.num_kept(rows) if self.memory_gb is None else rows // 2
        cost = {host: patches + kept * width * size}
        narrow = self.projected_width(rows, width)
        same = narrow == width and self.bank_type == torch.float32 and device == host
        points = rows * narrow * 4 * (1 if same else 2)  # the points, and a centred copy
        cost[device] = cost.get(device, 0) + points + 3 * rows * 4
        return cost

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Keep the patches of a batch of normal images; return sums of features."""
        features = self.embed(batch["image"]).to(self.bank_type)
        self.hold(batch["index"].cpu(), features.cpu())
        return {"features": feature_sums(features)}

    def hold(self, index: Tensor, features: Tensor) -> None:
        """Keep the patches ``(n, N, C)`` of images ``(n,)``, within the bound of the memory."""
        per_image, width = features.shape[1:]
        self._num_seen += len(index) * per_image
        most = self.most_rows(width)
        if most is None:
            self._parts.append((index, features))
            return
        most = max(2, most // self._num_processes)
        # Patches are now numbered one by one, as those of an image may be separated.
        numbers = (index[:, None] * per_image + torch.arange(per_image)).flatten()
        patches = features.reshape(-1, 1, width)
        for some, of_some in zip(numbers.split(most // 2), patches.split(most // 2), strict=True):
            if sum(len(number) for number, _ in self._parts) + len(some) > most:
                self.thin(most // 2)
            self._parts.append((some, of_some))

    def thin(self, count: int) -> None:
        """Keep a coreset of ``count`` of the patches in memory."""
        numbers = torch.cat([number for number, _ in self._parts]).sort().values
        patches = in_order(self._parts)
        kept = self.select(patches, count)
        self._parts.append((numbers[kept], patches[kept].unsqueeze(1)))

    def on_train_epoch_end(self) -> None:
        """Gather the patches of all processes, select the bank on the first one, and share it."""
        num_seen = self.trainer.strategy.reduce(
            torch.tensor(self._num_seen, device=self.device), reduce_op="sum"
        )
        parts, self._parts = self._parts, []
        patches = self.gathered(parts)
        bank = None if patches is None else self.choose(patches, int(num_seen))
        bank = self.trainer.strategy.broadcast(bank)
        assert bank is not None
        self.check_finite(bank=bank)
        self.bank = bank.to(self.device)

    def choose(self, patches: Tensor, num_seen: int) -> Tensor:
        """Return the coreset ``(K, C)`` of patches ``(M, C)``.

        Args:
            patches: The patches in memory.
            num_seen: Number of patches of all training images, of which ``coreset`` is a share.
        """
        most = self.most_rows(patches.shape[1])
        count = self.num_kept(num_seen)
        if most is not None and num_seen > most:
            count = min(count, max(1, most // 2), len(patches))
        return patches if count == len(patches) else patches[self.select(patches, count)]

    def select(self, patches: Tensor, count: int) -> Tensor:
        """Return the indices ``(count,)`` of a coreset of patches ``(M, C)``."""
        if self.projection_eps > 0:
            points = project(patches, self.seed, self.projection_eps, self.device)
        else:
            points = patches.float().to(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        start = int(torch.randint(len(points), (), generator=generator))
        return k_centre_greedy(points, count, start)

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` by the distance of each patch from the bank."""
        self.check_fitted()
        with self.backbone.out_of_autocast():  # distances stay in float32
            features = self.embed(images)
            distances, rows = nearest_rows(features.flatten(0, 1), self.bank)
            distances, rows = distances.view(len(images), -1), rows.view(len(images), -1)  # (B, N)
            side = math.isqrt(distances.shape[1])
            grid = distances.view(-1, side, side)  # (B, h, w)
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
        parts: list[Tensor] = []
        for features in self.backbone.feature_maps(images, self.layers):
            pooled = F.avg_pool2d(features.float(), 3, stride=1, padding=1)
            if parts and pooled.shape != parts[0].shape:
                size = parts[0].shape[-2:]
                pooled = F.interpolate(pooled, size, mode="bilinear", align_corners=False)
            parts.append(pooled)
        return torch.cat(parts, dim=1).flatten(2).mT  # (B, N, C)

    def image_scores(self, features: Tensor, distances: Tensor, rows: Tensor) -> Tensor:
        """Return image scores ``(B,)``: each image's largest patch distance, times a weight.

        The weight is smaller if other bank rows are close to the one nearest to that patch.

        Args:
            features: ``(B, N, C)``.
            distances: ``(B, N)``, distance of each patch from its nearest bank row.
            rows: ``(B, N)``, index of that bank row.
        """
        largest, at = distances.max(dim=1)
        if self.num_neighbours == 1:
            return largest
        images = torch.arange(len(features), device=features.device)
        patch, row = features[images, at], rows[images, at]  # (B, C), (B,)
        bank = self.bank.float()
        near = _distances(bank[row], bank).topk(min(self.num_neighbours, len(bank)), largest=False)
        to_near = torch.linalg.vector_norm(
            patch.unsqueeze(1) - bank[near.indices], dim=-1
        )  # (B, k)
        to_nearest = torch.linalg.vector_norm(patch - bank[row], dim=-1)  # (B,)
        # Softmax entry of the nearest row, whatever its rank among the neighbours.
        share = (to_nearest - to_near.logsumexp(dim=1)).exp()
        return (1 - share) * largest


def nearest_rows(features: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance and index of each feature's nearest bank row, computed block by block.

    The nearest row is found by matrix products. The distance is then computed from the difference
    of the two vectors, which loses no digits.

    Args:
        features: ``(n, C)``.
        bank: ``(K, C)``.

    Returns:
        Distances, float32 ``(n,)``, and row indices, int64 ``(n,)``.
    """
    features, rows_of_bank = features.float(), bank.float()
    half_lengths = rows_of_bank.square().sum(dim=1) / 2
    step = max(1, AT_ONCE // len(rows_of_bank))
    # The number of features is unknown while a graph is traced.
    blocks = [features] if torch.compiler.is_compiling() else features.split(step)
    parts = [
        torch.addmm(half_lengths, block, rows_of_bank.T, alpha=-1).argmin(dim=1) for block in blocks
    ]
    rows = torch.cat(parts)
    return torch.linalg.vector_norm(features - rows_of_bank[rows], dim=1), rows


def _distances(rows: Tensor, bank: Tensor) -> Tensor:
    """Return the distances ``(B, K)`` of rows ``(B, C)`` of the bank from all of its rows."""
    # As torch chooses, but independent of the number of images, which a graph does not know.
    if len(bank) > PRODUCT_FROM:
        return torch.cdist(rows, bank, compute_mode="use_mm_for_euclid_dist")
    if torch.compiler.is_compiling():  # ONNX has no cdist
        return torch.linalg.vector_norm(rows.unsqueeze(1) - bank, dim=-1)
    return torch.cdist(rows, bank, compute_mode="donot_use_mm_for_euclid_dist")
