"""Checks of a data set before a run: counts, equal files, masks and files that do not fit.

Every listed image and mask is read whole; files are compared by content. A problem is what makes
metrics wrong; the rest is a remark.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomaly_clip.data.check_files import (
    InspectedSample,
    Problem,
    inspect_samples,
    printable,
    short_path,
)
from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.layout import shared_masks
from anomaly_clip.images import is_image
from anomaly_clip.progress import track

__all__ = ["CheckReport", "CheckedSplit", "Problem", "check_data"]

NEAR = 0.99  # correlation of two thumbnails
BLOCK = 2048  # thumbnails compared at once


class CheckedSplit(NamedTuple):
    """The images of one category and split."""

    category: str
    split: Split
    normal: int
    anomalous: int
    published: tuple[int, int] | None
    """Normal and anomalous images that are published; None if nothing is known."""
    sizes: str
    """Widths and heights, as ``700`` or ``103-632``."""
    modes: dict[str, int]
    """Number of images by PIL's mode."""


@dataclass
class CheckReport:
    """The findings of a check.

    Attributes:
        data: The data set's name.
        root: Its folder.
        rows: One per category and split.
        problems: Everything that makes metrics wrong.
        remarks: Everything else that is worth knowing.
        duplicates: Files beyond the first of each group of equal content.
        groups: Groups of equal content.
        images: Number of images read.
        seconds: Duration of the check.
    """

    data: str
    root: str
    rows: list[CheckedSplit] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    duplicates: int = 0
    groups: int = 0
    images: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **asdict(self),
            "rows": [row._asdict() for row in self.rows],
            "problems": [problem._asdict() for problem in self.problems],
        }


def check_data(
    data: AnomalyData, workers: int | None = None, near_duplicates: bool = False
) -> CheckReport:
    """Read a data set whole and report what is wrong with it.

    Args:
        data: The data set; of its categories those in use.
        workers: Threads that read; default: one a core.
        near_duplicates: Whether to look for images that nearly equal one of another split, too.

    Raises:
        FileNotFoundError: If nothing is where it is expected.
        ValueError: If an asked category is not there.
    """
    started = time.monotonic()
    report = CheckReport(type(data).__name__, str(data.root))
    listed = list(_list_samples(data, report))
    inspected = inspect_samples(data, listed, workers, near_duplicates)
    report.images = len(inspected)
    report.problems += [problem for files in inspected for problem in files.problems]
    _compare_counts(data, inspected, report)
    _find_duplicates(data, inspected, report)
    if near_duplicates:
        _find_near_duplicates(data, inspected, report)
    if data.on_disk:
        _find_unused_files(data, [files.sample for files in inspected], report)
    _note_misfits(inspected, report)
    report.seconds = time.monotonic() - started
    return report


def _list_samples(data: AnomalyData, report: CheckReport) -> Iterator[tuple[Sample, Split]]:
    for category in data.categories:
        for split in data.splits:
            try:
                yield from ((sample, split) for sample in data.list_samples(category, split))
            except (OSError, ValueError) as error:
                _add_problem(report, "listing", short_path(data, data.root / category), str(error))


def _add_problem(report: CheckReport, kind: str, path: str, message: str) -> None:
    report.problems.append(Problem(kind, path, printable(message)))


