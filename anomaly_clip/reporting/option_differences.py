"""Options in which runs differ, from their complete configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from anomaly_clip.results.finished_run import FinishedRun, printable

__all__ = ["OptionDifference", "differing_options"]

SECTIONS = ("output", "config", "ckpt_path", "verbose", "return_predictions")
"""Sections that do not affect metrics: places of results, and what is printed."""
PLACES = ("trainer.logger", "trainer.default_root_dir", "trainer.enable_progress_bar")
LONGEST = 60
"""Characters of the longest value that is shown in full."""


class OptionDifference(NamedTuple):
    """An option that differs.

    Args:
        name: The option, such as ``data.resize.rule``.
        values: Its value in each run, as text.
    """

    name: str
    values: tuple[str, ...]


def differing_options(runs: Sequence[FinishedRun]) -> list[OptionDifference]:
    """Return the options whose values differ between runs, in the order of the configuration.

    Options that not all of the runs have, because their methods differ or they are of an earlier
    version, are left out.

    Args:
        runs: Finished runs. If the configuration of one was not saved, there is no difference.
    """
    configs = [dict(_options(run.config)) for run in runs]
    if len(configs) < 2:
        return []
    shared = [name for name in configs[0] if all(name in config for config in configs)]
    rows = (OptionDifference(n, tuple(_shown(config[n]) for config in configs)) for n in shared)
    return [row for row in rows if len(set(row.values)) > 1]


def _options(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options as they are typed; a class is the value of the option that it is for."""
    for key, value in content.items():
        name = f"{path}.{key}".lstrip(".")
        if name in SECTIONS or name in PLACES:
            continue
        if key == "class_path" and path:
            yield path, str(value).rpartition(".")[2]
        elif key == "init_args" and isinstance(value, Mapping):
            yield from _options(value, path)
        elif isinstance(value, Mapping) and value:
            yield from _options(value, name)
        else:
            yield name, value


def _shown(value: Any) -> str:
    """Return a value as YAML has it, on one line."""
    is_plain = isinstance(value, str)
    text = printable(value if is_plain else json.dumps(value, default=str))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
