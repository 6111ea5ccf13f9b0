"""The training and validation images of a fit as tensors, and cached features of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from anomaly_clip.data.augment import Augmentation
from anomaly_clip.data.feature_cache import FeatureCache
from anomaly_clip.data.loaders import processes
from anomaly_clip.data.samples import SampleDataset
from anomaly_clip.data.stitching import Stitching
from anomaly_clip.data.synthetic import SyntheticDataset, SyntheticPairs
from anomaly_clip.records import Encoder

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["FitSets"]


class FitSets:
    """Training and validation sets; the same objects until the next fit.

    Args:
        data: The data module.
        augmentation: Random transforms of the training images; None for none.
    """

    def __init__(self, data: AnomalyData, augmentation: Augmentation | None) -> None:
        self.data = data
        self.augmentation = augmentation
        self._sets: dict[str, SampleDataset | SyntheticDataset | SyntheticPairs | None] = {}

    def clear(self) -> None:
        """Forget the sets, because a new fit begins."""
        self._sets.clear()

    def training(self) -> SampleDataset | SyntheticDataset:
        """Return the training images, with synthetic defects and augmentation if configured."""
        data = self.data
        if "train" not in self._sets:
            source = data if data.auxiliary is None else data.auxiliary
            samples = data.fit_samples()
            if data.synthesis is not None:
                samples = [sample for sample in samples if not sample.label]
            images = source.as_tensors(samples)
            images.augmentation = self.augmentation
            if source.stitch:
                images.stitching = Stitching(samples, source.stitch, data.seed)
            self._sets["train"] = (
                images
                if data.synthesis is None
                else SyntheticDataset(images, data.synthesis, data.seed)
            )
        return self._sets["train"]  # type: ignore[return-value]

    def validation(self) -> SampleDataset | SyntheticPairs | None:
        """Return the validation images; None if there are none."""
        if "val" not in self._sets:
            self._sets["val"] = self.data.validation.dataset()
        return self._sets["val"]  # type: ignore[return-value]

    def unchanging(self) -> dict[str, SampleDataset]:
        """Return the ``fit`` and ``validation`` sets, if their images are the same every epoch."""
        sets = {"fit": self.training(), "validation": self.validation()}
        return {
            name: part
            for name, part in sets.items()
            if isinstance(part, SampleDataset) and not part.changes
        }

    def cache_features(
        self, encoders: Mapping[str, Encoder], limit_gb: float, option: str
    ) -> frozenset[str]:
        """See :meth:`~anomaly_clip.data.AnomalyData.cache_features`."""
        data, cache = self.data, self._cache(limit_gb, option)
        parts = self.unchanging()
        for name, part in parts.items():
            part.features = cache.fill(part, encoders[name], data.batch_size, data.num_workers)
        return frozenset(parts)

    @contextmanager
    def with_features(
        self, dataset: Dataset[Any], encoder: Encoder, limit_gb: float, option: str
    ) -> Iterator[None]:
        """Let a data set return cached features in place of images, inside the block.

        Generated defects are not cached: their images are the same only within a run.

        Args:
            dataset: Images of an evaluation.
            encoder: The encoder.
            limit_gb: Maximum size of the cache in GB (1e9 bytes).
            option: Name of the option that sets the limit, for messages.

        Raises:
            ValueError: If the features would exceed the limit.
        """
        if not isinstance(dataset, SampleDataset):
            yield
            return
        data, cache = self.data, self._cache(limit_gb, option)
        dataset.features = cache.fill(dataset, encoder, data.batch_size, data.num_workers)
        try:
            yield
        finally:
            dataset.features = None

    def _cache(self, limit_gb: float, option: str) -> FeatureCache:
        trainer = self.data.trainer
        assert trainer is not None
        agree = trainer.strategy.reduce_boolean_decision
        return FeatureCache(limit_gb, option, processes=processes(trainer), agree=agree)
