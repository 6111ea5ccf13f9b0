"""Places that weights come from: tags of open_clip with their caches, files, folders, hub blobs.

A weights file contains tensors only. The activation and the pixel normalisation stand in a JSON
file in the same folder, if anywhere: ``open_clip_config.json`` in open_clip's format,
``config.json`` with ``preprocessor_config.json`` in that of transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_clip.errors import reason
from anomaly_clip.records import DEMO, RANDOM

__all__ = [
    "HUB_TIMEOUT",
    "TagFile",
    "WeightsSettings",
    "fetch",
    "local_file",
    "looks_like_file",
    "other_epoch",
    "settings_next_to",
]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
IN_FOLDER = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin"),
)
"""Weights files in a folder of the model hub; the first that exists is used."""
OPEN_CLIP_SETTINGS = "open_clip_config.json"
TRANSFORMERS_SETTINGS = "config.json"
TRANSFORMERS_PIXELS = "preprocessor_config.json"
CLIP_CACHE = Path("~/.cache/clip")
"""Folder of files downloaded by address, shared with OpenAI's and other official programs."""
HUB_TIMEOUT = 5.0
"""Seconds to wait for an answer of the model hub; our choice, short because a user is waiting."""


class TagFile(NamedTuple):
    """Local file of a tag."""

    path: Path
    from_hub: bool
    """True if the file is that of the model hub, False if it was downloaded by address."""


class WeightsSettings(NamedTuple):
    """Settings of a model that a file next to its weights states."""

    file: Path
    quick_gelu: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def looks_like_file(value: str) -> bool:
    """Return whether a value is meant as a path or an address rather than a tag."""
    return value.endswith(SUFFIXES) or "/" in value or "\\" in value


def local_file(value: str, option: str, others: str = "") -> Path:
    """Return the weights file at a path; of a folder, the weights file in it.

    Args:
        value: Path of a file or folder, as the user typed it.
        option: Name of the option, for messages.
        others: Other values that the option takes, for messages, such as ``, or 'random'``.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the value is an address, or the folder does not contain one weights file.
    """
    if re.match(r"[\w+.-]+://|hf-hub:|local-dir:", value):
        raise ValueError(
            f"{option} {value} is an address, not a file: download the weights file, and the JSON "
            f"files next to it, and give its path{others}"
        )
    path = Path(value).expanduser()
    if path.is_dir():
        return _file_in(path, option)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{option} {value} is a link to {path.readlink()}, which does not exist; copy the "
            f"folder together with the files that its links lead to"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{option} {value}: there is no such file; give an existing weights file{others}"
        )
    return path


def _file_in(folder: Path, option: str) -> Path:
    """Return the weights file of a snapshot, of a repository in the hub's cache, or of a folder."""
    main = folder / "refs" / "main"
    if (folder / "snapshots").is_dir():
        snapshots = [p for p in (folder / "snapshots").iterdir() if p.is_dir()]
        if main.is_file():
            snapshots = [folder / "snapshots" / main.read_text(encoding="utf-8").strip()]
        if len(snapshots) == 1:
            folder = snapshots[0]
    files = sorted(p for p in folder.glob("*") if p.suffix in SUFFIXES and p.is_file())
    names = [name for name in IN_FOLDER if folder / name in files]
    if not names and len(files) == 1:
        return files[0]
    if not names:
        some = ", ".join(file.name for file in files[:3])
        content = f"{len(files)} weights files ({some})" if files else "no weights file"
        raise ValueError(f"{option} {folder} is a folder with {content}: give the path of one file")
    return folder / names[0]


def settings_next_to(path: Path, layout: str | None = None) -> WeightsSettings | None:
    """Return the settings that a JSON file next to a weights file states; None without such a file.

    For a file of the model hub's cache, these are the files of the same snapshot. Files that cannot
    be read are not used, with a warning.

    Args:
        path: A weights file.
        layout: ``transformers`` if the tensors are named as in transformers, whose settings are
            then read first.
    """
    readers = [(OPEN_CLIP_SETTINGS, _open_clip_settings)]
    readers.insert(0 if layout == "transformers" else 1, (TRANSFORMERS_SETTINGS, _hub_settings))
    folders = list(dict.fromkeys(_folders_of(path)))
    for name, read in readers:
        for folder in folders:
            file = folder / name
            if not file.is_file():
                continue
            try:
                settings = read(file)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                warnings.warn(
                    f"{file} states the activation of {path.name}, but cannot be read "
                    f"({reason(error)}) and is not used: correct or remove it",
                    stacklevel=2,
                )
                continue
            if settings is not None:
                return settings
    return None


