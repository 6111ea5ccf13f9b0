"""Features of a frozen encoder for a data set, kept on disk in half precision.

Later epochs and later runs then pay neither decoding nor the encoder. Each image has a file of its
own, named by all that its content depends on: the encoder, the bytes of image and mask, and how
both become tensors. A file appears whole or not at all, so any number of processes may fill one
folder and be interrupted, and an image in two listings is kept once. The folder may be deleted at
any time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from anomaly_clip import images
from anomaly_clip.data import samples, transforms
from anomaly_clip.data.file_hashes import FileHashes
from anomaly_clip.data.samples import SampleDataset
from anomaly_clip.files import CACHE_VARIABLE, atomic_path, cache_folder, source_hash
from anomaly_clip.progress import track
from anomaly_clip.records import Encoder

__all__ = ["FeatureCache", "FeatureFiles"]

GB = 1e9
RESERVE = 1.0  # GB of the disk that are left to others
MASK = "mask"


@dataclass(frozen=True)
class FeatureFiles:
    """The features of a data set, by row; travels to loading processes.

    Args:
        files: One a row.
    """

    files: Sequence[Path]

    def load(self, row: int) -> dict[str, Tensor]:
        """Return the features of a row, in half precision, and its ``mask`` if it has one.

        Raises:
            ValueError: If they are not there any more, or damaged.
        """
        file = self.files[row]
        try:
            return load(file.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file}: features that were kept there cannot be read ({error}); run the command "
                f"again, which makes them anew"
            ) from None


class FeatureCache:
    """Fills and finds files of features.

    Args:
        limit: Size in GB (1e9 bytes) that the folder may have.
        setting: What the limit is called in messages.
        folder: Where features are kept; default: in the cache folder.
        processes: How many share the work, and which of them this is.
        agree: Waits for the other processes and returns whether all of them have had success.
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
    ) -> FeatureFiles:
        """Encode the images that have no file yet; return the files of all.

        Raises:
            FileNotFoundError: If an image is missing.
            OSError: If the folder cannot be written.
            ValueError: If the folder would be larger than the limit or the disk, an image cannot be
                read, or another process fails.
        """
        features = FeatureFiles([self._file(name) for name in _names(dataset, encoder.key)])
        rows = {file: row for row, file in reversed(list(enumerate(features.files)))}
        missing = sorted(row for file, row in rows.items() if not _is_whole(file))
        number, rank = self.processes
        with self._together():  # no one writes before all have looked
            if missing:
                self._check_room(dataset, encoder, missing)
        with self._together():
            # The rows of a process do not depend on what the others have written already.
            share = [row for row in missing if row % number == rank]
            self._encode(dataset, encoder, features, share, batch_size, num_workers)
        with self._together():  # machines with folders of their own do the others' part, too
            left = [row for row in missing if not _is_whole(features.files[row])]
            self._encode(dataset, encoder, features, left, batch_size, num_workers)
        return features

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for the others at the end; if one process fails, all do."""
        try:
            yield
        except OSError as error:
            self.agree(False)
            if isinstance(error, FileNotFoundError) or not error.strerror:
                raise
            raise OSError(
                f"{self.folder}: features cannot be kept there ({error.strerror}): point "
                f"{CACHE_VARIABLE} at another folder, or set {self.setting} to 0"
            ) from None
        except Exception:
            self.agree(False)
            raise
        if not self.agree(True):
            raise ValueError("another process could not make features; its message says why")

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _check_room(self, dataset: SampleDataset, encoder: Encoder, missing: list[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            first = encoder.encode(dataset[missing[0]]["image"][None].to(encoder.device))
        each = 2 * sum(value.numel() for value in first.values())
        needed = len(missing) * (each + dataset.mask_size**2 * dataset.has_masks) / GB
        there = _size(self.folder) / GB
        if there + needed > self.limit:
            raise ValueError(
                f"{self.setting} {self.limit:g}: features of {len(missing)} images take "
                f"{needed:.2g} GB and {there:.2g} GB are in {self.folder} already: raise it, "
                f"delete the folder, or set it to 0 to keep none"
            )
        free = shutil.disk_usage(self.folder).free / GB - RESERVE
        if needed > free:
            raise ValueError(
                f"{self.folder}: features of {len(missing)} images take {needed:.2g} GB, "
                f"{max(free, 0):.2g} GB are free: point {CACHE_VARIABLE} at another disk, or set "
                f"{self.setting} to 0 to keep none"
            )

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
        for batch in track(loader, "encoding", total=len(loader)):
            try:
                features = _encoded(encoder, batch["image"])
            except OverflowError as error:
                raise ValueError(
                    f"{error} ({batch['path'][0]} or an image after it): set {self.setting} to 0"
                ) from None
            for place, row in enumerate(batch["index"].tolist()):
                if MASK in batch:
                    features[place][MASK] = batch[MASK][place].clone()
                with atomic_path(files.files[row]) as temporary:
                    temporary.write_bytes(save(features[place]))


def _encoded(encoder: Encoder, images: Tensor) -> list[dict[str, Tensor]]:
    """Return the features of each image, on the CPU, in half precision."""
    with torch.no_grad():
        encoded = encoder.encode(images.to(encoder.device))
    halves = {key: value.half().cpu().contiguous() for key, value in encoded.items()}
    for key, value in halves.items():
        if not value.isfinite().all():
            raise OverflowError(f"features {key} are beyond half precision, or not numbers")
    return [{k: v[place].clone() for k, v in halves.items()} for place in range(len(images))]


def _names(dataset: SampleDataset, key: str) -> Iterator[str]:
    """Yield what the features of each row are kept under."""
    code = source_hash(images.__file__, transforms.__file__, samples.__file__, __file__)
    making = (
        f"{code} {PIL.__version__} "
        f"{dataset.image_size} {dataset.mask_size} "
        f"{dataset.resize} {dataset.mask_filter} {dataset.mask_threshold} {dataset.mask_rule} "
        f"{dataset.has_masks}"
    )
    for content in _contents(dataset):
        yield hashlib.sha256(f"{key} {making} {content}".encode()).hexdigest()


def _contents(dataset: SampleDataset) -> Iterator[str]:
    """Yield what identifies the image and the mask of each row."""
    if dataset.read is not None:  # no files: pictures made by code
        for sample in track(dataset.samples, "comparing pictures"):
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


def _is_whole(file: Path) -> bool:
    """Return whether a file is there and as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _size(folder: Path) -> int:
    """Return the bytes of all features in a folder."""
    total = 0
    for file in folder.glob("*/*.safetensors"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # deleted meanwhile
            continue
    return total
