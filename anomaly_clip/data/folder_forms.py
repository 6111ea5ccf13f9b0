"""Forms of a user's own folder: which images are normal, which are defective, where masks are.

Three forms are understood:

- ``train/``, with normal images in ``train/good/`` or in ``train/`` itself, with or without
  ``test/``;
- ``good/``, alone or next to one folder per kind of defect, also inside ``test/``;
- any other tree of images, which is unlabelled.

The normal folder may also be called ``ok`` or ``normal``, in any case. Masks of defective images
are in ``ground_truth/``, ``masks/``, ``mask/`` or ``gt/``, with or without a folder per kind of
defect, or next to their images. A mask has the name of its image, possibly with an ending such as
``_mask``. A folder of another name contains masks if both its content and its file names are those
of masks; see :mod:`~anomaly_clip.data.mask_folders`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anomaly_clip.data.layout import USUAL_ENDINGS, images_in, subfolders
from anomaly_clip.data.mask_folders import (
    LABEL_FOLDERS,
    MASK_FOLDERS,
    MaskFolders,
    looks_like_a_mask,
)
from anomaly_clip.data.samples import Sample

__all__ = ["NORMAL_FOLDERS", "FolderForm", "looks_like_a_mask", "understand"]

NORMAL_FOLDERS = ("good", "ok", "normal")
RUN_FILES = tuple(f"config-{verb}.yaml" for verb in ("fit", "validate", "test", "predict"))
"""Files of which the folder of a run contains at least one."""


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
    names = {name.lower() for name in normal_folders}
    endings = USUAL_ENDINGS if mask_ending is None else (mask_ending,)
    return _Reader(root, category, names, endings).read()


class _Reader:
    """Implementation of :func:`understand`."""

    def __init__(
        self, root: Path, category: str, normal_names: set[str], endings: Sequence[str]
    ) -> None:
        self.root = root
        self.category = category
        self.normal_names = normal_names
        self.endings = endings
        self.masks = MaskFolders(endings)
        self.form = FolderForm()
        self.unused: dict[str, int] = {}
        self.runs: set[Path] = set()
        self.visited = {root.resolve()}

    def read(self) -> FolderForm:
        folders = {folder.name.lower(): folder for folder in self._subfolders(self.root)}
        train, test = folders.get("train"), folders.get("test")
        if train is not None and (samples := self._train_samples(train)):
            self.form.train = samples
            if test is not None:
                self._read_labelled(test, [test, self.root])
            others = [f for name, f in folders.items() if name not in ("train", "test")]
            others = [f for f in others if f.name.lower() not in MASK_FOLDERS]
            others = [f for f in others if f not in self.form.mask_folders]
            self._count("images next to train/", sum(map(_number_of_images, others)))
            self._count("images next to train/", len(images_in(self.root)))
            return self._finished()
        if any(name in self.normal_names for name in folders):
            self._read_labelled(self.root, [self.root])
            return self._finished()
        self._read_unlabelled()
        return self._finished()

    # -- the three forms -------------------------------------------------------------------------

    def _train_samples(self, train: Path) -> list[Sample]:
        """Return the normal images of ``train/``: of its normal folder, or its own."""
        normal = [f for f in self._subfolders(train) if f.name.lower() in self.normal_names]
        images = [image for folder in normal or [train] for image in self._images(folder)]
        if images:
            others = [f for f in self._subfolders(train) if f not in normal]
            self._count(
                "images of train/ that are not in its normal folder",
                sum(map(_number_of_images, others)),
            )
            where = normal[0].relative_to(self.root) if normal else train.relative_to(self.root)
            self._say(f"{where.as_posix()}/ contains the {len(images)} training images")
        return [Sample(image, self.category, label=False) for image in images]

    def _read_labelled(self, folder: Path, mask_roots: Sequence[Path]) -> None:
        kinds = self._subfolders(folder)
        images = {kind: self._images(kind) for kind in kinds}
        mask_folders = self._mask_folders(mask_roots, images)
        inner_folders = self._inner_mask_folders(images)
        normal: list[str] = []
        defective: list[str] = []
        for kind in kinds:
            if kind in mask_folders:
                continue
            is_normal = kind.name.lower() in self.normal_names
            places = self._places_of_masks(kind, mask_folders, inner_folders[kind])
            masks = {} if is_normal else self._masks_of(images[kind], kind, places)
            (normal if is_normal else defective).append(f"{kind.name}/ ({len(images[kind])})")
            inner = [f for f in self._subfolders(kind) if f not in inner_folders[kind]]
            deeper = sum(map(_number_of_images, inner))
            self._count("images in subfolders of these folders", deeper)
            for image in images[kind]:
                defect = "good" if is_normal else kind.name
                sample = Sample(image, self.category, not is_normal, masks.get(image), defect)
                self.form.labelled.append(sample)
        self._count("images next to the folders", len(images_in(folder)))
        self._expect_all_masks(mask_folders, inner_folders)
        mask_folders += [f for folders in inner_folders.values() for f in folders]
        self.form.mask_folders = [inner for f in mask_folders for inner in (f, *subfolders(f))]
        text = f"{_listed(normal) or 'no folder'} is normal"
        text += f", {_listed(defective)} defective" if defective else ", no folder is defective"
        if mask_folders:
            names = [f.relative_to(self.root).as_posix() + "/" for f in mask_folders]
            text += f", masks are in {_listed(names)}"
        elif self.form.has_masks:
            text += ", masks are next to their images"
        elif defective:
            text += ", there are no masks"
        self._say(text)

    def _read_unlabelled(self) -> None:
        for image in sorted(self._walk(self.root)):
            place = image.parent.relative_to(self.root).as_posix()
            defect = "" if place == "." else place
            self.form.unlabelled.append(Sample(image, self.category, label=False, defect=defect))
        self._say(
            f"{len(self.form.unlabelled)} images without labels, because no folder is called "
            f"{' or '.join(sorted(self.normal_names))}"
        )

    def _finished(self) -> FolderForm:
        if self.runs:
            first = min(self.runs).relative_to(self.root).as_posix()
            self._count(f"folders of results, such as {first}", len(self.runs))
        for what, count in self.unused.items():
            self._say(f"not used: {count} {what}")
        return self.form

    # -- folders and images ----------------------------------------------------------------------

    def _subfolders(self, folder: Path) -> list[Path]:
        """Return the subfolders without those of runs, whose images this package drew itself."""
        kept = []
        for inner in subfolders(folder):
            if any((inner / name).is_file() for name in RUN_FILES):
                self.runs.add(inner)
            else:
                kept.append(inner)
        return kept

    def _images(self, folder: Path) -> list[Path]:
        """Return the images of a folder without the masks that lie next to them."""
        images = {image.stem: image for image in images_in(folder)}
        masks = {mask for image in images.values() if (mask := self._mask_next_to(image, images))}
        return [image for image in images_in(folder) if image not in masks]

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Yield all images of a tree; links are followed, but each folder is read only once."""
        yield from self._images(folder)
        for inner in self._subfolders(folder):
            if inner.resolve() in self.visited:
                continue
            self.visited.add(inner.resolve())
            names = {image.stem for image in images_in(folder)}
            if inner.name.lower() in MASK_FOLDERS or self.masks.are_labels(inner, names):
                place = inner.relative_to(self.root).as_posix()
                inside = _number_of_images(inner)
                self._count(f"images in {place}/, which has the name of a mask folder", inside)
                continue
            yield from self._walk(inner)

    # -- masks -----------------------------------------------------------------------------------

    def _mask_folders(
        self, roots: Sequence[Path], images: Mapping[Path, Sequence[Path]]
    ) -> list[Path]:
        """Return the folders that contain masks, by their names and contents.

        Raises:
            ValueError: If a folder has the name of a mask folder, but contains something else.
        """
        folders = []
        kinds = [kind for kind in images if kind.name.lower() not in MASK_FOLDERS]
        defective = [kind for kind in kinds if kind.name.lower() not in self.normal_names]
        for folder in dict.fromkeys([f for root in roots for f in self._subfolders(root)]):
            if folder.name.lower() in self.normal_names:
                continue
            names = {image.stem for kind in kinds if kind != folder for image in images[kind]}
            partners = [image for kind in defective if kind != folder for image in images[kind]]
            if folder.name.lower() in MASK_FOLDERS:
                if self.masks.are_masks(folder, names):
                    folders.append(folder)
                elif _number_of_images(folder):
                    raise ValueError(
                        f"{folder}: a folder of this name should contain masks, but its images are "
                        f"photographs, or neither black and white nor named like others: rename "
                        f"it, to test its images as a kind of defect, or remove it"
                    )
            elif self.masks.are_labels(folder, names, [kind.name for kind in defective]):
                folders.append(folder)
            elif folder in images and self.masks.are_certain(folder, names, partners):
                folders.append(folder)
                self._say(f"{folder.name}/ contains black-and-white images: masks")
        return folders

    def _inner_mask_folders(
        self, images: Mapping[Path, Sequence[Path]]
    ) -> Mapping[Path, list[Path]]:
        """Return the mask folders inside of the folders of images, such as ``cut/masks/``."""
        folders: dict[Path, list[Path]] = defaultdict(list)
        for kind, listed in images.items():
            names = {image.stem for image in listed}
            for folder in self._subfolders(kind) if names else []:
                named = folder.name.lower() in MASK_FOLDERS and self.masks.are_masks(folder, names)
                if named or self.masks.are_labels(folder, names):
                    folders[kind].append(folder)
        return folders

    def _places_of_masks(
        self, kind: Path, mask_folders: Sequence[Path], inner: Sequence[Path]
    ) -> list[Path]:
        """Return the folders of a kind's masks: its own before those of all kinds."""
        special = [f for f in mask_folders if self.masks.kind_of(f, [kind.name])]
        shared = [f for f in mask_folders if f.name.lower() in (*MASK_FOLDERS, *LABEL_FOLDERS)]
        others = [f for f in mask_folders if f not in shared and f not in special]
        return [*inner, *special, *(p for f in (*shared, *others) for p in (f / kind.name, f))]

    def _masks_of(
        self, images: Sequence[Path], kind: Path, places: Sequence[Path]
    ) -> dict[Path, Path]:
        """Return the masks of defective images that exist."""
        by_name = [{p.stem.lower(): p for p in reversed(images_in(place))} for place in places]
        neighbours = {image.stem: image for image in images_in(kind)}
        masks = {}
        for image in images:
            names = [f"{image.stem}{ending}".lower() for ending in self.endings]
            listed = [masks_there[n] for masks_there in by_name for n in names if n in masks_there]
            mask = listed[0] if listed else self._mask_next_to(image, neighbours)
            if mask is not None:
                masks[image] = mask
        return masks

    def _expect_all_masks(
        self, mask_folders: Sequence[Path], inner_folders: Mapping[Path, list[Path]]
    ) -> None:
        """Give a defective image without mask its expected path, if others have masks."""
        if not self.form.has_masks:
            return
        for number, sample in enumerate(self.form.labelled):
            if sample.label and sample.mask is None:
                ending = next((e for e in self.endings if e), "")
                kind = sample.image.parent
                places = self._places_of_masks(kind, mask_folders, inner_folders.get(kind, []))
                folder = next((p for p in places if images_in(p)), places[0] if places else kind)
                expected = folder / f"{sample.image.stem}{ending}.png"
                self.form.labelled[number] = replace(sample, mask=expected)

    def _mask_next_to(self, image: Path, neighbours: Mapping[str, Path]) -> Path | None:
        """Return the mask of an image in its own folder, whose content must be that of a mask."""
        for ending in filter(None, self.endings):
            mask = neighbours.get(f"{image.stem}{ending}")
            if mask is not None and looks_like_a_mask(mask):
                return mask
        return None

    # -- texts -----------------------------------------------------------------------------------

    def _say(self, sentence: str) -> None:
        self.form.remarks.append(sentence)

    def _count(self, what: str, count: int) -> None:
        if count:
            self.unused[what] = self.unused.get(what, 0) + count


def _number_of_images(folder: Path) -> int:
    """Return the number of images in a tree; links are not followed."""
    inner = [f for f in subfolders(folder) if not f.is_symlink()]
    return len(images_in(folder)) + sum(map(_number_of_images, inner))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