def _folders_of(path: Path) -> Iterator[Path]:
    yield path.parent
    blob = path.resolve()
    yield blob.parent
    if blob.parent.name == "blobs":  # snapshots contain links to blobs, which have no suffix
        for link in sorted(blob.parent.parent.glob("snapshots/*/*")):
            if link.resolve() == blob:
                yield link.parent


def _open_clip_settings(file: Path) -> WeightsSettings | None:
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content.get("model_cfg", content)
    pixels = content.get("preprocess_cfg") or {}
    activation = bool(model.get("quick_gelu", False))
    return WeightsSettings(file, activation, *_pixels(pixels.get("mean"), pixels.get("std")))


def _hub_settings(file: Path) -> WeightsSettings | None:
    """Read the settings of transformers' CLIPModel, whose default activation is QuickGELU."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("model_type") != "clip":
        return None
    towers = [  # transformers lets the entries of the older "..._dict" win
        {**(content.get(key) or {}), **(content.get(f"{key}_dict") or {})}
        for key in ("vision_config", "text_config")
    ]
    names = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    if len(names) > 1 or not names <= {"quick_gelu", "gelu"}:
        raise ValueError(f"hidden_act is {' and '.join(sorted(map(str, names)))}")
    pixels: dict[str, Any] = {}
    if (other := file.with_name(TRANSFORMERS_PIXELS)).is_file():
        pixels = json.loads(other.read_text(encoding="utf-8"))
    values = _pixels(pixels.get("image_mean"), pixels.get("image_std"))
    return WeightsSettings(file, names == {"quick_gelu"}, *values)


def _pixels(mean: Any, std: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation per colour; None if they are not stated.

    Raises:
        ValueError: If they are not three numbers each.
    """
    values = []
    for value in (mean, std):
        numbers = None if value is None else tuple(float(number) for number in value)
        if numbers is not None and len(numbers) != 3:
            raise ValueError(f"{len(numbers)} values for pixels of three colours")
        values.append(numbers)
    return values[0], values[1]


def other_epoch(tag: str, record: dict[str, Any]) -> str | None:
    """Return the tag whose weights the model hub has for a tag, if it is that of another epoch.

    open_clip's record of a tag names a repository of the hub. For some tags this is the repository
    of another epoch of the same training.

    Example:
        >>> from anomaly_clip.backbones.weight_sources import other_epoch
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
    why = "offline mode is set" if constants.HF_HUB_OFFLINE else _unreachable(address)
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
    from huggingface_hub import try_to_load_from_cache

    repository, _, filename = str(record.get("hf_hub") or "").rpartition("/")
    if not repository:
        return None
    names = [filename] if filename else []
    for candidate in [*names, "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        path = try_to_load_from_cache(repository, candidate)
        if isinstance(path, str):
            return TagFile(Path(path), True)
    return None


def _cached_by_address(record: dict[str, Any]) -> TagFile | None:
    """Return a file that official programs have downloaded, if it has the sha256 of its address."""
    address = str(record.get("url") or "")
    file = CLIP_CACHE.expanduser() / address.rpartition("/")[2]
    if not address or not file.is_file():
        return None
    expected = _expected_hash(address)
    if expected is not None:
        digest = _sha256(file)
        if not digest.startswith(expected):
            warnings.warn(
                f"{file} is not used: its sha256 begins with {digest[:8]}, not {expected[:8]}; "
                f"remove it and download it again",
                stacklevel=2,
            )
            return None
    return TagFile(file, False)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for part in iter(lambda: content.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def _expected_hash(address: str) -> str | None:
    """Return the start of the sha256 in an address: OpenAI's folder, or the end of a name."""
    for part in address.split("/")[-2:]:
        if re.fullmatch(r"[0-9a-f]{64}", part):
            return part
    match = re.search(r"-([0-9a-f]{8})\.\w+$", address)
    return match[1] if match else None


def _unreachable(address: str) -> str | None:
    """Return why an address does not answer, or None if it answers, even with an HTTP error."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"no answer from {urllib.request.urlparse(address).hostname}: {_short(error)}"  # type: ignore[attr-defined]
    return None


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", error)).strip("<>")
