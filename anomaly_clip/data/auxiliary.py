"""Checks of an auxiliary data set, on which ``fit`` trains instead of the tested data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["check_auxiliary", "check_shots", "take_image_size"]


def check_auxiliary(data: AnomalyData) -> None:
    """Check that an auxiliary data set is the only source of training images.

    Raises:
        ValueError: If the auxiliary data set has an auxiliary set or shots of its own, or if
            synthetic defects are requested as well.
    """
    if data.auxiliary is None:
        return
    if data.auxiliary.auxiliary is not None or data.auxiliary.has_shots:
        raise ValueError(
            f"data.auxiliary {data.auxiliary.root} is the only source of training images, of which "
            f"all labelled test images are used: leave out data.auxiliary.auxiliary, "
            f"data.auxiliary.shots and data.auxiliary.fraction"
        )
    if data.auxiliary.augmentation is not None:
        raise ValueError(
            f"data.auxiliary.augment ({len(data.auxiliary.augmentation.settings)} transforms) has "
            f"no effect: set data.augment, which applies to the training images"
        )
    if data.synthesis is not None:
        raise ValueError(
            f"data.synthesis ({data.synthesis.recipe}) needs normal training images, which "
            f"data.auxiliary {data.auxiliary.root} replaces: leave out one of these options"
        )


def check_shots(data: AnomalyData) -> None:
    """Check that ``data.shots`` or ``data.fraction`` has an effect, if one is set.

    Raises:
        ValueError: If the method of the trainer neither trains on these images nor compares others
            with them.
    """
    use, few = data.needs.shots, data.few_shots
    if not few.is_limited or use == "references":
        return
    option = f"data.fraction {few.fraction}" if few.shots is None else f"data.shots {few.shots}"
    if use == "none":
        raise ValueError(
            f"{option} has no effect: the method neither trains on normal images of "
            f"{data.dataset_name} nor compares images with references; leave it out, or choose a "
            f"method that does, such as APRILGAN or WinCLIP"
        )
    if data.auxiliary is not None:
        raise ValueError(
            f"{option} has no effect: data.auxiliary {data.auxiliary.root} is the only source of "
            f"training images, and the method compares images with no references; leave it out"
        )


def take_image_size(data: AnomalyData, needed: int | None) -> None:
    """Give a data set and its auxiliary data set the image size of the model.

    Args:
        data: The tested data set.
        needed: The model's image size; None if any size will do.

    Raises:
        ValueError: If one of them has a different image size, or the auxiliary data set has no
            labels or no test images.
    """
    if needed is not None and data.image_size not in (None, needed):
        raise ValueError(
            f"data.image_size {data.image_size} differs from the model's ({needed}): leave "
            f"data.image_size out, or change the model's image size"
        )
    data.image_size = data.image_size or needed
    if data.image_size is not None:
        data.resize.check(data.image_size)
    auxiliary = data.auxiliary
    if auxiliary is None:
        return
    if not auxiliary.has_labels or "test" not in auxiliary.splits:
        raise ValueError(
            f"data.auxiliary {auxiliary.root} has no labelled test images to train on: choose a "
            f"data set that has some"
        )
    auxiliary.image_size = auxiliary.image_size or data.image_size
    if auxiliary.image_size != data.image_size:
        raise ValueError(
            f"data.auxiliary.image_size {auxiliary.image_size} must equal data.image_size "
            f"{data.image_size}: leave data.auxiliary.image_size out"
        )
