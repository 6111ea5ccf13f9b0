"""Inspection of masks before they are used: what makes metrics wrong, but can be read.

The masks of a test are inspected before it starts, and those of the whole data set by ``check``,
with the same result. Nothing is refused here except sizes that do not fit: a remark states what is
doubtful, and the option that changes it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.data.info import MaskRule
from anomaly_clip.data.mask_files import fits, mismatch, upright_size
from anomaly_clip.data.samples import Sample
from anomaly_clip.images import evenly_spaced
from anomaly_clip.masks import mask_levels, read_grey
from anomaly_clip.progress import say, track

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.data.reading_errors import ReadingGuard

__all__ = ["InspectedMask", "MaskChecks", "MaskFinding", "inspect_mask", "mask_findings"]

INSPECTED = 200  # masks inspected before a test, evenly spaced
NAMED = 3  # masks that a finding names
HALF = 127  # data.mask_level that separates black from white
# Our choices. The border of an image is normal in nearly all masks; a large defect may touch it.
COVERS = 0.5  # fraction of its image that a mask covers if it may be inverted
BORDER = 0.9  # fraction of the border that it covers as well
COVERS_ALONE = 0.9  # the same for a mask that differs from most masks of its category
BORDER_ALONE = 0.99
GREY = 0.01  # fraction of a mask's area that grey values add, from which on they are reported
CLASSES = 16  # most grey levels that may be numbers of classes
SMALL = 32  # grey level up to which values are numbers and not brightness
FLAT = 0.5  # fraction of grey pixels inside of even areas, if the levels are those of classes


class InspectedMask(NamedTuple):
    """Properties of one mask."""

    sample: Sample
    size: tuple[int, int]
    """Width and height in pixels."""
    levels: tuple[int, ...]
    """Grey levels that occur, 0 to 255, sorted."""
    marked: int
    """Number of pixels that count as a defect."""
    added: int
    """Number of those that would not count at ``level``."""
    level: int
    """Grey level that separates the dark half of the mask's values from the bright half."""
    covers: float
    """Fraction of pixels above ``level``, or above 0 for classes and two levels."""
    border: float
    """The same fraction of the pixels at the border."""
    has_classes: bool
    """True if the levels are numbers of classes."""

    @property
    def is_grey(self) -> bool:
        """True if dark values change the mask, as noise or soft edges do."""
        return not self.has_classes and self.added > GREY * (self.marked - self.added)

    @property
    def name(self) -> str:
        """Path of the mask with its folder."""
        assert self.sample.mask is not None
        return "/".join(self.sample.mask.parts[-2:])


class MaskFinding(NamedTuple):
    """Masks with the same property."""

    kind: str
    """inverted, grey, classes or empty, each after ``mask``."""
    masks: tuple[InspectedMask, ...]
    text: str
    """The finding and what to do, one line."""
    is_problem: bool
    """True if it makes metrics wrong."""


