"""Medical data sets in their published layouts; all are test sets of zero-shot methods.

None of them has a published split, so all images are test images (see ``docs/data.md``). The
categories are the object names that CLIP-AD's code puts into its prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.layout import (
    images_in,
    missing_layout,
    paired_masks,
    read_table,
    top_folder,
)

__all__ = [
    "ISIC",
    "BrainMRI",
    "CVCClinicDB",
    "HeadCT",
    "list_brain_mri",
    "list_clinic_db",
    "list_head_ct",
    "list_isic",
]

ISIC_IMAGES, ISIC_MASKS = "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"
CLINIC_IMAGES, CLINIC_MASKS = "Original", "Ground Truth"
BRAIN_FOLDER = "brain_tumor_dataset"


class MedicalData(AnomalyData):
    """A data set of one category without a training split."""

    category: ClassVar[str]
    splits: ClassVar[tuple[Split, ...]] = ("test",)
    top: ClassVar[tuple[str, ...]]
    """A file or folder by which the data set's folder is recognised, followed by the possible names
    of a folder that an archive adds around the data set."""

    def __init__(self, root: str, **shared: Any) -> None:
        top = top_folder(Path(root).expanduser(), *self.top)
        super().__init__(root=str(top), **shared)

    def expected(self) -> str:
        """Describe the expected content of the folder."""
        return self.top[0]

    def find_categories(self) -> list[str]:
        """Return the only category."""
        if not (self.root / self.top[0]).exists():
            raise missing_layout(self.root, self.expected(), self.dataset_name)
        return [self.category]


def list_isic(root: Path, category: str) -> Iterator[Sample]:
    """Yield the images, sorted, all with a lesion; masks are ``NAME_Segmentation.png``."""
    images = images_in(root / ISIC_IMAGES)
    for image, mask in paired_masks(images, root / ISIC_MASKS, ("_Segmentation",)).items():
        yield Sample(image, category, label=True, mask=mask, defect="lesion")


class ISIC(MedicalData):
    """ISIC: the 379 test images of the ISBI 2016 challenge, part 1, all with a skin lesion."""

    dataset_name: ClassVar[str] = "ISIC"
    omits_copies = True
    category: ClassVar[str] = "skin"
    top: ClassVar[tuple[str, ...]] = (ISIC_IMAGES, "ISIC", "isic")

    def expected(self) -> str:
        """Describe the expected content of the folder."""
        return f"{ISIC_IMAGES}/ and {ISIC_MASKS}/"

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folder that contains only masks."""
        return [self.root / ISIC_MASKS]

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_isic`."""
        return list_isic(self.root, category)


def list_clinic_db(root: Path, category: str) -> Iterator[Sample]:
    """Yield ``Original/NAME.tif``, sorted by name, all with a polyp."""
    images = images_in(root / CLINIC_IMAGES)
    for image, mask in paired_masks(images, root / CLINIC_MASKS, ("",)).items():
        yield Sample(image, category, label=True, mask=mask, defect="polyp")


class CVCClinicDB(MedicalData):
    """CVC-ClinicDB (Bernal et al., 2015): 612 colonoscopy frames, all with a polyp."""

    dataset_name: ClassVar[str] = "CVCClinicDB"
    omits_copies = True
    category: ClassVar[str] = "colon"
    top: ClassVar[tuple[str, ...]] = (CLINIC_IMAGES, "CVC-ClinicDB", "TIF")

    def expected(self) -> str:
        """Describe the expected content of the folder."""
        return f"{CLINIC_IMAGES}/ and {CLINIC_MASKS}/ with equal names"

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folder that contains only masks."""
        return [self.root / CLINIC_MASKS]

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_clinic_db`."""
        return list_clinic_db(self.root, category)


def list_head_ct(root: Path, category: str) -> Iterator[Sample]:
    """Yield ``head_ct/NNN.png``, sorted by number, with the labels of ``labels.csv``.

    The file's columns are the number and the label (1 = haemorrhage). They are read by position,
    because the name of the second column begins with a blank in some copies.

    Raises:
        ValueError: If a line is malformed, or a number occurs twice.
    """
    file = root / "labels.csv"
    folder = root / "head_ct"
    if (folder / "head_ct").is_dir():
        folder /= "head_ct"
    labels: dict[int, bool] = {}
    for number, row in read_table(file, ["id"]):
        if len(row) < 2 or not row[0].strip().isdecimal() or row[1].strip() not in ("0", "1"):
            raise ValueError(
                f"{file}, line {number}: expected a number and 0 or 1, got {', '.join(row)}; "
                f"correct the line"
            )
        if int(row[0]) in labels:
            raise ValueError(
                f"{file}, line {number}: image {int(row[0])} occurs twice: remove one of the lines"
            )
        labels[int(row[0])] = row[1].strip() == "1"
    for number, anomalous in sorted(labels.items()):
        defect = "haemorrhage" if anomalous else "good"
        yield Sample(folder / f"{number:03d}.png", category, anomalous, defect=defect)


class HeadCT(MedicalData):
    """Head CT - hemorrhage (Kitamura, 2018): 200 slices with image labels."""

    dataset_name: ClassVar[str] = "HeadCT"
    category: ClassVar[str] = "head ct"
    top: ClassVar[tuple[str, ...]] = ("labels.csv", "head_ct", "HeadCT")

    @property
    def has_masks(self) -> bool:
        """False: there are no pixel labels."""
        return False

    def expected(self) -> str:
        """Describe the expected content of the folder."""
        return "labels.csv and head_ct/000.png to head_ct/199.png"

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_head_ct`."""
        return list_head_ct(self.root, category)


def list_brain_mri(root: Path, category: str) -> Iterator[Sample]:
    """Yield ``no/*`` and ``yes/*`` (a tumour), sorted."""
    folder = root / BRAIN_FOLDER
    for image in images_in(folder / "no"):
        yield Sample(image, category, label=False)
    for image in images_in(folder / "yes"):
        yield Sample(image, category, label=True, defect="tumour")


class BrainMRI(MedicalData):
    """Brain MRI images for brain tumour detection (Chakrabarty, 2019): 253 with image labels.

    The published archive repeats ``yes/`` and ``no/`` at its top level; these copies are not read.
    """

    dataset_name: ClassVar[str] = "BrainMRI"
    category: ClassVar[str] = "brain ct"
    top: ClassVar[tuple[str, ...]] = (BRAIN_FOLDER, "archive", "BrainMRI")

    @property
    def has_masks(self) -> bool:
        """False: there are no pixel labels."""
        return False

    def expected(self) -> str:
        """Describe the expected content of the folder."""
        return f"{BRAIN_FOLDER}/yes/ and {BRAIN_FOLDER}/no/"

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_brain_mri`."""
        return list_brain_mri(self.root, category)
