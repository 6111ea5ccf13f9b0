"""A finished run: its metrics per category, and everything that they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from anomaly_clip.data.info import DATASETS
from anomaly_clip.metric_values import mean_defined
from anomaly_clip.records import DEMO, RANDOM
from anomaly_clip.results.warnings import (
    DEMO_REMARK,
    RANDOM_WARNING,
    overlap_warning,
    selection_warning,
    transductive_remark,
    unreadable_warnings,
)

__all__ = ["FinishedRun", "Tag", "printable"]


class Tag(NamedTuple):
    """Warning to show next to a run's metrics."""

    short: str
    """Text inside a table cell."""
    long: str
    """Text of a note."""
    comparable: bool = False
    """True if a difference from a published metric is still meaningful."""


@dataclass(frozen=True)
class FinishedRun:
    """A run of test or each, with its metrics.

    Args:
        folder: The run's folder.
        method: Class name of the tested method.
        data: Class name of the data set.
        backbone: Name of the network.
        pretrained: Name or file of the weights.
        random: Whether the weights are untrained.
        categories: Metrics by category, as fractions; None if undefined.
        protocol: Everything that the metrics depend on.
        seed: Seed of the run, None if unknown.
        failed: Categories whose run failed.
        config: Options of the run; empty if they were not saved.
        provenance: Record of the fit that produced the weights file; empty if unknown.
        uncertain: Pixel metrics with wide bounds by category, and under ``mean`` those of the mean.
        record: Section ``run`` of ``metrics.json`` as it is in the file.
        means: Section ``mean`` of ``metrics.json`` as it is in the file; empty if it has none.
        variant: Activation and interpolation of positions if they are not the defaults.
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
    provenance: Mapping[str, Any] = field(default_factory=dict)
    uncertain: Mapping[str, Sequence[str]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    means: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self) -> str:
        """The folder as printable text."""
        return printable(str(self.folder))

    @property
    def weights(self) -> str:
        """Name or file of the weights as printable text."""
        variant = f", {self.variant}" if self.variant else ""
        return RANDOM if self.random else printable(f"{self.pretrained}{variant}")

    @property
    def seeds(self) -> tuple[object, object]:
        """Seeds of the run and of its data; they distinguish repetitions of one experiment."""
        return self.seed, self.protocol.get("data_seed")

    @property
    def settings(self) -> str:
        """Model and data options of the configuration, without seeds, as JSON."""
        options_by_part = {}
        for part in ("model", "data"):
            section = self.config.get(part)
            options = section.get("init_args") if isinstance(section, dict) else None
            if isinstance(options, dict):
                options_by_part[part] = {k: v for k, v in options.items() if k != "seed"}
        return json.dumps(options_by_part, sort_keys=True, default=str)

    @property
    def description(self) -> str:
        """Folder, method, data and weights in one line."""
        return (
            f"{self.label}: {printable(self.method)} on {printable(self.data)}, "
            f"{printable(self.backbone)} with weights {self.weights}"
        )

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in order."""
        return list(dict.fromkeys(name for row in self.categories.values() for name in row))

    @cached_property
    def expected(self) -> frozenset[str]:
        """Categories that a mean must cover.

        These are all categories of the data set if it contains those of the run, else those of the
        run.
        """
        tried = {*self.categories, *self.failed}
        published = set(DATASETS[self.data].counts) if self.data in DATASETS else set()
        return frozenset(published if tried <= published else tried)

    @cached_property
    def tags(self) -> tuple[Tag, ...]:
        """Warnings to show next to the metrics; those for single metrics are in ``uncertain``."""
        tags = []
        if self.random:
            tags.append(Tag("random", RANDOM_WARNING))
        elif self.pretrained == DEMO:
            tags.append(Tag("demo", DEMO_REMARK))
        tags += self._training_tags()
        if not self.protocol.get("complete", True):
            tags.append(Tag("partial", f"PARTIAL: {self._scored_part()} were scored"))
        tags += [Tag("unreadable", warning) for warning in unreadable_warnings(self.protocol)]
        overlapping = overlap_warning(self.protocol)
        if overlapping is not None:
            tags.append(Tag("overlap", overlapping))
        selected = selection_warning(self.protocol)
        if selected is not None:
            tags.append(Tag("best_test", selected, comparable=True))
        transductive = transductive_remark(self.protocol)
        if transductive is not None:  # published metrics of such methods are transductive as well
            tags.append(Tag("transductive", transductive, comparable=True))
        return tuple(tags)

    def _training_tags(self) -> list[Tag]:
        """Return the warnings about the training of the weights."""
        tags = []
        text, start = self.provenance.get("text"), self.provenance.get("backbone")
        text_weights = text.get("pretrained") if isinstance(text, dict) else None
        if text_weights in (DEMO, RANDOM):
            note = f"the backbone was aligned with text embeddings of {text_weights} weights"
            tags.append(Tag(f"{text_weights} text", note))
        if isinstance(start, dict) and start.get("weights") == RANDOM:
            tags.append(Tag("random init", "the backbone was trained from random weights"))
        return tags

    def _scored_part(self) -> str:
        """Return the number of scored images out of all as text."""
        counts, listed = self.protocol.get("images"), self.protocol.get("listed")
        if not isinstance(counts, dict) or not isinstance(listed, int):
            return "not all test images"
        scored = sum(count for count in counts.values() if isinstance(count, int))
        return f"{scored:,} of {listed:,} images"

    def is_uncertain(self, metric: str, over: Sequence[str] | frozenset[str]) -> bool:
        """Return whether a metric has wide bounds in any of the categories."""
        return any(metric in self.uncertain.get(category, ()) for category in over)

    @property
    def is_stand_in(self) -> bool:
        """True for untrained and demo weights, for which there are no published results."""
        return self.random or self.pretrained == DEMO

    def mean(self, metric: str, over: Sequence[str] | frozenset[str]) -> tuple[float | None, int]:
        """Return the mean of a metric over categories, and the number of categories that define it.

        The mean is None unless all categories define it.
        """
        values = [self.categories.get(category, {}).get(metric) for category in over]
        count = sum(value is not None for value in values)
        return (mean_defined(values) if count == len(over) else None), count


def printable(text: object) -> str:
    """Replace non-printable characters, which could control a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
