"""Options of a resumed fit that differ from those of the fit that wrote its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.commands.checkpoint_option import config_of_fit
from anomaly_clip.documents import load_yaml
from anomaly_clip.errors import UserError

__all__ = ["changed_options"]

TRAINER = (
    "accumulate_grad_batches",
    "devices",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "num_nodes",
    "precision",
    "sync_batchnorm",
)
"""Options of the trainer that affect each step; limits are raised on purpose."""
HARMLESS = ("root", "num_workers", "cache")
"""Options of data that do not affect a step; other images are told by their hashes."""


def changed_options(checkpoint: Path, config: str) -> list[str]:
    """Return the options that differ, such as ``data.batch_size 4 (now 2)``.

    Args:
        checkpoint: A checkpoint next to the configuration of its fit; without one, nothing is
            known to differ.
        config: The current configuration of ``fit``, as YAML.
    """
    try:
        saved = config_of_fit(checkpoint).read_text(encoding="utf-8")
        before, now = (dict(_effective(load_yaml(text))) for text in (saved, config))
    except (UserError, OSError, ValueError, yaml.YAMLError):
        return []
    return [
        f"{name} {_shown(value)} (now {_shown(now[name])})"
        for name, value in before.items()
        if name in now and _shown(now[name]) != _shown(value)
    ]


def _effective(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options that affect the steps of a fit."""
    if not isinstance(config, Mapping):
        return
    if "seed_everything" in config:
        yield "seed_everything", config["seed_everything"]
    trainer = config.get("trainer")
    if isinstance(trainer, Mapping):
        yield from ((f"trainer.{name}", trainer[name]) for name in TRAINER if name in trainer)
    data = config.get("data")
    if isinstance(data, Mapping):
        yield "data", str(data.get("class_path")).rpartition(".")[2]
        options = data.get("init_args")
        yield from _leaves(options if isinstance(options, Mapping) else {}, "data")


def _leaves(options: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if name in HARMLESS:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


def _shown(value: Any) -> str:
    """Return a value as YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
