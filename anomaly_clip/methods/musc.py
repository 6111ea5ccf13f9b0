"""MuSc (arXiv 2401.16753): zero-shot detection by mutual scoring of unlabelled images.

The test images of a category judge each other: a patch that resembles patches of few other images
is anomalous. There are no prompts, no normal images and no training. Scores depend on the images
that are scored together, so the method is transductive.

The backbone may also be a CNN, and images may be compared only with those before them (``online``).
Both are ours, not the paper's; see docs/methods/musc.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.surgery import default_layers
from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, settings_of, tower_of
from anomaly_clip.errors import check_at_least, check_choice
from anomaly_clip.maps import image_score, resize_maps
from anomaly_clip.methods.image_features import ImageFeatures, gather_rows
from anomaly_clip.methods.musc_encoder import (
    CLASS_VECTOR,
    class_vectors,
    encoder_of,
    halves,
)
from anomaly_clip.methods.musc_images import Recent, SeenImages, drawn_order, resize_grids
from anomaly_clip.methods.mutual_scoring import (
    RecentImages,
    aggregate,
    check_interval,
    check_k_list,
    check_neighbourhood,
    mutual_scores,
    rescore,
    rescore_in_sequence,
    room_on,
    sequential_scores,
)
from anomaly_clip.methods.transductive import TransductiveMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import track
from anomaly_clip.records import Encoder

__all__ = ["CNN_SIZE", "MuSc"]

K_LIST = {"VisA": [1, 8, 9]}
DEFAULT_K_LIST = [1, 2, 3]
R_LIST = [1, 3, 5]
INTERVAL = [0, 0.3]
CNN_SIZE = 256
"""Side of the images of a CNN, in pixels (our choice)."""
RESNET_LAYERS = ["layer2", "layer3"]
"""Layers of a ResNet (our choice): a finer one would take 16 times as long."""
AT_ONCE = 16
"""Maps upsampled at once."""


class MuSc(TransductiveMethod):
    """Zero-shot detection by mutual scoring (MuSc, arXiv 2401.16753; docs/methods/musc.md).

    Args:
        backbone: A CLIP model, or a CNN or a ViT if ``weights`` are given in place of
            ``pretrained``.
        layers: Layers of the patch features. Of a CLIP model or a ViT: 1-based block numbers;
            default: the ends of its four quarters. Of a CNN: layer names, finest first; default:
            layer2 and layer3 of a ResNet.
        r_list: Sides of the neighbourhoods over which patches are averaged, in patches: odd
            numbers; default: 1, 3 and 5.
        interval: Images whose distances are averaged, of those that a patch is compared with, from
            the nearest: two shares from 0 to 1, or two numbers of images (integers; 1 is one image,
            1.0 are all); default: 0 and 0.3, the nearest 30 %.
        k_list: Numbers of images with similar class vectors over which image scores are averaged,
            including the image itself; [0]: image scores stay as they are. auto: 1, 8 and 9 on
            VisA, 1, 2 and 3 elsewhere (published).
        image_size: Side of the square images, in pixels; default: 256 for a CNN, otherwise that of
            the backbone's weights.
        grid: Side of the grid of patches that are compared, to which features are averaged or
            interpolated (ours); default: that of the finest layer.
        scoring: batch: the images of a category are compared with all others (the paper). online:
            with those that were scored before, for a production line (ours).
        memory: For online: number of images before an image that it is compared with.
        start: For online: number of first images that are compared with each other.
        order_seed: For online: seed of the order of the images in validate and test, as data sets
            list normal and anomalous images apart. predict keeps the order of the listing.
        feature_cache_gb: Maximum size of the cache of image features in validate and test, in GB
            (1e9 bytes); 0: no cache. A later run with other settings of the scoring then encodes no
            image again.
        evaluator: Settings of the metrics.
    """

    backbone: AnyBackbone

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = CLIPSettings(),
        layers: list[int] | list[str] | None = None,
        r_list: list[int] | None = None,
        interval: list[int | float] | None = None,
        k_list: list[int] | Literal["auto"] = "auto",
        image_size: int | None = None,
        grid: int | None = None,
        scoring: Literal["batch", "online"] = "batch",
        memory: int = 200,
        start: int = 20,
        order_seed: int = 0,
        feature_cache_gb: float = 0.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(evaluator)
        self.r_list = R_LIST if r_list is None else list(r_list)
        self.interval = INTERVAL if interval is None else list(interval)
        self.k_list = k_list
        self.grid = grid
        self.scoring = scoring
        self.memory, self.start, self.order_seed = memory, start, order_seed
        self.feature_cache_gb = feature_cache_gb
        if not self.r_list:
            raise ValueError("model.r_list is empty: give odd numbers, such as [1, 3, 5]")
        for r in self.r_list:
            check_neighbourhood(r)
        check_interval(self.interval)
        check_choice("model.scoring", scoring, ("batch", "online"))
        if grid is not None:
            check_at_least("model.grid", grid, 1)
        check_at_least("model.memory", memory, 1)
        check_at_least("model.start", start, 2)
        check_at_least("model.order_seed", order_seed, 0)
        check_at_least("model.feature_cache_gb", feature_cache_gb, 0)
        if k_list != "auto":
            check_k_list(k_list)
        self._take_backbone(backbone, layers, image_size)
        self._seen: dict[str, SeenImages] = {}
        """For online: the last images of each category."""
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"], logger=False)
        settings = {"backbone": asdict(self.backbone.settings), "layers": self.layers}
        self.save_hyperparameters(settings, logger=False)

    def _take_backbone(
        self,
        backbone: AnySettings | AnyBackbone | Mapping[str, Any],
        layers: Sequence[int] | Sequence[str] | None,
        image_size: int | None,
    ) -> None:
        """Build the backbone; check its layers and the image size.

        Raises:
            ValueError: If the backbone has no such layers, or sets the image size itself.
        """
        given = backbone if isinstance(backbone, get_args(AnyBackbone)) else settings_of(backbone)
        needed = layers
        if isinstance(given, CNNSettings):
            needed = [str(name) for name in layers or given.layers or RESNET_LAYERS]
            given = replace(given, layers=None)
        tower = self.backbone = tower_of(given, needed, image_size)
        if isinstance(tower, CNNBackbone):
            names = list(tower.strides) if needed is None else needed
            self.layers: list[int] | list[str] = tower.check_layers(names)  # type: ignore[arg-type]
            self._image_size = CNN_SIZE if image_size is None else image_size
            check_at_least("model.image_size", self._image_size, 32)
        else:
            numbers = default_layers(tower.num_layers) if layers is None else layers
            self.layers = tower.check_layers(numbers)  # type: ignore[arg-type]
            self._image_size = tower.image_size
        if len(set(self.layers)) < len(self.layers):  # features are stored by name
            raise ValueError(f"model.layers names a layer twice, got {self.layers}: leave one out")

    @property
    def image_size(self) -> int:
        """Side of the square input images of ``score``, in pixels."""
        return self._image_size

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the scoring; the numbers of images are recorded with every run."""
        online = {"memory": self.memory, "start": self.start, "order_seed": self.order_seed}
        return {
            "scoring": self.scoring,
            "layers": self.layers,
            "r_list": self.r_list,
            "interval": self.interval,
            "k_list": self.neighbours,
            "grid": self.grid,
            **(online if self.is_online else {}),
        }

    @property
    def is_online(self) -> bool:
        """True if images are only compared with those before them."""
        return self.scoring == "online"

    @property
    def is_predicting(self) -> bool:
        """True in predict and in a detector, which keep the order of the images."""
        return self.trainer.state.fn == TrainerFn.PREDICTING

    @property
    def neighbours(self) -> list[int]:
        """The ``k_list`` in use."""
        if self.k_list == "auto":
            return K_LIST.get(self.dataset_name or "", DEFAULT_K_LIST)
        return list(self.k_list)

    # -- features --------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The encoder of images, whose features can be cached."""
        return encoder_of(self.backbone, self.layers, self.device)

    def image_encoder(self) -> Callable[[Tensor, str], Mapping[str, Tensor]]:
        """Return a function that encodes images in half precision; see the base class."""
        return partial(halves, self.encoder)  # once, as its key is a hash of files

    def cached_features(self, dataset: Any) -> AbstractContextManager[object]:
        """Return a context in which a data set has cached features; see ``feature_cache_gb``."""
        if self.feature_cache_gb == 0 or self.data is None or self.is_predicting:
            return nullcontext()
        option = "model.feature_cache_gb"
        return self.data.fit_sets.with_features(
            dataset, self.encoder, self.feature_cache_gb, option
        )

    # -- scoring ---------------------------------------------------------------------------------

    def prepare(self, categories: list[str]) -> None:
        """Forget the images that were seen before."""
        self._seen.clear()

    def compare_gathered(
        self, name: str, images: ImageFeatures, indices: set[int]
    ) -> dict[int, tuple[Tensor, float]]:
        """Return the patch maps and image scores of this process's images; see the base class."""
        if self.is_online and not self.is_predicting:
            images = images[drawn_order(len(images), self.order_seed, name)]
        # A call that fails midway leaves a part of them one call ahead, so they are forgotten then.
        seen = self._seen.pop(name, None)
        if seen is None:
            self.check_images(name, len(images))
        rows = [row for row, i in enumerate(images.index.tolist()) if i in indices]
        start = min(self.start, len(images)) if seen is None else 0
        recent = self._recent(images) if seen is None else seen.recent
        patch_maps = self._patch_maps(images, rows, start, seen, recent)
        mine_raw = {"row": torch.tensor(rows), "raw": self._raw_scores(patch_maps)} if rows else {}
        gathered = gather_rows(mine_raw, self.device)
        raw = torch.zeros(len(images))
        raw[gathered["row"]] = gathered["raw"]
        if recent is not None:
            images = images.only(CLASS_VECTOR)
        if seen is not None:
            rows = [len(seen.raw) + row for row in rows]
            raw = torch.cat([seen.raw, raw])
            images = ImageFeatures.joined([seen.images, images])
        scores = self._image_scores(images, raw, rows, start)
        scored = self._by_index(images, rows, patch_maps, scores)
        if self.is_online and self.is_predicting:  # elsewhere, a category is scored once
            # Indices, as a slice would keep the features of all images alive.
            last = torch.arange(max(0, len(images) - self.memory), len(images))
            self._seen[name] = SeenImages(images[last], raw[last], recent)
        return scored

    def compare(
        self, name: str, images: ImageFeatures, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Score some images of a category; for ``online``, as a sequence of which nothing is kept.

        Args:
            name: The category.
            images: All images of the category.
            rows: Images to score.
        """
        start = min(self.start, len(images))
        patch_maps = self._patch_maps(images, rows, start)
        raw = self._raw_scores(patch_maps)
        return patch_maps, self._image_scores(images, raw, rows, start)

    def _recent(self, images: ImageFeatures) -> Recent | None:
        """Return a place to keep aggregated features; None without later calls, or memory."""
        if not (self.is_online and self.is_predicting):
            return None
        channels = sum(images.tensors[str(layer)].shape[1] for layer in self.layers)
        of_image = self._grid(images).numel() * channels * len(self.r_list) * 4
        return {} if of_image * self.memory <= room_on(self.device) else None

    def _patch_maps(
        self,
        images: ImageFeatures,
        rows: Sequence[int],
        start: int,
        seen: SeenImages | None = None,
        recent: Recent | None = None,
    ) -> Tensor:
        """Return the patch scores ``(rows, h, w)`` of some images, averaged over layers and r.

        Args:
            images: Images to compare.
            rows: Images to score.
            start: See :func:`sequential_scores`.
            seen: Images before these.
            recent: Place to keep aggregated features for the next call.
        """
        combinations = list(product(self.layers, self.r_list))
        size = self._grid(images)
        total = torch.zeros(len(rows), size.numel(), dtype=torch.float64)
        steps = iter(track(range(len(rows) * len(combinations)), f"comparing {len(images)} images"))

        def advance() -> None:
            next(steps, None)

        for layer, r in combinations:
            with self.backbone.out_of_autocast():  # cosines stay in float32
                features = self._aggregated(images.tensors[str(layer)], r, size)  # (n, N, C)
                if self.is_online:
                    before = self._before(seen, str(layer), r, size)
                    scores = sequential_scores(
                        features, self.interval, start, self.memory, rows, advance, before
                    )
                    if recent is not None:
                        recent[str(layer), r] = before
                else:
                    some = None if len(rows) == len(images) else rows
                    scores = mutual_scores(features, self.interval, some, advance=advance)
            total += scores.cpu().double()
        advance()  # ends the progress
        return (total / len(combinations)).float().unflatten(1, size)

    def _before(
        self, seen: SeenImages | None, layer: str, r: int, size: torch.Size
    ) -> RecentImages:
        """Return the aggregated features of the images that were seen before."""
        if seen is not None and seen.recent is not None:
            return seen.recent[layer, r]
        before = RecentImages(self.memory)
        if seen is not None:
            for image in self._aggregated(seen.images.tensors[layer], r, size):
                before.add(image)
        return before

    def _grid(self, images: ImageFeatures) -> torch.Size:
        """Return the size of the grid of patches: that of ``grid``, or of the finest layer."""
        if self.grid is not None:
            return torch.Size((self.grid, self.grid))
        return images.tensors[str(self.layers[0])].shape[-2:]

    def _aggregated(self, grids: Tensor, r: int, size: torch.Size) -> Tensor:
        """Return the unit features ``(n, N, C)`` of a layer, at the size of the finest layer."""
        parts = []
        for block in grids.split(AT_ONCE):
            block = resize_grids(block.to(self.device).float(), size)
            parts.append(aggregate(block, r))
        return torch.cat(parts)

    def _raw_scores(self, patch_maps: Tensor) -> Tensor:
        """Return the maximum of each upsampled map, ``(n,)``."""
        parts = [image_score(self.full_maps(block)).cpu() for block in patch_maps.split(AT_ONCE)]
        return torch.cat(parts)

    def full_maps(self, patch_maps: Tensor) -> Tensor:
        """Return maps ``(B, S, S)`` on the device, without blur."""
        size = (self.image_size, self.image_size)
        return resize_maps(patch_maps.to(self.device), size, align_corners=True)

    def _image_scores(
        self, images: ImageFeatures, raw: Tensor, rows: Sequence[int], start: int
    ) -> Tensor:
        """Return the final image scores ``(rows,)``."""
        vectors = class_vectors(images.tensors)  # on the CPU, as are the scores
        with torch.autocast("cpu", enabled=False):
            if self.is_online:
                return rescore_in_sequence(raw, vectors, self.neighbours, start, self.memory, rows)
            return rescore(raw, vectors, self.neighbours)[list(rows)]
