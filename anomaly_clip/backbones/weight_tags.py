"""Weights of open_clip's tags: their files in the caches, and the download.

Two folders are searched: the cache of the model hub, and the folder into which OpenAI's and other
official programs download files by address. The functions on these places serve timm's tags, too.
"""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_clip.errors import reason
from anomaly_clip.records import DEMO, RANDOM

__all__ = [
    "HUB_TIMEOUT",
    "TagFile",
    "cached_by_address",
    "cached_in_hub",
    "expected_hash",
    "fetch",
    "other_epoch",
    "why_no_download",
]

CLIP_CACHE = Path("~/.cache/clip")
"""Folder of files downloaded by address, shared with OpenAI's and other official programs."""
HUB_TIMEOUT = 5.0
"""Seconds to wait for an answer of the model hub; our choice, short because a user is waiting."""


class TagFile(NamedTuple):
    """Local file of a tag."""

    path: Path
    from_hub: bool
    """True if the file is that of the model hub, False if it was downloaded by address."""


def other_epoch(tag: str, record: dict[str, Any]) -> str | None:
    """Return the tag whose weights the model hub has for a tag, if it is that of another epoch.

    open_clip's record of a tag names a repository of the hub. For some tags this is the repository
    of another epoch of the same training.

    Example:
        >>> from anomaly_clip.backbones.weight_tags import other_epoch
        >>> other_epoch("laion400m_e32", {"hf_hub": "timm/vit_clip_240.laion400m_e31/"})
        'laion400m_e31'
        >>> other_epoch("laion400m_e31", {"hf_hub": "timm/vit_clip_240.laion400m_e31/"})
    """
    epoch = re.compile(r"_e(\d+)(?=\W|_|$)")
    place = str(record.get("hf_hub") or record.get("url") or "")
    requested, given = epoch.search(tag.replace("-", "_")), epoch.search(place)
    if requested is None or given is None or requested[1] == given[1]:
        return None
    return f"{tag[: requested.start(1)]}{given[1]}{tag[requested.end(1) :]}"


def fetch(name: str, tag: str, record: dict[str, Any]) -> TagFile:
    """Return the local weights file of a tag; download it if it is not cached.

    Args:
        name: Name of the model.
        tag: The tag.
        record: open_clip's record of the tag.

    Raises:
        FileNotFoundError: If the file is neither cached nor downloadable.
    """
    import open_clip
    from huggingface_hub import constants

    repository, _ = str(record.get("hf_hub") or "/").rsplit("/", 1)
    cached = _cached_file(tag, record)
    if cached is not None:
        return cached
    address = f"{constants.ENDPOINT}/{repository}" if repository else str(record.get("url"))
    why = why_no_download(address)
    if why is None:
        try:
            return TagFile(Path(open_clip.download_pretrained(record)), bool(repository))
        except Exception as error:  # every download library has its own exceptions
            why = reason(error)
    folder = f"{constants.HF_HUB_CACHE} or " if repository else ""
    raise FileNotFoundError(
        f"backbone.pretrained {tag} of {name} is not in {folder}{CLIP_CACHE.expanduser()} and "
        f"cannot be downloaded ({why}); copy that cache from a machine with network access, give a "
        f"weights file (--model.backbone.pretrained FILE.safetensors), or try the pipeline with "
        f"the bundled small CLIP (--model.backbone.name {DEMO} --model.backbone.pretrained {DEMO}) "
        f"or with untrained weights ('{RANDOM}')"
    )


def _cached_file(tag: str, record: dict[str, Any]) -> TagFile | None:
    """Return the file of a tag in the hub's cache, or else in the cache of files by address.

    The order is reversed if the hub has another epoch: the file by address is then the right one.
    """
    if record.get("file"):
        return TagFile(Path(record["file"]), False)
    places = [_cached_by_hub, _cached_by_address]
    if other_epoch(tag, record):
        places.reverse()
    return next((file for place in places if (file := place(record)) is not None), None)


def _cached_by_hub(record: dict[str, Any]) -> TagFile | None:
    repository, _, filename = str(record.get("hf_hub") or "").rpartition("/")
    names = [filename] if filename else []
    names += ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    path = cached_in_hub(repository, names)
    return None if path is None else TagFile(path, True)


def _cached_by_address(record: dict[str, Any]) -> TagFile | None:
    path = cached_by_address(str(record.get("url") or ""), CLIP_CACHE.expanduser())
    return None if path is None else TagFile(path, False)


def cached_in_hub(
    repository: str, names: Sequence[str], revision: str | None = None
) -> Path | None:
    """Return the first of several files of a repository that is in the model hub's cache.

    Args:
        repository: Name of the repository; nothing is found for an empty one.
        names: Names of files, the preferred one first.
        revision: A branch, tag or commit; None for the main branch.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in names if repository else ():
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path)
    return None


def cached_by_address(address: str, folder: Path) -> Path | None:
    """Return a file that official programs have downloaded, if it has the sha256 of its address.

    Args:
        address: Address of the file; nothing is found for an empty one.
        folder: Folder into which they download.
    """
    file = folder / address.rpartition("/")[2]
    if not address or not file.is_file():
        return None
    expected = expected_hash(address)
    if expected is not None:
        digest = _sha256(file)
        if not digest.startswith(expected):
            warnings.warn(
                f"{file} is not used: its sha256 begins with {digest[:8]}, not {expected[:8]}; "
                f"remove it and download it again",
                stacklevel=2,
            )
            return None
    return file


def why_no_download(address: str) -> str | None:
    """Return why nothing can be downloaded from an address, or None if it answers."""
    from huggingface_hub import constants

    return "offline mode is set" if constants.HF_HUB_OFFLINE else _unreachable(address)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for part in iter(lambda: content.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def expected_hash(address: str) -> str | None:
    """Return the start of the sha256 in an address: OpenAI's folder, or the end of a name."""
    for part in address.split("/")[-2:]:
        if re.fullmatch(r"[0-9a-f]{64}", part):
            return part
    match = re.search(r"-([0-9a-f]{8})\.\w+$", address)
    return match[1] if match else None


def _unreachable(address: str) -> str | None:
    """Return why an address does not answer, or None if it answers, even with an HTTP error."""
    # The address comes from a table of open_clip or timm, or begins with $HF_ENDPOINT.
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()  # noqa: S310
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"no answer from {urllib.request.urlparse(address).hostname}: {_short(error)}"  # type: ignore[attr-defined]
    return None


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", error)).strip("<>")
