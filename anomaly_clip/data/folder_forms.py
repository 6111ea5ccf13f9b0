"""Forms of a user's own folder: which images are normal, which are defective, where masks are.

Three forms are understood:

- ``train/``, with normal images in ``train/good/`` or in ``train/`` itself, with or without
  ``test/``;
- ``good/``, alone or next to one folder per kind of defect, also inside ``test/``;
- any other tree of images, which is unlabelled.

The normal folder may also be called ``ok`` or ``normal``, in any case. Images below these folders,
at any depth, have the label of the folder at the top. Masks of defective images are in
``ground_truth/``, ``masks/``, ``mask/`` or ``gt/``, with or without a folder per kind of defect and
with or without the folders below it, or next to their images. A mask has the name of its image,
possibly with an ending such as ``_mask``. A folder of another name contains masks if both its
content and its file names are those of masks; see :mod:`~anomaly_clip.data.mask_folders`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anomaly_clip.data.copies import original_of
from anomaly_clip.data.folder_listing import FolderListing, joined
from anomaly_clip.data.layout import USUAL_ENDINGS
from anomaly_clip.data.mask_content import looks_like_a_mask
from anomaly_clip.data.mask_folders import LABEL_FOLDERS, MASK_FOLDERS, ImageNames, MaskFolders
from anomaly_clip.data.path_selection import Selected
from anomaly_clip.data.samples import Sample
from anomaly_clip.errors import suggest
from anomaly_clip.files import name_key
from anomaly_clip.folders import find_inner
from anomaly_clip.progress import number_of

__all__ = ["NORMAL_FOLDERS", "FolderForm", "read_selection", "understand"]

NORMAL_FOLDERS = ("good", "ok", "normal")
MAX_INSPECTED = 20  # our choice: a folder per part, with equal names, takes too long to inspect


@dataclass
class FolderForm:
    """Content of a user's folder, as it was understood.

    Attributes:
        train: The images of ``train/``, all normal; empty without such a folder.
        labelled: The other images, if some folder contains normal ones, sorted by path.
        unlabelled: All images, if no folder contains normal ones.
        train_kinds: Names of the folders in ``train/`` if they contain images, but none is normal.
        mask_folders: Folders that contain only masks.
        normal_masks: Masks of normal images, which must be empty.
        remarks: How the folder was understood and what is not used, to be shown to the user.
    """

    train: list[Sample] = field(default_factory=list)
    labelled: list[Sample] = field(default_factory=list)
    unlabelled: list[Sample] = field(default_factory=list)
    train_kinds: list[str] = field(default_factory=list)
    mask_folders: list[Path] = field(default_factory=list)
    normal_masks: set[Path] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)

    @property
    def has_labels(self) -> bool:
        """True if the folder tells which images are normal."""
        return bool(self.train or self.labelled)

    @property
    def has_masks(self) -> bool:
        """True if defective images have masks."""
        return any(sample.mask is not None for sample in self.labelled)


def understand(
    root: Path,
    category: str,
    normal_folders: Iterable[str] = NORMAL_FOLDERS,
    mask_ending: str | None = None,
) -> FolderForm:
    """Find the images and masks of a user's folder.

    Args:
        root: The folder.
        category: The category of all images.
        normal_folders: Names of folders with normal images; case is ignored.
        mask_ending: Ending that a mask's name has after the name of its image; None for any of the
            usual endings, or none.

    Raises:
        ValueError: If a folder has the name of a mask folder, but contains something else.
    """
    names = {_folder_key(name.strip("/")): name for name in normal_folders}
    endings = USUAL_ENDINGS if mask_ending is None else (mask_ending,)
    return _Reader(root, category, names, endings).read()


def read_selection(root: Path, category: str, selected: Selected, name: str) -> FolderForm:
    """Return selected images, and all images of selected folders, as images without labels.

    Args:
        root: Folder of all of them.
        category: The category of all images.
        selected: The images and folders.
        name: Description of the selection, for the remark about it.
    """
    return _Reader(root, category, {}, USUAL_ENDINGS).select(selected, name)


class _Reader:
    """Implementation of :func:`understand`.

    Args:
        root: The folder.
        category: The category of all images.
        normal_names: Names of normal folders as typed, by the form in which they are compared.
        endings: Endings of masks.
    """

    def __init__(
        self, root: Path, category: str, normal_names: Mapping[str, str], endings: Sequence[str]
    ) -> None:
        self.root = root
        self.category = category
        self.normal_names = normal_names
        self.endings = endings
        self.form = FolderForm()
        self.listing = FolderListing(root)
        self.normal_folders: list[Path] = []
        self.deeper_normal: list[Path] = []
        self.masks = MaskFolders(endings, self.listing.tree_images)
        self._next_to: dict[Path, set[Path]] = {}
        self._places: dict[Path, list[Path]] = {}
        """Folders in which the masks of a folder's images may be."""

    def read(self) -> FolderForm:
        tops = self.listing.subfolders(self.root)
        trains = [folder for folder in tops if folder.name.lower() == "train"]
        tests = [folder for folder in tops if folder.name.lower() == "test"]
        if trains and (samples := [s for train in trains for s in self._train_samples(train)]):
            self.form.train = samples
            if tests:
                self._read_labelled(tests, [*tests, self.root])
            self._count_next_to([*trains, *tests], tops)
        elif any(map(self._is_normal, tops)):
            self._read_labelled([self.root], [self.root])
        elif any(self._is_normal(kind) for test in tests for kind in self.listing.subfolders(test)):
            self._read_labelled(tests, [*tests, self.root])
            self._count_next_to(tests, tops)
        else:
            self._read_unlabelled()
        if not self.form.train:
            kinds = [kind for train in trains for kind in self.listing.subfolders(train)]
            self.form.train_kinds = [k.name for k in kinds if self.listing.tree_images(k)]
        return self._finished(tops)

    def select(self, selected: Selected, name: str) -> FolderForm:
        """See :func:`read_selection`."""
        below = self.listing.below(selected.folders, self._enters_unlabelled)
        inside = [i for inner in below.values() for f in inner for i in self._photographs(f)]
        self._add_unlabelled([*selected.images, *inside])
        self._say(f"{number_of(len(self.form.unlabelled), 'image')} without labels: {name}")
        for what, paths in selected.left_out.items():
            self.listing.leave_out(what, paths)
        return self._finished([])

    # -- the three forms -------------------------------------------------------------------------

    def _train_samples(self, train: Path) -> list[Sample]:
        """Return the normal images of ``train/``: of its normal folders, or its own."""
        inner = self.listing.subfolders(train)
        normal = [folder for folder in inner if self._is_normal(folder)]
        below = self.listing.below(normal)
        kept = [self._without_masks(folder, below[folder]) for folder in normal]
        folders = [f for inner, _ in kept for f in inner] if normal else [train]
        images = sorted(image for folder in folders for image in self._photographs(folder))
        if images:
            self.form.normal_masks.update(*map(self._masks_next_to_images, folders))
            others = self.listing.images_below([f for f in inner if f not in normal])
            others += self.listing.images(train) if normal else []
            self.listing.leave_out("images of train/ that are not in its normal folder", others)
            masks = [
                mask for _, inner in kept for f in inner for mask in self.masks.images_below(f)
            ]
            self.listing.leave_out("masks of images that are not defective", masks)
            places = [f"{self.listing.place(folder)}/" for folder in normal or [train]]
            verb = "contains" if len(places) == 1 else "contain"
            self._say(f"{joined(places)} {verb} the {len(images)} training images")
            self.normal_folders += normal
        return [Sample(image, self.category, label=False) for image in images]

    def _count_next_to(self, used: Sequence[Path], tops: Sequence[Path]) -> None:
        """Count the images that lie next to ``train/``, or to ``test/`` without it."""
        masks = [f for f in tops if f.name.lower() in MASK_FOLDERS or f in self.form.mask_folders]
        others = [f for f in tops if f not in used and f not in masks]
        images = [*self.listing.images_below(others), *self.listing.images(self.root)]
        self.listing.leave_out(f"images next to {used[0].name.lower()}/", images)

    def _read_labelled(self, folders: Sequence[Path], mask_roots: Sequence[Path]) -> None:
        kinds = [kind for folder in folders for kind in self.listing.subfolders(folder)]
        below = self.listing.below(kinds)
        # Links to folders that are listed elsewhere have nothing below them.
        kinds = [f for f in kinds if below[f] and f.name.lower() not in MASK_FOLDERS]
        kept = {kind: self._without_masks(kind, below[kind]) for kind in kinds}
        images = {
            kind: [i for f in inner for i in self._images(f)] for kind, (inner, _) in kept.items()
        }
        mask_folders = self._mask_folders(mask_roots, images)
        kinds = [kind for kind in kinds if kind not in mask_folders]
        defects = [kind.name for kind in kinds if not self._is_normal(kind)]
        normal: list[str] = []
        defective: list[str] = []
        doubtful: list[str] = []
        for kind in kinds:
            inner, masks_inside = kept[kind]
            if self._is_normal(kind):
                self.normal_folders.append(kind)
                listed = sorted(image for folder in inner for image in self._photographs(folder))
                beside = (self._masks_next_to_images(folder) for folder in inner)
                self.form.normal_masks.update(*beside)
            else:
                inner = self._without_normal(kind, inner)
                listed = sorted(image for folder in inner for image in self._images(folder))
                if self.masks.seem_masks(listed):
                    doubtful.append(f"{kind.name}/ ({len(listed)})")
            shared = self._mask_folders_of(kind, mask_folders, defects)
            masks = self._masks_of(listed, kind, [*masks_inside, *shared])
            self._add_labelled(kind, listed, masks)
            places = {image.parent for image in listed}
            count = f"{len(listed)}" + (f" in {len(places)} folders" if len(places) > 1 else "")
            (normal if self._is_normal(kind) else defective).append(f"{kind.name}/ ({count})")
        for folder in folders:
            self.listing.leave_out("images next to the folders", self.listing.images(folder))
        self._expect_all_masks()
        mask_folders += [folder for kind in kinds for folder in kept[kind][1]]
        self.form.mask_folders = self.listing.trees(mask_folders)
        text = f"{joined(normal) or 'no folder'} {'are' if len(normal) > 1 else 'is'} normal"
        text += f", {joined(defective)} defective" if defective else ", no folder is defective"
        if mask_folders:
            names = [f"{self.listing.place(f)}/" for f in mask_folders]
            text += f", masks are in {joined(names)}"
        elif self.form.has_masks:
            text += ", masks are next to their images"
        elif defective:
            text += ", there are no masks"
        self._say(text)
        if doubtful:
            self._say(
                f"{joined(doubtful)}: nearly black and white, scored as defective images; if these "
                f"are masks, put them into ground_truth/<defect>/ with the names of their images"
            )

    def _add_labelled(
        self, kind: Path, images: Sequence[Path], masks: Mapping[Path, Sequence[Path]]
    ) -> None:
        """Add the samples of a folder; masks of normal images are recorded, to be checked."""
        is_normal = self._is_normal(kind)
        for image in images:
            if is_normal:
                self.form.normal_masks.update(masks[image])
                sample = Sample(image, self.category, label=False, defect="good")
            else:
                mask = masks[image][0] if masks[image] else self._mask_next_to(image)
                sample = Sample(image, self.category, True, mask, kind.name)
            self.form.labelled.append(sample)

    def _without_normal(self, kind: Path, folders: Sequence[Path]) -> list[Path]:
        """Return the folders below a kind of defect without those of normal images."""
        normal = [f for f in folders if any(map(self._is_normal_name, f.relative_to(kind).parts))]
        for folder in normal:
            what = f"images in {self.listing.place(folder)}/, whose names contradict each other"
            self.listing.leave_out(what, self.listing.images(folder))
        return [folder for folder in folders if folder not in normal]

    def _read_unlabelled(self) -> None:
        folders = self.listing.below([self.root], self._enters_unlabelled)[self.root]
        images = [image for folder in folders for image in self._photographs(folder)]
        self._add_unlabelled(images)
        names = " or ".join(sorted(self.normal_names.values()))
        why = f"because no folder is called {names}"
        if self._is_normal_name(self.root.name):
            why = f"because {self.root.name} is the folder itself, not one in it"
        self._say(f"{number_of(len(images), 'image')} without labels, {why}")
        if self.deeper_normal:
            place = min(self.deeper_normal)
            self._say(
                f"the labels of {self.listing.place(place)}/ are not read: only folders at the top "
                f"have labels, as with --data.root {place.parent}"
            )

    def _enters_unlabelled(self, folder: Path) -> bool:
        if folder == self.root:
            return True
        neighbours = ImageNames(self.listing.images(folder.parent))
        if folder.name.lower() in MASK_FOLDERS or self.masks.are_labels(folder, neighbours):
            what = f"images in {self.listing.place(folder)}/, which has the name of a mask folder"
            self.listing.leave_out(what, self.listing.images_below([folder]))
            return False
        if self._is_normal(folder):
            self.deeper_normal.append(folder)
        return True

    def _add_unlabelled(self, images: Sequence[Path]) -> None:
        for image in sorted(set(images)):
            place = self.listing.place(image.parent)
            defect = "" if place == "." else place
            self.form.unlabelled.append(Sample(image, self.category, label=False, defect=defect))

    def _finished(self, tops: Sequence[Path]) -> FolderForm:
        used = {_folder_key(folder.name) for folder in self.normal_folders}
        for key, name in self.normal_names.items():
            if set(self.normal_names.values()) != set(NORMAL_FOLDERS) and key not in used:
                hint = suggest(key, [folder.name for folder in tops])
                self._say(f"data.normal_folders: there is no folder {name} ({hint or 'none'})")
        self.form.remarks += self.listing.remarks()
        return self.form

    # -- folders and images ----------------------------------------------------------------------

    def _is_normal(self, folder: Path) -> bool:
        return self._is_normal_name(folder.name)

    def _is_normal_name(self, name: str) -> bool:
        return _folder_key(name) in self.normal_names

    def _images(self, folder: Path) -> list[Path]:
        """Return the images of a folder without the masks that lie next to them."""
        masks = self._masks_next_to_images(folder)
        return [image for image in self.listing.images(folder) if image not in masks]

    def _photographs(self, folder: Path) -> list[Path]:
        """Return the images of a folder; masks next to them are recorded as not used."""
        masks = self._masks_next_to_images(folder)
        self.listing.leave_out("masks of images that are not defective", sorted(masks))
        return [image for image in self.listing.images(folder) if image not in masks]

    def _masks_next_to_images(self, folder: Path) -> set[Path]:
        if folder not in self._next_to:
            masks = (self._mask_next_to(image) for image in self.listing.images(folder))
            self._next_to[folder] = {mask for mask in masks if mask is not None}
        return self._next_to[folder]

    # -- masks -----------------------------------------------------------------------------------

    def _mask_folders(
        self, roots: Sequence[Path], images: Mapping[Path, Sequence[Path]]
    ) -> list[Path]:
        """Return the folders that contain masks, by their names and contents.

        Raises:
            ValueError: If a folder has the name of a mask folder, but contains something else.
        """
        folders = []
        defects = [kind for kind in images if not self._is_normal(kind)]
        others = ImageNames(image for listed in images.values() for image in listed)
        defective = ImageNames(image for kind in defects for image in images[kind])
        kinds = [kind.name for kind in images]  # good_mask/ contains masks, too
        candidates = [folder for root in roots for folder in self.listing.subfolders(root)]
        for folder in dict.fromkeys(candidates):
            if self._is_normal(folder):
                continue
            if self._contains_masks(folder, others, kinds):
                folders.append(folder)
            elif folder in images and self.masks.are_certain(folder, others, defective):
                folders.append(folder)
                self._say(f"{folder.name}/ contains black-and-white images: masks")
            elif folder in images:
                self.masks.refuse_masks(folder, others)
        return folders

    def _without_masks(self, kind: Path, folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """Return the folders below a labelled folder without those of masks, and the latter."""
        kept: list[Path] = []
        masks: list[Path] = []
        others = ImageNames(image for folder in folders for image in self._images(folder))
        defective = ImageNames([]) if self._is_normal(kind) else others
        for folder in folders:
            if any(folder.is_relative_to(place) for place in masks):
                continue
            contains_masks = folder != kind and self._contains_masks(folder, others, [kind.name])
            if folder != kind and not contains_masks and len(folders) <= MAX_INSPECTED:
                contains_masks = self.masks.are_certain(folder, others, defective)
            (masks if contains_masks else kept).append(folder)
        return kept, masks

    def _contains_masks(self, folder: Path, others: ImageNames, kinds: Sequence[str]) -> bool:
        """Return whether a folder with a name of masks contains masks.

        Args:
            folder: The folder, with or without folders below it.
            others: All images, also those of the folder.
            kinds: Kinds of defects.

        Raises:
            ValueError: If the folder has the name of a mask folder, but contains something else.
        """
        if folder.name.lower() not in MASK_FOLDERS:
            return self.masks.are_labels(folder, others, kinds)
        if self.masks.are_masks(folder, others):
            return True
        if self.listing.tree_images(folder):
            raise ValueError(
                f"{folder}: a folder of this name should contain masks, but its images are "
                f"photographs, or neither black and white nor named like others: rename it, to "
                f"test its images as a kind of defect, or remove it"
            )
        return False

    def _mask_folders_of(
        self, kind: Path, mask_folders: Sequence[Path], defects: Sequence[str]
    ) -> list[Path]:
        """Return the mask folders of a kind: its own before those of all kinds."""
        special = [f for f in mask_folders if self.masks.kind_of(f, [kind.name])]
        shared = [f for f in mask_folders if f not in special]
        if not self._is_normal(kind):
            shared = [f for f in shared if not self.masks.kind_of(f, defects)]
        else:
            shared = [f for f in shared if not self.masks.kind_of(f, self.normal_names)]
        shared.sort(key=lambda f: f.name.lower() not in (*MASK_FOLDERS, *LABEL_FOLDERS))
        return [*special, *shared]

    def _masks_of(
        self, images: Sequence[Path], kind: Path, mask_folders: Sequence[Path]
    ) -> dict[Path, list[Path]]:
        """Return the masks of images that exist in mask folders, the most likely one first."""
        masks: dict[Path, list[Path]] = {}
        for image in images:
            if image.parent not in self._places:
                self._places[image.parent] = self._mask_places(image.parent, kind, mask_folders)
            names = [f"{image.stem}{ending}" for ending in self.endings]
            places = self._places[image.parent]
            listed = [self.listing.named(place, name) for place in places for name in names]
            masks[image] = [mask for mask in listed if mask is not None]
        return masks

    def _mask_places(self, folder: Path, kind: Path, mask_folders: Sequence[Path]) -> list[Path]:
        """Return the folders in which masks of the images of ``folder`` may be.

        These are, in a mask folder, the folders with the same names as those below the kind of
        defect, and else the folder of the kind or the mask folder itself.
        """
        inner = folder.relative_to(kind).parts
        places = []
        for masks in mask_folders:
            kinds = [kind.name]
            if self._is_normal(kind):
                kinds += [f.name for f in self.listing.subfolders(masks) if self._is_normal(f)]
            if masks.is_relative_to(kind):
                if not folder.is_relative_to(masks.parent):
                    continue
                names = [folder.relative_to(masks.parent).parts]
            else:
                names = [*((name, *inner) for name in kinds), inner]
            same = [find_inner(masks, *parts) for parts in names if parts]
            same = [place for place in same if place.is_dir()]
            wider = [*(find_inner(masks, name) for name in kinds), masks]
            places += same[:1] if same and inner else [*same, *wider]
        return list(dict.fromkeys(places))

    def _expect_all_masks(self) -> None:
        """Give a defective image without mask its expected path, if others have masks.

        Copies of other images, such as ``a (copy).png``, need no mask and are left out.
        """
        if not self.form.has_masks:
            return
        without = [s.image for s in self.form.labelled if s.label and s.mask is None]
        copies = [image for image in without if original_of(image)]
        self.listing.leave_out("copies without a mask of defective images", copies)
        self.form.labelled = [s for s in self.form.labelled if s.image not in copies]
        for number, sample in enumerate(self.form.labelled):
            if sample.label and sample.mask is None:
                ending = next((e for e in self.endings if e), "")
                parent = sample.image.parent
                places = self._places[parent]
                folder = next((p for p in places if self.listing.images(p)), (*places, parent)[0])
                expected = folder / f"{sample.image.stem}{ending}.png"
                self.form.labelled[number] = replace(sample, mask=expected)

    def _mask_next_to(self, image: Path) -> Path | None:
        """Return the mask of an image in its own folder, whose content must be that of a mask."""
        for ending in filter(None, self.endings):
            mask = self.listing.named(image.parent, f"{image.stem}{ending}")
            if mask is not None and looks_like_a_mask(mask):
                return mask
        return None

    # -- texts -----------------------------------------------------------------------------------

    def _say(self, sentence: str) -> None:
        self.form.remarks.append(sentence)


def _folder_key(name: str) -> str:
    return name_key(name).lower()
