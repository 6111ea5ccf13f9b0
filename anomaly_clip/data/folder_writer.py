"""Images of a data set, written in the form of a user's own folder.

``good/`` holds the normal images, one folder per kind of defect the others, and
``ground_truth/<kind>/`` their masks, so that ``ImageFolder`` reads the folder. Several categories
have a folder each.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.demo import Demo
from anomaly_clip.data.folder_forms import NORMAL_FOLDERS
from anomaly_clip.data.mask_folders import MASK_FOLDERS, has_name_of_masks
from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.files import readable, safe_name
from anomaly_clip.folders import is_passed_over
from anomaly_clip.masks import solid
from anomaly_clip.progress import track

__all__ = ["check_new_folder", "write_images"]

GOOD, MASKS = NORMAL_FOLDERS[0], MASK_FOLDERS[0]
NO_DEFECTS = (*NORMAL_FOLDERS, "train", "test")
"""Names of folders that are no kind of defect in a user's folder, as those of masks are."""
LEAST_DIGITS = 3  # of a file's number


def check_new_folder(folder: str | os.PathLike[str], data: AnomalyData) -> Path:
    """Return the folder as a path, if images can be written to it without replacing anything.

    Raises:
        ValueError: If it is a file, contains something, or lies in the folder of the data set.
    """
    if not os.fspath(folder).strip():
        raise ValueError(f"the folder of the images is {folder!r}: name a new one, such as photos")
    try:
        target = Path(folder).expanduser()
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target} is a file: name a new folder for the images")
        if target.is_dir() and any(target.iterdir()):
            raise ValueError(
                f"{target} is not empty, and nothing in it is replaced: name a new folder for the "
                f"images, or empty this one"
            )
    except (OSError, RuntimeError) as error:  # the latter for ~name of an unknown user
        raise ValueError(f"{folder}: no folder for images ({error}): name another one") from None
    if data.on_disk and target.resolve().is_relative_to(data.root.resolve()):
        raise ValueError(
            f"{target} lies in the folder of the data set, {data.root}, whose images would be "
            f"listed twice: name a folder outside of it"
        )
    return target


def write_images(
    data: AnomalyData,
    folder: str | os.PathLike[str],
    split: Split | None = None,
    unreadable: list[UnreadableError] | None = None,
) -> int:
    """Write the decoded images of a data set as PNG files, in the form of a user's own folder.

    Files are numbered. A comment in each file names the data set and the image. If an error occurs,
    nothing remains.

    Args:
        data: The data set, of which the categories in use are written.
        folder: The new folder; an empty one is used as it is.
        split: The split to write; default: all. Both splits end in the same folders.
        unreadable: Receives the errors of images that cannot be read, which are then left out;
            default: the first error is raised.

    Returns:
        The number of images, masks not counted.

    Raises:
        UnreadableError: If an image cannot be read and there is no list for it, or none can be.
        ValueError: If the folder is not empty, or lies in the folder of the data set.
    """
    target = check_new_folder(folder, data)
    splits = data.splits if split is None else (split,)
    samples = [s for name in splits for s in data.samples(name) if s.category in data.categories]
    existed = target.is_dir()
    temporary = target / f".{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({error}): name another folder") from None
    try:
        written = 0
        for category in data.categories:
            place = temporary / safe_name(category) if len(data.categories) > 1 else temporary
            rows = [sample for sample in samples if sample.category == category]
            written += _write_category(data, rows, place, unreadable)
        if unreadable and not written:
            raise unreadable[0]
        for inner in list(temporary.iterdir()):
            inner.rename(target / inner.name)
    except BaseException:
        shutil.rmtree(temporary if existed else target, ignore_errors=True)
        raise
    temporary.rmdir()
    return written


def _write_category(
    data: AnomalyData,
    samples: Sequence[Sample],
    place: Path,
    unreadable: list[UnreadableError] | None,
) -> int:
    """Write the images of a category and return their number."""
    read, guard = data.reader(), data.unreadable.guard
    (place / GOOD if data.has_labels else place).mkdir(parents=True, exist_ok=True)
    # Numbers differ between folders, so that no image has the name of another one's mask.
    ordered = sorted(samples, key=lambda s: (s.label, s.defect if s.label else ""))
    digits = max(LEAST_DIGITS, len(str(len(ordered) - 1)))
    written = 0
    for sample in track(ordered, "writing images"):
        try:
            with guard(sample):
                image, mask = read(sample)
        except UnreadableError as error:
            if unreadable is None:
                raise
            unreadable.append(error)
            continue
        kind = _folder_of(sample) if data.has_labels else "."
        name = f"{written:0{digits}d}"
        _save(image, place / kind / f"{name}.png", _comment(data, sample))
        if sample.label and data.has_masks:
            white = np.zeros(image.shape[:2], dtype=bool) if mask is None else solid(mask)
            file = place / MASKS / kind / f"{name}_mask.png"
            _save(white.astype(np.uint8) * 255, file, _comment(data, sample))
        written += 1
    return written


def _folder_of(sample: Sample) -> str:
    """Return the folder of an image by its label, which a reader of the folder understands."""
    if not sample.label:
        return GOOD
    name = safe_name(sample.defect)
    taken = name.lower() in NO_DEFECTS or has_name_of_masks(Path(name)) or is_passed_over(name)
    return f"defect {name}" if taken else name


def _comment(data: AnomalyData, sample: Sample) -> PngInfo:
    """Return the text that tells where an image of the folder is from."""
    path = sample.image
    name = path.relative_to(data.root) if path.is_relative_to(data.root) else path.name
    is_generated = isinstance(data, Demo)
    what = f"generated by Demo with seed {data.seed}" if is_generated else data.dataset_name
    info = PngInfo()
    info.add_text("Comment", readable(f"{what}: {name}"))
    return info


def _save(array: NDArray[np.uint8], path: Path, comment: PngInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, pnginfo=comment)
