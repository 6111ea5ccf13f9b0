"""The images that validate during a fit, and those that are left to train on."""

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
    """Meaning of ``data.val_split``; see :class:`~anomaly_clip.data.AnomalyData`.

    Args:
        data: The data module.
        kind: none, synthetic, auxiliary or test.
        share: Fraction of the training images per category held out for validation, where the kind
            holds some out.
    """

    def __init__(self, data: AnomalyData, kind: ValSplit, share: float) -> None:
        check_between("data.val_share", share, 0, 1, open_low=True, open_high=True)
        if kind == "synthetic" and data.synthesis is None:
            raise ValueError(
                "data.val_split synthetic: say which defects, as --data.synthesis.recipe nsa"
            )
        if kind == "auxiliary" and data.auxiliary is None:
            raise ValueError("data.val_split auxiliary: name one with data.auxiliary")
        self.data = data
        self.kind = kind
        self.share = share

    @property
    def exists(self) -> bool:
        """Whether anything validates."""
        return self.kind != "none"

    @property
    def is_test(self) -> bool:
        """Whether test images validate, so that a choice by them is too good."""
        return self.kind == "test"

    @property
    def is_synthetic(self) -> bool:
        """Whether held-out normal images validate, each without and with a synthetic defect."""
        return self.kind == "synthetic"

    @property
    def holds_out(self) -> bool:
        """Whether what validates would otherwise be trained on."""
        return self.kind in ("synthetic", "auxiliary")

    @property
    def source(self) -> AnomalyData:
        """The data set that validates: the auxiliary one, or the data module's own."""
        if self.kind == "auxiliary":
            assert self.data.auxiliary is not None
            return self.data.auxiliary
        return self.data

    @property
    def categories(self) -> list[str]:
        """The categories of what validates."""
        if self.is_synthetic:
            return self.data.train_categories
        return self.source.categories

    @cached_property
    def auxiliary_parts(self) -> tuple[list[Sample], list[Sample]]:
        """The auxiliary set's test split: what is trained on, and what is held out.

        Raises:
            ValueError: If there are too few images to hold some out.
        """
        assert self.data.auxiliary is not None
        samples = self.data.auxiliary.samples("test")
        if self.kind != "auxiliary":
            return samples, []
        held = hold_out([(s.category, s.label) for s in samples], self.share, self.data.seed)
        if not held:
            raise ValueError(
                f"data.val_split auxiliary: {len(samples)} images are too few to hold "
                f"{self.share:g} of them out"
            )
        return _parted(samples, held)

    @cached_property
    def normal_parts(self) -> tuple[list[Sample], list[Sample]]:
        """The normal training images: what is trained on, and what is held out.

        Raises:
            ValueError: If there are too few images to hold some out.
        """
        samples = [sample for sample in self.data.samples("train") if not sample.label]
        held = hold_out([s.category for s in samples], self.share, self.data.seed)
        if not held:
            raise ValueError(
                f"data.val_split synthetic: {len(samples)} normal images are too few to hold "
                f"{self.share:g} of each category out: raise data.val_share, or set "
                f"data.val_split none"
            )
        return _parted(samples, held)

    def dataset(self) -> SampleDataset | SyntheticPairs | None:
        """Return the images that validate, as tensors; None if nothing does."""
        data = self.data
        if self.kind == "none":
            return None
        if self.kind == "test":
            return data.dataset("test")
        if self.kind == "auxiliary":
            return self.source.as_tensors(self.auxiliary_parts[1])
        assert data.synthesis is not None
        held = data.as_tensors(self.normal_parts[1])
        donors = data.as_tensors([s for s in data.fit_samples() if not s.label])
        return SyntheticPairs(held, data.synthesis, data.seed, donors)


def _parted(samples: list[Sample], held: set[int]) -> tuple[list[Sample], list[Sample]]:
    trained = [sample for row, sample in enumerate(samples) if row not in held]
    return trained, [samples[row] for row in sorted(held)]
