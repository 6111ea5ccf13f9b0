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
possibly with an ending such as ``_mask``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anomaly_clip.data.folder_listing import FolderListing, joined
from anomaly_clip.data.path_selection import MASK_FOLDERS, Selected
from anomaly_clip.data.samples import Sample
from anomaly_clip.errors import suggest
from anomaly_clip.files import name_key
from anomaly_clip.folders import FolderTree, find_inner
from anomaly_clip.images import read_image
from anomaly_clip.progress import number_of

__all__ = [
    "NORMAL_FOLDERS",
    "FolderForm",
    "looks_like_a_mask",
    "read_selection",
    "understand",
]

NORMAL_FOLDERS = ("good", "ok", "normal")
MASK_ENDINGS = ("_mask", "_gt", "_label")

EXTREME = 8  # grey levels from black or white that still count as black or white
BLACK_AND_WHITE = 0.99  # fraction of such pixels in a mask, whose edges may be antialiased
MAX_INSPECTED = 20  # our choice: a folder per part, with equal names, takes too long to inspect
INSPECTED = 3  # images of a mask folder that are read if their names are not those of others


@dataclass
class FolderForm:
    """Content of a user's folder, as it was understood.

    Attributes:
        train: The images of ``train/``, all normal; empty without such a folder.
        labelled: The other images, if some folder contains normal ones, sorted by path.
        unlabelled: All images, if no folder contains normal ones.
        mask_folders: Folders that contain only masks.
        remarks: How the folder was understood and what is not used, to be shown to the user.
    """

    train: list[Sample] = field(default_factory=list)
    labelled: list[Sample] = field(default_factory=list)
    unlabelled: list[Sample] = field(default_factory=list)
    mask_folders: list[Path] = field(default_factory=list)
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
    endings = ("_mask", "", *MASK_ENDINGS[1:]) if mask_ending is None else (mask_ending,)
    return _Reader(root, category, names, endings).read()


def read_selection(root: Path, category: str, selected: Selected, name: str) -> FolderForm:
    """Return selected images, and all images of selected folders, as images without labels.

    Args:
        root: Folder of all of them.
        category: The category of all images.
        selected: The images and folders.
        name: Description of the selection, for the remark about it.
    """
    return _Reader(root, category, {}, MASK_ENDINGS).select(selected, name)


