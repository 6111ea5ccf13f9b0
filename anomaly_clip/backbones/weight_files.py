"""Files with weights: recognised by their content, and read without running any code in them.

The first bytes decide how a file is read, not its name: files of the model hub's cache have no
suffix, and an interrupted download keeps the suffix of what it should have been. Read are
safetensors files, files that ``torch.save`` has written, as far as they hold tensors and plain
values, and TorchScript archives (:mod:`anomaly_clip.backbones.torchscript`). Every other form is
refused by name.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomaly_clip.backbones.torchscript import ArchiveError, is_archive, read_archive
from anomaly_clip.errors import reason
from anomaly_clip.exhaustion import explain_exhaustion

__all__ = [
    "BARE",
    "FileContent",
    "WeightFileError",
    "check_floating",
    "in_one_sentence",
    "listed",
    "read_content",
]

HEAD = 4096  # bytes that the recognition of a file reads
SAFETENSORS_LENGTH = 8  # bytes with the length of the header, which follows them
LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"
"""Number at the start of the files that ``torch.save`` wrote before PyTorch 1.6."""
MAX_SHOWN = 3
MAX_UNPACKING = 20
"""Largest ratio of the unpacked size of an archive to its size."""
SMALLEST_BOMB = 1 << 26  # bytes; less is unpacked whatever the ratio
MAX_REPEATED_BYTES = 2**30
"""Largest number of bytes that views of fewer stored values may add up to."""
MIN_BYTES = 2  # of a number in weights that are not quantised

AGAIN = "download or copy it again"
UNPACK = "unpack it and give the weights file in it"
ANOTHER = "give weights of PyTorch: a .safetensors file, or a state dict saved with torch.save"
BARE = "save the state dict alone (torch.save(model.state_dict(), FILE)) and give that file"

SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run git lfs pull"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes them", ANOTHER),
    (b"GGUF", "a GGUF file", ANOTHER),
    (b"\x93NUMPY", "a NumPy array", ANOTHER),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x89PNG", "an image", ANOTHER),
    (b"\xff\xd8\xff", "an image", ANOTHER),
    (b"%PDF", "a PDF document", ANOTHER),
)
"""First bytes of other forms, their names, and the way out."""


class WeightFileError(ValueError):
    """The file cannot be used.

    Args:
        form: The form of the file, as the end of "the file cannot be read (it is ...)".
        way_out: Advice to the user, in the imperative.
    """

    def __init__(self, form: str, way_out: str) -> None:
        super().__init__(f"{form}; {way_out}")
        self.form, self.way_out = form, way_out


class FileContent(NamedTuple):
    """Content of a file with weights."""

    content: Any
    """A state dict of tensors, or what a training program has saved around it."""
    activation: str | None = None
    """Class of the activation, ``QuickGELU`` or ``GELU``, if the file states it."""


def read_content(path: Path) -> FileContent:
    """Read a file with weights; no code in it is run.

    Args:
        path: An existing file.

    Raises:
        WeightFileError: If the file has another form, is damaged, or holds objects that are neither
            tensors nor plain values.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        size = path.stat().st_size
    except OSError as error:
        raise WeightFileError(
            f"it cannot be opened: {error.strerror or error}", "check its permissions"
        ) from None
    if head[:4] == b"PK\x03\x04":
        return _read_zip(path)
    if head[SAFETENSORS_LENGTH:][:1] == b"{":
        return FileContent(_read_safetensors(path, head, size))
    if head[:1] == b"\x80":  # a pickle
        if LEGACY_MAGIC not in head[:64]:
            raise WeightFileError(
                "it is a Python pickle that torch.save did not write, which could run code, and is "
                "rejected",
                BARE,
            )
        return FileContent(_torch_load(path))
    raise _other_form(head)


