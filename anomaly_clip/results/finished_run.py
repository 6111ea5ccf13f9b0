"""Runs that are finished, as their folders tell: figures, and what these come from.

A folder may be damaged or of something else; what is wrong is then said in one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from anomaly_clip.data.info import FACTS
from anomaly_clip.errors import UserError
from anomaly_clip.records import DEMO, RANDOM
from anomaly_clip.report.metrics_table import DEMO_REMARK, RANDOM_WARNING, selection_warning

__all__ = [
    "AGAIN",
    "METRICS",
    "Finished",
    "Tag",
    "expect",
    "find_runs",
    "is_fraction",
    "plain",
    "read_json",
    "read_run",
]

METRICS = "metrics.json"
CONFIGS = ("config-each.yaml", "config-test.yaml", "config-fit.yaml")
"""Where a run's options stand, the first that there is."""
RUN_KEYS = ("method", "weights", "protocol")
WEIGHT_KEYS = ("backbone", "pretrained", "random")
AGAIN = "run the test again, or leave the folder out"


class Tag(NamedTuple):
    """What must be said beside a run's figures."""

    short: str
    """Inside a cell."""
    long: str
    comparable: bool = False
    """Whether a difference to a published figure may be taken all the same."""


@dataclass(frozen=True)
class Finished:
    """A run with figures.

    Args:
        folder: Where it lies.
        method: The class that was tested.
        data: The data set's class.
        backbone: Name of the network.
        pretrained: The weights: a word or a file.
        random: Whether they are untrained.
        categories: Figures by category, as fractions; None where one is not defined.
        protocol: What the figures depend on.
        seed: What it draws from, None if it is not known.
        failed: Categories that could not be run.
        config: The run's options, nothing if they are not kept.
        made: What a weights file comes from, as the fit that made it says; nothing if unknown.
    """

    folder: Path
    method: str
    data: str
    backbone: str
    pretrained: str
    random: bool
    categories: Mapping[str, Mapping[str, float | None]]
    protocol: Mapping[str, Any]
    seed: int | None = None
    failed: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The folder, fit for printing."""
        return plain(str(self.folder))

    @property
    def weights(self) -> str:
        """The weights in words."""
        return RANDOM if self.random else plain(self.pretrained)

    @property
    def seeds(self) -> tuple[object, object]:
        """What tells draws of one experiment apart."""
        return self.seed, self.protocol.get("data_seed")

    @property
    def settings(self) -> str:
        """Model and data of the configuration without their seeds."""
        parts = {}
        for part in ("model", "data"):
            content = self.config.get(part)
            options = content.get("init_args") if isinstance(content, dict) else None
            if isinstance(options, dict):
                parts[part] = {name: one for name, one in options.items() if name != "seed"}
        return json.dumps(parts, sort_keys=True, default=str)

    @property
    def description(self) -> str:
        """What was tested on what, with which weights."""
        told = f"{self.label}: {plain(self.method)} on {plain(self.data)}"
        return f"{told}, {plain(self.backbone)} weights {self.weights}"

    @property
    def figures(self) -> list[str]:
        """Names of its figures, in their order."""
        return list(dict.fromkeys(name for row in self.categories.values() for name in row))

    @cached_property
    def expected(self) -> frozenset[str]:
        """The categories that a mean must be of: those of the data set, if they are its own."""
        own = {*self.categories, *self.failed}
        known = set(FACTS[self.data].counts) if self.data in FACTS else set()
        return frozenset(known if own <= known else own)

    @cached_property
    def tags(self) -> tuple[Tag, ...]:
        """What must be said beside its figures."""
        tags = []
        start = self.made.get("backbone")
        text = self.made.get("text")
        text = text.get("pretrained") if isinstance(text, dict) else None
        if self.random:
            tags.append(Tag("random", RANDOM_WARNING))
        if self.pretrained == DEMO and not self.random:
            tags.append(Tag("demo", DEMO_REMARK))
        if text in (DEMO, RANDOM):
            tags.append(Tag(f"{text} texts", f"the backbone followed texts of {text} weights"))
        if isinstance(start, dict) and start.get("weights") == RANDOM:
            tags.append(Tag("random start", "the backbone was trained from random weights"))
        if not self.protocol.get("complete", True):
            counts, listed = self.protocol.get("images"), self.protocol.get("listed")
            told = "not all test images"
            if isinstance(counts, dict) and isinstance(listed, int):
                scored = sum(count for count in counts.values() if isinstance(count, int))
                told = f"{scored:,} of {listed:,} images"
            tags.append(Tag("partial", f"PARTIAL: {told} were scored"))
        if self.protocol.get("overlap"):
            number = self.protocol["overlap"]
            told = f"{number} TEST IMAGES ARE AMONG THE TRAINING IMAGES"
            tags.append(Tag("overlap", told))
        selected = selection_warning(self.protocol)
        if selected is not None:
            tags.append(Tag("by test", selected, comparable=True))
        return tuple(tags)

    @property
    def is_stand_in(self) -> bool:
        """Whether the weights are of no published figure, only to try things out."""
        return self.random or self.pretrained == DEMO

    def mean(self, figure: str, over: Sequence[str] | frozenset[str]) -> tuple[float | None, int]:
        """Return the mean of a figure over categories, and how many of them have it.

        It is None unless all have it.
        """
        rows = self.categories
        found = [v for c in over if c in rows and (v := rows[c].get(figure)) is not None]
        if not found or len(found) < len(over):
            return None, len(found)
        return math.fsum(found) / len(found), len(found)


def plain(text: object) -> str:
    """Return a text without characters that steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def find_runs(folders: Sequence[Path]) -> list[Finished]:
    """Read runs; a folder of several, as ``compare`` makes it, stands for all of them.

    Raises:
        UserError: If one is missing, unfinished or damaged.
    """
    found: dict[Path, Finished] = {}
    for folder in folders:
        for run in _below(folder.expanduser()):
            found.setdefault(run.resolve(), read_run(run))
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    """Return the folders with figures that a word of the command line means."""
    if folder.name == METRICS:
        folder = folder.parent
    if (folder / METRICS).is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name that of a run (as runs/padim/1)")
    if (folder / CONFIGS[0]).is_file():
        raise UserError(
            f"{folder}: the run is not finished, there is no {METRICS}; go on with it: "
            f"anomaly_clip each --resume {folder}"
        )
    below = sorted(file.parent for file in folder.glob(f"*/{METRICS}"))
    if below:
        return below
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():
        raise UserError(
            f"{folder}: fitted but not tested, there is no {METRICS}; test it: "
            f"anomaly_clip test --ckpt_path {checkpoint}"
        )
    raise UserError(
        f"{folder}: there is no {METRICS} in it: name the folder of a run of test or each"
    )


