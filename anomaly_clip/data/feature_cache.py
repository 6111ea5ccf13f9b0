"""Features of a frozen encoder for a data set, kept on disk in half precision.

Later epochs and later runs then neither decode images nor run the encoder. Each image has its own
file, named by a hash of everything that the features depend on: the encoder, the bytes of the image
and its mask, and the preprocessing. Files are written atomically, so any number of processes may
fill one folder, and an interruption leaves no incomplete file. An image that is listed twice is
stored once. The folder may be deleted at any time, and a run does without it: images whose
features cannot be stored or read are encoded again in each epoch, and rounded to half precision.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from anomaly_clip import images
from anomaly_clip.cache_files import is_cached, read_cached, warn_of_cache, write_cached
from anomaly_clip.data import samples, transforms
from anomaly_clip.data.file_hashes import FileHashes
from anomaly_clip.data.samples import SampleDataset
from anomaly_clip.files import cache_folder, source_hash
from anomaly_clip.progress import track
from anomaly_clip.records import Encoder

__all__ = ["FeatureCache", "FeatureFiles"]

GB = 1e9
RESERVE = 1.0  # GB of disk space that must stay free
MASK = "mask"


@dataclass(frozen=True)
class FeatureFiles:
    """Files with the features of each row of a data set; sent to the data loader workers.

    Args:
        files: One file per row of the data set.
    """

    files: Sequence[Path]

    def load(self, row: int) -> dict[str, Tensor] | None:
        """Return the features of a row, in half precision, and ``mask`` if the row has one.

        If the file is missing or damaged, warn once a run and return None. A damaged file is
        removed, so that the next run makes it again.
        """
        file = self.files[row]
        content = read_cached(file, file.stem)
        with suppress(SafetensorError):
            if content is not None:
                return load(content)
        if file.exists():
            reason = OSError(errno.EIO, "a file in it is damaged")
            with suppress(OSError):
                file.unlink()
        else:
            reason = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        warn_of_cache(file.parents[1], reason)
        return None


class _UnusableError(Exception):
    """The folder of the features cannot be used, for a reason that its only argument states."""


class FeatureCache:
    """Cache of features on disk, filled by one process or several.

    Args:
        limit: Maximum size of the folder in GB (1e9 bytes).
        setting: Name of the option that sets the limit, for messages.
        folder: The folder of the features; default: a subfolder of the cache folder.
        processes: Number of processes that share the work, and the rank of this one.
        agree: Function that takes whether this process succeeded, waits for the other processes,
            and returns whether all succeeded.
    """

    def __init__(
        self,
        limit: float,
        setting: str,
        folder: Path | None = None,
        processes: tuple[int, int] = (1, 0),
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.limit = limit
        self.setting = setting
        self.folder = folder or cache_folder() / "features"
        self.processes = processes
        self.agree = agree

    def fill(
        self, dataset: SampleDataset, encoder: Encoder, batch_size: int, num_workers: int
    ) -> FeatureFiles | None:
        """Encode the images that have no file yet; return the files of all images.

        If a process cannot write into its folder, warn and return None in all processes.

        Raises:
            FileNotFoundError: If an image is missing.
            ValueError: If the features would exceed the limit, an image cannot be read, or another
                process fails.
        """
        features = FeatureFiles([self._file(name) for name in _names(dataset, encoder.key)])
        rows = {file: row for row, file in reversed(list(enumerate(features.files)))}
        whole = _whole_files(list(rows))
        missing = sorted(row for file, row in rows.items() if file not in whole)
        number, rank = self.processes
        try:
            with self._together():  # no process writes before all have looked for missing files
                if missing:
                    self._check_room(dataset, encoder, missing)
            with self._together():
                # The rows of a process do not depend on which files others have already written.
                share = [row for row in missing if row % number == rank]
                self._encode(dataset, encoder, features, share, batch_size, num_workers)
            # Machines with separate folders also need the rows that other machines have encoded.
            with self._together():
                whole = _whole_files([features.files[row] for row in missing])
                left = [row for row in missing if features.files[row] not in whole]
                self._encode(dataset, encoder, features, left, batch_size, num_workers)
        except _UnusableError as error:
            warn_of_cache(self.folder, error.args[0])
            return None
        return features

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for the other processes at the end of the block; if one fails, all fail."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.agree(failure is None):
            return
        if self.agree(failure is None or isinstance(failure, _UnusableError)):
            raise failure or _UnusableError(OSError("another process cannot use its folder"))
        if failure is not None and not isinstance(failure, _UnusableError):
            raise failure
        raise ValueError(
            f"process {self.processes[1]} of {self.processes[0]}: another process could not "
            f"encode its features; see the error message of that process"
        )

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _check_room(self, dataset: SampleDataset, encoder: Encoder, missing: list[int]) -> None:
        with torch.no_grad():
            first = encoder.encode(dataset[missing[0]]["image"][None].to(encoder.device))
        each = 2 * sum(value.numel() for value in first.values())
        needed = len(missing) * (each + dataset.mask_size**2 * dataset.has_masks) / GB
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            used = _size(self.folder) / GB
            free = shutil.disk_usage(self.folder).free / GB - RESERVE
        except OSError as error:
            raise _UnusableError(error) from None
        if used + needed > self.limit:
            raise ValueError(
                f"{self.setting} {self.limit:g}: features of {len(missing)} images need "
                f"{needed:.2g} GB, and {used:.2g} GB are already in {self.folder}: raise the "
                f"limit, delete the folder, or set the limit to 0 to disable the cache"
            )
        if needed > free:
            reason = f"features need {needed:.2g} GB, and {max(free, 0):.2g} GB are free"
            raise _UnusableError(OSError(errno.ENOSPC, reason))

    def _encode(
        self,
        dataset: SampleDataset,
        encoder: Encoder,
        files: FeatureFiles,
        rows: list[int],
        batch_size: int,
        num_workers: int,
    ) -> None:
        if not rows:
            return
        loader = DataLoader(Subset(dataset, rows), batch_size, num_workers=num_workers)
        written: list[Path] = []
        for batch in track(loader, "encoding", total=len(loader)):
            try:
                halves = _encoded(encoder, batch["image"])
            except OverflowError as error:
                raise ValueError(
                    f"{error}, in the batch that starts with {batch['path'][0]}: set "
                    f"{self.setting} to 0 to disable the cache"
                ) from None
            for place, row in enumerate(batch["index"].tolist()):
                features = {key: value[place].clone() for key, value in halves.items()}
                if MASK in batch:
                    features[MASK] = batch[MASK][place].clone()
                file = files.files[row]
                try:
                    write_cached(file, file.stem, save(features))
                except OSError as error:
                    _remove(written)  # they would take the last space of the disk
                    raise _UnusableError(error) from None
                written.append(file)


def _encoded(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """Return the features of images, on the CPU."""
    return {key: value.cpu() for key, value in encoder.halves(images).items()}


def _names(dataset: SampleDataset, key: str) -> Iterator[str]:
    """Yield the name of each row's file."""
    code = source_hash(images.__file__, transforms.__file__, samples.__file__, __file__)
    preprocessing = (
        f"{code} {PIL.__version__} "
        f"{dataset.image_size} {dataset.mask_size} "
        f"{dataset.resize} {dataset.mask_filter} {dataset.mask_threshold} {dataset.mask_rule} "
        f"{dataset.has_masks} {dataset.reading.bit_depth}"
    )
    for content in _contents(dataset):
        yield hashlib.sha256(f"{key} {preprocessing} {content}".encode()).hexdigest()


