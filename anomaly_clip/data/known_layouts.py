"""Recognition of published data sets by their files, for messages about an unexpected folder.

Two questions are answered: is this a published set that is not supported, and which ``--data`` or
which other folder fits? Only names of folders and files are read.
"""

from __future__ import annotations

from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import NamedTuple

from anomaly_clip.folders import subfolders
from anomaly_clip.images import is_image

__all__ = ["layout_hint", "published_layout", "unsupported"]

SEARCHED = 100  # subfolders of a folder that are searched
FEW = 5  # subfolders of each of these that are searched


class Unsupported(NamedTuple):
    """A published data set that cannot be read."""

    title: str
    reason: str
    """Missing support, and the way out."""
    contains: Callable[[Path], bool]
    """Test of whether a folder is one of its categories."""


def subfolders_of(folder: Path) -> list[Path]:
    """Return some of the visible subfolders, sorted; none if the folder cannot be read."""
    try:
        return subfolders(folder)[:SEARCHED]
    except OSError:
        return []


def has_image(folder: Path, pattern: str = "*") -> bool:
    """Return whether a folder contains an image whose name has a form."""
    try:
        return any(is_image(path) for path in folder.glob(pattern))
    except OSError:
        return False


# -- published sets that are not supported --------------------------------------------------------


def is_loco(folder: Path) -> bool:
    """Return whether a category has a folder of masks per image."""
    for defect in subfolders_of(folder / "ground_truth"):
        inner = subfolders_of(defect)
        if inner and not has_image(defect) and has_image(inner[0]):
            # A user's own folders below a kind of defect are below test/, too.
            return has_image(folder / "test" / defect.name, f"{escape(inner[0].name)}.*")
    return False


def is_kolektor(folder: Path) -> bool:
    """Return whether a folder ``kos01`` holds ``Part0.jpg`` and ``Part0_label.bmp``."""
    return folder.name.lower().startswith("kos") and has_image(folder, "Part*_label.*")


def is_mvtec_3d(folder: Path) -> bool:
    """Return whether a category has folders ``rgb`` and ``xyz``."""
    places = [place for split in ("train", "test") for place in subfolders_of(folder / split)]
    return any((p / "xyz").is_dir() and (p / "rgb").is_dir() for p in places)


def is_eyecandies(folder: Path) -> bool:
    """Return whether a category has ``data/000_image_0.png``."""
    return any(has_image(p / "data", "*_image_0.*") for p in subfolders_of(folder))


def is_dagm(folder: Path) -> bool:
    """Return whether a class has ``Train/Label`` or ``Test/Label``."""
    return any((folder / split / "Label").is_dir() for split in ("Train", "Test"))


UNSUPPORTED = (
    Unsupported(
        "MVTec LOCO AD",
        "its masks (ground_truth/<defect>/NAME/, several per image) and their metric, sPRO, are "
        "not supported: for image metrics alone, move the folders ground_truth/ elsewhere and use "
        "--data MVTecAD",
        is_loco,
    ),
    Unsupported(
        "KolektorSDD",
        "its layout (kos01/Part0.jpg with Part0_label.bmp) is not supported, because only the "
        "masks tell which images are normal: copy the images with a black mask into good/, the "
        "others into defect/ and their masks into ground_truth/defect/, each with a name of its "
        "own, and use --data ImageFolder",
        is_kolektor,
    ),
    Unsupported(
        "MVTec 3D-AD",
        "its layout with point clouds (xyz/) is not supported: for the color images alone, copy "
        "rgb/* into <category>/train/good/ and <category>/test/<defect>/, and gt/* into "
        "<category>/ground_truth/<defect>/, and use --data MVTecAD",
        is_mvtec_3d,
    ),
    Unsupported(
        "Eyecandies",
        "its layout (data/000_image_0.png with depth and normals) is not supported: copy one "
        "image of each object into <category>/train/good/ and <category>/test/{good,bad}/, with "
        "the masks in <category>/ground_truth/bad/, and use --data MVTecAD",
        is_eyecandies,
    ),
    Unsupported(
        "DAGM 2007",
        "its layout (Train/, Test/ and Label/) is not supported: copy the images without a file "
        "in Label/ into <class>/train/good/ and <class>/test/good/, the others into "
        "<class>/test/defect/ and their masks into <class>/ground_truth/defect/, and use --data "
        "MVTecAD",
        is_dagm,
    ),
)


