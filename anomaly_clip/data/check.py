"""Checks of a data set before a run: counts, duplicates, mismatched masks and unused files.

Every listed image and mask is read completely, and files are compared by content. A finding that
makes metrics wrong is a problem; any other finding is a remark.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
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
from anomaly_clip.data.copies import original_of
from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.layout import MASK_OF_NORMAL, shared_mask, shared_masks, spare_mask
from anomaly_clip.data.mask_checks import mask_findings
from anomaly_clip.data.mask_files import load_mask
from anomaly_clip.data.summary import left_out_remark
from anomaly_clip.progress import number_of, track

__all__ = ["CheckReport", "CheckedSplit", "Problem", "check_data"]

NEAR = 0.99  # correlation above which two thumbnails are near-duplicates
BLOCK = 2048  # thumbnails compared at once


class CheckedSplit(NamedTuple):
    """The images of one category and split."""

    category: str
    split: Split
    normal: int
    anomalous: int
    published: tuple[int, int] | None
    """Published numbers of normal and anomalous images; None if unknown."""
    sizes: str
    """Width and height, or their ranges, such as ``700 x 700`` or ``103-632 x 105-401``."""
    modes: dict[str, int]
    """Number of images in each PIL mode."""
    labelled: bool = True
    """False if the images are without labels; they are then counted as normal."""


@dataclass
class CheckReport:
    """The findings of a check.

    Attributes:
        data: The data set's name.
        root: The data set's folder.
        rows: One row per category and split.
        problems: Findings that make metrics wrong.
        remarks: All other findings.
        duplicates: Number of redundant files: all but the first of each group of equal content.
        groups: Number of groups of files with equal content.
        images: Number of images read.
        seconds: Duration of the check.
        published: False if this is a user's own data set in the layout of a published one.
        copies: Copies of other files, which are not used.
        unused: All other images that are not used.
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
    published: bool = True
    copies: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable values."""
        return {
            **asdict(self),
            "rows": [row._asdict() for row in self.rows],
            "problems": [problem._asdict() for problem in self.problems],
        }


def check_data(
    data: AnomalyData, workers: int | None = None, near_duplicates: bool = False
) -> CheckReport:
    """Read all files of a data set and report its problems.

    Args:
        data: The data set; only the categories in use are checked.
        workers: Number of reading threads; default: one per core.
        near_duplicates: Whether to also look for test images that nearly equal a training image.

    Raises:
        FileNotFoundError: If the data set is not laid out as expected.
        ValueError: If a requested category is missing.
    """
    started = time.monotonic()
    report = CheckReport(type(data).__name__, str(data.root))
    _judge(data, report)
    listed = list(_list_samples(data, report))
    trained_on = [sample for sample, split in listed if split == "train"]
    data.reading.prepare([sample for sample, _ in listed], fitted=trained_on or None)
    # Files of several frames are named one by one.
    report.remarks += [r for r in data.reading.remarks if r != data.reading.frames]
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
    _judge_masks(data, inspected, report)
    report.seconds = time.monotonic() - started
    return report


def _judge(data: AnomalyData, report: CheckReport) -> None:
    """Decide whether this is the published data set, and describe how the folder is understood."""
    _ = data.categories  # refuses unknown categories
    report.published = data.is_published
    if not report.published and data.info.counts:
        report.remarks.append(
            f"checked as your own data in this layout: fewer than two of the categories of "
            f"{data.info.title} are here"
        )
    report.remarks += data.remarks


def _list_samples(data: AnomalyData, report: CheckReport) -> Iterator[tuple[Sample, Split]]:
    for category in data.categories:
        for split in data.splits:
            try:
                for sample in data.list_samples(category, split):
                    if not (data.omits_copies and original_of(sample.image)):
                        yield sample, split
            except (OSError, ValueError) as error:
                _add_problem(report, "listing", short_path(data, data.root / category), str(error))


def _add_problem(report: CheckReport, kind: str, path: str, message: str) -> None:
    report.problems.append(Problem(kind, path, printable(message)))


def _compare_counts(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Compare the numbers of images with the published ones."""
    published = data.info.counts if report.published else {}
    for category in data.categories:
        counts = published.get(category)
        if published and counts is None:
            report.remarks.append(f"{category}: not a published category")
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
                data.has_labels,
            )
            report.rows.append(row)
            if expected is not None and expected != (row.normal, row.anomalous):
                message = (
                    f"{category}, {split}: {row.normal} normal and {anomalous} anomalous images, "
                    f"published: {expected[0]} and {expected[1]}"
                )
                _add_problem(report, "count", short_path(data, data.root), message)
            elif not members:
                message = f"{category}: no {split} images"
                _add_problem(report, "count", short_path(data, data.root), message)
    total = data.info.total
    if total is not None and total != len(inspected) and data.listing.chosen is None:
        message = f"{len(inspected)} images, published: {total}"
        _add_problem(report, "count", short_path(data, data.root), message)
    if data.listing.chosen is None:
        for category in sorted(set(published) - set(data.categories)):
            message = f"the published category {category} is missing"
            _add_problem(report, "count", short_path(data, data.root), message)


