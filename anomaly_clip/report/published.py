"""What papers report, to stand beside our figures: ``published.yaml``, read and checked.

The file explains its form at its top. Figures become fractions here, whatever the paper prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.data.info import FACTS
from anomaly_clip.metrics.classification import CLASS_FIGURES
from anomaly_clip.metrics.evaluator import FIGURES

__all__ = ["Cell", "Column", "Published", "Row", "RunOf", "Table", "WeightsOf", "published", "read"]

FILE = "published.yaml"
UNSET = ("shots", "fraction", "auxiliary")
"""What a run must not have unless it is asked for."""
CONDITIONS = {
    *UNSET,
    *("method", "data", "backbone", "image_size", "train_categories", "frozen", "targets", "each"),
}
SCALE = {"percent": 100.0, "fraction": 1.0}


@dataclass(frozen=True)
class WeightsOf:
    """Weights that a run of ours makes, and by what they are known."""

    name: str
    title: str
    file: str
    made: Mapping[str, object]
    command: str


@dataclass(frozen=True)
class RunOf:
    """A run that a row of a table can stand beside.

    Args:
        name: What it is called; its folder is ``runs/<name>``.
        match: What of its records must be so; None: must be unset.
        weights: A plain word that the run records (``imagenet``), or the name of a
            :class:`WeightsOf`.
        commands: What makes it, the making of its weights first.
        draws: How many of it are averaged.
    """

    name: str
    match: Mapping[str, object]
    weights: str
    commands: tuple[str, ...]
    draws: int = 1

    @property
    def folder(self) -> str:
        """Where the commands put it."""
        return f"runs/{self.name}"


@dataclass(frozen=True)
class Column:
    """A figure, and what it is the mean of."""

    figure: str
    of: str | None
    """A group or a category; None: all categories."""

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.figure if self.of is None else f"{self.figure} of {self.of}"


@dataclass(frozen=True)
class Cell:
    """One published figure, as a fraction."""

    value: float
    spread: float | None
    """The published deviation, over draws."""
    doubt: str | None


@dataclass(frozen=True)
class Row:
    """One line of a table: a method, and what of ours belongs beside it."""

    method: str
    data: str
    of: str | None
    """The group or category that its figures are of, if one alone."""
    run: RunOf | None
    doubt: str | None
    cells: tuple[Cell | None, ...]
    """One a column."""


@dataclass(frozen=True)
class Table:
    """One table of a source."""

    id: str
    title: str
    source: str
    where: str
    data: str
    protocol: str
    doubt: str | None
    digits: int
    """Decimals of its figures in percent."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def runs(self) -> tuple[RunOf, ...]:
        """The runs that its rows stand beside, each once."""
        return tuple({row.run.name: row.run for row in self.rows if row.run is not None}.values())

    def __len__(self) -> int:
        """Return how many figures it has."""
        return sum(cell is not None for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class Published:
    """All tables, by id, and what their figures are of."""

    tables: Mapping[str, Table]
    groups: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Categories by group, by data set."""
    weights: Mapping[str, WeightsOf]

    def categories(self, data: str, of: str | None) -> tuple[str, ...] | None:
        """Return what a figure is the mean of; None if it is not known by name."""
        if of is None:
            counts = FACTS[data].counts if data in FACTS else {}
            return tuple(counts) or None
        return self.groups.get(data, {}).get(of, (of,))


@cache
def published() -> Published:
    """Return the tables that come with the package."""
    return read(Path(str(resources.files("anomaly_clip.report") / FILE)))


def read(path: Path) -> Published:
    """Read and check a file of published figures.

    Raises:
        ValueError: What is wrong with it, and in which entry.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
    return _Reader(path.name).read(content)


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a name stands once: of two entries the first would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Reader:
    """Turns the file's content into records; remembers where it is, for messages."""

    def __init__(self, name: str) -> None:
        self.at = [name]
        self.sources: Mapping[str, Any] = {}
        self.doubts: Mapping[str, Any] = {}
        self.groups: dict[str, dict[str, tuple[str, ...]]] = {}
        self.weights: dict[str, WeightsOf] = {}
        self.runs: dict[str, RunOf] = {}

    def read(self, content: Any) -> Published:
        parts = ("sources", "doubts", "groups", "weights", "runs", "tables")
        self.keys(content, parts)
        self.sources, self.doubts = content["sources"], content["doubts"]
        for data, groups in self.each(content, "groups"):
            self.known("data set", data, FACTS)
            for members in groups.values():
                for member in members:
                    self.known("category", member, FACTS[data].counts)
            self.groups[data] = {name: tuple(members) for name, members in groups.items()}
        for name, entry in self.each(content, "weights"):
            self.weights[name] = self.weights_of(name, entry)
        for name, entry in self.each(content, "runs"):
            self.runs.update((run.name, run) for run in self.runs_of(name, entry))
        tables = {name: self.table(name, entry) for name, entry in self.each(content, "tables")}
        used = {run.name for table in tables.values() for run in table.runs}
        for name in self.runs:
            self.check(name in used, f"no table has the run {name}")
        return Published(tables, self.groups, self.weights)

    def weights_of(self, name: str, entry: Any) -> WeightsOf:
        self.keys(entry, ("title", "file", "made", "command"))
        command = entry["command"].format(folder=f"runs/{name}")
        return WeightsOf(name, entry["title"], entry["file"], entry["made"], command)

    def runs_of(self, name: str, entry: Any) -> Iterator[RunOf]:
        self.keys(entry, ("match", "weights", "commands"), ("draws",))
        for key in entry["match"]:
            if not key.startswith("model."):
                self.known("condition", key, CONDITIONS)
        for key in ("method", "data", "backbone"):
            self.check(key in entry["match"], f"match lacks {key}")
        self.known("data set", entry["match"]["data"], FACTS)
        match = {"each": False, **dict.fromkeys(UNSET), **entry["match"]}
        for weights in entry["weights"]:
            own = self.weights.get(weights)
            file = weights if own is None else f"runs/{weights}/{own.file}"
            run = f"{name}-{weights}"
            first = () if own is None else (own.command,)
            draws = entry.get("draws", 1)
            lines = []
            for draw in range(draws):
                folder = f"runs/{run}" if draws == 1 else f"runs/{run}/{draw}"
                filled = {"folder": folder, "weights": file, "draw": draw}
                lines += [line.format_map(filled) for line in entry["commands"]]
            yield RunOf(run, match, weights, (*first, *lines), draws)

    def table(self, name: str, entry: Any) -> Table:
        self.keys(
            entry,
            ("title", "source", "where", "data", "protocol", "unit", "columns", "rows"),
            ("digits", "doubt"),
        )
        self.known("source", entry["source"], self.sources)
        self.known("unit", entry["unit"], SCALE)
        columns = tuple(self.column(text, entry["data"]) for text in entry["columns"])
        rows = []
        for number, row in enumerate(entry["rows"], start=1):
            self.at.append(f"row {number}")
            rows.append(self.row(row, columns, entry["data"], SCALE[entry["unit"]]))
            self.at.pop()
        source = self.sources[entry["source"]]
        told = source["title"] + (f" (arXiv {source['arxiv']})" if source["arxiv"] else "")
        return Table(
            id=name,
            title=entry["title"],
            source=told,
            where=entry["where"],
            data=entry["data"],
            protocol=entry["protocol"],
            doubt=self.doubt(entry.get("doubt")),
            digits=entry.get("digits", 1),
            columns=columns,
            rows=tuple(rows),
        )

    def column(self, text: str, data: str) -> Column:
        figure, _, of = text.partition(" of ")
        self.known("figure", figure, (*FIGURES, *CLASS_FIGURES))
        if of:
            self.known("group", of, self.groups.get(data, {}))
        return Column(figure, of or None)

    def row(self, entry: Any, columns: Sequence[Column], data: str, scale: float) -> Row:
        self.keys(entry, ("method", "values"), ("data", "of", "run", "doubt", "doubts"))
        self.at[-1] += f" ({entry['method']})"
        data, of = entry.get("data", data), entry.get("of")
        if of is not None:
            counts = FACTS[data].counts if data in FACTS else {}
            self.known("group or category", of, {**self.groups.get(data, {}), **counts})
        run = None
        if "run" in entry:
            self.known("run", entry["run"], self.runs)
            run = self.runs[entry["run"]]
            self.check(
                run.match["data"] == data,
                f"run {run.name} is on {run.match['data']}, the row on {data}",
            )
        values, doubts = entry["values"], entry.get("doubts", {})
        self.check(
            len(values) == len(columns),
            f"{len(values)} values, but the table has {len(columns)} columns",
        )
        for key in doubts:
            self.known("column", key, [column.key for column in columns])
        cells = tuple(
            self.cell(value, scale, self.doubt(doubts.get(column.key)))
            for value, column in zip(values, columns, strict=True)
        )
        self.check(any(cell is not None for cell in cells), "has no figure")
        return Row(entry["method"], data, of, run, self.doubt(entry.get("doubt")), cells)

    def cell(self, value: Any, scale: float, doubt: str | None) -> Cell | None:
        if value is None:
            return None
        pair = value if isinstance(value, list) else [value, None]
        numbers = [number for number in pair if number is not None]
        right = len(pair) == 2 and pair[0] is not None
        right &= all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        self.check(right, f"{value} is neither a number nor [value, deviation]")
        self.check(
            all(0 <= number <= scale for number in numbers), f"{value} is outside 0 to {scale:g}"
        )
        fraction, spread = (None if n is None else round(n / scale, 10) for n in pair)
        assert fraction is not None
        return Cell(fraction, spread, doubt)

    def doubt(self, text: str | None) -> str | None:
        """Return a doubt's text, which may stand in the section of those that are shared."""
        return None if text is None else self.doubts.get(text, text)

    def each(self, content: Any, part: str) -> Iterator[tuple[str, Any]]:
        self.at.append(part)
        self.check(isinstance(content[part], dict), "expected entries by name")
        for name, entry in content[part].items():
            self.check(re.fullmatch(r"\w+", name) is not None, f"{name!r} is no plain name")
            self.at.append(name)
            yield name, entry
            self.at.pop()
        self.at.pop()

    def keys(self, entry: Any, wanted: Sequence[str], others: Sequence[str] = ()) -> None:
        self.check(isinstance(entry, dict), f"expected {', '.join(wanted)}")
        for key in wanted:
            self.check(key in entry, f"{key} is missing")
        for key in entry:
            self.known("key", key, (*wanted, *others))

    def known(self, what: str, name: object, names: Any) -> None:
        self.check(name in names, f"unknown {what} {name} (there are {', '.join(sorted(names))})")

    def check(self, right: bool, wrong: str) -> None:
        if not right:
            raise ValueError(f"{': '.join(self.at)}: {wrong}")
