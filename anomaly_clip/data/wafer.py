"""``MixedWM38``: wafer maps with mixed defect patterns, all in one ``.npz`` file."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.cache_files import is_cached, warn_of_cache, write_cached
from anomaly_clip.data.dataset import AnomalyData, Reader, Sample, Split
from anomaly_clip.data.file_hashes import FileHashes
from anomaly_clip.data.layout import missing_layout
from anomaly_clip.data.transforms import Resize
from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.files import cache_folder

__all__ = ["PATTERNS", "MixedWM38", "WaferMaps"]

PATTERNS = ("Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Scratch", "Random")
"""Names of the target columns."""

LEVELS = 3  # blank, pass, fail; a few stray 3s in the file count as fail
STEP = 127  # grey values per level
BLOCK = 1 << 22  # values that are converted at once, which saves memory
MAX_NAMES = 200  # characters of the names in a message
VERSION = 1  # increase it when a file is converted to other arrays


class WaferMaps:
    """The two arrays of the published file: maps uint8 ``(n, H, W)`` and targets bool ``(n, 8)``.

    They are cached on disk as bytes, an eighth of the size of the file's integers. Every data
    loader worker memory-maps the cached arrays.

    Args:
        file: The ``.npz`` file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __getstate__(self) -> dict[str, Path]:
        return {"file": self.file}

    @cached_property
    def maps(self) -> NDArray[np.uint8]:
        """The levels of all maps, ``(n, H, W)``."""
        return self._arrays[0]

    @cached_property
    def targets(self) -> NDArray[np.bool_]:
        """The patterns that each map shows, ``(n, 8)``."""
        return self._arrays[1].astype(bool)

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        folder = cache_folder() / "wafers"
        digest = FileHashes().sha256(self.file)
        files = [folder / f"{digest}-{name}.npy" for name in ("maps", "targets")]
        identities = [f"{VERSION} {file.name}" for file in files]
        if all(map(is_cached, files, identities)):
            with suppress(OSError, ValueError, EOFError):  # converted again
                # The checksum at the end of the file is not part of the mapped array.
                maps, targets = (np.load(f, mmap_mode="r", allow_pickle=False) for f in files)
                return maps, targets
        arrays = read_wafers(self.file)
        try:
            for file, identity, array in zip(files, identities, arrays, strict=True):
                content = io.BytesIO()
                np.save(content, array)
                write_cached(file, identity, content.getvalue())
        except OSError as error:  # the file is converted again each time
            warn_of_cache(folder, error)
        return arrays


