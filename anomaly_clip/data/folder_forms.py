"""Forms of a user's own folder: which images are normal, which are defective, where masks are.

Three forms are understood:

- ``train/``, with normal images in ``train/good/`` or in ``train/`` itself, with or without
  ``test/``;
- ``good/``, alone or next to one folder per kind of defect, also inside ``test/``;
- any other tree of images, which is unlabelled.

The normal folder may also be called ``ok`` or ``normal``, in any case. Masks of defective images
are in ``ground_truth/``, ``masks/``, ``mask/`` or ``gt/``, with or without a folder per kind of
defect, or next to their images. A mask has the name of its image, possibly with an ending such as
``_mask``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anomaly_clip.data.copies import original_of
from anomaly_clip.data.layout import images_in, subfolders
from anomaly_clip.data.samples import Sample
from anomaly_clip.images import read_image

__all__ = ["NORMAL_FOLDERS", "RUN_FILES", "FolderForm", "looks_like_a_mask", "understand"]

NORMAL_FOLDERS = ("good", "ok", "normal")
MASK_FOLDERS = ("ground_truth", "masks", "mask", "gt")
MASK_ENDINGS = ("_mask", "_gt", "_label")
RUN_FILES = tuple(f"config-{verb}.yaml" for verb in ("fit", "validate", "test", "predict"))
"""Files of which the folder of a run contains at least one."""

EXTREME = 8  # grey levels from black or white that still count as black or white
BLACK_AND_WHITE = 0.99  # fraction of such pixels in a mask, whose edges may be antialiased
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
    names = {name.lower() for name in normal_folders}
    endings = ("_mask", "", *MASK_ENDINGS[1:]) if mask_ending is None else (mask_ending,)
    return _Reader(root, category, names, endings).read()


def looks_like_a_mask(image: Path) -> bool:
    """Return whether nearly all pixels of an image are black or white; False if unreadable."""
    try:
        pixels = read_image(image)
    except (OSError, ValueError):
        return False
    extreme = (pixels <= EXTREME) | (pixels >= 255 - EXTREME)
    return bool(extreme.mean() >= BLACK_AND_WHITE)


class _Reader:
    """Implementation of :func:`understand`."""

    def __init__(
        self, root: Path, category: str, normal_names: set[str], endings: Sequence[str]
    ) -> None:
        self.root = root
        self.category = category
        self.normal_names = normal_names
        self.endings = endings
        self.form = FolderForm()
        self.unused: dict[str, int] = {}
        self.runs: set[Path] = set()
        self.visited = {root.resolve()}

    def read(self) -> FolderForm:
        folders = {folder.name.lower(): folder for folder in self._subfolders(self.root)}
        train, test = folders.get("train"), folders.get("test")
        if train is not None and (samples := self._train_samples(train)):
            self.form.train = samples
            others = [f for name, f in folders.items() if name not in ("train", "test")]
            others = [f for f in others if f.name.lower() not in MASK_FOLDERS]
            self._count("images next to train/", sum(map(_number_of_images, others)))
            self._count("images next to train/", len(images_in(self.root)))
            if test is not None:
                self._read_labelled(test, [test, self.root])
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
        normal: list[str] = []
        defective: list[str] = []
        for kind in kinds:
            if kind in mask_folders:
                continue
            is_normal = kind.name.lower() in self.normal_names
            masks = {} if is_normal else self._masks_of(images[kind], kind, mask_folders)
            (normal if is_normal else defective).append(f"{kind.name}/ ({len(images[kind])})")
            deeper = sum(map(_number_of_images, self._subfolders(kind)))
            self._count("images in subfolders of these folders", deeper)
            for image in images[kind]:
                defect = "good" if is_normal else kind.name
                sample = Sample(image, self.category, not is_normal, masks.get(image), defect)
                self.form.labelled.append(sample)
        self._count("images next to the folders", len(images_in(folder)))
        self._expect_all_masks(mask_folders)
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
            if inner.name.lower() in MASK_FOLDERS:
                place = inner.relative_to(self.root).as_posix()
                inside = _number_of_images(inner)
                self._count(f"images in {place}/, which has the name of a mask folder", inside)
                continue
            yield from self._walk(inner)

    # -- masks -----------------------------------------------------------------------------------

    def _mask_folders(
        self, roots: Sequence[Path], images: Mapping[Path, Sequence[Path]]
    ) -> list[Path]:
        """Return the folders that contain masks, by their name or by their content.

        Raises:
            ValueError: If a folder has the name of a mask folder, but contains something else.
        """
        folders = []
        for folder in dict.fromkeys([f for root in roots for f in self._subfolders(root)]):
            named = folder.name.lower() in MASK_FOLDERS
            if folder.name.lower() in self.normal_names or not (named or folder in images):
                continue
            others = {i.stem for kind, listed in images.items() if kind != folder for i in listed}
            if self._contains_masks(folder, others):
                folders.append(folder)
                if not named:
                    self._say(f"{folder.name}/ contains black-and-white images: masks")
            elif named and _number_of_images(folder):
                raise ValueError(
                    f"{folder}: a folder of this name should contain masks, but its images are "
                    f"neither black and white nor named like others: rename it, to test its images "
                    f"as a kind of defect, or remove it"
                )
        return folders

    def _contains_masks(self, folder: Path, others: set[str]) -> bool:
        """Return whether the images of a tree are masks of images with the given names."""
        images = [*images_in(folder), *(i for f in subfolders(folder) for i in images_in(f))]
        named = folder.name.lower() in MASK_FOLDERS
        paired = [i for i in images if any(i.stem.removesuffix(e) in others for e in self.endings)]
        if named and images and len(paired) == len(images):
            return True
        # Without a mask folder's name, both names and content must be those of masks.
        certain = named or len(paired) == len(images)
        inspected = images[:INSPECTED] if named else images
        return certain and bool(images) and all(map(looks_like_a_mask, inspected))

    def _masks_of(
        self, images: Sequence[Path], kind: Path, mask_folders: Sequence[Path]
    ) -> dict[Path, Path]:
        """Return the masks of defective images that exist."""
        places = [place for f in mask_folders for place in (f / kind.name, f)]
        by_name = [{p.stem: p for p in reversed(images_in(place))} for place in places]
        neighbours = {image.stem: image for image in images_in(kind)}
        masks = {}
        for image in images:
            names = [f"{image.stem}{ending}" for ending in self.endings]
            listed = [masks_there[n] for masks_there in by_name for n in names if n in masks_there]
            mask = listed[0] if listed else self._mask_next_to(image, neighbours)
            if mask is not None:
                masks[image] = mask
        return masks

    def _expect_all_masks(self, mask_folders: Sequence[Path]) -> None:
        """Give a defective image without mask its expected path, if others have masks.

        Copies of other images, such as ``a (copy).png``, need no mask and are left out.
        """
        if not self.form.has_masks:
            return
        copies = {
            sample.image
            for sample in self.form.labelled
            if sample.label and sample.mask is None and original_of(sample.image)
        }
        self._count("copies without a mask of defective images", len(copies))
        self.form.labelled = [s for s in self.form.labelled if s.image not in copies]
        for number, sample in enumerate(self.form.labelled):
            if sample.label and sample.mask is None:
                ending = next((e for e in self.endings if e), "")
                folder = mask_folders[0] / sample.defect if mask_folders else sample.image.parent
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
