"""Industrial data sets in their published layouts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from anomaly_clip.data.copies import original_of, plain_name
from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.kind_folders import KindFolders, is_normal
from anomaly_clip.data.layout import (
    USUAL_ENDINGS,
    images_in,
    missing_layout,
    paired_masks,
    read_table,
    subfolders,
)
from anomaly_clip.data.stray_masks import refuse_stray_masks
from anomaly_clip.masks import read_mask

__all__ = [
    "BTAD",
    "KSDD2",
    "IndustrialFolders",
    "MVTecAD",
    "MagneticTile",
    "VisA",
    "list_btad",
    "list_class_folders",
    "list_ksdd2",
    "list_mvtec",
    "list_visa",
    "list_visa_unsplit",
    "mvtec_categories",
]

MVTEC_LAYOUT = (
    "<category>/train/good/, <category>/test/<defect>/, <category>/ground_truth/<defect>/"
)
VISA_LAYOUT = "split_csv/1cls.csv and <category>/Data/Images/{Normal,Anomaly}/"
VISA_SPLIT = Path("split_csv", "1cls.csv")
VISA_COLUMNS = ["object", "split", "label", "image", "mask"]
BTAD_LAYOUT = "<category>/train/ok/, <category>/test/ok/, <category>/test/ko/, ground_truth/ko/"
KSDD2_MASK = "_GT"
BTAD_TOP = "BTech_Dataset_transformed"
KSDD2_LAYOUT = "train/10000.png with its mask train/10000_GT.png, and the same in test/"


def mvtec_categories(root: Path) -> list[str]:
    """Return the folders of ``root`` that have a folder ``test``, or ``train/good``, sorted.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    names = [
        p.name
        for p in subfolders(root)
        if (p / "test").is_dir() or any(map(is_normal, subfolders(p / "train")))
    ]
    if not names:
        raise missing_layout(root, f"MVTec-AD's layout, {MVTEC_LAYOUT}", "MVTecAD")
    return names


def list_mvtec(root: Path, category: str, split: Split, has_masks: bool = True) -> Iterator[Sample]:
    """Yield ``root/category/split/<defect>/NAME.*``, sorted by path.

    The folder ``good`` is normal, as are ``ok`` and ``normal``, in any case; defective training
    images are left out.

    Masks are paired by name: ``ground_truth/<defect>/NAME_mask.*`` for ``test/<defect>/NAME.*``;
    see :data:`~anomaly_clip.data.layout.USUAL_ENDINGS` for the other endings.

    Args:
        root: The data set's folder.
        category: The category.
        split: The split.
        has_masks: Whether defective images have masks.

    Raises:
        ValueError: If there are masks among the images.
    """
    folder = root / category
    kinds = subfolders(folder / split)
    refuse_stray_masks([k for k in kinds if split == "test" or is_normal(k)])
    for defect in kinds:
        images = images_in(defect)
        normal = is_normal(defect)
        if split == "train" and not normal:
            continue  # methods are trained on normal images only
        place = folder / "ground_truth" / defect.name
        masks = {} if normal or not has_masks else paired_masks(images, place)
        for image in images:
            kind = "good" if normal else defect.name
            yield Sample(image, category, not normal, masks.get(image), kind)


def defective_training_images(root: Path, category: str) -> list[Path]:
    """Return the images of ``root/category/train/`` that are not in its normal folder."""
    kinds = subfolders(root / category / "train")
    return [image for kind in kinds if not is_normal(kind) for image in images_in(kind)]


def mvtec_mask_folders(root: Path, category: str) -> list[Path]:
    """Return the folders that contain only masks."""
    return subfolders(root / category / "ground_truth")


