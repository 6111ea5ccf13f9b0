"""What is wrong with a data set, found before a run does.

Every listed picture and mask is read whole; files are compared by content. What keeps figures from
being what they should be is a problem; the rest is a remark.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.file_hashes import FileHashes
from anomaly_clip.data.layout import shared_masks
from anomaly_clip.data.samples import read_sample
from anomaly_clip.data.transforms import resize_image
from anomaly_clip.images import is_image, read_grey, read_mask, solid
from anomaly_clip.progress import track

__all__ = ["Checked", "Problem", "Row", "check_data"]

FORMATS = {
    ".png": {"PNG"},
    ".jpg": {"JPEG", "MPO"},
    ".jpeg": {"JPEG", "MPO"},
    ".bmp": {"BMP", "DIB"},
    ".tif": {"TIFF"},
    ".tiff": {"TIFF"},
    ".webp": {"WEBP"},
    ".ppm": {"PPM"},
    ".pgm": {"PPM"},
}
"""PIL's names for what an extension promises."""

THUMBNAIL = 16  # pixels; near copies are looked for among pictures of this size
NEAR = 0.99  # correlation of two thumbnails
BLOCK = 2048  # thumbnails compared at once


class Problem(NamedTuple):
    """Something that is wrong."""

    kind: str
    path: str
    message: str


class Row(NamedTuple):
    """One category and split."""

    category: str
    split: Split
    normal: int
    anomalous: int
    published: tuple[int, int] | None
    """Normal and anomalous images that are published; None if nothing is known."""
    sizes: str
    """Widths and heights, as ``700`` or ``103-632``."""
    modes: dict[str, int]
    """Number of pictures by PIL's mode."""


@dataclass
class Checked:
    """What a check found.

    Attributes:
        data: The data set's name.
        root: Its folder.
        rows: One a category and split.
        problems: What is wrong.
        remarks: What is worth knowing.
        duplicates: Files beyond the first of each group of equal content.
        groups: Groups of equal content.
        images: How many images were read.
        seconds: How long it took.
    """

    data: str
    root: str
    rows: list[Row] = field(default_factory=list)
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


class InspectedSample(NamedTuple):
    """What one sample's files are."""

    sample: Sample
    split: Split
    digest: str | None = None
    size: tuple[int, int] | None = None
    mode: str | None = None
    thumbnail: NDArray[np.float32] | None = None
    problems: tuple[Problem, ...] = ()
    misfit: int = 0
    """By how many pixels the mask differs from its image, where that is allowed."""


def check_data(
    data: AnomalyData, workers: int | None = None, near_duplicates: bool = False
) -> Checked:
    """Read a data set whole and say what is wrong with it.

    Args:
        data: The data set; of its categories those in use.
        workers: Threads that read; default: one a core.
        near_duplicates: Whether to look for pictures that nearly equal one of another split, too.

    Raises:
        FileNotFoundError: If nothing is where it is expected.
        ValueError: If an asked category is not there.
    """
    started = time.monotonic()
    checked = Checked(type(data).__name__, str(data.root))
    listed = list(_listing(data, checked))
    seen = _inspect_all(data, listed, workers, near_duplicates)
    checked.images = len(seen)
    checked.problems += [problem for one in seen for problem in one.problems]
    _count(data, seen, checked)
    _compare(data, seen, checked)
    if near_duplicates:
        _compare_nearly(data, seen, checked)
    if data.on_disk:
        _look_around(data, [one.sample for one in seen], checked)
    _say_misfits(seen, checked)
    checked.seconds = time.monotonic() - started
    return checked


def _listing(data: AnomalyData, checked: Checked) -> Iterator[tuple[Sample, Split]]:
    for category in data.categories:
        for split in data.splits:
            try:
                yield from ((sample, split) for sample in data.list_samples(category, split))
            except (OSError, ValueError) as error:
                _add(checked, "listing", _short(data, data.root / category), str(error))


def _add(checked: Checked, kind: str, path: str, message: str) -> None:
    checked.problems.append(Problem(kind, path, printable(message)))