def inspect_mask(sample: Sample, rule: MaskRule) -> InspectedMask:
    """Read a sample's mask and return its properties.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    assert sample.mask is not None
    exact = (read_grey if rule.grey else mask_levels)(sample.mask, rule.max_pixels)
    # Rounded up, so that the smallest value above zero is not zero.
    whole = exact if exact.dtype == np.uint8 else np.ceil(exact).clip(0, 255)
    values: NDArray[np.uint8] = whole.astype(np.uint8, copy=False)
    histogram = cv2.calcHist([np.ascontiguousarray(values)], [0], None, [256], [0, 256])
    counts = histogram.ravel().astype(np.int64)
    levels = tuple(np.flatnonzero(counts).tolist())
    threshold = HALF if rule.grey else rule.level
    low, top = levels[0], levels[-1]
    middle = HALF if low <= HALF // 2 and top > HALF + HALF // 2 else (low + top) // 2
    classes = _are_classes(values, levels)
    is_plain = classes or len(levels) - (low == 0) <= 1 or rule.grey or rule.level > 0
    solid = threshold if is_plain else middle
    marked = int(counts[threshold + 1 :].sum())
    edges = (values[0], values[-1], values[1:-1, 0], values[1:-1, -1])
    border = np.concatenate([edge > solid for edge in edges])
    return InspectedMask(
        sample,
        (values.shape[1], values.shape[0]),
        levels,
        marked,
        marked - int(counts[solid + 1 :].sum()),
        solid,
        int(counts[solid + 1 :].sum()) / values.size,
        float(border.mean()),
        classes,
    )


def _are_classes(values: NDArray[np.uint8], levels: Sequence[int]) -> bool:
    """Return whether the levels of a mask ``(H, W)`` are numbers of classes: few, in even areas.

    Noise has many levels, and soft edges have no even areas.
    """
    between = [level for level in levels[:-1] if level > 0]
    if levels[0] > 0 or not between or len(levels) > CLASSES:
        return False
    if levels[-1] <= SMALL:
        return True
    grey = (values > 0) & (values < levels[-1])
    even = (values[:-1, :-1] == values[1:, :-1]) & (values[:-1, :-1] == values[:-1, 1:])
    return bool((even & grey[:-1, :-1]).sum() > FLAT * grey.sum())


def mask_findings(
    masks: Sequence[InspectedMask],
    rule: MaskRule,
    level_is_set: bool = False,
    is_own: bool = True,
    sampled: bool = False,
) -> list[MaskFinding]:
    """Return what is doubtful about the masks of anomalous images.

    Args:
        masks: The inspected masks.
        rule: Rule by which they are read.
        level_is_set: Whether the user has set the grey level, so that grey values are no surprise.
        is_own: Whether they are a user's own; classes in published masks are no surprise.
        sampled: Whether there are more masks than these.
    """
    total = f"{len(masks)}{' inspected' if sampled else ''} masks"
    findings = []

    def add(kind: str, members: Sequence[InspectedMask], text: str, problem: bool = True) -> None:
        if members:
            findings.append(MaskFinding(f"mask {kind}", tuple(members), text, problem))

    inverted = _inverted(masks)
    if inverted:
        least = min(mask.covers for mask in inverted)
        text = f"{len(inverted)} of {total} cover more than {_floor(least):g} % of their image, "
        text += f"such as {_named(inverted, lambda m: f'{m.covers:.0%}'.replace('%', ' %'))}: "
        text += "inverted? Defects must be bright and the rest black"
        add("inverted", inverted, text)
    grey = [] if rule.grey or level_is_set else [mask for mask in masks if mask.is_grey]
    if grey:
        low = min(level for mask in grey for level in mask.levels if level > 0)
        dark = [level for m in grey for level in m.levels if 0 < level <= m.level]
        share = sum(m.added for m in grey) / max(1, sum(m.marked - m.added for m in grey))
        level = HALF if all(min(m.levels) <= HALF < max(m.levels) for m in grey) else grey[0].level
        text = f"{len(grey)} of {total} have grey values, as of noise or soft edges, such as "
        text += f"{_named(grey)}: values {low} to {max(dark)} count as defect "
        text += f"({100 * share:.0f} % more pixels): set data.mask_level {level}"
        add("grey", grey, text)
    classes = [mask for mask in masks if mask.has_classes and not mask.is_grey]
    if is_own and not rule.grey and not level_is_set:
        values = sorted({level for mask in classes for level in mask.levels if level > 0})
        listed = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        text = f"{len(classes)} of {total} have several values ({listed}), such as "
        text += f"{_named(classes)}: all of them count as defect"
        add("classes", classes, text, problem=False)
    empty = [mask for mask in masks if mask.marked == 0]
    if empty:
        text = f"{len(empty)} of {total} of anomalous images are empty, such as "
        text += _named(empty, lambda m: f"largest value {m.levels[-1]}" if m.levels[-1] else "")
        text += ": nothing is marked as defect"
        text += f" at data.mask_level {rule.level}" if rule.level else ""
        add("empty", empty, text)
    return findings


def _inverted(masks: Sequence[InspectedMask]) -> list[InspectedMask]:
    """Return the masks that may be inverted.

    In a category, these are most of the masks, or single ones with a hole in the middle.
    """
    by_category: dict[str, list[InspectedMask]] = defaultdict(list)
    for mask in masks:
        if mask.marked:
            by_category[mask.sample.category].append(mask)
    doubtful: list[InspectedMask] = []
    for members in by_category.values():
        large = [m for m in members if m.covers > COVERS and m.border > BORDER]
        if 2 * len(large) < len(members) or len(members) == 1:
            large = [m for m in large if COVERS_ALONE < m.covers < 1 and m.border > BORDER_ALONE]
        doubtful += large
    return doubtful


def _floor(share: float) -> float:
    """Return a fraction in percent, rounded down to a multiple of 10."""
    return min(90, 10 * int(share * 10 + 1e-9))


def _named(
    masks: Sequence[InspectedMask], detail: Callable[[InspectedMask], str] = lambda mask: ""
) -> str:
    """Return the names of the first masks, with a detail in brackets."""
    texts = []
    for mask in masks[:NAMED]:
        text = detail(mask)
        texts.append(f"{mask.name} ({text})" if text else mask.name)
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


class MaskChecks:
    """The masks that a stage of a run uses, inspected before it starts.

    Args:
        data: The data module.
    """

    def __init__(self, data: AnomalyData) -> None:
        self.data = data
        self.remarks: list[str] = []
        """Findings before the current stage, one line each."""

    def protocol(self) -> Mapping[str, object]:
        """Return the grey levels of masks, if the user has set them."""
        data = self.data
        settings = {} if data.mask_level is None else {"mask_level": data.mask_level}
        if data.auxiliary is not None and data.auxiliary.mask_level is not None:
            settings["auxiliary_mask_level"] = data.auxiliary.mask_level
        return settings

    def are_used(self, stage: str) -> bool:
        """Return whether a stage uses the masks of the data module's own test split."""
        validates = stage in ("fit", "validate") and self.data.validation.is_test
        return stage == "test" or validates

    def inspect(self, stage: str) -> None:
        """Inspect the masks of a stage, at most 200 per data set, and print what is doubtful.

        Raises:
            FileNotFoundError: If a mask is missing.
            ValueError: If a mask cannot be decoded, or its size does not fit its image.
        """
        self.remarks = [remark for data in self._sources(stage) for remark in _remarks(data)]
        for remark in self.remarks:
            say(remark, style="yellow")

    def _sources(self, stage: str) -> Iterator[AnomalyData]:
        data = self.data
        if self.are_used(stage):
            yield data
        trains = stage == "fit" or (stage == "validate" and data.val_split == "auxiliary")
        if trains and data.auxiliary is not None:
            yield data.auxiliary