def check_floating(tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are finite floating-point numbers of 16 bits or more, all of them stored.

    Quantised weights mean nothing without their scales, which state dicts keep elsewhere or lack.
    Weights are used in float32, in which they must be finite.

    Args:
        tensors: Weights by name, without counters.

    Raises:
        WeightFileError: If one has another type, is sparse or without values, or contains NaN or
            infinite values.
    """
    repeated = 0
    for key, value in tensors.items():
        if not value.is_floating_point() or value.itemsize < MIN_BYTES:
            raise WeightFileError(
                f"its tensors are quantised ({key} is {value.dtype})",
                "give weights in float32, float16 or bfloat16",
            )
        if value.layout != torch.strided:
            raise WeightFileError(
                f"its tensors are sparse ({key} is {value.layout})",
                "save them dense (tensor.to_dense()) and give that file",
            )
        if value.is_meta:
            raise WeightFileError(
                f"its tensors have no values ({key} is on the device meta)",
                "save the model after its weights are loaded, and give that file",
            )
        repeated += max(value.nbytes - value.untyped_storage().nbytes(), 0)
        if repeated > MAX_REPEATED_BYTES:  # a small file may claim any amount of memory
            raise WeightFileError(
                f"its tensors repeat their elements ({key} has {value.numel()} of them)",
                "save them whole (tensor.clone()) and give that file",
            )
        if not value.float().isfinite().all():
            raise WeightFileError(
                f"its tensors contain NaN or infinite values ({key}, in float32)",
                "download or copy it again, or give weights of a training that did not diverge",
            )


@contextmanager
def in_one_sentence(subject: str) -> Iterator[None]:
    """Turn exceptions of libraries into a ValueError of one sentence.

    Args:
        subject: Option and value that the code in the block reads.

    Raises:
        ValueError: If the block raises anything but ValueError, FileNotFoundError, or an error of
            exhausted memory, which pass unchanged.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # pathlib, torch and open_clip raise many types
        if explain_exhaustion(error) is not None:
            raise
        text = _clean(reason(error)).rstrip(".:; ")
        raise ValueError(
            f"{subject}: the weights cannot be loaded ({type(error).__name__}: {text}); give other "
            f"weights, or correct the model's name or configuration"
        ) from None  # the command line shows the innermost cause


def listed(names: list[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    rest = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _other_form(head: bytes) -> WeightFileError:
    """Return the error for a file that is neither safetensors nor written by ``torch.save``."""
    if not head:
        return WeightFileError("it is empty", AGAIN)
    for start, form, way_out in SIGNATURES:
        if head.startswith(start):
            return WeightFileError(f"it is {form}", way_out)
    if head.lstrip()[:1] == b"<":
        return WeightFileError("it is a web page, as a failed download leaves", AGAIN)
    if head[257:262] == b"ustar":
        return WeightFileError("it is a tar archive", UNPACK)
    if not head.strip(b"\0"):
        return WeightFileError("it begins with zeros, as an interrupted download leaves", AGAIN)
    if _is_text(head):
        return WeightFileError("it is a text file", ANOTHER)
    return WeightFileError("its first bytes are those of no form of weights", ANOTHER)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a letter cut in half at the end
            return False
        text = head[: error.start].decode()
    return all(letter.isprintable() or letter in "\n\r\t" for letter in text)


def _read_safetensors(path: Path, head: bytes, size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    length = int.from_bytes(head[:SAFETENSORS_LENGTH], "little")
    if length + SAFETENSORS_LENGTH > size:
        raise WeightFileError("it is a truncated safetensors file", AGAIN)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        form = f"it is a truncated or damaged safetensors file: {_clean(reason(error))}"
        raise WeightFileError(form, AGAIN) from None
    except (AttributeError, KeyError, TypeError) as error:  # a dtype that torch does not have
        raise WeightFileError(
            f"it is a safetensors file with tensors of an unsupported type: {reason(error)}",
            ANOTHER,
        ) from None


def _read_zip(path: Path) -> FileContent:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            _check_sizes(archive)
    except WeightFileError:
        raise
    except Exception:  # zipfile raises several types
        raise WeightFileError("it is truncated: its table of contents is missing", AGAIN) from None
    if is_archive(names):
        try:
            return FileContent(*read_archive(path))
        except ArchiveError as error:
            raise WeightFileError(
                f"it is a TorchScript archive of which only tensors are read, but {error}",
                "save the state dict with the program that made the archive, and give that file",
            ) from None
    inside = [name.partition("/")[2] for name in names]
    if "data.pkl" in inside:
        _check_sums(path)
        return FileContent(_torch_load(path))
    if any(name.startswith(("archive_format", "models/")) for name in inside):
        raise WeightFileError("it is a program exported by torch.export", BARE)
    if names and all(name.endswith(".npy") for name in names):
        raise WeightFileError("it is an archive of NumPy arrays", ANOTHER)
    raise WeightFileError(f"it is a zip archive of {listed(names) or 'nothing'}", UNPACK)


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Check that an archive does not unpack to many times its size.

    ``torch.save`` compresses nothing, and trained weights can hardly be compressed.
    """
    entries = archive.infolist()
    packed, unpacked = (sum(getattr(e, n) for e in entries) for n in ("compress_size", "file_size"))
    if unpacked > SMALLEST_BOMB and unpacked > MAX_UNPACKING * packed:
        raise WeightFileError(
            f"it is a compressed archive of {packed / 1e6:.1f} MB that unpacks to "
            f"{unpacked / 1e6:.0f} MB, as no weights do",
            ANOTHER,
        )


def _check_sums(path: Path) -> None:
    """Check the checksums of all entries, which ``torch.load`` does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile and zlib raise many types
        form = f"it is a truncated or damaged file of torch.save: {_clean(reason(error))}"
        raise WeightFileError(form, AGAIN) from None
    if damaged is not None:
        raise WeightFileError(
            f"it is damaged: {damaged} does not fit its checksum, so at least one bit has changed",
            AGAIN,
        )


def _torch_load(path: Path) -> object:
    """Read a file of ``torch.save``, restricted to tensors and plain values."""
    try:
        # A file object, because torch.load takes some suffixes for another form.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many types
        message = str(error)
        if match := re.search(r"GLOBAL (\S+)", message):
            raise _objects(match[1]) from None
        if "weights_only" in message or "Unsupported" in message:
            raise _objects(None) from None
        if isinstance(error, MemoryError):
            raise
        form = f"it is a truncated or damaged file of torch.save: {_clean(reason(error))}"
        raise WeightFileError(form, AGAIN) from None


def _objects(name: str | None) -> WeightFileError:
    """Return the error for a pickle with objects of a class, or that calls a function."""
    example = "" if name is None else f" (such as {name})"
    is_model = re.match(r"(torch\.nn|torchvision\.models|timm|open_clip|clip)\.", name or "")
    start = "it is a whole pickled model: " if is_model else ""
    return WeightFileError(
        f"{start}it holds Python objects besides tensors{example}, which could run code, and is "
        f"rejected",
        BARE,
    )


def _clean(text: str) -> str:
    """Return a message of a library without the colours of a terminal, shortened."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)[:200]