def _find_duplicates(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Find images of equal pixels, such as copies that were saved again without loss."""
    for files in _groups(inspected, lambda files: files.digest):
        report.duplicates += len(files) - 1
        report.groups += 1
    twins = []
    for first, *others in _groups(inspected, lambda files: files.pixels):
        for other in others:
            same = "content" if other.digest == first.digest else "pixels"
            message = f"same {same} as {short_path(data, first.sample.image)}"
            kind = "twin"
            if first.split != other.split:
                kind = "leak"
                message += f", a {first.split} image: the same image is trained on and tested"
            elif first.sample.label != other.sample.label:
                kind, message = "contradiction", f"{message}, which has the opposite label"
            twins.append(Problem(kind, short_path(data, other.sample.image), message))
    allowed = data.known_duplicates
    expected = [problem for problem in twins if problem.kind != "contradiction"]
    if expected and (allowed is None or len(expected) <= allowed):
        twins = [problem for problem in twins if problem.kind == "contradiction"]
        report.remarks.append(
            f"{number_of(len(expected), 'image')} equal to others, such as {expected[0].path} "
            f"({expected[0].message}), as in the published archive"
        )
    report.problems += twins


def _groups(
    inspected: Sequence[InspectedSample], key: Callable[[InspectedSample], str | None]
) -> list[list[InspectedSample]]:
    """Return the groups of at least two images with the same key, which is not None."""
    groups: dict[str, list[InspectedSample]] = defaultdict(list)
    for files in inspected:
        if (value := key(files)) is not None:
            groups[value].append(files)
    return [files for files in groups.values() if len(files) > 1]


def _find_near_duplicates(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Find test images that nearly equal a training image, by the correlation of thumbnails.

    Without a training split, test images are compared with each other.
    """
    alone = "train" not in data.splits
    for category in data.categories:
        members = [
            s for s in inspected if s.sample.category == category and s.thumbnail is not None
        ]
        test = [s for s in members if s.split == "test"]
        others = test if alone else [s for s in members if s.split == "train"]
        pairs = list(_near_pairs(test, others))
        match = "another test image" if alone else "a training image"
        remark = f"{category}: {len(pairs)} test images nearly equal {match}"
        if pairs:
            correlation, path, other_path = max(pairs)
            remark += (
                f" (correlation of thumbnails above {NEAR:g}); the closest are "
                f"{short_path(data, path)} and {short_path(data, other_path)} ({correlation:.4f})"
            )
        report.remarks.append(remark)


def _near_pairs(
    samples: Sequence[InspectedSample], others: Sequence[InspectedSample]
) -> Iterator[tuple[float, Path, Path]]:
    """Yield each sample and the most similar other image, if they are near-duplicates.

    Exact duplicates are left out.
    """
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
        similarity = rows[start : start + BLOCK] @ columns.T
        for number, files in enumerate(samples[start : start + BLOCK]):
            similarity[number, same[files.digest]] = -1
            best = int(similarity[number].argmax())
            if similarity[number, best] > NEAR:
                yield float(similarity[number, best]), files.sample.image, others[best].sample.image


def _find_unused_files(data: AnomalyData, samples: Sequence[Sample], report: CheckReport) -> None:
    """Find masks without an image, masks of several images, and image files that are not listed."""
    # If a category could not be listed, all of its masks would seem to have no image.
    unlisted = {problem.path for problem in report.problems if problem.kind == "listing"}
    listed = [c for c in data.categories if short_path(data, data.root / c) not in unlisted]
    spare = data.spare_masks(listed, samples)
    for path in spare:
        message = spare_mask(spare, samples, bool(data.mask_hint))
        message = message.removesuffix(": add its image, or remove the mask")
        _add_problem(report, "mask", short_path(data, path), message)
    for mask, images in shared_masks(samples).items():
        _add_problem(report, "mask", short_path(data, mask), shared_mask(images))
    masks = {s.mask for s in samples if s.mask is not None}
    of_normal = [mask for mask in data.normal_masks(listed, samples) if mask not in masks]
    for path in of_normal:
        _check_normal_mask(data, path, report)
    _list_unused(data, {*(s.image for s in samples), *masks, *spare, *of_normal}, report)


def _list_unused(data: AnomalyData, files: Set[Path], report: CheckReport) -> None:
    """List copies, results of this program, and all other images that are not among ``files``."""
    left_out = {**data.left_out("test"), **data.left_out("fit")}
    # Links lead to one file by several paths.
    used = {os.path.realpath(path) for path in files}
    passed_over = {os.path.realpath(path) for images in left_out.values() for path in images}
    runs: list[Path] = []
    others = [path for path in data.image_files(runs) if os.path.realpath(path) not in used]
    copies = [path for path in sorted(others) if data.omits_copies and original_of(path)]
    passed_over |= {os.path.realpath(path) for path in copies}
    unused = sorted(path for path in others if os.path.realpath(path) not in passed_over)
    report.copies = [short_path(data, path) for path in copies]
    report.unused = [short_path(data, path) for path in unused]
    if copies:
        report.remarks.append(
            f"{number_of(len(copies), 'file')} not used, as the content is that of the original: "
            f"{', '.join(report.copies)}"
        )
    for kind, images in left_out.items():
        if images:
            report.remarks.append(left_out_remark(data.root, kind, images))
    if runs:
        report.remarks.append(
            f"{number_of(len(runs), 'folder')} of results not read, such as "
            f"{short_path(data, min(runs))}"
        )
    if unused:
        report.remarks.append(
            f"{len(unused)} other images are not used, such as {report.unused[0]}"
        )


def _check_normal_mask(data: AnomalyData, mask: Path, report: CheckReport) -> None:
    try:
        if load_mask(mask, data.mask_rule).any():
            _add_problem(report, "mask of normal", short_path(data, mask), MASK_OF_NORMAL)
    except (OSError, ValueError) as error:
        message = str(error).removeprefix(f"{mask}: ")
        _add_problem(report, "unreadable", short_path(data, mask), message)


def _judge_masks(
    data: AnomalyData, inspected: Sequence[InspectedSample], report: CheckReport
) -> None:
    """Report what is doubtful about readable masks, in the words of a test."""
    masks = [s.mask for s in inspected if s.mask is not None and s.sample.label]
    for finding in mask_findings(masks, data.mask_rule, data.mask_level is not None, data.is_own):
        if not finding.is_problem:
            report.remarks.append(printable(finding.text))
        elif finding.kind != "mask empty":  # each of these is listed by itself
            path = finding.masks[0].sample.mask
            assert path is not None
            _add_problem(report, finding.kind, short_path(data, path), finding.text)


def _note_misfits(inspected: Sequence[InspectedSample], report: CheckReport) -> None:
    misfits = [
        s.misfit for s in inspected if s.misfit and not any("mask" in p.kind for p in s.problems)
    ]
    if misfits:
        report.remarks.append(
            f"{len(misfits)} masks differ in size from their image by up to {max(misfits)} pixels; "
            f"these masks are resized by nearest neighbour"
        )


def _sizes(inspected: Sequence[InspectedSample]) -> str:
    sizes = [s.size for s in inspected if s.size is not None]
    if not sizes:
        return ""
    ranges = [(min(side), max(side)) for side in zip(*sizes, strict=True)]
    return " x ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
