"""Training images with synthetic defects that depend only on (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from anomaly_clip.data.samples import Item, Sample, SampleDataset
from anomaly_clip.records import Draw, Synthetic
from anomaly_clip.synthesis.synthesizer import SynthesisSettings, synthesize

__all__ = ["SyntheticDataset", "SyntheticPairs"]

# Parts of seeds: training and validation have separate streams of random numbers.
SYNTHESIS = 0x5EED
VALIDATION = 0x7E57


class _DefectGenerator:
    """Generator of a synthetic defect for each row of a data set of normal images.

    Args:
        images: Normal images.
        settings: Settings of the defects.
        seed: Seed of the defects.
        donors: Normal images from which patches are copied; default: ``images``.
    """

    def __init__(
        self,
        images: SampleDataset,
        settings: SynthesisSettings,
        seed: int,
        donors: SampleDataset | None = None,
    ) -> None:
        self.images = images
        self.settings = settings
        self.seed = seed
        self.donors = images if donors is None else donors
        self.donor_rows: dict[str, list[int]] = {}
        for row, sample in enumerate(self.donors.samples):
            self.donor_rows.setdefault(sample.category, []).append(row)

    def generator(self, purpose: int, epoch: int, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, epoch, row])

    def make(self, draw: Draw, item: Item, rng: np.random.Generator) -> Synthetic:
        epoch, row = draw
        category = self.images.samples[row].category

        def donor() -> NDArray[np.uint8]:
            image = self.images.samples[row].image
            rows = self.donor_rows.get(category, [])
            others = [other for other in rows if self.donors.samples[other].image != image]
            if not others:  # the only image of its category donates patches to itself
                return _array(item)
            return _array(self.donors[Draw(epoch, others[int(rng.integers(len(others)))])])

        return synthesize(self.settings, _array(item), category, rng, donor)

    def mask(self, synthetic: Synthetic) -> torch.Tensor:
        """Return the mask of a defect at the size at which maps are evaluated."""
        return torch.from_numpy(_resized(synthetic.mask, self.images.mask_size))


class SyntheticDataset(Dataset[Item]):
    """Normal images, some or all with a synthetic defect; each epoch has new defects.

    Masks have the size of the images, because they are used in losses and not in evaluation.

    Args:
        images: Normal images.
        settings: Settings of the defects, and whether defective images replace the normal ones or
            are paired with them.
        seed: Seed of the defects.
    """

    def __init__(self, images: SampleDataset, settings: SynthesisSettings, seed: int) -> None:
        self.defects = _DefectGenerator(images, settings, seed)
        self.images = images

    def shown(self, row: int) -> tuple[NDArray[np.uint8], Synthetic]:
        """Return an image of the first epoch and its defect, even if ``fit`` leaves it normal."""
        draw = Draw(0, row)
        rng = self.defects.generator(SYNTHESIS, *draw)
        item = self.rotated(draw, rng)
        if self.defects.settings.mode == "replace":
            rng.random()
        return _array(item), self.defects.make(draw, item, rng)

    @property
    def samples(self) -> Sequence[Sample]:
        """The listing of the normal images."""
        return self.images.samples

    def rotated(self, draw: Draw, rng: np.random.Generator) -> Item:
        """Return a normal image, rotated at random if the settings allow it."""
        item, settings = self.images[draw], self.defects.settings
        chosen = settings.rotated_categories
        if settings.rotated == 0 or (chosen is not None and item["category"] not in chosen):
            return item
        if rng.random() < settings.rotated:
            image = _array(item)
            height, width = image.shape[:2]
            middle = ((width - 1) / 2, (height - 1) / 2)
            matrix = cv2.getRotationMatrix2D(middle, rng.uniform(-90, 90), 1.0)
            rotated = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
            item["image"] = torch.from_numpy(rotated).permute(2, 0, 1).contiguous()
        return item

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Draw) -> Item:
        draw = index if isinstance(index, Draw) else Draw(0, index)
        settings = self.defects.settings
        rng = self.defects.generator(SYNTHESIS, *draw)
        item = self.rotated(draw, rng)
        replaced = settings.mode == "replace" and rng.random() < settings.share
        if not replaced and settings.mode == "replace":
            item["mask"] = torch.zeros(item["image"].shape[-2:], dtype=torch.bool)
            item["defect"] = "good"
            return item
        synthetic = self.defects.make(draw, item, rng)
        image = torch.from_numpy(synthetic.image).permute(2, 0, 1).contiguous()
        is_defective = bool(synthetic.mask.any())
        item["defect"] = str(synthetic.info["recipe"]) if is_defective else "good"
        if replaced:
            item["image"], item["label"] = image, is_defective
            item["mask"] = torch.from_numpy(synthetic.mask)
        else:
            item["synthetic"] = image
            item["synthetic_mask"] = torch.from_numpy(synthetic.mask)
        return item


class SyntheticPairs(Dataset[Item]):
    """Pairs for validation: each image without and with a defect, the same in every epoch.

    Args:
        images: Normal images that are not trained on.
        settings: Settings of the defects.
        seed: Seed of the defects.
        donors: Normal images from which patches are copied; default: ``images``.
    """

    def __init__(
        self,
        images: SampleDataset,
        settings: SynthesisSettings,
        seed: int,
        donors: SampleDataset | None = None,
    ) -> None:
        self.defects = _DefectGenerator(images, settings, seed, donors)
        self.images = images

    def __len__(self) -> int:
        return 2 * len(self.images)

    def __getitem__(self, index: int) -> Item:
        row, defective = divmod(index, 2)
        item = self.images[row]
        item["index"] = index
        item["mask"] = torch.zeros((self.images.mask_size,) * 2, dtype=torch.bool)
        if defective:
            synthetic = self.defects.make(
                Draw(0, row), item, self.defects.generator(VALIDATION, 0, row)
            )
            item["image"] = torch.from_numpy(synthetic.image).permute(2, 0, 1).contiguous()
            item["mask"] = self.defects.mask(synthetic)
            item["label"] = bool(synthetic.mask.any())
        return item


def _array(item: Item) -> NDArray[np.uint8]:
    """Return an item's image as ``(H, W, 3)``."""
    array: NDArray[np.uint8] = item["image"].permute(1, 2, 0).contiguous().numpy()
    return array


def _resized(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    if mask.shape == (side, side):
        return mask
    levels = mask.astype(np.uint8) * 255
    kind = cv2.INTER_AREA if side < len(mask) else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(levels, (side, side), interpolation=kind) > 127)
