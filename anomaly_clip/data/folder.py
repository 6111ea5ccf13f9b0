"""``ImageFolder``: a user's own images of one object, with or without labels and masks."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.file_hashes import FileHashes, pixel_hashes
from anomaly_clip.data.folder_forms import (
    NORMAL_FOLDERS,
    FolderForm,
    read_selection,
    understand,
)
from anomaly_clip.data.known_layouts import layout_hint, published_layout, unsupported
from anomaly_clip.data.layout import USUAL_ENDINGS, missing_layout
from anomaly_clip.data.path_selection import PathSelection
from anomaly_clip.errors import check_between, check_choice
from anomaly_clip.files import name_bytes
from anomaly_clip.folders import image_files
from anomaly_clip.progress import number_of

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

    Raises:
        ValueError: If the expression matches no name.
    """
    hashes = FileHashes()
    images = [sample.image for sample in samples]
    contents = hashes.sha256_of_all(images) if group is None else {}
    if group is not None and images and not grouped(images, group):
        raise ValueError(
            f"data.group {group!r} matches none of the {len(images)} file names, such as "
            f"{images[0].name}: correct it, or leave it out"
        )
    out = set()
    for image in images:
        key = contents[image] if group is None else _group_of(image, group)
        digest = hashlib.sha256(name_bytes(f"{seed} {key}")).digest()
        if int.from_bytes(digest[:8], "big") < share * 2**64:
            out.add(image)
    return out


def _names_of(root: str | Sequence[str]) -> list[str]:
    """Return the paths and patterns; a folder called ``[x]`` reaches this as the list of x."""
    if isinstance(root, str | os.PathLike):
        return [os.fspath(root)]
    names = [os.fspath(name) for name in root]
    typed = [text for name in names[:1] for text in (f"[{name}]", f"- {name}")]
    existing = [text for text in typed if len(names) == 1 and os.path.lexists(text)]
    return existing[:1] or names


