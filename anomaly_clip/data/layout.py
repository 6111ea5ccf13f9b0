"""Helpers of listing functions: sorted folders, masks by name, tables, helpful errors."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from anomaly_clip.data.copies import with_copy_mark
from anomaly_clip.data.known_layouts import layout_hint, unsupported
from anomaly_clip.data.samples import Sample
from anomaly_clip.images import is_image

__all__ = [
    "by_stem",
    "check_files",
    "images_in",
    "missing_layout",
    "paired_masks",
    "read_table",
    "shared_masks",
    "subfolders",
    "top_folder",
]


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted; none if the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if is_image(p))


def by_stem(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name without extension; of equal names, the first image."""
    return {path.stem: path for path in reversed(images_in(folder))}


def subfolders(folder: Path) -> list[Path]:
    """Return the visible subfolders of a folder, sorted; none if the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir())


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
    images: Sequence[Path], folder: Path, endings: Sequence[str] = ("_mask", "")
) -> dict[Path, Path]:
    """Return the mask of each image, paired by name: the image's name and an ending.

    In the name of a copy, such as ``a (copy)``, the ending may also come before the mark. A missing
    mask gets its expected path; see :func:`check_files`.

    Args:
        images: The images.
        folder: The folder of the masks.
        endings: Possible endings after the image's name; the first existing mask is used.
    """
    masks_by_name = by_stem(folder)
    masks = {}
    for image in images:
        names = [f"{image.stem}{ending}" for ending in endings]
        names += [name for e in endings if (name := with_copy_mark(image.stem, e)) is not None]
        existing = [masks_by_name[name] for name in names if name in masks_by_name]
        masks[image] = existing[0] if existing else folder / f"{names[0]}.png"
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


def check_files(samples: Iterable[Sample]) -> None:
    """Check that all listed files exist and that no two images share a mask.

    Raises:
        FileNotFoundError: If an image or a mask is missing.
        ValueError: If two images share a mask.
    """
    samples = list(samples)
    for sample in samples:
        if not sample.image.exists():
            raise FileNotFoundError(
                f"{sample.image}: there is no such file; correct the path, or restore the image"
            )
        if sample.mask is not None and not sample.mask.exists():
            raise FileNotFoundError(f"{sample.image}: its mask is missing, expected {sample.mask}")
    for mask, (first, second, *_) in shared_masks(samples).items():
        raise ValueError(
            f"{mask}: the mask of two images, {first.name} and {second.name}: rename one image "
            f"and give it its own mask"
        )


def shared_masks(samples: Iterable[Sample]) -> dict[Path, list[Path]]:
    """Return the masks that several images share, with those images."""
    images: dict[Path, list[Path]] = {}
    for sample in samples:
        if sample.mask is not None:
            images.setdefault(sample.mask, []).append(sample.image)
    return {mask: sharing for mask, sharing in images.items() if len(sharing) > 1}


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
