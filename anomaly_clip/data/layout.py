"""Helpers of listing functions: sorted folders, masks by name, tables, helpful errors."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from anomaly_clip.data.copies import with_copy_mark
from anomaly_clip.data.known_layouts import layout_hint, unsupported
from anomaly_clip.data.samples import Sample
from anomaly_clip.files import name_key
from anomaly_clip.folders import find_inner, images_in, subfolders

__all__ = [
    "MASK_OF_NORMAL",
    "USUAL_ENDINGS",
    "by_stem",
    "check_images",
    "check_masks",
    "images_in",
    "missing_layout",
    "missing_mask",
    "paired_masks",
    "read_table",
    "shared_mask",
    "shared_masks",
    "spare_mask",
    "subfolders",
    "top_folder",
]

USUAL_ENDINGS = ("_mask", "", "_gt", "_label")
"""Endings that the name of a mask has after that of its image, the most common first."""
MASK_OF_NORMAL = "the mask of a normal image is not empty"
LISTED = 4  # names of a folder that an error message lists


def by_stem(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name without extension; of equal names, the first image.

    Names are those of :func:`~anomaly_clip.files.name_key`.
    """
    return {name_key(path.stem): path for path in reversed(images_in(folder))}


def top_folder(root: Path, inner: str, *names: str) -> Path:
    """Return the data set's folder: ``root``, or a folder in it that an archive has added.

    Args:
        root: The folder given by the user.
        inner: A file or folder by which the data set's folder is recognised.
        names: Possible names of the added folder.
    """
    for name in ("", *names):
        if (root / name / inner).exists():
            return root / name
    return root


def paired_masks(
    images: Sequence[Path], folder: Path, endings: Sequence[str] = USUAL_ENDINGS
) -> dict[Path, Path]:
    """Return the mask of each image, paired by name: the image's name and an ending.

    In the name of a copy, such as ``a (copy)``, the ending may also come before the mark. A missing
    mask gets its expected path; see :func:`check_files`.

    Args:
        images: The images.
        folder: The folder of the masks.
        endings: Possible endings after the image's name, in any case; the first existing mask is
            used.
    """
    folder = find_inner(folder.parent, folder.name)
    masks_by_name = by_stem(folder)
    masks_by_ending = {
        (stem[: len(stem) - len(ending)], ending): mask
        for stem, mask in reversed(masks_by_name.items())
        for ending in endings
        if stem.lower().endswith(ending.lower())
    }
    masks = {}
    for image in images:
        stem = name_key(image.stem)
        names = [name_key(f"{image.stem}{ending}") for ending in endings]
        names += [name for e in endings if (name := with_copy_mark(stem, e)) is not None]
        existing = [masks_by_name[name] for name in names if name in masks_by_name]
        existing += [m for e in endings if (m := masks_by_ending.get((stem, e)))]
        masks[image] = existing[0] if existing else folder / f"{image.stem}{endings[0]}.png"
    return masks


def read_table(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row of a CSV file.

    The header and empty rows are skipped.

    Args:
        file: The CSV file.
        columns: Names with which the header must begin.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not CSV in UTF-8, or has a different header.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(enumerate(csv.reader(lines, skipinitialspace=True), start=1))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: there is no such file; correct the path, or restore the file"
        ) from None
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: not a CSV file in UTF-8 ({error}); save it as one") from None
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if header[: len(columns)] != list(columns):
        raise ValueError(
            f"{file}, line 1: expected a header, {', '.join(columns)}; got "
            f"{', '.join(header) or 'nothing'}; restore the published file"
        )
    yield from ((number, row) for number, row in rows[1:] if any(cell.strip() for cell in row))


def check_images(samples: Iterable[Sample]) -> None:
    """Check that all listed images exist.

    Raises:
        FileNotFoundError: If an image is missing.
    """
    for sample in samples:
        if not sample.image.exists():
            raise FileNotFoundError(
                f"{sample.image}: there is no such file; correct the path, or restore the image"
            )


