"""Reader of ``published.yaml``, the published results; the file documents its own format.

The file is more compact than the records: one entry stands for several runs, and one number for a
cell. It can therefore not be parsed into the dataclasses directly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.data.info import DATASETS
from anomaly_clip.documents import load_yaml
from anomaly_clip.metric_values import CLASS_METRICS, METRICS
from anomaly_clip.reporting.published import (
    PublishedCell,
    PublishedColumn,
    PublishedRow,
    PublishedTable,
    PublishedTables,
    RunSpec,
    SourcedValue,
    WeightsSpec,
)

__all__ = ["FILE", "load_published", "read_published"]

FILE = "published.yaml"
UNSET = ("shots", "fraction", "auxiliary", "stitch")
"""Keys that must be unset in a run, unless the entry has a condition for them."""
CONDITIONS = {
    *UNSET,
    *("method", "data", "backbone", "image_size", "train_categories", "frozen", "targets", "each"),
    *("transductive", "scoring", "layers", "r_list", "interval", "k_list", "grid"),
}
SCALE = {"percent": 100.0, "fraction": 1.0}
WITHOUT_MASKS = ("BrainMRI", "HeadCT")
"""Data sets without masks: pixel metrics under such a name are those of a namesake."""


@cache
def load_published() -> PublishedTables:
    """Return the published tables that come with the package."""
    return read_published(Path(str(resources.files("anomaly_clip.reporting") / FILE)))


def read_published(path: Path) -> PublishedTables:
    """Read and check a file of published results.

    Raises:
        ValueError: If an entry is invalid; the message states its place in the file.
    """
    try:
        content = load_yaml(
            path.read_text(encoding="utf-8"), partial(yaml.load, Loader=_UniqueKeyLoader)
        )
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
    return _Reader(path.name).read(content)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate names, of which PyYAML would keep only the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate name {name}: rename one of the two entries",
                    problem_mark=node.start_mark,
                )
        return super().construct_mapping(node, deep)


class _Reader:
    """Parser of the file's content; keeps the place of the current entry for error messages."""

    def __init__(self, name: str) -> None:
        self.place = [name]
        self.sources: Mapping[str, Any] = {}
        self.doubts: Mapping[str, Any] = {}
        self.other_data: dict[str, str | None] = {}
        self.groups: dict[str, dict[str, tuple[str, ...]]] = {}
        self.weights: dict[str, WeightsSpec] = {}
        self.runs: dict[str, RunSpec] = {}

    def read(self, content: Any) -> PublishedTables:
        parts = ("sources", "doubts", "groups", "weights", "runs", "tables")
        self.check_keys(content, parts, ("defaults", "other_data"))
        self.sources, self.doubts = content["sources"], content["doubts"]
        for name, note in self.entries({"other_data": {}, **content}, "other_data"):
            self.check(name not in DATASETS, "this project has a data set of this name: rename it")
            self.other_data[name] = note
        for data, groups in self.entries(content, "groups"):
            self.check_name("data set", data, DATASETS)
            for members in groups.values():
                for member in members:
                    self.check_name("category", member, DATASETS[data].counts)
            self.groups[data] = {name: tuple(members) for name, members in groups.items()}
        for name, entry in self.entries(content, "weights"):
            self.weights[name] = self.weights_of(name, entry)
        for name, entry in self.entries(content, "runs"):
            self.runs.update((run.name, run) for run in self.runs_of(name, entry))
        tables = {name: self.table(name, entry) for name, entry in self.entries(content, "tables")}
        used = {run.name for table in tables.values() for run in table.runs}
        for name in self.runs:
            self.check(name in used, f"no row uses the run {name}: add a row, or remove the run")
        return PublishedTables(tables, self.groups, self.weights, content.get("defaults", {}))

    def weights_of(self, name: str, entry: Any) -> WeightsSpec:
        self.check_keys(entry, ("title", "file", "made", "command"))
        command = entry["command"].format(folder=f"runs/{name}")
        return WeightsSpec(name, entry["title"], entry["file"], entry["made"], command)

    def runs_of(self, name: str, entry: Any) -> Iterator[RunSpec]:
        self.check_keys(entry, ("match", "weights", "commands"), ("draws",))
        for key in entry["match"]:
            if not key.startswith("model."):
                self.check_name("condition", key, CONDITIONS)
        for key in ("method", "data", "backbone"):
            self.check(
                key in entry["match"],
                f"match has no {key}: add it, next to {', '.join(entry['match'])}",
            )
        self.check_name("data set", entry["match"]["data"], DATASETS)
        match = {"each": False, **dict.fromkeys(UNSET), **entry["match"]}
        for weights in entry["weights"]:
            spec = self.weights.get(weights)
            file = weights if spec is None else f"runs/{weights}/{spec.file}"
            run = f"{name}-{weights}"
            first = () if spec is None else (spec.command,)
            draws = entry.get("draws", 1)
            lines = []
            for draw in range(draws):
                folder = f"runs/{run}" if draws == 1 else f"runs/{run}/{draw}"
                filled = {"folder": folder, "weights": file, "draw": draw}
                lines += [line.format_map(filled) for line in entry["commands"]]
            yield RunSpec(run, match, weights, (*first, *lines), draws)

    def table(self, name: str, entry: Any) -> PublishedTable:
        self.check_keys(
            entry,
            ("title", "source", "where", "data", "protocol", "unit", "columns", "rows"),
            ("digits", "doubt"),
        )
        self.check_name("unit", entry["unit"], SCALE)
        columns = tuple(self.column(text, entry["data"]) for text in entry["columns"])
        rows = []
        for number, row in enumerate(entry["rows"], start=1):
            self.place.append(f"row {number}")
            rows.append(self.row(row, columns, entry["data"], SCALE[entry["unit"]]))
            self.place.pop()
        return PublishedTable(
            id=name,
            title=entry["title"],
            source=self.source(entry["source"]),
            where=entry["where"],
            data=entry["data"],
            protocol=entry["protocol"],
            doubt=self.doubt(entry.get("doubt")),
            digits=entry.get("digits", 1),
            columns=columns,
            rows=tuple(rows),
        )

    def source(self, name: Any) -> str:
        """Return a source in prose."""
        self.check_name("source", name, self.sources)
        source = self.sources[name]
        return source["title"] + (f" (arXiv {source['arxiv']})" if source["arxiv"] else "")

    def column(self, text: str, data: str) -> PublishedColumn:
        metric, _, of = text.partition(" of ")
        self.check_name("metric", metric, (*METRICS, *CLASS_METRICS))
        if of:
            self.check_name("group", of, self.groups.get(data, {}))
        return PublishedColumn(metric, of or None)

    def row(
        self, entry: Any, columns: Sequence[PublishedColumn], data: str, scale: float
    ) -> PublishedRow:
        self.check_keys(
            entry, ("method", "values"), ("data", "of", "run", "doubt", "doubts", "transductive")
        )
        self.place[-1] += f" ({entry['method']})"
        data, of = entry.get("data", data), entry.get("of")
        self.check_name("data set", data, {**DATASETS, **self.other_data})
        if of is not None:
            counts = DATASETS[data].counts if data in DATASETS else {}
            self.check_name("group or category", of, {**self.groups.get(data, {}), **counts})
        run = None
        if "run" in entry:
            self.check_name("run", entry["run"], self.runs)
            run = self.runs[entry["run"]]
            self.check(
                run.match["data"] == data,
                f"expected a run on {data}, but run {run.name} is on {run.match['data']}",
            )
        values, doubts = entry["values"], entry.get("doubts", {})
        self.check(
            len(values) == len(columns),
            f"expected one value per column ({len(columns)}), got {len(values)}",
        )
        for key in doubts:
            self.check_name("column", key, [column.key for column in columns])
        cells = tuple(
            self.cell(value, scale, self.doubt(doubts.get(column.key)))
            for value, column in zip(values, columns, strict=True)
        )
        self.check(any(cell is not None for cell in cells), f"expected a value, got {values}")
        for column, cell in zip(columns, cells, strict=True):
            self.check(
                cell is None or data not in WITHOUT_MASKS or not column.metric.startswith("pixel"),
                f"{data} has no masks, so {column.key} is of another data set of this name: give "
                f"that one a name of its own in other_data",
            )
        doubt, other = self.doubt(entry.get("doubt")), self.other_data.get(data)
        transductive = entry.get("transductive", False)
        is_of_run = transductive if run is None else run.match.get("transductive", False)
        self.check(
            is_of_run in (True, False) and transductive == is_of_run,
            f"expected transductive {is_of_run} as for the run, got {transductive}",
        )
        return PublishedRow(entry["method"], data, of, run, doubt, cells, other, transductive)

    def cell(self, value: Any, scale: float, doubt: str | None) -> PublishedCell | None:
        if value is None:
            return None
        if isinstance(value, dict):
            self.check(bool(value), f"expected {{value: source}}, got {value}")
            sourced = tuple(
                SourcedValue(self.fraction(number, scale, value), self.joined(names))
                for number, names in value.items()
            )
            return PublishedCell(sourced[0].value, None, doubt, sourced)
        pair = value if isinstance(value, list) else [value, None]
        self.check(
            len(pair) == 2 and pair[0] is not None,
            f"expected a number, [value, deviation] or {{value: source}}, got {value}",
        )
        number, spread = pair
        deviation = None if spread is None else self.fraction(spread, scale, value)
        return PublishedCell(self.fraction(number, scale, value), deviation, doubt)

    def fraction(self, number: Any, scale: float, value: Any) -> float:
        """Return a number of a cell as a fraction; ``value`` is the cell, for messages."""
        self.check(
            isinstance(number, int | float) and not isinstance(number, bool),
            f"expected a number, [value, deviation] or {{value: source}}, got {value}",
        )
        self.check(0 <= number <= scale, f"expected 0 to {scale:g}, got {value}")
        return round(float(number) / scale, 10)

    def joined(self, names: Any) -> str:
        """Return one source or a list of sources in prose."""
        listed = names if isinstance(names, list) else [names]
        self.check(bool(listed), "expected a source of each value, got an empty list")
        return " and ".join(self.source(name) for name in listed)

    def doubt(self, text: str | None) -> str | None:
        """Return the text of a doubt, which is given directly or by its name in section doubts."""
        return None if text is None else self.doubts.get(text, text)

    def entries(self, content: Any, part: str) -> Iterator[tuple[str, Any]]:
        self.place.append(part)
        self.check(
            isinstance(content[part], dict), f"expected entries by name, got {content[part]!r}"
        )
        for name, entry in content[part].items():
            self.check(
                re.fullmatch(r"\w+", name) is not None,
                f"expected letters, digits and underscores, got {name!r}",
            )
            self.place.append(name)
            yield name, entry
            self.place.pop()
        self.place.pop()

    def check_keys(self, entry: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        self.check(isinstance(entry, dict), f"expected {', '.join(required)}, got {entry!r}")
        for key in required:
            self.check(key in entry, f"{key} is missing, add it to {', '.join(map(str, entry))}")
        for key in entry:
            self.check_name("key", key, (*required, *optional))

    def check_name(self, kind: str, name: object, names: Any) -> None:
        self.check(name in names, f"unknown {kind} {name} (choose from {', '.join(sorted(names))})")

    def check(self, valid: bool, problem: str) -> None:
        if not valid:
            raise ValueError(f"{': '.join(self.place)}: {problem}")