def unsupported(root: Path) -> str | None:
    """Return a sentence if a folder is a published data set that is not supported, else None.

    The folder may also be one of its categories, or one level above it.
    """
    if not root.is_dir():
        return None
    inner = subfolders_of(root)
    for kind in UNSUPPORTED:
        if any(map(kind.contains, (root, *inner))):
            return f"data.root {root}: this is {kind.title}; {kind.reason}"
    deeper = [folder for place in inner for folder in subfolders_of(place)[:FEW]]
    for kind in UNSUPPORTED:
        if any(map(kind.contains, deeper)):
            return f"data.root {root}: this contains {kind.title}; {kind.reason}"
    return None


# -- supported layouts ----------------------------------------------------------------------------


def _any_category(*parts: str) -> Callable[[Path], bool]:
    """Return a test of whether some subfolder has one of these folders."""
    return lambda root: any((p / part).is_dir() for p in subfolders_of(root) for part in parts)


def _any_of(*patterns: str) -> Callable[[Path], bool]:
    """Return a test of whether a folder has a file or folder of one of these forms."""
    return lambda root: any(any(root.glob(pattern)) for pattern in patterns)


def _all_of(*names: str) -> Callable[[Path], bool]:
    """Return a test of whether a folder has all of these files or folders."""
    return lambda root: all((root / name).exists() for name in names)


def _is_mvtec(root: Path) -> bool:
    return any(
        (p / "test").is_dir() and ((p / "train").is_dir() or (p / "ground_truth").is_dir())
        for p in subfolders_of(root)
    )


LAYOUTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "VisA": ("VisA", _any_category("Data/Images")),
    "MVTecAD2": ("MVTec AD 2", _any_category("test_public")),
    "RealIAD": ("Real-IAD", _any_of("realiad_jsons*", "realiad_1024", "realiad_512")),
    "KSDD2": ("KolektorSDD2", _any_of("train/*_GT.*", "test/*_GT.*")),
    "HeadCT": ("Head CT", _all_of("labels.csv", "head_ct")),
    "BrainMRI": ("Brain MRI", _all_of("brain_tumor_dataset")),
    "ISIC": ("ISIC", _all_of("ISBI2016_ISIC_Part1_Test_Data")),
    "CVCClinicDB": ("CVC-ClinicDB", _all_of("Original", "Ground Truth")),
    "MixedWM38": ("MixedWM38", _any_of("MixedWM38*.npz", "Wafer_Map_Datasets*.npz")),
    "BTAD": ("BTAD", _any_category("test/ko")),
    "MVTecAD": ("MVTec-AD", _is_mvtec),
    "MetaJSON": ("a data set listed by meta.json", _all_of("meta.json")),
}
"""Title of each layout and the test of whether a folder has it, the most specific first."""


def published_layout(root: Path) -> str | None:
    """Return a sentence if a folder, which may be read as a user's own, is a published set."""
    if all(has_image(root / split, "*_GT.*") for split in ("train", "test")):
        return f"data.root {root}: this is KolektorSDD2's layout: use --data KSDD2"
    return None


CATEGORY_FOLDERS = ("VisA", "MVTecAD2", "BTAD", "MVTecAD")
"""Data modules whose root contains one folder per category."""


def layout_hint(root: Path, module: str = "") -> str | None:
    """Return what to try instead of a folder in which a data module finds nothing, or None.

    Args:
        root: The folder, which exists.
        module: Name of the data module, which may read a folder up to two levels above or below.
    """
    inner = subfolders_of(root)
    deeper = [folder for place in inner for folder in subfolders_of(place)[:FEW]]
    above = list(root.absolute().parents)[:2]
    fits = LAYOUTS[module][1] if module in LAYOUTS else None
    for place in (*inner, *deeper):
        if fits is not None and _fits(fits, place):
            return f"the data set is in a folder of it: try {place}"
    for name, (title, test) in LAYOUTS.items():
        if name != module and _fits(test, root):
            return f"this is the layout of {title}: try --data {name}"
    for place in above:
        if fits is not None and _fits(fits, place):
            part = "one category" if module in CATEGORY_FOLDERS else "a part of the data set"
            return f"this looks like {part}: try {place}"
    return None


def _fits(test: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return test(folder)
    except OSError:
        return False
