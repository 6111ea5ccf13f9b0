"""Leakage: test images that are also training images, by the content of their files or pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anomaly_clip.data.file_hashes import DuplicatePair, pixel_hashes
from anomaly_clip.data.samples import Sample

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.records import LoaderNeeds

__all__ = ["LeakageCheck"]


class LeakageCheck:
    """Comparison of training and test images by their decoded pixels.

    Copies that were saved again without loss are found, in any format; those saved with loss are
    not (``check --near_duplicates``). A fit compares its training images with those of the test
    split. A test compares its images with those that its checkpoint was fitted on, which also finds
    images of other folders.

    If the published archive of a data set is known to contain duplicates, so many are counted and
    not refused.

    Args:
        data: The data module.
        allowed: Whether training images may be test images; the results are then marked.
    """

    def __init__(self, data: AnomalyData, allowed: bool) -> None:
        self.data = data
        self.allowed = allowed
        self.compared = True
        """False if scores are computed without metrics, so that reference images may be scored."""
        self.num_fitted_on: int | None = None
        """Number of test images that the module was fitted on; None if unknown."""
        self.num_published = 0
        """Number of test images among the training images, as in the published archive."""

    def overlap(self, samples: Sequence[Sample] | None = None) -> list[DuplicatePair]:
        """See :meth:`~anomaly_clip.data.AnomalyData.overlap`."""
        data = self.data
        if "test" not in data.splits:
            return []
        trained = data.fit_samples() if samples is None else samples
        return data.duplicates(trained, data.listing.listed("test"))

    def check_training(self, samples: Sequence[Sample], *, are_references: bool = False) -> None:
        """Check that no image of a fit, or no reference image, is a test image.

        Args:
            samples: The images.
            are_references: Whether they are reference images, of this data set even if a fit uses
                an auxiliary one.

        Raises:
            ValueError: If one is, and that is not allowed.
        """
        scores_only = not self.compared or self.data.calibration.is_scored
        pairs = [] if self.allowed or scores_only else self.overlap(samples)
        is_known = bool(pairs) and self._is_known(len(pairs), are_references)
        self.num_published = len(pairs) if is_known else 0
        if len(pairs) > self.num_published:
            kind = "reference" if are_references else "training"
            raise ValueError(
                f"{len(pairs)} test images are among the {kind} images, such as "
                f"{pairs[0].second} = {pairs[0].first}: remove these duplicates, or set "
                f"data.allow_overlap true"
            )

    def check_test(self, stage: str, samples: Sequence[Sample], needs: LoaderNeeds) -> None:
        """Check that a module was neither fitted nor calibrated on its test images.

        Args:
            stage: The verb; only ``test`` is checked, as ``predict`` may score images of the fit.
            samples: The images.
            needs: Hashes of the images that the module was fitted and calibrated on, if known.

        Raises:
            ValueError: If it was, and that is not allowed.
        """
        self.num_fitted_on = None
        fitted_images = needs.fitted_images
        calibrated = needs.calibrated_images | self.data.calibration.images_of_file
        if stage != "test" or not (fitted_images or calibrated) or not self.data.on_disk:
            return
        with self.data.unreadable.advising():
            hashes = pixel_hashes((s.image for s in samples), self.data.reading.max_pixels)
        used = [sample for sample in samples if hashes[sample.image] in calibrated]
        if used and not self.allowed:
            raise ValueError(
                f"{len(used)} of {len(samples)} test images were calibrated on, such as "
                f"{used[0].image}, so false alarms on them mean nothing: test on other images, or "
                f"allow it with data.allow_overlap true"
            )
        if not fitted_images:
            return
        fitted = [sample for sample in samples if hashes[sample.image] in fitted_images]
        self.num_fitted_on = len(fitted)
        if fitted and not self.allowed and not self._is_known(len(fitted)):
            if len(fitted) == len(samples) and not any(sample.label for sample in samples):
                raise ValueError(
                    f"data.root {self.data.root}: all {len(samples)} images are normal and were "
                    f"fitted on, so there is nothing to test on: add defective images, or use "
                    f"predict on other images"
                )
            raise ValueError(
                f"{len(fitted)} of {len(samples)} test images were fitted on, such as "
                f"{fitted[0].image}: test on other images, or allow it with data.allow_overlap true"
            )

    def _is_known(self, count: int, are_references: bool = False) -> bool:
        """Return whether the published archive contains at least ``count`` duplicates."""
        is_own = self.data.auxiliary is None or are_references
        limit = self.data.known_duplicates if is_own else 0
        return limit is None or count <= limit

    def validation_hashes(self) -> frozenset[str]:
        """Return hashes of the normal images that a fit holds out to select its weights by."""
        data = self.data
        if not (data.validation.is_synthetic and data.on_disk):
            return frozenset()
        images = [sample.image for sample in data.validation.normal_parts[1]]
        with data.unreadable.advising():
            return frozenset(pixel_hashes(images, data.reading.max_pixels).values())

    def training_hashes(self) -> frozenset[str]:
        """Return hashes of the decoded images of a fit; empty for images that are not files."""
        data = self.data
        source = data if data.auxiliary is None else data.auxiliary
        if not source.on_disk:
            return frozenset()
        images = [sample.image for sample in data.fit_samples()]
        with data.unreadable.advising():
            return frozenset(pixel_hashes(images, source.reading.max_pixels).values())
