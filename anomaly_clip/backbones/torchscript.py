"""Tensors of a TorchScript archive, read without running any code in it.

OpenAI publishes its CLIP weights as such archives (``ViT-B-16.pt``). ``torch.jit.load`` would
compile the code in the archive. This module reads two kinds of entries of the zip file only:
``data.pkl``, which holds the modules and their attributes, and ``data/0``, ``data/1`` and so on,
the bytes of the tensors. The entries ``code/`` and ``constants.pkl`` are never opened.

A pickle can call any function that its reader looks up for it. The reader here looks up nothing:
each name in ``data.pkl`` is replaced by one of the objects below, and any other name is refused.

- Names below ``__torch__`` are the archive's own classes. Each becomes an empty class that only
  keeps its name and the attributes of its objects.
- ``torch._utils._rebuild_tensor_v2`` becomes a function that cuts a view out of a storage, after
  checking that the view lies within the storage and repeats no element.
- ``torch.FloatStorage`` and the other storage classes become dtypes, ``collections.OrderedDict`` is
  the only real class, and TorchScript's functions for typed lists become functions that return the
  list.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Archive", "ArchiveError", "is_archive", "read_archive"]

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TYPED_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
ACTIVATIONS = ("QuickGELU", "GELU")
MAX_ATTRIBUTES = 1_000_000
"""Attributes to visit at most, so that modules that share others in many layers come to an end."""


class ArchiveError(ValueError):
    """The archive is damaged, or contains something other than modules and tensors."""


class Archive(NamedTuple):
    """Content of a TorchScript archive."""

    state: dict[str, Tensor]
    """Parameters, buffers and other tensors of the modules, by path."""
    activation: str | None
    """Class of the activation, ``QuickGELU`` or ``GELU``; None if there is none, or both."""


class _Object:
    """Object of a class of the archive: its attributes, as they were pickled."""

    name = ""
    attributes: Mapping[str, Any] = {}  # replaced, never changed

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes = state


def is_archive(names: list[str]) -> bool:
    """Return whether the entries of a zip file are those of a TorchScript archive."""
    parts = {name.partition("/")[2] for name in names}
    return {"data.pkl", "constants.pkl"} <= parts


def read_archive(path: Path) -> Archive:
    """Read the tensors of a TorchScript archive; see the module's text on safety.

    Args:
        path: A zip file for which :func:`is_archive` is true.

    Raises:
        ArchiveError: If ``data.pkl`` refers to anything but modules and tensors, or the archive is
            damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except ArchiveError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ArchiveError(f"its data.pkl is damaged ({type(error).__name__})") from None


def _read(archive: zipfile.ZipFile) -> Archive:
    root = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
    folder = root.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = archive.read(f"{folder}byteorder")
        if order != b"little":
            raise ArchiveError(f"its byte order is {order!r}, not little")
    reader = _Reader(archive, folder)
    top = reader.load()
    state: dict[str, Tensor] = {}
    activations = set()
    for count, (key, value) in enumerate(_walk(top)):
        if count >= MAX_ATTRIBUTES:
            raise ArchiveError(f"its modules have more than {MAX_ATTRIBUTES} attributes")
        if isinstance(value, Tensor):
            state[key] = value
        elif isinstance(value, _Object):
            activations |= {value.name} & set(ACTIVATIONS)
    return Archive(state, activations.pop() if len(activations) == 1 else None)


def _walk(top: object) -> Iterator[tuple[str, object]]:
    """Yield the path and the value of every attribute, depth first, in the order of the pickle."""
    waiting: list[tuple[str, object, frozenset[int]]] = [("", top, frozenset())]
    while waiting:
        key, value, above = waiting.pop()
        yield key, value
        if isinstance(value, _Object) and id(value) not in above:  # not its own attribute
            prefix = f"{key}." if key else ""
            inside = above | {id(value)}
            attributes = reversed(list(value.attributes.items()))
            waiting += [(f"{prefix}{name}", child, inside) for name, child in attributes]


class _Reader(pickle.Unpickler):
    """Unpickler that looks up no name; see the module's text."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(_stored(archive, f"{folder}data.pkl")))
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}
        self._classes: dict[str, type[_Object]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name in the pickle.

        Raises:
            ArchiveError: If there is none.
        """
        if module == "__torch__" or module.startswith("__torch__."):
            full = f"{module}.{name}"
            if full not in self._classes:
                self._classes[full] = type("Object", (_Object,), {"name": name})
            return self._classes[full]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _View()
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name in TYPED_LISTS:
            return _Same()
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _Same()
        raise ArchiveError(
            f"its data.pkl refers to {module}.{name}, which could run code, and is rejected"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the storage ``(n,)`` that a tensor refers to.

        Raises:
            ArchiveError: If it is missing or has another size.
        """
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ArchiveError("its data.pkl refers to something other than tensors")
        if key not in self._storages:
            content = bytearray(_stored(self._archive, f"{self._folder}data/{key}"))
            if len(content) != count * dtype.itemsize:
                raise ArchiveError(f"the tensor data/{key} has {len(content)} bytes")
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else empty
        return self._storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return an uncompressed entry; TorchScript compresses none, so that sizes are as they seem."""
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise ArchiveError(f"it has no entry {name}") from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ArchiveError(f"its entry {name} is compressed")
    return archive.read(entry)


class _Same:
    """Function that returns its first argument; a new object each time, without attributes."""

    __slots__ = ()

    def __call__(self, items: Any, *_: object) -> Any:
        return items


class _View:
    """Function that returns a view of a storage; a new object each time, without attributes.

    In slices and transposes, each stride exceeds the largest offset that smaller strides reach.
    Only such views are accepted; no element occurs twice in them.
    """

    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
        """Return a view; the storage must contain all of it, and no element may occur twice.

        Raises:
            ArchiveError: If the view exceeds the storage, or its strides could repeat elements.
        """
        size, stride = tuple(map(int, size)), tuple(map(int, stride))
        count = math.prod(size)
        if count:
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            inside = min((offset, *size, *stride, last)) >= 0 and last < len(storage)
            if not inside or count > len(storage):
                raise ArchiveError(f"a tensor {size} exceeds its {len(storage)} elements")
            reach = 0
            for step, n in sorted(zip(stride, size, strict=True)):
                if n > 1 and step <= reach:
                    raise ArchiveError(f"a tensor {size} with strides {stride} repeats elements")
                reach += (n - 1) * step
        return storage.as_strided(size, stride, offset)
