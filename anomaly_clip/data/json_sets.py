"""Data sets listed by JSON files: ``meta.json`` of zero-shot repositories, and Real-IAD."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.folder_forms import NORMAL_FOLDERS
from anomaly_clip.data.layout import missing_layout, subfolders
from anomaly_clip.documents import load_json

__all__ = ["MetaJSON", "RealIAD", "list_meta_json", "list_real_iad", "read_json"]

META_FILE = "meta.json"
META_FORM = (
    "{split: {category: [{img_path, mask_path, cls_name, specie_name, anomaly}, ...]}} with the "
    "splits train and test"
)
SPLITS: tuple[Split, ...] = ("train", "test")
JSON_FOLDER = "realiad_jsons"
RESOLUTIONS = (1024, 512, 256)
REAL_IAD_LAYOUT = f"{JSON_FOLDER}/<category>.json and realiad_1024/<category>/{{OK,NG}}/"


def read_json(file: Path, form: str = META_FORM) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: The file.
        form: The expected form, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON in UTF-8, not an object, or an object repeats a key.
    """
    try:
        content = load_json(file.read_text(encoding="utf-8-sig"), _unique)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: there is no such file; restore it from the data set's archive"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a JSON file in UTF-8 ({error}); save it as one") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a JSON object, got {type(content).__name__}; the form is {form}"
        )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON file, whose keys must differ."""
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} occurs twice in one object")
    return dict(pairs)


def below(root: Path, path: Any, where: str, what: str = "an image") -> Path:
    """Return the path of a file of a listing, which must be below ``root``.

    Absolute paths must begin with ``root``, others are relative to it. Windows' separators are
    accepted.

    Args:
        root: The folder.
        path: The path in the listing.
        where: The place in the listing, for messages.
        what: The file, for messages.

    Raises:
        ValueError: If it is not a path, or leads elsewhere.
    """
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"{where}: expected the path of {what}, got {path!r}")
    relative = Path(path.replace("\\", "/"))
    if relative.is_absolute() and root.absolute() in relative.parents:
        relative = relative.relative_to(root.absolute())
    absolute = relative.is_absolute() or PureWindowsPath(str(relative)).is_absolute()
    if absolute or ".." in relative.parts:
        raise ValueError(f"{where}: {path} is not below {root}: use paths relative to it")
    return root / relative


class _Entries:
    """The images of a listing so far, to find those that are listed twice."""

    def __init__(self) -> None:
        self.places: dict[Path, str] = {}

    def add(self, image: Path, where: str) -> None:
        """Add an image.

        Raises:
            ValueError: If it is listed already.
        """
        if image in self.places:
            first = self.places[image].rpartition(", ")[2]
            raise ValueError(f"{where}: {image} is also {first}: remove one of them")
        self.places[image] = where


def _label(entry: Mapping[str, Any], where: str) -> bool:
    """Return whether an entry is anomalous: 0 or 1, as a number, a boolean or text."""
    value = entry.get("anomaly")
    text = str(value).strip().lower() if isinstance(value, str | bool | int | float) else ""
    if text in ("0", "0.0", "false"):
        return False
    if text in ("1", "1.0", "true"):
        return True
    raise ValueError(f"{where}: expected anomaly 0 or 1, got {value!r}")


def _check_list(entries: Any, where: str) -> None:
    """Check that the entries of a category are a list.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(entries, list):
        raise ValueError(
            f"{where}: expected a list of entries, got {json.dumps(entries)}: list them, or remove "
            f"the category"
        )