def _remarks(data: AnomalyData) -> Iterator[str]:
    """Yield what is doubtful about the masks of a data module's test split."""
    where = f"masks of {data.dataset_name} {data.root}"
    if not (data.on_disk and data.has_masks):
        if data.mask_level is not None:
            yield f"{where}: data.mask_level {data.mask_level} has no effect, there are no files"
        return
    rule = data.mask_rule
    samples = [sample for sample in data.samples("test") if sample.label and sample.mask]
    chosen = [samples[place] for place in evenly_spaced(INSPECTED, len(samples))]
    masks, misfits = _inspect_all(chosen, rule, data.unreadable.guard)
    sampled = len(chosen) < len(samples)
    for finding in mask_findings(masks, rule, data.mask_level is not None, data.is_own, sampled):
        yield f"{where}: {finding.text}"
    if misfits and data.is_own:
        total = f"{len(masks)}{' inspected' if sampled else ''} masks"
        yield (
            f"{where}: {len(misfits)} of {total} differ in size from their image by up to "
            f"{max(misfits)} pixels; these masks are resized by nearest neighbour"
        )


def _inspect_all(
    samples: Sequence[Sample], rule: MaskRule, guard: ReadingGuard
) -> tuple[list[InspectedMask], list[int]]:
    """Inspect masks in threads; also return the differences in size, in pixels.

    Args:
        samples: Anomalous samples with masks.
        rule: Rule for reading the masks.
        guard: Context in which a sample is read.

    Raises:
        FileNotFoundError: If a mask is missing.
        ValueError: If a mask cannot be decoded, or its size does not fit its image.
    """

    def inspect(sample: Sample) -> tuple[InspectedMask, int]:
        with guard(sample):
            mask = inspect_mask(sample, rule)
        return mask, _misfit(mask, rule)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            pairs = list(track(pool.map(inspect, samples), "checking masks", total=len(samples)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [mask for mask, _ in pairs], [misfit for _, misfit in pairs if misfit]


def _misfit(mask: InspectedMask, rule: MaskRule) -> int:
    image: Path = mask.sample.image
    try:
        size = upright_size(image)
    except (OSError, ValueError):  # the error is reported when the image is read
        return 0
    if not fits(mask.size, size, rule):
        raise ValueError(f"{mask.sample.mask}: {mismatch(mask.size, image, size)}")
    return max(abs(a - b) for a, b in zip(mask.size, size, strict=True))