def grouped(images: Sequence[Path], group: str) -> list[Path]:
    """Return the images whose file names match the regular expression of their group."""
    return [image for image in images if re.search(group, image.name)]


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
        root: The folder; or one image, or a pattern such as "photos/**/*.JPG" (in quotes), whose
            images have no labels; in YAML and Python, also a list of these.
        category: Name of the object in prompts, such as "laser-cut plank"; default: the name of the
            folder.
        categories: None, or the category alone, as for all data modules.
        normal: folders: the normal images are those in a normal folder. all: all images are normal,
            for a fit on images without labels.
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
        root: str | list[str],
        category: str | None = None,
        categories: list[str] | None = None,
        normal: Literal["folders", "all"] = "folders",
        normal_folders: list[str] | None = None,
        mask_ending: str | None = None,
        test_share: float = 0.2,
        group: str | None = None,
        **shared: Any,
    ) -> None:
        try:
            self.selection = PathSelection(_names_of(root))
        except RuntimeError as error:  # ~name of an unknown user
            raise ValueError(f"data.root {root}: give the full path ({error})") from None
        if not all(str(name).strip() for name in self.selection.names or [""]):
            raise ValueError(f"data.root {root} is empty: name a folder, images or a pattern")
        super().__init__(root=str(self.selection.folder), categories=categories, **shared)
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
        self.named = category
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
            ValueError: If a folder has the name of a mask folder, but contains something else; or
                if a pattern matches no image.
        """
        if not self.selection.is_folder:
            return self._selected()
        if not self.root.is_dir():
            raise missing_layout(self.root, LAYOUT)
        if not self._predicts:  # scores need neither labels nor masks
            self.refuse_unsupported()
        try:
            form = understand(self.root, self.category, self.normal_folders, self.mask_ending)
        except ValueError:
            self.refuse_unsupported()  # a clearer message, if it is one of these
            raise
        if not (form.train or form.labelled or form.unlabelled):
            raise missing_layout(self.root, LAYOUT)
        return form

    def _selected(self) -> FolderForm:
        selected = self.selection.find()
        form = read_selection(self.root, self.category, selected, f"data.root {self.selection}")
        if not form.unlabelled:
            raise FileNotFoundError(f"data.root {self.selection}: there is no image in it")
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

    @property
    def has_default_name(self) -> bool:
        """True without ``category``: the name is that of the folder."""
        return self.named is None

    def find_categories(self) -> list[str]:
        """Return the only category.

        Raises:
            FileNotFoundError: If the folder is missing.
        """
        if self.selection.is_folder and not self.root.is_dir():
            raise missing_layout(self.root, LAYOUT)
        return [self.category]

    def image_files(self, runs: list[Path] | None = None) -> Iterator[Path]:
        """Yield the images below the folder, or those of a selection.

        Args:
            runs: Unused, because the remarks count folders of results.
        """
        if self.selection.is_folder:
            yield from image_files(self.root)
        else:
            yield from (sample.image for sample in self.form.unlabelled)

    @cached_property
    def unsupported(self) -> str | None:
        """The message if the folder is a published set for another ``--data``, or for none."""
        return unsupported(self.root) or published_layout(self.root)

    @property
    def remarks(self) -> list[str]:
        """Remarks on how the folder was understood, and what is not used."""
        title = (self.unsupported or "").removeprefix(f"data.root {self.root}: ")
        hints = (self._layout_hint(), title) if self.selection.is_folder else ()
        return [*self.form.remarks, *filter(None, hints)]

    def _layout_hint(self) -> str | None:
        """Return what to try instead of a folder without labels."""
        if self.form.has_labels or not self.selection.is_folder:
            return None
        return layout_hint(self.root)

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

    def normal_images(self, category: str) -> list[Sample]:
        """Return the normal images that a fit might train on."""
        normal = [s for s in self.form.train or self._normal_to_train_on() if not s.label]
        if not normal:
            raise ValueError(
                f"data.root {self.selection}: nothing tells which images are normal: put them into "
                f"good/, or set --data.normal all if all of them are"
            )
        return normal

    def group_of(self, sample: Sample) -> str | None:
        """Return the match of ``data.group`` in the name of an image."""
        return None if self.group is None else _group_of(sample.image, self.group)

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
        needs = self.needs
        self._predicts = stage == "predict"
        if not self._predicts and self.selection.is_folder:
            self.refuse_unsupported()
        if needs.category_names and self.has_default_name:
            raise ValueError(
                f"data.category is not set, but prompts contain the name of the object: name what "
                f'is shown in {self.root}, such as --data.category "laser-cut plank"'
            )
        self.leakage.compared = not self._predicts
        self._trains = stage == "fit" and self.auxiliary is None
        if not self.selection.is_folder and stage in ("validate", "test"):
            raise ValueError(
                f"data.root {self.selection}: only a folder tells which images are normal, to "
                f"compute metrics with: name a folder, or use predict"
            )
        hint = None if self._predicts else self._layout_hint()
        if hint is not None and not (self._trains and self.normal == "all"):
            raise ValueError(
                f"data.root {self.root}: nothing tells which images are normal, as no folder is "
                f"called {' or '.join(self.normal_folders)}; {hint}"
            )
        if (self._trains or self.has_shots) and self.form.has_labels and self.form.train_kinds:
            raise ValueError(
                f"data.root {self.root}: train/ has no normal folder "
                f"({', '.join(self.normal_folders)}), only {', '.join(self.form.train_kinds[:4])}: "
                f"put the normal training images into train/{self.normal_folders[0]}/, or name "
                f"their folders in data.normal_folders"
            )
        if self._trains and not (self.form.has_labels or self.normal == "all"):
            raise ValueError(
                f"data.root {self.selection}: nothing tells which images are normal: put them into "
                f"good/, or set --data.normal all if all of them are"
            )
        if self._trains and self.held_out and not any(True for _ in self._normal_to_train_on()):
            raise ValueError(
                f"data.test_share {self.test_share:g} holds out all {len(self.held_out)} normal "
                f"images of {self.root} for the test: lower data.test_share, or add images"
            )
        used = needs.fitted_images | needs.calibrated_images | self.calibration.images_of_file
        if stage in ("validate", "test") and used and self.held_out:
            normal = self.unreadable.readable(list(self._normal_to_train_on()))
            with self.unreadable.advising():
                images = (sample.image for sample in normal)
                hashes = pixel_hashes(images, self.reading.max_pixels)
            self._trains = not used.isdisjoint(hashes.values())
        self.listing.forget()
        super().setup(stage)

    def more_training_images(self) -> str:
        """Return what to do for more training images."""
        if not (self.is_split and self.held_out):
            return super().more_training_images()
        return (
            f"add images, or lower data.test_share {self.test_share:g}, which holds out "
            f"{len(self.held_out)} normal images for the test"
        )

    @property
    def is_tested_after_fit(self) -> bool:
        """False if a fit trains on all images, because no folder is defective."""
        if self.form.train or self.auxiliary is not None or self.allow_overlap:
            return super().is_tested_after_fit
        return any(sample.label for sample in self.form.labelled) or not self.form.has_labels

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
        return sorted(self.form.normal_masks - {sample.mask for sample in self.form.labelled})

    def summary(self, stage: str) -> str:
        """Return the numbers of images, and how the folder was understood."""
        parts = [super().summary(stage), *self.remarks]
        if self.normal == "all" and self.form.has_labels:
            parts.append("data.normal all is ignored, because folders tell which are normal")
        elif self.normal == "all" and stage == "fit":
            parts.append("all are normal (data.normal all)")
        if self.group is not None:
            parts.append(self._group_remark(self.group))
        if (self.is_split or self.calibration.is_scored) and not self.form.train:
            if self.held_out:
                number = number_of(len(self.held_out), "normal image")
                verb = "is" if len(self.held_out) == 1 else "are"
                share = f"{number} {verb} held out for the test"
                rule = "content" if self.group is None else "the match of data.group in their names"
                parts.append(f"{share} (about {self.test_share:g} of them, chosen by {rule})")
            elif stage == "fit" and any(sample.label for sample in self.form.labelled):
                parts.append("no normal image is held out for the test")
        return "; ".join(parts)

    def _group_remark(self, group: str) -> str:
        images = [sample.image for sample in self.form.labelled if not sample.label]
        if self.calibration.hold_out is not None:
            images = [sample.image for sample in self.normal_images(self.category)]
        elif self.form.train or not images or len(images) == len(self.form.labelled):
            return "data.group is not used, because there is nothing to hold out"
        matching = grouped(images, group)
        groups = number_of(len({_group_of(image, group) for image in matching}), "group")
        return f"data.group matches {len(matching)} of {len(images)} normal images, in {groups}"

    def protocol(self) -> dict[str, object]:
        """Return the data settings, with those of the folder that are not the defaults."""
        if not (self.is_split and self.held_out):
            return dict(super().protocol())
        return {**super().protocol(), "test_share": self.test_share, "group": self.group}