def list_meta_json(
    file: Path, content: Mapping[str, Any], category: str, split: Split
) -> Iterator[Sample]:
    """Yield the entries of a category in the order of the file.

    An anomalous image may be without mask (``mask_path`` empty or missing). A normal image may have
    one, which must be empty. Anomalous training images are left out: methods train on normal ones
    only.

    Args:
        file: The file; paths in it are relative to its folder.
        content: Its content.
        category: Key of the category.
        split: Key of the split.

    Raises:
        ValueError: If an entry is malformed, contradicts itself, is listed twice, or leads out of
            the file's folder.
    """
    entries = content.get(split, {}).get(category, [])
    _check_list(entries, f"{file}: {split}, {category}")
    listed = _Entries()
    for number, entry in enumerate(entries, start=1):
        where = f"{file}: {split}, {category}, entry {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object with img_path and anomaly, got {entry}")
        label = _label(entry, where)
        image = below(file.parent, entry.get("img_path"), where)
        listed.add(image, where)
        name = entry.get("cls_name") or category
        if name != category:
            raise ValueError(
                f"{where}: cls_name {name!r} differs from the category {category!r} that lists it: "
                f"correct one of them"
            )
        defect = str(entry.get("specie_name") or ("anomaly" if label else "good"))
        if label and defect.lower() in NORMAL_FOLDERS:
            raise ValueError(
                f"{where}: specie_name {defect!r} contradicts anomaly {entry['anomaly']}: correct "
                f"one of them"
            )
        if label and split == "train":
            continue
        mask = entry.get("mask_path") or None
        path = None if mask is None else below(file.parent, mask, where, "a mask")
        if path is not None and not label and not path.is_file():
            path = None
        yield Sample(image, category, label, path, defect)


class MetaJSON(AnomalyData):
    """A data set listed by ``meta.json``, the file that many zero-shot repositories exchange.

    Args:
        root: The folder with ``meta.json``, or a file of that form; paths in it are relative to its
            folder.
        shared: Arguments of all data modules.
    """

    dataset_name: ClassVar[str] = "MetaJSON"

    def __init__(self, root: str, **shared: Any) -> None:
        path = Path(root).expanduser()
        is_file = path.suffix.lower() == ".json"
        super().__init__(root=str(path.parent if is_file else path), **shared)
        self.file = path if is_file else path / META_FILE

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it does not have the expected form.
        """
        if not self.file.is_file():
            raise missing_layout(self.root, f"{self.file.name}, {META_FORM}", "MetaJSON")
        content = read_json(self.file)
        of_splits = {name: part for name, part in content.items() if name in SPLITS}
        if not any(of_splits.values()) or not all(isinstance(v, dict) for v in of_splits.values()):
            keys = ", ".join(map(str, content)) or "nothing"
            raise ValueError(f"{self.file}: expected {META_FORM}, got the keys {keys}")
        if any(not name.strip() for part in of_splits.values() for name in part):
            raise ValueError(f"{self.file}: a category has the name '': give it a name")
        for split, part in of_splits.items():
            for category, entries in part.items():
                _check_list(entries, f"{self.file}: {split}, {category}")
        return content

    @property
    def splits(self) -> tuple[Split, ...]:  # type: ignore[override]
        """The splits with entries."""
        return tuple(name for name in SPLITS if any(self.content.get(name, {}).values()))

    @property
    def has_masks(self) -> bool:
        """True if anomalous test images have masks.

        Raises:
            ValueError: If only some of them have, and masks are used.
        """
        samples = [
            s for name in self.categories for s in self.listing.rows(name, "test") if s.label
        ]
        without = [sample for sample in samples if sample.mask is None]
        if without and len(without) < len(samples) and self.listing.needs_masks:
            raise ValueError(
                f"{self.file}: {len(without)} of {len(samples)} anomalous test images have no "
                f"mask_path, such as {without[0].image}: give all of them one, or none"
            )
        return len(without) < len(samples)

    def left_out(self, stage: str) -> dict[str, list[Path]]:
        """Return the anomalous training images, and the images of splits that are not used."""
        names = self.train_categories if stage == "fit" and self.auxiliary is None else []
        parts = {
            "anomalous training image": [
                entry
                for name in names
                for entry in self.content.get("train", {}).get(name, [])
                if isinstance(entry, dict) and _label(entry, name)
            ],
            "image of another split": [
                entry
                for split, part in self.content.items()
                if split not in SPLITS and isinstance(part, dict)
                for entries in part.values()
                if isinstance(entries, list)
                for entry in entries
                if isinstance(entry, dict)
            ],
        }
        return {
            kind: [below(self.root, entry.get("img_path"), str(self.file)) for entry in entries]
            for kind, entries in parts.items()
        }

    def find_categories(self) -> list[str]:
        """Return the categories of all splits, sorted."""
        return sorted({name for split in SPLITS for name in self.content.get(split, {})})

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_meta_json`."""
        return list_meta_json(self.file, self.content, category, split)


