"""Checks of an auxiliary data set: the one that ``fit`` learns from in place of the tested one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["check_auxiliary", "share_image_size"]


def check_auxiliary(data: AnomalyData) -> None:
    """Check that an auxiliary data set is all that is learnt from.

    Raises:
        ValueError: If it has an auxiliary set of its own, or comes with shots or synthetic defects.
    """
    if data.auxiliary is None:
        return
    if data.auxiliary.auxiliary is not None or data.has_shots:
        raise ValueError(
            "data.auxiliary is all that is learnt from: it takes no auxiliary of its own, and "
            "data.shots and data.fraction must be left out"
        )
    if data.synthesis is not None:
        raise ValueError(
            "data.synthesis makes defects on normal training images, which data.auxiliary "
            "replaces: leave one of them out"
        )


def share_image_size(data: AnomalyData) -> None:
    """Give the auxiliary data set the image size of the one that it serves.

    Raises:
        ValueError: If it has no labels or no test images, or another image size.
    """
    auxiliary = data.auxiliary
    if auxiliary is None:
        return
    if not auxiliary.has_labels or "test" not in auxiliary.splits:
        raise ValueError(
            f"data.auxiliary {auxiliary.root}: nothing says which of its images are normal"
        )
    auxiliary.image_size = auxiliary.image_size or data.image_size
    if auxiliary.image_size != data.image_size:
        raise ValueError(
            f"data.auxiliary.image_size {auxiliary.image_size} is not "
            f"{data.image_size}: leave it out"
        )
