"""Metrics that papers report, as records; ``published_reader`` reads them from ``published.yaml``.

Metrics are fractions here, whatever the paper prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anomaly_clip.data.info import DATASETS

__all__ = [
    "PublishedCell",
    "PublishedColumn",
    "PublishedRow",
    "PublishedTable",
    "PublishedTables",
    "RunSpec",
    "WeightsSpec",
]


@dataclass(frozen=True)
class WeightsSpec:
    """Weights that a run of ours makes.

    Args:
        name: Name of the entry; the run's folder is ``runs/<name>``.
        title: Description of the weights.
        file: Name of the file in the run's folder.
        provenance: Entries that the record of the fit must have.
        command: The command that makes them.
    """

    name: str
    title: str
    file: str
    provenance: Mapping[str, object]
    command: str


@dataclass(frozen=True)
class RunSpec:
    """A run that a row of a table can stand beside.

    Args:
        name: Name of the run; its folder is ``runs/<name>``.
        match: Conditions on the run's records; None: must be unset.
        weights: A plain word that the run records (``imagenet``), or the name of a
            :class:`WeightsSpec`.
        commands: The commands that make it, those of its weights first.
        draws: Number of runs that are averaged.
    """

    name: str
    match: Mapping[str, object]
    weights: str
    commands: tuple[str, ...]
    draws: int = 1

    @property
    def folder(self) -> str:
        """Folder that the commands put it into."""
        return f"runs/{self.name}"


@dataclass(frozen=True)
class PublishedColumn:
    """A metric, and the categories that it is the mean of."""

    metric: str
    of: str | None
    """A group or a category; None: all categories."""

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.metric if self.of is None else f"{self.metric} of {self.of}"


@dataclass(frozen=True)
class PublishedCell:
    """One published value of a metric, as a fraction."""

    value: float
    spread: float | None
    """The published standard deviation, over draws."""
    doubt: str | None


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table: a method, and the run of ours that belongs beside it."""

    method: str
    data: str
    of: str | None
    """The one group or category that its metrics are of, if they are not of all."""
    run: RunSpec | None
    doubt: str | None
    cells: tuple[PublishedCell | None, ...]
    """One per column."""

    @property
    def name(self) -> str:
        """The method, with the group or category of its metrics."""
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
    """Decimals of its metrics in percent."""
    columns: tuple[PublishedColumn, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def runs(self) -> tuple[RunSpec, ...]:
        """The runs that its rows stand beside, each once."""
        return tuple({row.run.name: row.run for row in self.rows if row.run is not None}.values())

    def __len__(self) -> int:
        """Return the number of published values."""
        return sum(cell is not None for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class PublishedTables:
    """All tables by id, the groups of categories, and the weights that runs need."""

    tables: Mapping[str, PublishedTable]
    groups: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Categories by group, by data set."""
    weights: Mapping[str, WeightsSpec]

    def categories(self, data: str, of: str | None) -> tuple[str, ...] | None:
        """Return the categories that a mean is over; None if they are not known by name."""
        if of is None:
            counts = DATASETS[data].counts if data in DATASETS else {}
            return tuple(counts) or None
        return self.groups.get(data, {}).get(of, (of,))