def _contents(dataset: SampleDataset) -> Iterator[str]:
    """Yield the content hash of each row's image and mask."""
    if dataset.read is not None:  # no files: the images are generated or in an array
        for sample in track(dataset.samples, "comparing images"):
            image, mask = dataset.read(sample)
            digest = hashlib.sha256(image.tobytes())
            digest.update(b"" if mask is None else mask.tobytes())
            yield digest.hexdigest()
        return
    files = [s.mask if s.label and dataset.has_masks else None for s in dataset.samples]
    paths = [s.image for s in dataset.samples] + [file for file in files if file is not None]
    digests = FileHashes().sha256_of_all(paths)
    for sample, file in zip(dataset.samples, files, strict=True):
        yield f"{digests[sample.image]} {digests[file] if file is not None else ''}"


def _whole_files(files: Sequence[Path]) -> set[Path]:
    """Return the files that exist and fit their checksums."""
    with ThreadPoolExecutor() as pool:
        whole = pool.map(lambda file: is_cached(file, file.stem), files)
        checked = track(whole, "checking cached features", total=len(files))
        return {file for file, is_whole in zip(files, checked, strict=True) if is_whole}


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()


def _size(folder: Path) -> int:
    """Return the size of all features in a folder, in bytes."""
    total = 0
    for file in folder.glob("*/*.safetensors"):
        try:
            total += file.stat().st_size
        except OSError:  # deleted in the meantime
            continue
    return total
