"""State dicts in the content of weights files: bare, or in what training programs save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from anomaly_clip.backbones.weight_files import BARE, WeightFileError, listed

__all__ = ["StateDict", "state_dict_of"]

CONTAINERS = (
    *("state_dict", "model", "model_state_dict", "net", "backbone", "network", "module"),
    *("model_ema", "ema", "ema_state_dict", "state_dict_ema", "student", "teacher"),
)
"""Keys under which training programs save a state dict; the first that is present is used."""
SAVE_ONE = "save the one to use alone and give that file"
MAX_NESTING = 4


class StateDict(NamedTuple):
    """Tensors by name, and what else the file contains."""

    tensors: dict[str, Tensor]
    container: str
    """Key under which the state dict was, with full stops between levels; empty for none."""
    others: tuple[str, ...]
    """Keys of further state dicts in the file, which are not used."""


def state_dict_of(
    content: object, preferred: Sequence[str] = (), way_out: str = SAVE_ONE
) -> StateDict:
    """Return the tensors of a file's content: a state dict, bare or in a container.

    Containers are dictionaries with a key of ``preferred`` or :data:`CONTAINERS`, or with any key
    if they contain no other state dict. They may be nested.

    Args:
        content: What :func:`~anomaly_clip.backbones.weight_files.read_content` returns.
        preferred: Further keys of containers, which are looked up before the others.
        way_out: Advice where several state dicts are of equal rank.

    Raises:
        WeightFileError: If there is no state dict, or several under keys of equal rank.
    """
    containers = (*preferred, *CONTAINERS)
    path: list[str] = []
    others: list[str] = []
    for _ in range(MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        inner = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and _has_tensors(value, containers)
        }
        chosen = [key for key in containers if key in inner]
        if not chosen and _tensors(content):
            break
        if not chosen and len(inner) > 1:
            raise WeightFileError(
                f"it contains several state dicts: {listed(list(inner))}",
                way_out,
            )
        if not inner:
            break
        key = chosen[0] if chosen else next(iter(inner))
        path.append(key)
        others += [".".join([*path[:-1], other]) for other in inner if other != key]
        content = inner[key]
    tensors = _tensors(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise WeightFileError(f"it contains no weights: {_described(content)}", BARE)
    return StateDict(tensors, ".".join(path), tuple(others))


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _has_tensors(value: object, containers: Sequence[str], depth: int = MAX_NESTING) -> bool:
    """Return whether a value is a state dict, or a known container of one."""
    if not isinstance(value, Mapping) or not depth:
        return False
    return bool(_tensors(value)) or any(
        _has_tensors(value[key], containers, depth - 1) for key in containers if key in value
    )


def _described(content: object) -> str:
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        return f"a dictionary with the keys {listed(keys)}" if keys else "an empty dictionary"
    return "a single tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