class MVTecAD(KindFolders):
    """MVTec-AD (Bergmann et al., CVPR 2019): 15 categories, and any data set in its layout.

    Masks are optional: without any, there are image metrics only. For a fit alone, ``train/good``
    is enough.
    """

    dataset_name: ClassVar[str] = "MVTecAD"
    omits_copies = True

    @property
    def splits(self) -> tuple[Split, ...]:  # type: ignore[override]
        """Train and test; train alone if no category in use has a folder ``test``."""
        names = self.listing.chosen or [folder.name for folder in subfolders(self.root)]
        has_train, has_test = (
            any((self.root / name / split).is_dir() for name in names)
            for split in ("train", "test")
        )
        return ("train",) if has_train and not has_test else ("train", "test")

    def find_categories(self) -> list[str]:
        """See :func:`mvtec_categories`."""
        self.refuse_unsupported()
        return mvtec_categories(self.root)

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_mvtec`."""
        return list_mvtec(self.root, category, split, self.has_masks)

    def kind_folders(self, category: str, split: Split) -> list[Path]:
        """Return the folders of a split."""
        return subfolders(self.root / category / split)

    def mask_folders(self, category: str) -> list[Path]:
        """See :func:`mvtec_mask_folders`."""
        return mvtec_mask_folders(self.root, category)

    @property
    def mask_endings(self) -> Sequence[str]:
        """The usual endings of masks."""
        return USUAL_ENDINGS

    def normal_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks in ``ground_truth`` of normal images, which must be empty."""
        images: dict[Path, list[Path]] = defaultdict(list)
        normal = [s for s in samples if not s.label and s.category in categories]
        for name in categories:  # masks of training images may be there, too
            if any(map(is_normal, mvtec_mask_folders(self.root, name))):
                normal += list_mvtec(self.root, name, "train")
        for sample in normal:
            masks = self.root / sample.category / "ground_truth" / sample.image.parent.name
            images[masks].append(sample.image)
        paired = [m for folder in images for m in paired_masks(images[folder], folder).values()]
        return [mask for mask in dict.fromkeys(paired) if mask.is_file()]

    def left_out(self, stage: str) -> dict[str, list[Path]]:
        """Return the defective training images, and those in subfolders of the kinds."""
        names = self.train_categories if stage == "fit" and self.auxiliary is None else []
        images = [i for name in names for i in defective_training_images(self.root, name)]
        return {"defective training image": images, **super().left_out(stage)}


class MagneticTile(MVTecAD):
    """Magnetic tile surface defects (Huang et al.) in MVTec-AD's layout: grey, of many sizes."""

    dataset_name: ClassVar[str] = "MagneticTile"


def list_visa(root: Path, category: str, split: Split, has_masks: bool = True) -> Iterator[Sample]:
    """Yield a category's rows of the official split file, ``split_csv/1cls.csv``, in its order.

    The published training of SDP+ takes the test images in this order: in each category first the
    normal ones, then the anomalous ones.

    Args:
        root: The data set's folder.
        category: The category.
        split: The split.
        has_masks: Whether defective images have masks.

    Raises:
        ValueError: If a line of the file is malformed, or names a file outside of ``root``.
    """
    file = root / VISA_SPLIT
    rows = []
    for number, row in read_table(file, VISA_COLUMNS):
        if len(row) < 4 or row[1] not in ("train", "test") or row[2] not in LABELS:
            raise ValueError(
                f"{file}, line {number}: expected {', '.join(VISA_COLUMNS)}, got {', '.join(row)}; "
                f"split must be train or test, and label {' or '.join(LABELS)}: correct the line, "
                f"or restore the published file"
            )
        if row[0] == category and row[1] == split:
            rows.append((row[3], row[2] == "anomaly", row[4] if len(row) > 4 else ""))
    for image, anomalous, mask in rows:
        if any(Path(path).is_absolute() or ".." in Path(path).parts for path in (image, mask)):
            raise ValueError(
                f"{file}: {image} or its mask is not below {root}: use paths relative to that "
                f"folder"
            )
        if not anomalous:
            yield Sample(root / image, category, label=False)
            continue
        mask_path = Path(mask or f"{category}/Data/Masks/Anomaly/{Path(image).stem}.png")
        place = root / mask_path if has_masks else None
        yield Sample(root / image, category, label=True, mask=place, defect="anomaly")


LABELS = ("normal", "anomaly")


def list_visa_unsplit(root: Path, category: str, has_masks: bool = True) -> Iterator[Sample]:
    """Yield all images of a category, sorted, normal ones first; needs no split file.

    Args:
        root: The data set's folder.
        category: The category.
        has_masks: Whether defective images have masks.
    """
    folder = root / category / "Data" / "Images"
    for image in images_in(folder / "Normal"):
        yield Sample(image, category, label=False)
    anomalous = images_in(folder / "Anomaly")
    place = root / category / "Data" / "Masks" / "Anomaly"
    masks = paired_masks(anomalous, place, ("",)) if has_masks else {}
    for image in anomalous:
        yield Sample(image, category, label=True, mask=masks.get(image), defect="anomaly")


class VisA(KindFolders):
    """VisA (Zou et al., ECCV 2022): 12 categories, with the official one-class split.

    Three forms are accepted: the published one with ``split_csv/1cls.csv``; the same without this
    file (all images are then test images, which is not the published protocol); and the one that
    the authors' script converts to MVTec-AD's layout. Masks are optional in all of them.
    """

    dataset_name: ClassVar[str] = "VisA"

    def in_draw_order(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return samples sorted by path, so that random choices do not depend on the split file."""
        if not self.is_split:
            return list(samples)
        names = list(dict.fromkeys(sample.category for sample in samples))
        places = {name: place for place, name in enumerate(names)}
        return sorted(samples, key=lambda s: (places[s.category], str(s.image)))

    @property
    def is_split(self) -> bool:
        """True if the official split file exists."""
        return (self.root / VISA_SPLIT).is_file()

    @property
    def omits_copies(self) -> bool:  # type: ignore[override]
        """True without the official split file, which lists the images."""
        return not self.is_split

    @cached_property
    def has_masks(self) -> bool:
        """True if a category in use has a folder with masks, or the split file names some."""
        if super().has_masks:
            return True
        rows = (list_visa(self.root, c, "test") for c in self.categories if self.is_split)
        return any(s.mask is not None and s.mask.is_file() for s in chain.from_iterable(rows))

    @property
    def is_published(self) -> bool:
        """True with the official split file, or two of the published categories."""
        return self.is_split or super().is_published

    @property
    def splits(self) -> tuple[Split, ...]:  # type: ignore[override]
        """The splits that exist; without the official file, all images are test images."""
        return ("train", "test") if self.is_split or self._converted() else ("test",)

    def find_categories(self) -> list[str]:
        """Return the names of the folders in VisA's layout, or else in MVTec-AD's, sorted."""
        names = [p.name for p in subfolders(self.root) if (p / "Data" / "Images").is_dir()]
        names = names or self._converted()
        self.refuse_unsupported()
        if not names:
            raise missing_layout(self.root, VISA_LAYOUT, "VisA")
        return names

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_visa`, :func:`list_visa_unsplit` and :func:`list_mvtec`."""
        if (self.root / category / "test").is_dir():
            return list_mvtec(self.root, category, split, self.has_masks)
        if self.is_split:
            return list_visa(self.root, category, split, self.has_masks)
        return list_visa_unsplit(self.root, category, self.has_masks)

    def kind_folders(self, category: str, split: Split) -> list[Path]:
        """Return the folders of a split; none with the split file, which lists every image."""
        if (self.root / category / "test").is_dir():
            return subfolders(self.root / category / split)
        return [] if self.is_split else subfolders(self.root / category / "Data" / "Images")

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that contain only masks."""
        masks = subfolders(self.root / category / "Data" / "Masks")
        return masks or mvtec_mask_folders(self.root, category)

    def protocol(self) -> dict[str, object]:
        """Return the data settings and whether the official split is used."""
        return {**super().protocol(), "official_split": "train" in self.splits}

    def _converted(self) -> list[str]:
        """Return the categories that are in MVTec-AD's layout."""
        return [p.name for p in subfolders(self.root) if (p / "test" / "good").is_dir()]


