"""Data settings that are recorded with the metrics of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["data_protocol"]


def data_protocol(data: AnomalyData) -> Mapping[str, object]:
    """Return the settings of a data module to record with the metrics."""
    auxiliary = data.auxiliary
    return {
        "data": data.dataset_name,
        "image_size": data.image_size,
        "mask_size": data.mask_size or data.image_size,
        "mask_filter": data.mask_filter,
        "mask_threshold": data.mask_threshold,
        "words": {name: data.words(name) for name in data.categories},
        "resize": str(data.resize),
        "train_categories": data.listing.chosen_for_training,
        "auxiliary": None if auxiliary is None else auxiliary.dataset_name,
        **({"stitch": auxiliary.stitch} if auxiliary is not None and auxiliary.stitch else {}),
        "val_split": data.validation.kind,
        "val_share": data.validation.share if data.validation.holds_out else None,
        "synthesis": None if data.synthesis is None else asdict(data.synthesis),
        "shots": data.few_shots.shots,
        "fraction": data.few_shots.fraction,
        "data_seed": data.seed,
        "allow_overlap": data.allow_overlap,
        **({} if data.augmentation is None else {"augment": data.augmentation.settings}),
        **({"unreadable": "skip"} if data.unreadable.skips else {}),
        **data.reading.protocol(),
        **data.masks.protocol(),
    }
