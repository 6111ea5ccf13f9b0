"""MVTec AD 2, whose public test set is in ``test_public``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from anomaly_clip.data.dataset import Sample, Split
from anomaly_clip.data.kind_folders import KindFolders
from anomaly_clip.data.layout import images_in, missing_layout, paired_masks, subfolders
from anomaly_clip.data.stray_masks import refuse_stray_masks

__all__ = ["MVTecAD2", "list_mvtec_ad_2"]

FOLDERS: dict[Split, str] = {"train": "train", "test": "test_public"}
MASKS = "ground_truth"
LAYOUT = (
    "<category>/train/good/, <category>/test_public/{good,bad}/, "
    "<category>/test_public/ground_truth/bad/"
)


def list_mvtec_ad_2(
    root: Path, category: str, split: Split, has_masks: bool = True
) -> Iterator[Sample]:
    """Yield ``root/category/{train,test_public}/{good,bad}/NAME.*``, sorted; ``good`` is normal.

    The mask of ``bad/NAME.*`` is ``ground_truth/bad/NAME_mask.*``, in ``test_public`` or next to
    it.

    Args:
        root: The data set's folder.
        category: The category.
        split: The split.
        has_masks: Whether defective images have masks.

    Raises:
        ValueError: If there are masks among the images.
    """
    places, kinds = mask_folder(root, category), kinds_of(root, category, split)
    refuse_stray_masks(kinds)
    for kind in kinds:
        images = images_in(kind)
        normal = kind.name == "good"
        masks = {} if normal or not has_masks else paired_masks(images, places / kind.name)
        for image in images:
            yield Sample(image, category, not normal, masks.get(image), kind.name)


def kinds_of(root: Path, category: str, split: Split) -> list[Path]:
    """Return the folders of a split's images."""
    return [f for f in subfolders(root / category / FOLDERS[split]) if f.name != MASKS]


def mask_folder(root: Path, category: str) -> Path:
    """Return the folder of a category's masks; that in ``test_public`` if none exists."""
    inside = root / category / FOLDERS["test"] / MASKS
    beside = root / category / MASKS
    return beside if beside.is_dir() and not inside.is_dir() else inside


class MVTecAD2(KindFolders):
    """MVTec AD 2 (Heckler-Kram et al., 2025): eight categories, tested on ``test_public``.

    ``validation/good`` is neither trained on nor tested. The two private test sets have no labels:
    score them with ``predict`` and ``--data ImageFolder``.
    """

    dataset_name: ClassVar[str] = "MVTecAD2"
    omits_copies = True

    def find_categories(self) -> list[str]:
        """Return the folders with a folder ``test_public``, sorted.

        Raises:
            FileNotFoundError: If there is none.
        """
        names = [p.name for p in subfolders(self.root) if (p / FOLDERS["test"]).is_dir()]
        self.refuse_unsupported()
        if not names:
            raise missing_layout(self.root, f"MVTec AD 2's layout, {LAYOUT}", "MVTecAD2")
        return names

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_mvtec_ad_2`."""
        return list_mvtec_ad_2(self.root, category, split, self.has_masks)

    def kind_folders(self, category: str, split: Split) -> list[Path]:
        """Return the folders of a split's images."""
        return kinds_of(self.root, category, split)

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that contain only masks."""
        return subfolders(mask_folder(self.root, category))