def _inspect_all(
    data: AnomalyData,
    listed: Sequence[tuple[Sample, Split]],
    workers: int | None,
    near: bool,
) -> list[InspectedSample]:
    hashes = FileHashes()
    hashes.sha256_of_all([])  # reads what is known, before threads ask

    def inspect(one: tuple[Sample, Split]) -> InspectedSample:
        return _inspect(data, *one, hashes, near)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            return list(track(pool.map(inspect, listed), "checking", total=len(listed)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _inspect(
    data: AnomalyData, sample: Sample, split: Split, hashes: FileHashes, near: bool
) -> InspectedSample:
    if not data.on_disk:
        image, _ = data.reader()(sample)
        size, digest = (image.shape[1], image.shape[0]), hashlib.sha256(image.tobytes()).hexdigest()
        return InspectedSample(
            sample, split, digest, size, "RGB", _thumbnail(image) if near else None
        )
    problems: list[Problem] = []

    def wrong(kind: str, path: Path, message: str) -> None:
        message = printable(message.removeprefix(f"{path}: "))
        problems.append(Problem(kind, _short(data, path), message))

    try:
        image, _ = read_sample(Sample(sample.image, sample.category, sample.label))
        with Image.open(sample.image) as picture:
            mode, kind = picture.mode, picture.format or ""
        digest = hashes.sha256(sample.image)
    except FileNotFoundError:
        wrong("missing", sample.image, "there is no such file")
        return InspectedSample(sample, split, problems=tuple(problems))
    except Exception as error:  # one odd file must not end the check of all others
        wrong("unreadable", sample.image, str(error))
        return InspectedSample(sample, split, problems=tuple(problems))
    if kind not in FORMATS.get(sample.image.suffix.lower(), {kind}):
        wrong("extension", sample.image, f"the extension lies, it is a {kind} file")
    misfit = 0
    if sample.mask is not None:
        try:
            read = read_grey if data.info.mask.grey else read_mask
            mask = solid(read(sample.mask))
            with Image.open(sample.mask) as picture:
                lossy = picture.format in ("JPEG", "MPO")
        except FileNotFoundError:
            wrong("mask missing", sample.image, f"its mask is missing, expected {sample.mask.name}")
        except Exception as error:  # as above
            wrong("unreadable", sample.mask, str(error))
        else:
            if lossy:
                message = "a mask saved as JPEG, whose noise counts as defect: save it as PNG"
                wrong("mask lossy", sample.mask, message)
            misfit = max(abs(a - b) for a, b in zip(mask.shape, image.shape, strict=False))
            if misfit > data.info.mask.fitted:
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, its image {image.shape[1]} x "
                wrong("mask size", sample.mask, f"the mask is {sizes}{image.shape[0]} pixels")
            if sample.label and not mask.any():
                wrong("mask empty", sample.mask, "the mask of an anomalous image is empty")
    return InspectedSample(
        sample,
        split,
        digest,
        (image.shape[1], image.shape[0]),
        mode,
        _thumbnail(image) if near else None,
        tuple(problems),
        misfit,
    )


def _count(data: AnomalyData, seen: Sequence[InspectedSample], checked: Checked) -> None:
    """Set numbers beside the published ones."""
    published = data.info.counts
    for category in data.categories:
        known = published.get(category)
        if published and known is None:
            checked.remarks.append(f"{category}: not one of the published categories")
        for split in data.splits:
            own = [s for s in seen if s.sample.category == category and s.split == split]
            anomalous = sum(s.sample.label for s in own)
            expected = None
            if known is not None:
                expected = (known.train, 0) if split == "train" else known[1:]
                if split == "test" and "train" not in data.splits and known.train:
                    expected = (known.train + known.normal, known.anomalous)
                    remark = "all images are test images, which is not the published protocol"
                    checked.remarks.append(f"{category}: {remark}")
            row = Row(
                category,
                split,
                len(own) - anomalous,
                anomalous,
                expected,
                _sizes(own),
                dict(sorted(Counter(s.mode for s in own if s.mode).items())),
            )
            checked.rows.append(row)
            if expected is not None and expected != (row.normal, row.anomalous):
                message = (
                    f"{category}, {split}: {row.normal} normal and {anomalous} anomalous images, "
                    f"published are {expected[0]} and {expected[1]}"
                )
                _add(checked, "count", _short(data, data.root), message)
            elif not own:
                _add(checked, "count", _short(data, data.root), f"{category}: no {split} images")
    total = data.info.total
    if total is not None and total != len(seen) and data.listing.chosen is None:
        message = f"{len(seen)} images, published are {total}"
        _add(checked, "count", _short(data, data.root), message)
    # A set of one's own in a published layout lacks nothing.
    if data.listing.chosen is None and set(published) & set(data.categories):
        for category in sorted(set(published) - set(data.categories)):
            message = f"the published category {category} is not there"
            _add(checked, "count", _short(data, data.root), message)


def _compare(data: AnomalyData, seen: Sequence[InspectedSample], checked: Checked) -> None:
    """Find files of equal content."""
    groups: dict[str, list[InspectedSample]] = defaultdict(list)
    for one in seen:
        if one.digest is not None:
            groups[one.digest].append(one)
    for first, *others in groups.values():
        checked.duplicates += len(others)
        checked.groups += bool(others)
        for other in others:
            message = f"the same content as {_short(data, first.sample.image)}"
            kind = "twin"
            if first.split != other.split:
                kind, message = "leak", f"{message}, a {first.split} image: training and test mix"
            elif first.sample.label != other.sample.label:
                kind, message = "contradiction", f"{message}, which has the other label"
            _add(checked, kind, _short(data, other.sample.image), message)


def _compare_nearly(data: AnomalyData, seen: Sequence[InspectedSample], checked: Checked) -> None:
    """Find test pictures that nearly equal a training picture: their thumbnails correlate.

    Without a training split they are compared with each other.
    """
    alone = "train" not in data.splits
    for category in data.categories:
        own = [s for s in seen if s.sample.category == category and s.thumbnail is not None]
        test = [s for s in own if s.split == "test"]
        others = test if alone else [s for s in own if s.split == "train"]
        found = list(_near_pairs(test, others))
        of = "another one" if alone else "a training image"
        remark = f"{category}: {len(found)} test images nearly equal {of}"
        if found:
            value, one, other = max(found)
            remark += (
                f" (thumbnails correlate above {NEAR:g}), most of all {_short(data, one)} and "
                f"{_short(data, other)} ({value:.4f})"
            )
        checked.remarks.append(remark)


def _near_pairs(
    ones: Sequence[InspectedSample], others: Sequence[InspectedSample]
) -> Iterator[tuple[float, Path, Path]]:
    """Yield for each picture the one most like it, if that is near and not the same content."""
    if not ones or not others:
        return
    rows, columns = (
        np.stack([s.thumbnail for s in part if s.thumbnail is not None]) for part in (ones, others)
    )
    same: dict[str | None, list[int]] = defaultdict(list)
    for number, other in enumerate(others):
        same[other.digest].append(number)
    for start in track(range(0, len(rows), BLOCK), "comparing thumbnails"):
        likeness = rows[start : start + BLOCK] @ columns.T
        for number, one in enumerate(ones[start : start + BLOCK]):
            likeness[number, same[one.digest]] = -1
            best = int(likeness[number].argmax())
            if likeness[number, best] > NEAR:
                yield float(likeness[number, best]), one.sample.image, others[best].sample.image


def _look_around(data: AnomalyData, samples: Sequence[Sample], checked: Checked) -> None:
    """Find masks without an image or with several, and pictures that nothing lists."""
    # Of a category that could not be listed every mask would seem to be one too many.
    unlisted = {problem.path for problem in checked.problems if problem.kind == "listing"}
    listed = [c for c in data.categories if _short(data, data.root / c) not in unlisted]
    spare = data.spare_masks(listed, samples)
    for path in spare:
        _add(checked, "mask", _short(data, path), "a mask without an image")
    for mask, (one, other, *_) in shared_masks(samples).items():
        message = f"the mask of two images, {one.name} and {other.name}"
        _add(checked, "mask", _short(data, mask), message)
    known = {s.image for s in samples} | {s.mask for s in samples} | set(spare)
    others = sorted(
        path
        for folder, _, names in os.walk(data.root)
        for name in names
        if is_image(path := Path(folder, name)) and path not in known
    )
    if others:
        checked.remarks.append(
            f"{len(others)} other pictures are not used, such as {_short(data, others[0])}"
        )


def _say_misfits(seen: Sequence[InspectedSample], checked: Checked) -> None:
    misfits = [s.misfit for s in seen if s.misfit and not any("mask" in p.kind for p in s.problems)]
    if misfits:
        checked.remarks.append(
            f"{len(misfits)} masks differ from their image by up to {max(misfits)} pixels; they "
            f"are resized to it, nearest"
        )


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return grey values of mean 0 and length 1, so that a product is a correlation."""
    grey = resize_image(image, THUMBNAIL).astype(np.float32).mean(axis=2).ravel()
    grey = grey - grey.mean()
    length = float(np.linalg.norm(grey))
    return (grey / length if length > 0 else grey).astype(np.float32)


def _sizes(seen: Sequence[InspectedSample]) -> str:
    sizes = [s.size for s in seen if s.size is not None]
    if not sizes:
        return ""
    ranges = [(min(side), max(side)) for side in zip(*sizes, strict=True)]
    return " x ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


def _short(data: AnomalyData, path: Path) -> str:
    """Return a path from the data set's folder on."""
    try:
        return printable(str(path.relative_to(data.root) if path != data.root else path))
    except ValueError:
        return printable(str(path))


def printable(text: str) -> str:
    """Write what cannot be printed, such as the end of a line in a file's name, as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
