"""``ImageFolder``: a user's own images of one object, with or without labels and masks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.file_hashes import FileHashes, pixel_hashes
from anomaly_clip.data.folder_forms import NORMAL_FOLDERS, FolderForm, understand
from anomaly_clip.data.layout import USUAL_ENDINGS, missing_layout
from anomaly_clip.errors import check_between, check_choice

__all__ = ["ImageFolder", "held_out"]

LAYOUT = (
    "images; or good/ and one folder per kind of defect; or train/good/ and test/ (masks in "
    "ground_truth/<defect>/)"
)


def held_out(samples: Sequence[Sample], share: float, seed: int, group: str | None) -> set[Path]:
    """Return the images that are held out of training, chosen by (seed, content).

    Whether an image is held out does not depend on the other images, so adding some moves none.

    Args:
        samples: The images.
        share: Probability that an image is held out.
        seed: Another seed holds out other images.
        group: Regular expression on file names. Images with the same match stay together, as the
            first group of the expression if it has one; None for each image by itself.
    """
    hashes = FileHashes()
    images = [sample.image for sample in samples]
    contents = hashes.sha256_of_all(images) if group is None else {}
    out = set()
    for image in images:
        key = contents[image] if group is None else _group_of(image, group)
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        if int.from_bytes(digest[:8], "big") < share * 2**64:
            out.add(image)
    return out


def _group_of(image: Path, group: str) -> str:
    match = re.search(group, image.name)
    if match is None:
        return image.name
    return (match[1] if match.re.groups else match[0]) or image.name


class ImageFolder(AnomalyData):
    """A user's own images of one object; see :mod:`~anomaly_clip.data.folder_forms` for the forms.

    Without a folder ``train``, a fit is trained on normal images. If there are defective images to
    test on, some of the normal images are held out for the test. Zero-shot methods are tested on
    all images.

    Args:
        root: The folder.
        category: Name of the object in prompts, such as "laser-cut plank"; default: the name of the
            folder.
        categories: None, or the category alone, as for all data modules.
        normal: folders: the normal images are those in a normal folder. all: all images are normal,
            for a fit on a folder without subfolders.
        normal_folders: Names of folders with normal images; default: good, ok and normal.
        mask_ending: Ending that the name of a mask has after the name of its image; default: _mask,
            _gt, _label or none.
        test_share: Fraction of the normal images held out for the test, if there are defective
            images and no folder ``train``.
        group: Regular expression on file names; images with the same match (of its first group, if
            it has one) are held out together, such as several views of one part.
        shared: Arguments of all data modules.
    """

    dataset_name: ClassVar[str] = "ImageFolder"

    def __init__(
        self,
        root: str,
        category: str | None = None,
        categories: list[str] | None = None,
        normal: Literal["folders", "all"] = "folders",
        normal_folders: list[str] | None = None,
        mask_ending: str | None = None,
        test_share: float = 0.2,
        group: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(root=root, categories=categories, **shared)
        if category is not None and not category.strip():
            raise ValueError(
                f"data.category {category!r} is empty: name the object in the images, such as "
                f'"laser-cut plank"'
            )
        check_choice("data.normal", normal, ("folders", "all"))
        check_between("data.test_share", test_share, 0, 1, open_high=True)
        try:
            re.compile(group or "")
        except re.error as error:
            raise ValueError(
                f"data.group {group!r} is not a regular expression ({error}): correct it"
            ) from None
        self._has_default_name = category is None
        self.category = self._default_name() if category is None else category
        self.normal = normal
        self.normal_folders = normal_folders or list(NORMAL_FOLDERS)
        self.mask_ending = mask_ending
        self.test_share = test_share
        self.group = group
        self._trains = self._predicts = False

    def _default_name(self) -> str:
        return self.root.resolve().name.replace("_", " ").strip() or "object"

    @cached_property
    def form(self) -> FolderForm:
        """The content of the folder, read once.

        Raises:
            FileNotFoundError: If there is no image.
            ValueError: If a folder has the name of a mask folder, but contains something else.
        """
        if not self.root.is_dir():
            raise missing_layout(self.root, LAYOUT)
        form = understand(self.root, self.category, self.normal_folders, self.mask_ending)
        if not (form.train or form.labelled or form.unlabelled):
            raise missing_layout(self.root, LAYOUT)
        return form

    @cached_property
    def held_out(self) -> set[Path]:
        """The normal images that a fit leaves to the test."""
        if self.form.train or not any(sample.label for sample in self.form.labelled):
            return set()
        normal = [sample for sample in self.form.labelled if not sample.label]
        normal = self.unreadable.readable(normal)
        return held_out(normal, self.test_share, self.seed, self.group)

    @property
    def is_split(self) -> bool:
        """True if normal images are trained on, so that the test must not contain them."""
        return self._trains or self.has_shots

    @property
    def splits(self) -> tuple[Split, ...]:  # type: ignore[override]
        """The splits with images; without a fit, all labelled images are test images."""
        if not (self.is_split or self.form.train):
            return ("test",)
        both: tuple[Split, ...] = ("train", "test")
        return tuple(name for name in both if any(True for _ in self._listed(name)))

    @property
    def has_masks(self) -> bool:
        """True if defective images have masks."""
        return self.form.has_masks

    @property
    def has_labels(self) -> bool:
        """True if a folder contains the normal images."""
        return self.form.has_labels

    def find_categories(self) -> list[str]:
        """Return the only category.

        Raises:
            FileNotFoundError: If the folder is missing.
        """
        if not self.root.is_dir():
            raise missing_layout(self.root, LAYOUT)
        return [self.category]

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that contain only masks."""
        return self.form.mask_folders

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split, sorted by path."""
        return self._listed(split)

    def _listed(self, split: Split) -> Iterator[Sample]:
        form = self.form
        if split == "train":
            yield from form.train or self._normal_to_train_on()
        elif self._predicts:  # every image, whatever was trained on
            every = [*form.train, *form.labelled, *form.unlabelled]
            yield from sorted(every, key=lambda sample: sample.image)
        elif form.train:
            yield from form.labelled
        else:
            for sample in form.labelled or form.unlabelled:
                if sample.label or not self.is_split or sample.image in self.held_out:
                    yield sample

    def _normal_to_train_on(self) -> Iterator[Sample]:
        if self.normal == "all" and not self.form.has_labels:
            yield from self.form.unlabelled
        normal = (sample for sample in self.form.labelled if not sample.label)
        yield from (sample for sample in normal if sample.image not in self.held_out)

    def setup(self, stage: str) -> None:
        """Decide whether the normal images are split, then continue as all data modules do.

        A test leaves out the training images of this folder if the method was fitted on some of
        them, which the hashes in its checkpoint tell.

        Raises:
            FileNotFoundError: If there is no image.
            ValueError: As :meth:`AnomalyData.setup`, or if a method needs the name of the object,
                or normal images to fit on, and there are none.
        """
        needs = self._needs
        if needs.category_names and self._has_default_name:
            raise ValueError(
                f"data.category is not set, but prompts contain the name of the object: name what "
                f'is shown in {self.root}, such as --data.category "laser-cut plank"'
            )
        self._predicts = stage == "predict"
        self.leakage.compared = not self._predicts
        self._trains = stage == "fit" and self.auxiliary is None
        if self._trains and not (self.form.has_labels or self.normal == "all"):
            raise ValueError(
                f"data.root {self.root}: nothing tells which images are normal: put them into "
                f"good/, or set --data.normal all if all of them are"
            )
        if stage in ("validate", "test") and needs.fitted_images and self.held_out:
            normal = self.unreadable.readable(list(self._normal_to_train_on()))
            with self.unreadable.advising():
                images = (sample.image for sample in normal)
                hashes = pixel_hashes(images, self.reading.max_pixels)
            self._trains = not needs.fitted_images.isdisjoint(hashes.values())
        self.listing.forget()
        super().setup(stage)

    def begin_fit(self) -> None:
        """Split the normal images as a fit does."""
        self._trains = self.auxiliary is None
        self.listing.forget()

    @property
    def mask_endings(self) -> Sequence[str]:
        """Endings that the name of a mask may have after that of its image."""
        return USUAL_ENDINGS if self.mask_ending is None else (self.mask_ending,)

    @property
    def mask_hint(self) -> str:
        """Advice for masks that are not found."""
        return "add the mask, or set data.mask_ending if its name ends differently"

    def normal_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks of normal images, which must be empty."""
        stems = {sample.image.stem for sample in self.form.labelled if not sample.label}
        names = {f"{stem}{ending}".lower() for stem in stems for ending in self.mask_endings}
        kinds = {name.lower() for name in self.normal_folders}
        inner = {folder for folder in self.form.mask_folders if folder.name.lower() not in kinds}
        inner = {folder for folder in inner if folder.parent in self.form.mask_folders}
        masks = super().spare_masks(categories, samples)
        return [m for m in masks if m.stem.lower() in names and m.parent not in inner]

    def spare_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks that belong to no sample; those of normal images belong to them."""
        of_normal = set(self.normal_masks(categories, samples))
        return [m for m in super().spare_masks(categories, samples) if m not in of_normal]

    def summary(self, stage: str) -> str:
        """Return the numbers of images, and how the folder was understood."""
        parts = [super().summary(stage), *self.form.remarks]
        if self.normal == "all" and not self.form.has_labels and stage == "fit":
            parts.append("all are normal (data.normal all)")
        if self.is_split and not self.form.train:
            if self.held_out:
                share = f"{len(self.held_out)} normal images are held out for the test"
                rule = "content" if self.group is None else "the match of data.group in their names"
                parts.append(f"{share} (about {self.test_share:g} of them, chosen by {rule})")
            elif stage == "fit" and any(sample.label for sample in self.form.labelled):
                parts.append("no normal image is held out for the test")
        return "; ".join(parts)

    def protocol(self) -> dict[str, object]:
        """Return the data settings, with those of the folder that are not the defaults."""
        if not (self.is_split and self.held_out):
            return dict(super().protocol())
        return {**super().protocol(), "test_share": self.test_share, "group": self.group}