def read_run(folder: Path) -> Finished:
    """Read a run of test or each.

    Raises:
        UserError: If it is damaged.
    """
    file = folder / METRICS
    content = read_json(file)
    expect(isinstance(content, dict), file, "is not a table of figures")
    for key in ("categories", "run"):
        expect(isinstance(content.get(key), dict), file, f"has no {key}")
    run, categories = content["run"], content["categories"]
    for key in RUN_KEYS:
        expect(key in run, file, f"has no run.{key}")
    weights, protocol = run["weights"], run["protocol"]
    expect(isinstance(weights, dict), file, "has no run.weights")
    for key in WEIGHT_KEYS:
        expect(key in weights, file, f"has no run.weights.{key}")
    right = isinstance(protocol, dict) and isinstance(protocol.get("data"), str)
    expect(right, file, "has no run.protocol.data")
    failed = run.get("failed") or {}
    expect(isinstance(failed, dict), file, "has a run.failed of another form")
    expect(bool(categories), file, "has no categories")
    for name, figures in categories.items():
        expect(isinstance(figures, dict), file, f"has no figures of {plain(name)}")
        for figure, value in figures.items():
            told = f"has {plain(value)} for {plain(figure)} of {plain(name)}, not a fraction"
            expect(is_fraction(value), file, told)
    expect(any(categories.values()), file, "has no figures")
    return Finished(
        folder,
        str(run["method"]),
        protocol["data"],
        str(weights["backbone"]),
        str(weights["pretrained"]),
        bool(weights["random"]),
        categories,
        protocol,
        run["seed"] if isinstance(run.get("seed"), int) else None,
        tuple(failed),
        _config(folder),
        {} if weights["random"] else _made(Path(str(weights["pretrained"]))),
    )


def is_fraction(value: object) -> bool:
    """Whether a value is a figure in 0..1, or None, where one is not defined."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value <= 1


def read_json(file: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: If it cannot be read, or is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{file}: damaged, it is not JSON ({error}): {AGAIN}") from None


def expect(right: bool, file: Path, wrong: str) -> None:
    """Check a file of a run.

    Raises:
        UserError: What is wrong with it.
    """
    if not right:
        raise UserError(f"{file}: {wrong}, as a run of test or each writes it: {AGAIN}")


def _config(folder: Path) -> Mapping[str, Any]:
    """Return the options that a folder keeps, if they can be read."""
    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                content = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                return {}
            return content if isinstance(content, dict) else {}
    return {}


def _made(weights: Path) -> Mapping[str, Any]:
    """Return what an export of ours comes from: its ``.json``, and what its fit synthesised."""
    side = weights.with_suffix(".json")
    if weights.suffix not in (".safetensors", ".pt") or not side.is_file():
        return {}
    try:
        made = json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(made, dict):
        return {}
    data = _config(weights.parent).get("data")
    options = data.get("init_args") if isinstance(data, dict) else None
    synthesis = options.get("synthesis") if isinstance(options, dict) else None
    return {**made, "synthesis": synthesis}