def check_masks(samples: Iterable[Sample], endings: Sequence[str] = (), hint: str = "") -> None:
    """Check that all listed masks exist and that no two images share one.

    Args:
        samples: The samples.
        endings: Endings that the name of a mask may have after that of its image, for messages.
        hint: Advice for masks that are not found.

    Raises:
        FileNotFoundError: If a mask is missing.
        ValueError: If two images share a mask.
    """
    samples = list(samples)
    for sample in samples:
        if sample.mask is not None and not sample.mask.exists():
            raise FileNotFoundError(f"{sample.image}: {missing_mask(sample, endings, hint)}")
    for mask, images in shared_masks(samples).items():
        raise ValueError(
            f"{mask}: {shared_mask(images)}: rename one image and give it its own mask"
        )


def missing_mask(sample: Sample, endings: Sequence[str] = (), hint: str = "") -> str:
    """Describe a missing mask: its expected names, and what its folder contains instead.

    Args:
        sample: The sample, which has a mask.
        endings: Endings that the name of a mask may have after that of its image.
        hint: Advice to end with; default: to add the mask.
    """
    assert sample.mask is not None
    folder, stem = sample.mask.parent, sample.image.stem
    others = [f"{stem}{ending}.png" for ending in endings]
    others = [name for name in others if name != sample.mask.name]
    text = f"its mask is missing, expected {sample.mask.name}"
    text += f" (or {', '.join(others)})" if others else ""
    text += f" in {folder}"
    hint = hint or "add the mask"
    if not folder.is_dir():
        return f"{text}, which does not exist: {hint}"
    names = [image.name for image in images_in(folder) if image != sample.image]
    names.sort(key=lambda name: not name.startswith(stem))
    if not names:
        return f"{text}, which is empty: {hint}"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{text}; there are {', '.join(names[:LISTED])}{more}: {hint}"


def shared_mask(images: Sequence[Path]) -> str:
    """Describe which images share a mask, by paths below the folder that they have in common."""
    first, second = images[:2]
    folder = Path(os.path.commonpath([first.parent, second.parent]))
    return (
        f"the mask of {'two' if len(images) == 2 else len(images)} images, "
        f"{first.relative_to(folder)} and {second.relative_to(folder)}"
    )


def shared_masks(samples: Iterable[Sample]) -> dict[Path, list[Path]]:
    """Return the masks that several images share, with those images."""
    images: dict[Path, list[Path]] = {}
    for sample in samples:
        if sample.mask is not None:
            images.setdefault(sample.mask, []).append(sample.image)
    return {mask: sharing for mask, sharing in images.items() if len(sharing) > 1}


def spare_mask(spare: Sequence[Path], samples: Iterable[Sample], has_option: bool) -> str:
    """Describe masks without an image, with the ending of their names if that explains them.

    Args:
        spare: The masks.
        samples: All samples.
        has_option: Whether ``data.mask_ending`` exists.
    """
    text = "a mask without an image"
    stems = {
        name_key(s.image.stem)
        for s in samples
        if s.label and (s.mask is None or not s.mask.exists())
    }
    endings: Counter[str] = Counter()
    for mask in spare if has_option else ():
        name = name_key(mask.stem)
        cuts = [place for place in range(1, len(name)) if name[:place] in stems]
        endings.update([name[cuts[-1] :]] if cuts else [])
    ending, count = (endings.most_common(1) or [("", 0)])[0]
    if 2 * count <= len(spare):
        return f"{text}: add its image, or remove the mask"
    option = f"--data.mask_ending={ending}"
    return f"{text}, but the names of masks begin with those of images: set {option}"


def missing_layout(root: Path, expected: str, module: str = "") -> FileNotFoundError | ValueError:
    """Return the error for an unexpected layout; its message lists the content of ``root``.

    Args:
        root: The folder.
        expected: The content that was expected.
        module: Name of the data module, whose data may be in a folder near ``root``.
    """
    if not root.exists():
        return FileNotFoundError(f"data.root {root}: there is no such folder; expected {expected}")
    if not root.is_dir():
        return FileNotFoundError(f"data.root {root} is a file; expected a folder with {expected}")
    sentence = unsupported(root)
    if sentence is not None:
        return ValueError(sentence)
    names = sorted(p.name for p in root.iterdir())
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    hint = layout_hint(root, module)
    end = "" if hint is None else f" ({hint})"
    return FileNotFoundError(f"data.root {root}: expected {expected}; found {listed}{end}")
