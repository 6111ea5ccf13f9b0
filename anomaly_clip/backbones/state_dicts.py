"""State dicts of weights files, bare or as training programs save them, and their fit to models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from anomaly_clip.backbones.weight_files import BARE, WeightFileError, listed

__all__ = ["StateDict", "check_keys", "only_prefix", "state_dict_of"]

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


def check_keys(
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    name: str,
    optional: Collection[str] = (),
) -> None:
    """Check that a state dict has the names and shapes of a model's.

    Args:
        given: Tensors of a file, without those that the model does not need.
        expected: Tensors of the model, without those that no feature depends on.
        source: Option and file, for messages.
        name: Name of the model.
        optional: Names that may be missing.

    Raises:
        ValueError: If a tensor is missing, unexpected, or of another shape.
    """
    missing = [key for key in expected if key not in given and key not in optional]
    unexpected = [key for key in given if key not in expected]
    shapes = [key for key in expected if key in given and expected[key].shape != given[key].shape]
    for problem, keys in (
        ("lacks", missing),
        ("has the unexpected key", unexpected),
        ("has a different shape for", shapes),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"{source} {problem} {keys[0]}{more}; give weights of {name}, or set backbone.name "
                f"to the model that they belong to"
            )


def only_prefix(prefixes: Sequence[str], preferred: Sequence[str], source: str) -> str:
    """Return the prefix of the network to use, of those that a state dict contains.

    Args:
        prefixes: At least one, each once.
        preferred: Parts of the names of trained networks, such as ``encoder_q.``.
        source: Option and file, for messages.

    Raises:
        ValueError: If there are several, and not exactly one of them is preferred.
    """
    chosen = [p for p in prefixes if any(part in p for part in preferred)] or list(prefixes)
    if len(prefixes) > 1 and len(chosen) != 1:
        raise ValueError(
            f"{source} contains {len(chosen)} networks, below {' and '.join(chosen[:3])}; save "
            f"the state dict of one and give that file"
        )
    return chosen[0]


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
