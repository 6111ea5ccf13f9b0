"""The split into training images and validation images of a fit."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

from anomaly_clip.data.samplers import hold_out
from anomaly_clip.data.samples import Sample, SampleDataset
from anomaly_clip.data.synthetic import SyntheticPairs
from anomaly_clip.errors import check_between

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["ValSplit", "ValidationSplit"]

ValSplit = Literal["none", "synthetic", "auxiliary", "test"]


class ValidationSplit:
    """Implementation of ``data.val_split``; see :class:`~anomaly_clip.data.AnomalyData`.

    Args:
        data: The data module.
        kind: none, synthetic, auxiliary or test.
        share: Fraction of each category's training images that is held out for validation, if the
            kind is synthetic or auxiliary.
    """

    def __init__(self, data: AnomalyData, kind: ValSplit, share: float) -> None:
        check_between("data.val_share", share, 0, 1, open_low=True, open_high=True)
        if kind == "synthetic" and data.synthesis is None:
            raise ValueError(
                f"data.val_split {kind} needs synthetic defects: choose a recipe, such as with "
                f"--data.synthesis.recipe nsa"
            )
        if kind == "auxiliary" and data.auxiliary is None:
            raise ValueError(
                f"data.val_split {kind} needs an auxiliary data set: set data.auxiliary"
            )
        self.data = data
        self.kind = kind
        self.share = share

    @property
    def exists(self) -> bool:
        """True if there are validation images."""
        return self.kind != "none"

    @property
    def is_test(self) -> bool:
        """True if validation uses the test images, so the selected results are optimistic."""
        return self.kind == "test"

    @property
    def is_synthetic(self) -> bool:
        """True if validation uses held-out normal images, without and with a synthetic defect."""
        return self.kind == "synthetic"

    @property
    def holds_out(self) -> bool:
        """True if the validation images are held out of the training images."""
        return self.kind in ("synthetic", "auxiliary")

    @property
    def source(self) -> AnomalyData:
        """The data set of the validation images: the auxiliary one, or the data module itself."""
        if self.kind == "auxiliary":
            assert self.data.auxiliary is not None
            return self.data.auxiliary
        return self.data

    @property
    def categories(self) -> list[str]:
        """The categories of the validation images."""
        if self.is_synthetic:
            return self.data.train_categories
        return self.source.categories

    @cached_property
    def auxiliary_parts(self) -> tuple[list[Sample], list[Sample]]:
        """The training and the held-out samples of the auxiliary set's test split.

        Raises:
            ValueError: If there are too few images to hold any out.
        """
        assert self.data.auxiliary is not None
        auxiliary = self.data.auxiliary
        if self.kind != "auxiliary":
            return auxiliary.samples("test"), []
        listed = auxiliary.in_draw_order(auxiliary.listing.listed("test"))
        held = hold_out([(s.category, s.label) for s in listed], self.share, self.data.seed)
        samples = auxiliary.samples("test")
        parts = _partition(samples, {listed[row] for row in held})
        if not parts[1]:
            raise ValueError(
                f"data.val_split auxiliary: {len(samples)} images are too few to hold "
                f"{self.share:g} of each category and class out: raise data.val_share, or set "
                f"data.val_split none"
            )
        return parts

    @cached_property
    def held_normal(self) -> set[Sample]:
        """The normal training images that are held out, with those that cannot be read."""
        listed = self.data.in_draw_order(self.data.listing.listed("train"))
        samples = [sample for sample in listed if not sample.label]
        held = hold_out([s.category for s in samples], self.share, self.data.seed)
        return {samples[row] for row in held}

    @cached_property
    def normal_parts(self) -> tuple[list[Sample], list[Sample]]:
        """The training and the held-out samples of the normal training images.

        Raises:
            ValueError: If there are too few images to hold any out.
        """
        samples = [sample for sample in self.data.samples("train") if not sample.label]
        parts = _partition(samples, self.held_normal)
        if not parts[1]:
            raise ValueError(
                f"data.val_split synthetic: {len(samples)} normal images are too few to hold "
                f"{self.share:g} of each category out: raise data.val_share, or set "
                f"data.val_split none"
            )
        return parts

    def dataset(self) -> SampleDataset | SyntheticPairs | None:
        """Return the validation images as tensors; None if there are none."""
        data = self.data
        if self.kind == "none":
            return None
        if self.kind == "test":
            return data.dataset("test")
        if self.kind == "auxiliary":
            return self.source.as_tensors(self.auxiliary_parts[1])
        assert data.synthesis is not None
        held = data.as_tensors(data.in_draw_order(self.normal_parts[1]))
        normal = [s for s in data.fit_samples() if not s.label]
        donors = data.as_tensors(data.in_draw_order(normal))
        return SyntheticPairs(held, data.synthesis, data.seed, donors)


def _partition(samples: list[Sample], held: set[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the samples that are not held out, and those that are."""
    trained = [sample for sample in samples if sample not in held]
    return trained, [sample for sample in samples if sample in held]