def list_real_iad(
    images: Path, file: Path, content: Mapping[str, Any], category: str, split: Split
) -> Iterator[Sample]:
    """Yield the images of a category in the order of its JSON file.

    Anomalous training images are left out: methods train on normal ones only.

    Args:
        images: The folder with the category's images.
        file: The JSON file of the category.
        content: Its content.
        category: The category.
        split: Key of the split.

    Raises:
        ValueError: If an entry is malformed or listed twice, or belongs to another category.
    """
    meta, entries = content.get("meta"), content.get(split)
    if not isinstance(meta, dict) or not isinstance(entries, list):
        raise ValueError(
            f"{file}: expected the keys meta, train and test, got {', '.join(content)}"
        )
    normal = meta.get("normal_class", "OK")
    listed = _Entries()
    for number, entry in enumerate(entries, start=1):
        where = f"{file}: {split}, entry {number}"
        if not isinstance(entry, dict) or "anomaly_class" not in entry:
            raise ValueError(f"{where}: expected image_path and anomaly_class, got {entry}")
        name = entry.get("category") or category
        if name != category:
            raise ValueError(
                f"{where}: category {name!r} differs from the name of the file: correct one of them"
            )
        image = below(images, entry.get("image_path"), where)
        listed.add(image, where)
        label = entry["anomaly_class"] != normal
        if label and split == "train":
            continue
        mask = below(images, entry.get("mask_path"), where, "a mask") if label else None
        yield Sample(image, category, label, mask, str(entry["anomaly_class"]) if label else "good")


class RealIAD(AnomalyData):
    """Real-IAD (Wang et al., CVPR 2024): 30 categories, each seen from five sides.

    Args:
        root: The folder with the images and the folder of JSON files.
        jsons: The folder of JSON files: ``realiad_jsons``, or ``realiad_jsons_sv`` for one view.
        resolution: Side of the images, which are in ``realiad_<resolution>``; default: the largest
            that exists.
        shared: Arguments of all data modules.
    """

    dataset_name: ClassVar[str] = "RealIAD"

    def __init__(
        self,
        root: str,
        jsons: str = JSON_FOLDER,
        resolution: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(root=root, **shared)
        self.jsons = jsons
        self.resolution = resolution
        self._contents: dict[str, dict[str, Any]] = {}

    @property
    def json_folder(self) -> Path:
        """The folder of the JSON files; archives nest it in one of the same name."""
        nested = self.root / self.jsons / self.jsons
        return nested if nested.is_dir() else self.root / self.jsons

    @property
    def image_folder(self) -> Path:
        """The folder of the images.

        Raises:
            FileNotFoundError: If there is none.
        """
        sizes = RESOLUTIONS if self.resolution is None else (self.resolution,)
        for size in sizes:
            folder = self.root / f"realiad_{size}"
            if subfolders(folder):
                return folder
        names = " or ".join(f"realiad_{size}/" for size in sizes)
        raise missing_layout(self.root, f"the images in {names}")

    def find_categories(self) -> list[str]:
        """Return the names of the JSON files, sorted."""
        names = sorted(path.stem for path in self.json_folder.glob("*.json"))
        if not names:
            raise missing_layout(self.root, REAL_IAD_LAYOUT, "RealIAD")
        return names

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_real_iad`."""
        file = self.json_folder / f"{category}.json"
        if category not in self._contents:
            self._contents[category] = read_json(file, "{meta: {...}, train: [...], test: [...]}")
        images = self.image_folder / category
        return list_real_iad(images, file, self._contents[category], category, split)

    def protocol(self) -> Mapping[str, object]:
        """Return the data settings, with the JSON files and the resolution."""
        used = {"jsons": self.jsons, "resolution": self.image_folder.name}
        return {**super().protocol(), **used}

    def spare_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return nothing: masks lie next to their images, and only the JSON files pair them."""
        return []