def looks_like_a_mask(image: Path) -> bool:
    """Return whether nearly all pixels of an image are black or white; False if unreadable."""
    try:
        pixels = read_image(image)
    except (OSError, ValueError):
        return False
    extreme = (pixels <= EXTREME) | (pixels >= 255 - EXTREME)
    return bool(extreme.mean() >= BLACK_AND_WHITE)


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
        self._next_to: dict[Path, set[Path]] = {}

    def read(self) -> FolderForm:
        tops = self.listing.subfolders(self.root)
        trains = [folder for folder in tops if folder.name.lower() == "train"]
        tests = [folder for folder in tops if folder.name.lower() == "test"]
        if trains and (samples := [s for train in trains for s in self._train_samples(train)]):
            self.form.train = samples
            self._count_next_to([*trains, *tests], tops)
            if tests:
                self._read_labelled(tests, [*tests, self.root])
        elif any(map(self._is_normal, tops)):
            self._read_labelled([self.root], [self.root])
        elif any(self._is_normal(kind) for test in tests for kind in self.listing.subfolders(test)):
            self._count_next_to(tests, tops)
            self._read_labelled(tests, [*tests, self.root])
        else:
            self._read_unlabelled()
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
        folders = [f for folder in normal for f in below[folder]] if normal else [train]
        images = sorted(image for folder in folders for image in self._photographs(folder))
        if images:
            others = self.listing.images_below([f for f in inner if f not in normal])
            others += self.listing.images(train) if normal else []
            self.listing.leave_out("images of train/ that are not in its normal folder", others)
            places = [f"{self.listing.place(folder)}/" for folder in normal or [train]]
            verb = "contains" if len(places) == 1 else "contain"
            self._say(f"{joined(places)} {verb} the {len(images)} training images")
            self.normal_folders += normal
        return [Sample(image, self.category, label=False) for image in images]

    def _count_next_to(self, used: Sequence[Path], tops: Sequence[Path]) -> None:
        """Count the images that lie next to ``train/``, or to ``test/`` without it."""
        others = [f for f in tops if f not in used and f.name.lower() not in MASK_FOLDERS]
        images = [*self.listing.images_below(others), *self.listing.images(self.root)]
        self.listing.leave_out(f"images next to {used[0].name.lower()}/", images)

    def _read_labelled(self, folders: Sequence[Path], mask_roots: Sequence[Path]) -> None:
        kinds = [kind for folder in folders for kind in self.listing.subfolders(folder)]
        below = self.listing.below(kinds)
        images = {kind: [i for f in below[kind] for i in self._images(f)] for kind in kinds}
        mask_folders = self._mask_folders(mask_roots, images)
        normal: list[str] = []
        defective: list[str] = []
        for kind in kinds:
            if kind in mask_folders or not below[kind]:  # masks, or a link to another folder
                continue
            is_normal = self._is_normal(kind)
            inner, masks_inside = self._without_masks(kind, below[kind])
            mask_folders += masks_inside
            if is_normal:
                self.normal_folders.append(kind)
                listed = sorted(image for folder in inner for image in self._photographs(folder))
                masks = {}
            else:
                inner = self._without_normal(kind, inner)
                listed = sorted(image for folder in inner for image in self._images(folder))
                masks = self._masks_of(listed, kind, mask_folders)
            places = {image.parent for image in listed}
            count = f"{len(listed)}" + (f" in {len(places)} folders" if len(places) > 1 else "")
            (normal if is_normal else defective).append(f"{kind.name}/ ({count})")
            for image in listed:
                defect = "good" if is_normal else kind.name
                sample = Sample(image, self.category, not is_normal, masks.get(image), defect)
                self.form.labelled.append(sample)
        for folder in folders:
            self.listing.leave_out("images next to the folders", self.listing.images(folder))
        self._expect_all_masks(mask_folders)
        below_masks = FolderTree(self.root, self.listing.content).below(mask_folders)
        self.form.mask_folders = [f for inner in below_masks.values() for f in inner]
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
        number = number_of(len(images), "image")
        self._say(f"{number} without labels, because no folder is called {names}")
        if self.deeper_normal:
            place = min(self.deeper_normal)
            self._say(
                f"the labels of {self.listing.place(place)}/ are not read: only folders at the top "
                f"have labels, as with --data.root {place.parent}"
            )

    def _enters_unlabelled(self, folder: Path) -> bool:
        if folder == self.root:
            return True
        if folder.name.lower() in MASK_FOLDERS:
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
        """Return the folders that contain masks, by their name or by their content.

        Raises:
            ValueError: If a folder has the name of a mask folder, but contains something else.
        """
        folders = []
        candidates = [folder for root in roots for folder in self.listing.subfolders(root)]
        folders_by_stem = _folders_by_stem(i for listed in images.values() for i in listed)
        for folder in dict.fromkeys(candidates):
            named = folder.name.lower() in MASK_FOLDERS
            if self._is_normal(folder) or not (named or folder in images):
                continue
            if self._contains_masks(folder, folders_by_stem):
                folders.append(folder)
                if not named:
                    self._say(f"{folder.name}/ contains black-and-white images: masks")
        return folders

    def _without_masks(self, kind: Path, folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """Return the folders below a labelled folder without those of masks, and the latter."""
        kept: list[Path] = []
        masks: list[Path] = []
        folders_by_stem = _folders_by_stem(i for f in folders for i in self._images(f))
        for folder in folders:
            if any(folder.is_relative_to(place) for place in masks):
                continue
            is_candidate = folder.name.lower() in MASK_FOLDERS or len(folders) <= MAX_INSPECTED
            if folder != kind and is_candidate and self._contains_masks(folder, folders_by_stem):
                masks.append(folder)
            else:
                kept.append(folder)
        return kept, masks

    def _contains_masks(self, folder: Path, folders_by_stem: Mapping[str, Iterable[Path]]) -> bool:
        """Return whether the images of a tree are masks of images outside of it.

        Args:
            folder: The tree.
            folders_by_stem: Folders of the images with a name.

        Raises:
            ValueError: If the folder has the name of a mask folder, but contains something else.
        """
        below = FolderTree(self.root, self.listing.content).below([folder])[folder]
        images = [image for inner in below for image in self.listing.images(inner)]
        if not images:
            return False
        named = folder.name.lower() in MASK_FOLDERS

        inside = set(below)

        def is_paired(name: str) -> bool:
            stems = [name.removesuffix(ending) for ending in self.endings]
            places = (place for stem in stems for place in folders_by_stem.get(stem, ()))
            return any(place not in inside for place in places)

        all_paired = all(map(is_paired, {name_key(image.stem): None for image in images}))
        if named and all_paired:
            return True
        # Without a mask folder's name, both names and content must be those of masks.
        inspected = images[:INSPECTED] if named else images
        if (named or all_paired) and all(map(looks_like_a_mask, inspected)):
            return True
        if named:
            raise ValueError(
                f"{folder}: a folder of this name should contain masks, but its images are "
                f"neither black and white nor named like others: rename it, to test its images "
                f"as a kind of defect, or remove it"
            )
        return False

    def _masks_of(
        self, images: Sequence[Path], kind: Path, mask_folders: Sequence[Path]
    ) -> dict[Path, Path]:
        """Return the masks of defective images that exist."""
        masks = {}
        places: dict[Path, list[Path]] = {}
        for image in images:
            if image.parent not in places:
                places[image.parent] = self._mask_places(image.parent, kind, mask_folders)
            names = [name_key(f"{image.stem}{ending}") for ending in self.endings]
            by_name = [self.listing.by_stem(place) for place in places[image.parent]]
            listed = [masks_there[n] for masks_there in by_name for n in names if n in masks_there]
            mask = listed[0] if listed else self._mask_next_to(image)
            if mask is not None:
                masks[image] = mask
        return masks

    def _mask_places(self, folder: Path, kind: Path, mask_folders: Sequence[Path]) -> list[Path]:
        """Return the folders in which masks of the images of ``folder`` may be.

        These are, in a mask folder, the folders with the same names as those below the kind of
        defect, and else the folder of the kind or the mask folder itself.
        """
        inner = folder.relative_to(kind).parts
        places = []
        for masks in mask_folders:
            if masks.is_relative_to(kind):
                if not folder.is_relative_to(masks.parent):
                    continue
                names = [folder.relative_to(masks.parent).parts]
            else:
                names = [(kind.name, *inner), inner]
            same = [find_inner(masks, *parts) for parts in names if parts]
            same = [place for place in same if place.is_dir()]
            wider = [find_inner(masks, kind.name), masks]
            places += same[:1] if same and inner else [*same, *wider]
        return list(dict.fromkeys(places))

    def _expect_all_masks(self, mask_folders: Sequence[Path]) -> None:
        """Give a defective image without mask its expected path, if others have masks."""
        if not self.form.has_masks:
            return
        for number, sample in enumerate(self.form.labelled):
            if sample.label and sample.mask is None:
                ending = next((e for e in self.endings if e), "")
                folder = mask_folders[0] / sample.defect if mask_folders else sample.image.parent
                expected = folder / f"{sample.image.stem}{ending}.png"
                self.form.labelled[number] = replace(sample, mask=expected)

    def _mask_next_to(self, image: Path) -> Path | None:
        """Return the mask of an image in its own folder, whose content must be that of a mask."""
        neighbours = self.listing.by_stem(image.parent)
        for ending in filter(None, self.endings):
            mask = neighbours.get(name_key(f"{image.stem}{ending}"))
            if mask is not None and looks_like_a_mask(mask):
                return mask
        return None

    # -- texts -----------------------------------------------------------------------------------

    def _say(self, sentence: str) -> None:
        self.form.remarks.append(sentence)


def _folders_by_stem(images: Iterable[Path]) -> dict[str, dict[Path, None]]:
    """Return the folders that contain an image of a name, by that name."""
    folders: dict[str, dict[Path, None]] = {}
    for image in images:
        folders.setdefault(name_key(image.stem), {})[image.parent] = None
    return folders


def _folder_key(name: str) -> str:
    return name_key(name).lower()