def _compare_counts(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Compare the numbers of images with the published ones."""
    published = data.info.counts
    for category in data.categories:
        counts = published.get(category)
        if published and counts is None:
            report.remarks.append(f"{category}: not one of the published categories")
        for split in data.splits:
            members = [s for s in inspected if s.sample.category == category and s.split == split]
            anomalous = sum(s.sample.label for s in members)
            expected = None
            if counts is not None:
                expected = (counts.train, 0) if split == "train" else counts[1:]
                if split == "test" and "train" not in data.splits and counts.train:
                    expected = (counts.train + counts.normal, counts.anomalous)
                    remark = "all images are test images, which is not the published protocol"
                    report.remarks.append(f"{category}: {remark}")
            row = CheckedSplit(
                category,
                split,
                len(members) - anomalous,
                anomalous,
                expected,
                _sizes(members),
                dict(sorted(Counter(s.mode for s in members if s.mode).items())),
            )
            report.rows.append(row)
            if expected is not None and expected != (row.normal, row.anomalous):
                message = (
                    f"{category}, {split}: {row.normal} normal and {anomalous} anomalous images, "
                    f"published are {expected[0]} and {expected[1]}"
                )
                _add_problem(report, "count", short_path(data, data.root), message)
            elif not members:
                message = f"{category}: no {split} images"
                _add_problem(report, "count", short_path(data, data.root), message)
    total = data.info.total
    if total is not None and total != len(inspected) and data.listing.chosen is None:
        message = f"{len(inspected)} images, published are {total}"
        _add_problem(report, "count", short_path(data, data.root), message)
    # A set of one's own in a published layout lacks nothing.
    if data.listing.chosen is None and set(published) & set(data.categories):
        for category in sorted(set(published) - set(data.categories)):
            message = f"the published category {category} is not there"
            _add_problem(report, "count", short_path(data, data.root), message)


def _find_duplicates(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Find files of equal content."""
    groups: dict[str, list[InspectedSample]] = defaultdict(list)
    for files in inspected:
        if files.digest is not None:
            groups[files.digest].append(files)
    for first, *others in groups.values():
        report.duplicates += len(others)
        report.groups += bool(others)
        for other in others:
            message = f"the same content as {short_path(data, first.sample.image)}"
            kind = "twin"
            if first.split != other.split:
                kind, message = "leak", f"{message}, a {first.split} image: training and test mix"
            elif first.sample.label != other.sample.label:
                kind, message = "contradiction", f"{message}, which has the other label"
            _add_problem(report, kind, short_path(data, other.sample.image), message)


def _find_near_duplicates(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Find test images that nearly equal a training image: their thumbnails correlate.

    Without a training split they are compared with each other.
    """
    alone = "train" not in data.splits
    for category in data.categories:
        members = [
            s for s in inspected if s.sample.category == category and s.thumbnail is not None
        ]
        test = [s for s in members if s.split == "test"]
        others = test if alone else [s for s in members if s.split == "train"]
        pairs = list(_near_pairs(test, others))
        of = "another one" if alone else "a training image"
        remark = f"{category}: {len(pairs)} test images nearly equal {of}"
        if pairs:
            correlation, path, other_path = max(pairs)
            remark += (
                f" (thumbnails correlate above {NEAR:g}), most of all {short_path(data, path)} and "
                f"{short_path(data, other_path)} ({correlation:.4f})"
            )
        report.remarks.append(remark)


def _near_pairs(
    samples: Sequence[InspectedSample], others: Sequence[InspectedSample]
) -> Iterator[tuple[float, Path, Path]]:
    """Yield for each image the one most like it, if that is near and not the same content."""
    if not samples or not others:
        return
    rows, columns = (
        np.stack([s.thumbnail for s in part if s.thumbnail is not None])
        for part in (samples, others)
    )
    same: dict[str | None, list[int]] = defaultdict(list)
    for number, other in enumerate(others):
        same[other.digest].append(number)
    for start in track(range(0, len(rows), BLOCK), "comparing thumbnails"):
        likeness = rows[start : start + BLOCK] @ columns.T
        for number, files in enumerate(samples[start : start + BLOCK]):
            likeness[number, same[files.digest]] = -1
            best = int(likeness[number].argmax())
            if likeness[number, best] > NEAR:
                yield float(likeness[number, best]), files.sample.image, others[best].sample.image


def _find_unused_files(data: AnomalyData, samples: Sequence[Sample], report: CheckReport) -> None:
    """Find masks without an image or with several, and images that nothing lists."""
    # Of a category that could not be listed every mask would seem to be one too many.
    unlisted = {problem.path for problem in report.problems if problem.kind == "listing"}
    listed = [c for c in data.categories if short_path(data, data.root / c) not in unlisted]
    spare = data.spare_masks(listed, samples)
    for path in spare:
        _add_problem(report, "mask", short_path(data, path), "a mask without an image")
    for mask, (first, second, *_) in shared_masks(samples).items():
        message = f"the mask of two images, {first.name} and {second.name}"
        _add_problem(report, "mask", short_path(data, mask), message)
    used = {s.image for s in samples} | {s.mask for s in samples} | set(spare)
    others = sorted(
        path
        for folder, _, names in os.walk(data.root)
        for name in names
        if is_image(path := Path(folder, name)) and path not in used
    )
    if others:
        report.remarks.append(
            f"{len(others)} other pictures are not used, such as {short_path(data, others[0])}"
        )


def _note_misfits(inspected: Sequence[InspectedSample], report: CheckReport) -> None:
    misfits = [
        s.misfit for s in inspected if s.misfit and not any("mask" in p.kind for p in s.problems)
    ]
    if misfits:
        report.remarks.append(
            f"{len(misfits)} masks differ from their image by up to {max(misfits)} pixels; they "
            f"are resized to it, nearest"
        )


def _sizes(inspected: Sequence[InspectedSample]) -> str:
    sizes = [s.size for s in inspected if s.size is not None]
    if not sizes:
        return ""
    ranges = [(min(side), max(side)) for side in zip(*sizes, strict=True)]
    return " x ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
