"""Atomic writing of files, file names that any disk takes, names as text, and the cache folder."""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "CACHE_VARIABLE",
    "ESCAPING",
    "MAX_NAME_BYTES",
    "atomic_path",
    "cache_folder",
    "cut_name",
    "json_text",
    "leftovers",
    "name_bytes",
    "name_key",
    "printable",
    "read_csv",
    "readable",
    "safe_name",
    "source_hash",
    "write_bytes",
    "write_csv",
    "write_json",
]

CACHE_VARIABLE = "ANOMALY_CLIP_CACHE"
MAX_NAME_BYTES = 255
"""Longest file name that common file systems take, in bytes of UTF-8."""
MAX_SAFE_BYTES = 236  # of a name from safe_name, which leaves room for a number and a suffix
HASH_DIGITS = 8
ESCAPING = "anomaly_clip.escaping"
"""Error handler of encodings: what cannot be encoded is written as an escape such as ``\\xe9``."""


def cache_folder() -> Path:
    """Return the cache folder: ``$ANOMALY_CLIP_CACHE``, or by default the user's cache directory.

    The folder can be deleted at any time, because all of its content can be regenerated.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "anomaly_clip"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path``, or remove it on an error.

    Readers and other writers of the path see either the old or the new content, never a mixture.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from anomaly_clip.files import atomic_path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder, "a.txt")) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because writers derive the format from it.
    ending = f".{secrets.token_hex(HASH_DIGITS // 2)}.tmp{path.suffix}"
    temporary = path.with_name(f".{_temporary_stem(path)}{ending}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # NumPy, on a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        if (
            error.errno is not None and error.filename is None
        ):  # the error of a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path, name: str) -> list[Path]:
    """Return the temporary files of :func:`atomic_path` in a folder, sorted by name.

    Args:
        folder: The folder; none are found if it does not exist.
        name: Name of the target, or a pattern.
    """
    target = Path(name)
    digits = "[0-9a-f]" * HASH_DIGITS
    stem = target.stem if "*" in name else glob.escape(_temporary_stem(target))
    return sorted(folder.glob(f".{stem}.{digits}.tmp{target.suffix}"))


def _temporary_stem(path: Path) -> str:
    """Return the beginning of the name of a temporary file."""
    ending = name_bytes(f".{'0' * HASH_DIGITS}.tmp{path.suffix}")
    return _first_bytes(path.stem, MAX_NAME_BYTES - len(ending) - 1)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically.

    Weights go through here as bytes, because the libraries' own writers raise errors of many kinds
    if the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN and infinities raise a ``ValueError``."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(content) + "\n", encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """Return JSON in which bytes that are not UTF-8 are escaped as by :func:`readable`.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    return SURROGATE.sub(lambda match: json.dumps(readable(match[0]))[1:-1], text)


SURROGATE = re.compile("[\ud800-\udfff]")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically; None becomes an empty cell.

    A text that a spreadsheet would run as a formula gets an apostrophe in front: one that begins
    with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return, and is not a number. So does a text
    that begins with apostrophes before one of these, so that :func:`read_csv` restores all texts.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors=ESCAPING) as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        # Python 3.10 to 3.12 do not quote a cell because of a carriage return in it.
        quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(map(_guarded, header))
        for row in rows:
            cells = ["" if cell is None else _guarded(cell) for cell in row]
            quotes = any(isinstance(cell, str) and "\r" in cell for cell in cells)
            (quoting if quotes else writer).writerow(cells)


FORMULA = re.compile(r"'*[=+\-@\t\r]")


def _guarded(cell: object) -> object:
    if isinstance(cell, str) and FORMULA.match(cell):
        try:
            float(cell)
        except ValueError:
            return f"'{cell}"
    return cell


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table that :func:`write_csv` has written, by the names of the header.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a row has another number of cells than the header, or is no CSV in UTF-8.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from anomaly_clip.files import read_csv, write_csv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_csv(Path(folder, "a.csv"), ["name"], [["=1+1"], ["-2"]])
        ...     print(Path(folder, "a.csv").read_text(), list(read_csv(Path(folder, "a.csv"))))
        name
        '=1+1
        -2
         [{'name': '=1+1'}, {'name': '-2'}]
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            header: list[str] = []
            for number, row in enumerate(csv.reader(file)):
                if any("\0" in cell for cell in row):  # newer versions of Python accept it
                    raise ValueError(f"line {number + 1} has a null character")
                cells = [cell[1:] if re.match(r"'+[=+\-@\t\r]", cell) else cell for cell in row]
                if not number:
                    header = cells
                elif cells and len(cells) != len(header):
                    raise ValueError(
                        f"line {number + 1} has {len(cells)} cells, and the header {len(header)}"
                    )
                elif cells:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(str(error)) from None


def safe_name(text: str) -> str:
    """Convert any text to a file name that is valid on every file system, not a path.

    Bytes that are not UTF-8 are escaped, and a name that is too long is cut by :func:`cut_name`.
    """
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f\x7f]', "_", readable(text)).strip(" .")
    return cut_name(name) or "_"


def cut_name(name: str, longest: int = MAX_SAFE_BYTES) -> str:
    """Cut a name to a number of bytes; a cut name ends with a hash, so that names stay distinct."""
    if len(name_bytes(name)) <= longest:
        return name
    digest = hashlib.sha256(name_bytes(name)).hexdigest()[:HASH_DIGITS]
    return f"{_first_bytes(name, longest - HASH_DIGITS - 1)}-{digest}"


def _first_bytes(name: str, count: int) -> str:
    """Return the longest beginning of a name that has at most ``count`` bytes."""
    kept = name[:count]
    while len(name_bytes(kept)) > count:
        kept = kept[:-1]
    return kept


# -- names as text -------------------------------------------------------------------------------


def name_bytes(name: str) -> bytes:
    """Return the bytes of a file name, which need not be UTF-8."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return name.encode("utf-8", ESCAPING)


def name_key(name: str) -> str:
    """Return the form in which names are compared: macOS writes letters and accents apart."""
    return unicodedata.normalize("NFC", name)


def readable(text: str) -> str:
    r"""Return text as it is, but escape bytes of file names that are not UTF-8.

    Example:
        >>> import os
        >>> from anomaly_clip.files import readable
        >>> readable(os.fsdecode(b"gr\xfcn.png"))
        'gr\\xfcn.png'
    """
    return text.encode("utf-8", ESCAPING).decode("utf-8")


def printable(text: str) -> str:
    r"""Escape bytes that are not UTF-8 and unprintable characters, such as a line break in a name.

    Example:
        >>> from anomaly_clip.files import printable
        >>> print(printable("two\nlines"))
        two\nlines
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in readable(text))


PLAIN = {"\N{EN DASH}": "-"}  # the dash of a table


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of characters that cannot be encoded, and the place after them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    escapes = []
    for c in error.object[error.start : error.end]:
        # A surrogate of this range stands for a byte, see PEP 383.
        byte = f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else None
        escapes.append(byte or PLAIN.get(c) or ascii(c)[1:-1])
    return "".join(escapes), error.end


codecs.register_error(ESCAPING, _escape)


def source_hash(*files: str) -> str:
    """Return a hash of source files, so that changes of the code invalidate cached values.

    Args:
        files: ``__file__`` of each module that the values depend on.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
