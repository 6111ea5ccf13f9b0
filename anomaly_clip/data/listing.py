"""What listing functions are made of: sorted folders, masks by name, errors that help."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from anomaly_clip.data.samples import Sample
from anomaly_clip.data.transforms import is_image

__all__ = [
    "check_masks",
    "images_in",
    "mask_beside",
    "missing_layout",
    "paired_masks",
    "spare_masks",
    "subfolders",
    "top_folder",
]


def images_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if is_image(p))


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir())


def top_folder(root: Path, inner: str, *names: str) -> Path:
    """Return ``root`` or a folder in it that archives put around a data set.

    Args:
        root: Where the user says the data set is.
        inner: What is in the right folder.
        names: Folders that may stand around it.
    """
    for name in ("", *names):
        if (root / name / inner).exists():
            return root / name
    return root


def paired_masks(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the mask of each image: ``NAME_mask.*``, or ``NAME.*``, in a folder. By name only.

    A mask that is not there is named as it would be called: see :func:`check_masks`.
    """
    by_stem = {p.stem: p for p in images_in(folder)}
    return {
        image: by_stem.get(f"{image.stem}_mask")
        or by_stem.get(image.stem)
        or folder / f"{image.stem}_mask.png"
        for image in images
    }


def mask_beside(image: Path, folder: Path, ending: str) -> Path:
    """Return ``folder/NAME<ending>.*``, by name; ``.png`` if it is not there."""
    wanted = f"{image.stem}{ending}"
    found = sorted(p for p in folder.glob(f"{_plain(wanted)}.*") if is_image(p))
    return found[0] if found else folder / f"{wanted}.png"


def check_masks(samples: Iterable[Sample]) -> None:
    """Refuse a listing whose masks are not all there, or whose mask folders hold others.

    Raises:
        FileNotFoundError: If a mask is missing.
        ValueError: If a mask has no image.
    """
    samples = list(samples)
    for sample in samples:
        if sample.mask is not None and not sample.mask.exists():
            raise FileNotFoundError(f"{sample.image}: its mask is missing, expected {sample.mask}")
    spare = spare_masks(samples)
    if spare:
        raise ValueError(f"{spare[0]}: a mask without an image")


def spare_masks(samples: Sequence[Sample]) -> list[Path]:
    """Return the pictures, in folders of masks alone, that are the mask of no image."""
    masks = {s.mask for s in samples if s.mask is not None}
    folders = {mask.parent for mask in masks} - {s.image.parent for s in samples}
    return sorted(p for folder in folders for p in images_in(folder) if p not in masks)


def missing_layout(root: Path, expected: str) -> FileNotFoundError:
    """Return the error for a folder that is not laid out as expected, saying what is there."""
    if not root.exists():
        return FileNotFoundError(f"data.root {root}: there is no such folder; expected {expected}")
    if not root.is_dir():
        return FileNotFoundError(f"data.root {root} is a file; expected a folder with {expected}")
    names = sorted(p.name for p in root.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    return FileNotFoundError(f"data.root {root}: expected {expected}; there is {shown}")


def _plain(name: str) -> str:
    """Take the meaning from characters that stand for others in patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