def list_btad(root: Path, category: str, split: Split, has_masks: bool = True) -> Iterator[Sample]:
    """Yield ``root/category/split/{ok,ko}/NAME.*``, sorted; masks: ``ground_truth/ko/NAME.*``.

    Args:
        root: The data set's folder.
        category: The category.
        split: The split.
        has_masks: Whether defective images have masks.
    """
    folder = root / category
    ok, ko = images_in(folder / split / "ok"), images_in(folder / split / "ko")
    masks = paired_masks(ko, folder / "ground_truth" / "ko") if has_masks else {}
    for image in ko:
        yield Sample(image, category, label=True, mask=masks.get(image), defect="ko")
    for image in ok:
        yield Sample(image, category, label=False)


class BTAD(KindFolders):
    """BTAD (Mishra et al., ISIE 2021): three products."""

    dataset_name: ClassVar[str] = "BTAD"
    omits_copies = True

    def __init__(self, root: str, **shared: Any) -> None:
        top = Path(root, BTAD_TOP)
        super().__init__(root=str(top) if top.is_dir() else root, **shared)

    def find_categories(self) -> list[str]:
        """Return the folders that have ``test/ok`` or ``test/ko``, sorted."""
        names = [
            p.name
            for p in subfolders(self.root)
            if (p / "test" / "ok").is_dir() or (p / "test" / "ko").is_dir()
        ]
        self.refuse_unsupported()
        if not names:
            raise missing_layout(self.root, BTAD_LAYOUT, "BTAD")
        return names

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_btad`."""
        return list_btad(self.root, category, split, self.has_masks)

    def kind_folders(self, category: str, split: Split) -> list[Path]:
        """Return the folders of a split."""
        return [self.root / category / split / kind for kind in ("ok", "ko")]

    def mask_folders(self, category: str) -> list[Path]:
        """See :func:`mvtec_mask_folders`."""
        return mvtec_mask_folders(self.root, category)


def list_ksdd2(root: Path, category: str, split: Split, level: int = 0) -> Iterator[Sample]:
    """Yield ``root/split/NAME.png``, sorted; the mask is ``NAME_GT.png``, all zero if normal.

    Defective training images are left out: methods train on normal images only.

    Args:
        root: The data set's folder.
        category: The category.
        split: The split.
        level: Grey level above which a mask's pixel is a defect, 0 to 254.
    """
    images = [image for image in images_in(root / split) if not is_ksdd2_mask(image)]
    for image, mask in paired_masks(images, root / split, (KSDD2_MASK,)).items():
        try:
            anomalous = bool(read_mask(mask, level).any())
        except (FileNotFoundError, ValueError):  # the error is reported when the sample is used
            yield Sample(image, category, label=True, mask=mask, defect="defect")
            continue
        if not anomalous or split == "test":
            defect = "defect" if anomalous else "good"
            yield Sample(image, category, anomalous, mask, defect)


def is_ksdd2_mask(image: Path) -> bool:
    """Return whether a file is a mask by its name; its copies are, too."""
    return plain_name(image.stem).endswith(KSDD2_MASK)


class KSDD2(AnomalyData):
    """KolektorSDD2 (Bozic et al., 2021): one category, ``surface``, of about 230 x 630 pixels.

    The 246 defective training images are not used. Masks whose size differs from that of their
    image by a few pixels are resized by nearest neighbour. The published archive contains copies of
    an image and its mask, ``10301 (copy).png`` and ``10301_GT (copy).png``, which are not used.
    """

    dataset_name: ClassVar[str] = "KSDD2"
    omits_copies = True

    def find_categories(self) -> list[str]:
        """Return the only category."""
        self.refuse_unsupported()
        folders = [self.root / split for split in self.splits]
        if not any(map(is_ksdd2_mask, chain.from_iterable(map(images_in, folders)))):
            raise missing_layout(self.root, KSDD2_LAYOUT, "KSDD2")
        return ["surface"]

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_ksdd2`."""
        return list_ksdd2(self.root, category, split, self.mask_level or 0)

    def left_out(self, stage: str) -> dict[str, list[Path]]:
        """Return the defective training images."""
        if stage != "fit" or self.auxiliary is not None:
            return {}
        rows = [*self.listing.rows("surface", "train"), *self.listing.copies("train")]
        listed = {sample.image for sample in rows}
        images = [i for i in images_in(self.root / "train") if not is_ksdd2_mask(i)]
        return {
            "defective training image": [
                image for image in images if image not in listed and original_of(image) is None
            ]
        }

    def spare_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks that have no image next to them."""
        spare = []
        for split in self.splits:
            files = images_in(self.root / split)
            masks = [file for file in files if is_ksdd2_mask(file)]
            images = [f for f in files if not is_ksdd2_mask(f) and original_of(f) is None]
            paired = set(paired_masks(images, self.root / split, (KSDD2_MASK,)).values())
            spare += [m for m in masks if m not in paired and original_of(m) is None]
        return sorted(spare)

    def normal_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return nothing: an image is normal because its mask is empty."""
        return []


def list_class_folders(root: Path, category: str) -> Iterator[Sample]:
    """Yield the images of the folder whose lower-case name is the category, sorted."""
    for folder in subfolders(root):
        if folder.name.lower() == category:
            for image in images_in(folder):
                yield Sample(image, category, label=False)


class IndustrialFolders(AnomalyData):
    """Class folders of normal images, such as the Industrial set that TAB is pre-trained on."""

    dataset_name: ClassVar[str] = "IndustrialFolders"
    splits: ClassVar[tuple[Split, ...]] = ("train",)

    @property
    def has_masks(self) -> bool:
        """False: there are no pixel labels."""
        return False

    def find_categories(self) -> list[str]:
        """Return the names of the folders, in lower case, sorted.

        Raises:
            FileNotFoundError: If no folder contains images.
            ValueError: If two names differ in case only.
        """
        self.refuse_unsupported()
        folders = subfolders(self.root)
        if not any(images_in(folder) for folder in folders):
            raise missing_layout(self.root, "one folder per class, with its images")
        names = sorted(p.name.lower() for p in folders)
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(
                f"{self.root}: two folders are called {repeated[0]!r}, ignoring case: rename one"
            )
        return names

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_class_folders`."""
        return list_class_folders(self.root, category)
