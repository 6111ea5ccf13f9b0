"""Normal images to calibrate on: held out of a fit, or all that were not fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_clip.data.file_hashes import pixel_hashes, readable_hashes
from anomaly_clip.data.samples import Sample
from anomaly_clip.files import name_bytes
from anomaly_clip.progress import number_of, say

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["CalibrationImages", "HoldOut", "draw_key"]

SHARE = 0.2
"""Smallest fraction of a category's normal images that is held out; our choice."""
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class HoldOut:
    """Request to hold normal images out of a fit.

    Args:
        num_needed: Number of images per category that the false-alarm rate needs.
        seed: Seed of the choice.
        fold: Number of this fold, counted from 0, and of all folds; None: no cross-validation. The
            fit on all images has no number, and holds none out.
    """

    num_needed: int
    seed: int
    fold: tuple[int | None, int] | None = None


class CalibrationImages:
    """The normal images of each category on which a method is calibrated.

    A fit that is calibrated holds out the larger of 20 % of each category's normal images and the
    number that the false-alarm rate needs, but at most half of them. They are chosen by (seed,
    content), and images of one group, such as several views of a part, stay together.

    Args:
        data: The data module.
    """

    def __init__(self, data: AnomalyData) -> None:
        self.data = data
        self.hold_out: HoldOut | None = None
        """Request of a fit; None if it uses all images."""
        self.is_scored = False
        """True while the calibration images take the place of the test images."""
        self.images_of_file: frozenset[str] = frozenset()
        """Hashes of the calibration images of a ``calibration.json``, for the test."""
        self.remarks: list[str] = []
        """Remarks on the images that are not used, for the screen."""
        self._held: dict[str, frozenset[Sample]] = {}

    def normal(self, category: str) -> list[Sample]:
        """Return the normal training images of a category, with those that are held out.

        Raises:
            ValueError: If there is none.
        """
        data = self.data
        rows = data.listing.all_rows(category, "train") if "train" in data.splits else []
        normal = [sample for sample in rows if not sample.label]
        if not normal:
            raise ValueError(
                f"{data.root}: {category!r} has no normal training images to calibrate on: give "
                f"normal images with --data ImageFolder --data.root FOLDER"
            )
        return normal

    def without_held(self, category: str, rows: list[Sample]) -> list[Sample]:
        """Return the training rows of a category without those that are held out."""
        held = self.held_out(category, rows)
        return [sample for sample in rows if sample not in held]

    def held_out(self, category: str, rows: Sequence[Sample]) -> frozenset[Sample]:
        """Return the normal images of a category that are held out of the fit.

        Args:
            category: The category.
            rows: All of its training images.
        """
        request, data = self.hold_out, self.data
        if request is None or data.auxiliary is not None or category not in data.categories:
            return frozenset()
        if category not in data.train_categories:  # all of its images are new to the fit
            return frozenset()
        if category not in self._held:
            normal = data.unreadable.readable([sample for sample in rows if not sample.label])
            self._held[category] = frozenset(self._choose(category, normal, request))
        return self._held[category]

    def request(self, hold_out: HoldOut | None) -> None:
        """Hold images out of the next fits; None: no more."""
        self.hold_out = hold_out
        self._held.clear()
        self.data.listing.forget()

    def _choose(self, category: str, normal: list[Sample], request: HoldOut) -> list[Sample]:
        groups = self._groups(normal, request.seed)
        images = number_of(len(normal), "normal image")
        if len(groups) < len(normal):  # by data.group, or copies
            images += f" in {number_of(len(groups), 'group')}"
        if request.fold is not None:
            number, count = request.fold
            if len(groups) < count:
                raise ValueError(
                    f"{category}: {images} cannot be divided into {count} folds: lower "
                    f"calibration.folds, or add images"
                )
            return [] if number is None else [s for g in groups[number::count] for s in g]
        shots = self.data.few_shots.shots
        largest = int(LARGEST_SHARE * len(normal)) if shots is None else len(normal) - shots
        minimum = max(round(SHARE * len(normal)), request.num_needed)
        held: list[Sample] = []
        for group in groups:
            if len(held) < minimum and len(held) + len(group) <= largest:
                held += group
        if not held:
            raise ValueError(
                f"{category}: too few normal images to hold some out to calibrate on ({images}, of "
                f"which at most {max(0, largest)} may be held out): add images, or leave "
                f"--calibrate out"
            )
        return held

    def _groups(self, samples: list[Sample], seed: int) -> list[list[Sample]]:
        """Return the images that stay together, in an order that depends on their content only."""
        keys = self.keys(samples)
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            key = self.data.group_of(sample) or keys[sample]
            groups.setdefault(key, []).append(sample)
        return [groups[key] for key in sorted(groups, key=lambda key: draw_key(key, seed))]

    def held(self) -> list[Sample]:
        """Return the images that are held out of the fit, once its images are listed."""
        return sorted(
            (sample for held in self._held.values() for sample in held),
            key=lambda sample: sample.image,
        )

    def summary(self) -> str:
        """Return the number of images held out of a fit, for its start line; empty without any."""
        number = sum(len(held) for held in self._held.values())
        images = number_of(number, "normal image")
        return f", and {images} held out to calibrate on" if number else ""

    def compare(self, fitted_images: frozenset[str]) -> None:
        """Compare the images that are held out with those on which a resumed fit was fitted before.

        Args:
            fitted_images: Hashes of all images that the model was fitted on.

        Raises:
            ValueError: If none is new.
        """
        for category, held in self._held.items():
            keys = self.keys(list(held)).values()
            new = [key for key in keys if key not in fitted_images]
            if held and not new:
                raise ValueError(
                    f"{category}: all {len(held)} images held out to calibrate on were fitted on "
                    f"by the checkpoint: leave --ckpt_path out to fit anew, or --calibrate to "
                    f"calibrate on other images later"
                )
            if len(new) < len(held):
                number = f"{len(held) - len(new)} of {len(held)} images held out"
                say(f"{category}: {number} were fitted on before, and are not calibrated on")

    def keys(self, samples: Sequence[Sample]) -> dict[Sample, str]:
        """Return the hash of each image's decoded pixels; its path if it is not a file."""
        if not self.data.on_disk:
            return {sample: str(sample.image) for sample in samples}
        with self.data.unreadable.advising():
            images = [sample.image for sample in samples]
            hashes = pixel_hashes(images, self.data.reading.max_pixels)
        return {sample: hashes[sample.image] for sample in samples}

    def keys_of_paths(self, paths: Sequence[str]) -> dict[str, str]:
        """Return :meth:`keys` by path."""
        keys = self.keys([Sample(Path(path), "", False) for path in paths])
        return {str(sample.image): key for sample, key in keys.items()}

    def samples(self) -> list[Sample]:
        """Return the images to score: normal, not fitted on, and each content once.

        Raises:
            ValueError: If a category has none, or it is unknown which images were fitted on.
        """
        self.remarks = []
        return [s for category in self.data.categories for s in self._samples_of(category)]

    def _samples_of(self, category: str) -> list[Sample]:
        data, needs = self.data, self.data.needs
        rows = data.normal_images(category)
        if self.hold_out is not None and (self.hold_out.fold or (None,))[0] is not None:
            # With data.shots or data.fraction, a fold's fit leaves out images of other folds, too.
            held = self._held.get(category, frozenset())
            rows = [sample for sample in rows if sample in held]
        if not data.on_disk:
            return self._generated(category, rows)
        # A method fitted on auxiliary images of another data set has seen none of these.
        is_known = needs.fitted_images or not needs.is_fitted or data.auxiliary is not None
        if not is_known and not data.allow_overlap:
            raise ValueError(
                "the checkpoint does not tell which images were fitted on, and these must not be "
                "calibrated on: fit again with --calibrate true, or allow it with "
                "data.allow_overlap true if all images are new"
            )
        rows = data.unreadable.readable(rows)
        images = readable_hashes([s.image for s in rows], data.reading.max_pixels)
        hashes = {sample: images[sample.image] for sample in rows if sample.image in images}
        used = needs.fitted_images | needs.validated_images
        new = [sample for sample in rows if hashes.get(sample) not in used]
        groups = {data.group_of(sample) for sample in rows if hashes.get(sample) in used} - {None}
        alike = [sample for sample in new if data.group_of(sample) in groups]
        if alike and len(alike) < len(new):
            number = number_of(len(alike), "image")
            self.remarks.append(
                f"{category}: {number} in groups (data.group) of images of the fit are left out"
            )
        new = [sample for sample in new if sample not in set(alike)]
        if not new:
            raise ValueError(
                f"all {len(rows)} normal images of {category!r} in {data.root} were fitted on"
                f"{' or are in groups of such images' if alike else ''}, so none is left to "
                f"calibrate on: give other normal images with data.root, or fit again with "
                f"--calibrate true, which holds some out"
            )
        distinct = {hashes.get(sample, str(sample.image)): sample for sample in reversed(new)}
        chosen = [sample for sample in new if sample in set(distinct.values())]
        num_used = len(rows) - len(new) - len(alike)
        if num_used and self.hold_out is None:
            count = f"{num_used} of {number_of(len(rows), 'normal image')}"
            self.remarks.append(f"{category}: {count} were fitted on, and are not calibrated on")
        if len(chosen) < len(new):
            number = number_of(len(new) - len(chosen), "image")
            self.remarks.append(f"{category}: {number} with the content of others are left out")
        return chosen

    def _generated(self, category: str, rows: list[Sample]) -> list[Sample]:
        if not self.data.needs.is_fitted or self.data.auxiliary is not None:
            return rows
        if self.hold_out is None:
            raise ValueError(
                f"the images of {self.data.dataset_name} are no files, so nothing tells which were "
                f"fitted on: fit with --calibrate true, which holds some out"
            )
        held = self._held.get(category, frozenset())
        return [sample for sample in rows if sample in held]


def draw_key(key: str, seed: int) -> bytes:
    """Return the place of an image in a random order that depends on (seed, content) alone."""
    return hashlib.sha256(name_bytes(f"calibration {seed} {key}")).digest()
