"""Records of published results; ``published_reader`` reads them from ``published.yaml``.

Metrics are fractions, even if the paper prints percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from anomaly_clip.data.info import DATASETS

__all__ = [
    "PublishedCell",
    "PublishedColumn",
    "PublishedRow",
    "PublishedTable",
    "PublishedTables",
    "RunSpec",
    "SourcedValue",
    "WeightsSpec",
]


@dataclass(frozen=True)
class WeightsSpec:
    """Weights trained by a run of this project.

    Args:
        name: Name of the entry; the run's folder is ``runs/<name>``.
        title: Description of the weights.
        file: Name of the file in the run's folder.
        provenance: Entries required in the record of the fit.
        command: Command that trains the weights.
    """

    name: str
    title: str
    file: str
    provenance: Mapping[str, object]
    command: str


@dataclass(frozen=True)
class RunSpec:
    """Run of this project to compare with a row of a published table.

    Args:
        name: Name of the run; its folder is ``runs/<name>``.
        match: Required values by key of the run's records; None: the key must be unset.
        weights: Weights name that the run records (``imagenet``), or the name of a
            :class:`WeightsSpec`.
        commands: Commands to reproduce the run, starting with those for its weights.
        draws: Number of runs with different seeds that are averaged.
    """

    name: str
    match: Mapping[str, object]
    weights: str
    commands: tuple[str, ...]
    draws: int = 1

    @property
    def folder(self) -> str:
        """Output folder of the commands."""
        return f"runs/{self.name}"


@dataclass(frozen=True)
class PublishedColumn:
    """A metric, and the categories over which it is averaged."""

    metric: str
    of: str | None
    """A group or a category; None: all categories."""

    @property
    def key(self) -> str:
        """Name of the column in ``published.yaml``."""
        return self.metric if self.of is None else f"{self.metric} of {self.of}"


class SourcedValue(NamedTuple):
    """A value of a cell, and who published it."""

    value: float
    """As a fraction."""
    source: str
    """The sources in prose; several are joined by "and"."""


@dataclass(frozen=True)
class PublishedCell:
    """One published value of a metric, or several that differ by source."""

    value: float
    """The first value, as a fraction."""
    spread: float | None
    """Published standard deviation over several runs."""
    doubt: str | None
    sources: tuple[SourcedValue, ...] = ()
    """The values by source, starting with :attr:`value`; empty: the value of the table's source."""

    @property
    def values(self) -> tuple[float, ...]:
        """All values, as fractions."""
        return tuple(sourced.value for sourced in self.sources) or (self.value,)


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table: a method, and the run of this project to compare it with."""

    method: str
    data: str
    of: str | None
    """Group or category that the metrics cover; None: all categories."""
    run: RunSpec | None
    doubt: str | None
    cells: tuple[PublishedCell | None, ...]
    """One cell per column."""
    other_data: str | None = None
    """Description of a data set that is not of this project; None for others."""
    transductive: bool = False
    """True if the method scores test images by each other."""

    @property
    def name(self) -> str:
        """Method, followed by the group or category if the metrics cover only one."""
        return self.method if self.of is None else f"{self.method}, {self.of}"


@dataclass(frozen=True)
class PublishedTable:
    """One table of a source."""

    id: str
    title: str
    source: str
    where: str
    data: str
    protocol: str
    doubt: str | None
    digits: int
    """Number of decimals of the metrics in percent."""
    columns: tuple[PublishedColumn, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def runs(self) -> tuple[RunSpec, ...]:
        """Distinct runs that the rows are compared with."""
        return tuple({row.run.name: row.run for row in self.rows if row.run is not None}.values())

    def __len__(self) -> int:
        """Return the number of published values."""
        return sum(len(cell.values) for row in self.rows for cell in row.cells if cell is not None)


@dataclass(frozen=True)
class PublishedTables:
    """All tables by id, and what they refer to: groups of categories, weights, older options."""

    tables: Mapping[str, PublishedTable]
    groups: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Categories by data set and group."""
    weights: Mapping[str, WeightsSpec]
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values of options in runs that were made before the option existed."""

    def categories(self, data: str, of: str | None) -> tuple[str, ...] | None:
        """Return the categories that a mean covers; None if their names are unknown."""
        if of is None:
            counts = DATASETS[data].counts if data in DATASETS else {}
            return tuple(counts) or None
        return self.groups.get(data, {}).get(of, (of,))