def read_wafers(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the levels ``(n, H, W)`` and the targets ``(n, 8)`` of the published file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, contains Python objects, or has unexpected arrays.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if not {"arr_0.npy", "arr_1.npy"} <= set(archive.namelist()):
                raise ValueError(
                    f"{file}: expected arrays arr_0 (maps) and arr_1 (targets); found "
                    f"{', '.join(names)[:MAX_NAMES] or 'nothing'}; use the published file"
                )
            maps, targets = (_Member(archive, f"{name}.npy") for name in ("arr_0", "arr_1"))
            if maps.dtype.hasobject or targets.dtype.hasobject:
                raise ValueError(
                    f"{file} contains Python objects, which are not loaded because they can run "
                    f"code: use the published file"
                )
            count = maps.shape[0] if maps.shape else 0
            fits = len(maps.shape) == 3 and targets.shape == (count, len(PATTERNS)) and count > 0
            fits = fits and np.issubdtype(maps.dtype, np.integer)
            levels = maps.read(LEVELS) if fits else None
            patterns = targets.read(1) if levels is not None else None
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: there is no such file; correct data.root, or download the file again"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # zip, zlib and numpy raise many types
        if str(error).startswith(str(file)):
            raise
        raise ValueError(
            f"{file}: the file is damaged, or not an .npz file ({error}): download it again"
        ) from None
    if levels is None or patterns is None:
        raise ValueError(
            f"{file}: expected maps (n, 52, 52) of integers 0 to 2 and targets (n, 8) of 0 and 1, "
            f"got {maps.shape} of {maps.dtype} and {targets.shape} of {targets.dtype}; use the "
            f"published file"
        )
    return np.minimum(levels, LEVELS - 1, out=levels), patterns


class _Member:
    """An array in an ``.npz`` file, of which only the header is read at first.

    Raises:
        ValueError: If it is no array, or has another size than its header states.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive, self._entry = archive, archive.getinfo(name)
        with archive.open(self._entry) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"{name} has the unknown format {version}")
            read = np.lib.format.read_array_header_1_0
            read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, self._by_columns, self.dtype = read(stream)
            self._start = stream.tell()
        size = math.prod(self.shape) * self.dtype.itemsize
        if not self.dtype.hasobject and self._start + size != self._entry.file_size:
            raise ValueError(f"{name} has another size than the {self.shape} that it states")

    def read(self, highest: int) -> NDArray[np.uint8] | None:
        """Return the values as bytes, converted block by block; None if one is out of range."""
        flat = np.empty(math.prod(self.shape), np.uint8)
        with self._archive.open(self._entry) as stream:
            stream.read(self._start)
            for start in range(0, len(flat), BLOCK):
                part = flat[start : start + BLOCK]
                content = stream.read(len(part) * self.dtype.itemsize)
                values = np.frombuffer(content, self.dtype, len(part))
                if not (values.min() >= 0 and values.max() <= highest):
                    return None
                part[:] = values
                if not np.array_equal(part, values):
                    return None
            stream.read(1)  # to the end of the file, where its checksum is compared
        return flat.reshape(self.shape, order="F" if self._by_columns else "C")


class MixedWM38(AnomalyData):
    """MixedWM38 (Wang et al., 2020): 38,015 wafer maps, each with zero to four of eight defects.

    A data set for classification: training images show defects, too. The split follows the authors'
    script (a fifth for testing, seed 10), but is stratified, so that both parts contain every class
    (see ``docs/data.md``). All three channels of an image are equal: the level times 127, resized
    by nearest neighbour.

    Args:
        root: The ``.npz`` file, or the folder that contains it.
        targets: single: one class per map (a class for each combination of patterns that occurs);
            multi: the eight patterns.
        test_share: Fraction of the maps in the test split.
        split_seed: Seed of the split.
        shared: Arguments common to all data modules.
    """

    dataset_name: ClassVar[str] = "MixedWM38"

    def __init__(
        self,
        root: str,
        targets: Literal["single", "multi"] = "single",
        test_share: float = 0.2,
        split_seed: int = 10,
        resize: Resize = Resize(filter="nearest"),
        **shared: Any,
    ) -> None:
        super().__init__(root=root, resize=resize, **shared)
        check_at_least("data.split_seed", split_seed, 0)
        check_between("data.test_share", test_share, 0, 1, open_low=True, open_high=True)
        self.targets = targets
        self.test_share = test_share
        self.split_seed = split_seed

    @property
    def has_masks(self) -> bool:
        """False: there are no pixel labels."""
        return False

    @property
    def on_disk(self) -> bool:
        """False: all maps are in one file."""
        return False

    @property
    def known_duplicates(self) -> int | None:
        """None, for unknown, if the file has the published number of maps; otherwise 0."""
        return self.info.duplicates if len(self.wafers.targets) == self.info.total else 0

    @cached_property
    def wafers(self) -> WaferMaps:
        """The file's arrays.

        Raises:
            FileNotFoundError: If there is no ``.npz`` file, or more than one.
        """
        if self.root.is_file():
            return WaferMaps(self.root)
        files = sorted(self.root.glob("*.npz")) if self.root.is_dir() else []
        if len(files) != 1:
            expected = "MixedWM38.npz (or Wafer_Map_Datasets.npz)"
            if files:
                expected += f" alone, not {len(files)} .npz files"
            raise missing_layout(self.root, expected, self.dataset_name)
        return WaferMaps(files[0])

    @cached_property
    def classes(self) -> NDArray[np.bool_]:
        """The combinations of patterns that occur, sorted, ``(K, 8)``."""
        return cast("NDArray[np.bool_]", np.unique(self.wafers.targets, axis=0))

    @property
    def target_names(self) -> list[str]:
        """Names of the columns of a batch's ``target``."""
        if self.targets == "multi":
            return list(PATTERNS)
        return [pattern_name(row) for row in self.classes]

    @cached_property
    def _parts(self) -> dict[Split, NDArray[np.int64]]:
        from sklearn.model_selection import train_test_split  # most of a second to import

        targets = self.wafers.targets
        numbers = np.unique(targets, axis=0, return_inverse=True)[1].ravel()
        try:
            train, test = train_test_split(
                np.arange(len(targets)),
                test_size=self.test_share,
                random_state=self.split_seed,
                stratify=numbers,
            )
        except ValueError as error:
            raise ValueError(
                f"{self.wafers.file}: with data.test_share {self.test_share}, the maps cannot be "
                f"split so that both parts contain every class ({error}): change data.test_share, "
                f"or add maps of each class"
            ) from None
        return {"train": np.sort(train), "test": np.sort(test)}

    def find_categories(self) -> list[str]:
        """Return the only category."""
        _ = self.wafers
        return ["wafer map"]

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """Yield a split's maps in the order of the file, named ``FILE/<number>``."""
        targets, classes = self.wafers.targets, self.classes
        for number in self._parts[split]:
            row = targets[number]
            target = row if self.targets == "multi" else (classes == row).all(axis=1)
            yield Sample(
                self.wafers.file / f"{number:05d}",
                category,
                label=bool(row.any()),
                defect=pattern_name(row),
                target=tuple(bool(value) for value in target),
            )

    def protocol(self) -> Mapping[str, object]:
        """Return the data settings to record with the metrics."""
        return {
            **super().protocol(),
            "targets": self.targets,
            "test_share": self.test_share,
            "split_seed": self.split_seed,
        }

    def reader(self) -> Reader:
        """Return the function that reads a map from the file."""
        return partial(_read_map, wafers=self.wafers)


def pattern_name(row: NDArray[np.bool_]) -> str:
    """Return the names of a map's patterns joined by ``+``, or ``good`` if it has none.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.data.wafer import pattern_name
        >>> pattern_name(np.array([1, 0, 0, 1, 0, 0, 0, 0], bool))
        'Center+Edge-Ring'
    """
    return "+".join(name for name, shown in zip(PATTERNS, row, strict=True) if shown) or "good"


def _read_map(sample: Sample, wafers: WaferMaps) -> tuple[NDArray[np.uint8], None]:
    levels = wafers.maps[int(sample.image.name)]
    return np.repeat((levels * np.uint8(STEP))[..., None], 3, axis=2), None
