"""Our figures beside each other, and beside published ones.

Nothing is compared that cannot be: a mean lacks no category, a difference is taken only between
figures of the same categories, and figures of random or demo weights, of part of the test images,
or of images that were trained on, stand there with that label and without a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from string import ascii_uppercase
from typing import Any, NamedTuple

from anomaly_clip.errors import UserError
from anomaly_clip.metrics.classification import CLASS_FIGURES
from anomaly_clip.metrics.evaluator import FIGURES
from anomaly_clip.report.metrics_table import HEADINGS, percent
from anomaly_clip.report.published import Cell, Column, Published, Row, RunOf, Table
from anomaly_clip.report.table import Line, Note, Sheet
from anomaly_clip.results.finished_run import Finished, plain

__all__ = ["Made", "Records", "beside_published", "differences", "side_by_side"]

SHOWN = ("image_auroc", "pixel_auroc", *CLASS_FIGURES)
"""Figures that are printed of several runs, if there are any; the files have all."""
UNDEFINED = "–"
NAMED = 3
"""How many names a message lists."""


class Records(NamedTuple):
    """A table for programs: fractions."""

    header: list[str]
    rows: list[list[object]]


class Made(NamedTuple):
    """One table, for people and for programs."""

    sheet: Sheet
    records: Records


# -- our figures beside each other -----------------------------------------------------------------


def side_by_side(runs: Sequence[Finished]) -> Made:
    """Return the figures of runs by category, and their means.

    Raises:
        UserError: If the runs are of different categories.
    """
    names = _common_categories(runs)
    letters = _letters(runs)
    figures = _in_order({figure for run in runs for figure in run.figures})
    columns = [(figure, letter, run) for figure in figures for letter, run in letters.items()]
    ranked_by = next((f for f in figures if _has_any(runs[0], f)), figures[0])
    lines = [
        Line(
            (plain(name), *(_own_cell(run, figure, name) for figure, _, run in columns)),
            "category",
            rank=_value(runs[0], ranked_by, name),
        )
        for name in names
    ]
    means = (_own_mean(run, figure) for figure, _, run in columns)
    lines.append(Line(("mean", *means), "mean"))
    shown = [at for at, (figure, _, _) in enumerate(columns, start=1) if figure in SHOWN]
    number = f"{len(names)} {'category' if len(names) == 1 else 'categories'}"
    sheet = Sheet(
        title=f"{_what(runs)}: {number}, percent",
        notes=_warnings(letters),
        headings=["category", *(_heading(f, _marked(letters, letter)) for f, letter, _ in columns)],
        lines=lines,
        legend=_legend(letters),
        printed=[0, *shown] if len(runs) > 1 and shown else None,
        ranked_by=_heading(ranked_by).replace("\n", " "),
    )
    return Made(sheet, _own_records(runs, names, figures))


def _what(runs: Sequence[Finished]) -> str:
    """Return which methods were tested on which data."""
    methods, data = (
        list(dict.fromkeys(names))
        for names in zip(*((r.method, r.data) for r in runs), strict=True)
    )
    return f"{plain(', '.join(methods))} on {plain(', '.join(data))}"


def _has_any(run: Finished, figure: str) -> bool:
    return any(figures.get(figure) is not None for figures in run.categories.values())


def _common_categories(runs: Sequence[Finished]) -> list[str]:
    """Return the categories of all runs, those that failed too.

    Raises:
        UserError: If one has others than the first.
    """
    first = {*runs[0].categories, *runs[0].failed}
    for run in runs[1:]:
        other = {*run.categories, *run.failed}
        if other != first:
            raise UserError(
                f"{runs[0].label} and {run.label} are of different categories "
                f"({_only(first - other, runs[0])}{_only(other - first, run)}): give runs of the "
                f"same, or set them beside a published table with --table"
            )
    return list(dict.fromkeys([*runs[0].categories, *runs[0].failed]))


def _only(names: set[str], run: Finished) -> str:
    if not names:
        return ""
    listed = ", ".join(plain(name) for name in sorted(names)[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"only {run.label} has {listed}{more}; "


def _own_cell(run: Finished, figure: str, category: str) -> str:
    if category not in run.categories:
        return "failed"
    return percent([_value(run, figure, category)])[0]


def _value(run: Finished, figure: str, category: str) -> float | None:
    return run.categories.get(category, {}).get(figure)


def _own_mean(run: Finished, figure: str) -> str:
    value, count = run.mean(figure, run.expected)
    if value is None and count:
        return f"incomplete\n({count} of {len(run.expected)})"
    return percent([value])[0]


def _own_records(runs: Sequence[Finished], names: list[str], figures: list[str]) -> Records:
    rows: list[list[object]] = []
    for name in [*names, None]:
        for run in runs:
            if name is not None:
                values = [_value(run, figure, name) for figure in figures]
                notes = [] if name in run.categories else ["failed"]
            else:
                means = [run.mean(figure, run.expected) for figure in figures]
                values = [value for value, _ in means]
                notes = [
                    f"{figure} incomplete ({count} of {len(run.expected)})"
                    for figure, (value, count) in zip(figures, means, strict=True)
                    if value is None and count
                ]
            told = "; ".join([*notes, *(tag.long for tag in run.tags)])
            start = ["mean" if name is None else plain(name), run.label, *_facts(run)]
            rows.append([*start, *values, told])
    header = ["category", "run", "method", "data", "backbone", "weights", *figures, "note"]
    return Records(header, rows)


def _facts(run: Finished) -> list[str]:
    return [plain(run.method), plain(run.data), plain(run.backbone), run.weights]


# -- ours beside published -------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A run's figure in the place of a published one."""

    value: float | None
    told: str
    """What is said instead of the figure, or of it."""
    comparable: bool
    spread: float | None = None
    """Standard deviation, of the mean of several draws."""


def beside_published(
    table: Table,
    runs: Sequence[Finished],
    source: Published,
    named: Mapping[Path, str] | None = None,
) -> Made:
    """Return a published table, ours beside each figure if a run belongs there.

    Args:
        table: The table.
        runs: Runs, of which those are taken that belong to a row.
        source: All that is published.
        named: What weights files are, where nothing beside them says so.
    """
    letters = _letters(runs)
    marks: dict[str, int] = {}
    lines: list[Line] = []
    rows: list[list[object]] = []
    placed: set[str] = set()
    for row in table.rows:
        name = row.method if row.of is None else f"{row.method}, {row.of}"
        lines.append(_published_line(table, row, name, marks))
        ours = {
            letter: run
            for letter, run in letters.items()
            if row.run is not None and not differences(row.run, run, source, named or {})
        }
        placed.update(ours)
        found = [[_ours(run, c, row, source) for c in table.columns] for run in ours.values()]
        for letter, run, figures in zip(ours, ours.values(), found, strict=True):
            mark = f"ours {letter}" if len(runs) > 1 else "ours"
            lines += _our_lines(table, row, figures, mark)
            rows += _records(table, row, figures, [run])
        if _are_draws(list(ours.values())):
            means = [_mean_of(column) for column in zip(*found, strict=True)]
            lines += _our_lines(table, row, means, f"mean of {len(ours)}")
            rows += _records(table, row, means, list(ours.values()))
        if not ours:
            if row.run is not None:
                missing = ("" if cell is None else "not run" for cell in row.cells)
                lines.append(Line(("", "ours", *missing), "missing"))
            rows += _records(table, row, None, [])
    strangers = [
        Note(_why_nowhere(table, run, source, named or {}), loud=True)
        for letter, run in letters.items()
        if letter not in placed
    ]
    doubts = [Note(f"[{number}] {text}") for text, number in marks.items()]
    reference = [] if table.runs else [Note("For reference: no run of ours belongs to a row.")]
    sheet = Sheet(
        title=f"{table.title} ({table.id}), percent",
        notes=[*_said(table), *_warnings(letters)],
        headings=["method", "", *(_heading(c.figure, _of(c)) for c in table.columns)],
        lines=lines,
        legend=[*doubts, *reference, *strangers, *_legend(letters)],
        num_names=2,
    )
    header = ["table", "method", "data", "of", "figure", "published", "deviation", "ours"]
    header += ["our_deviation", "difference", "run", "weights", "note", "doubt", "source"]
    return Made(sheet, Records(header, rows))


def differences(
    wanted: RunOf, run: Finished, source: Published, named: Mapping[Path, str]
) -> list[str]:
    """Return what keeps a run from belonging to a row, nothing if it does.

    Of random and demo weights it is not asked what the weights and their network are.
    """
    found = []
    for key, value in wanted.match.items():
        if run.is_stand_in and (key in ("backbone", "image_size") or key.startswith("model.")):
            continue
        own = _condition(run, key)
        if own != value and not (key == "each" and len(run.categories) == 1):
            found.append(_told(key, own, value))
    if not run.is_stand_in:
        found += _weights_differences(wanted.weights, run, source, named)
    return found


def _condition(run: Finished, key: str) -> object:
    """Return what a run says of a condition."""
    if key.startswith("model."):
        model = run.config.get("model")
        return _lookup(model.get("init_args") if isinstance(model, dict) else None, key[6:])
    if key == "each":
        return bool(run.protocol.get("one_model_a_category", False))
    own = {"method": run.method, "data": run.data, "backbone": run.backbone}
    return own[key] if key in own else run.protocol.get(key)


def _told(key: str, own: object, wanted: object) -> str:
    if key == "each":
        return "it is one model of all categories" if wanted else "it is one model a category"
    if own is None:
        return f"{key} is not {plain(wanted)}"
    return f"{key} is {plain(own)}" + ("" if wanted is None else f", not {plain(wanted)}")


def _weights_differences(
    wanted: str, run: Finished, source: Published, named: Mapping[Path, str]
) -> list[str]:
    if run.pretrained == wanted:
        return []
    kind = named.get(Path(run.pretrained).expanduser().resolve())
    if kind is not None:
        return [] if kind == wanted else [f"its weights are {kind}, not {wanted}"]
    own = source.weights.get(wanted)
    if own is None:
        return [f"its weights are {run.weights}, not {wanted}"]
    if not run.made:
        file = run.weights
        return [f"nothing beside its weights {file} says what they are: --weights {wanted}={file}"]
    return [
        f"{key} of its weights is {plain(found)}, not {plain(value)}"
        for key, value in own.made.items()
        if (found := _lookup(run.made, key)) != value
    ]


def _lookup(content: Any, key: str) -> object:
    """Return the value behind names joined by dots; None if there is none."""
    for part in key.split("."):
        if not isinstance(content, Mapping):
            return None
        content = content.get(part)
    return content


def _why_nowhere(table: Table, run: Finished, source: Published, named: Mapping[Path, str]) -> str:
    """Say why a run belongs to no row, by the row that it is nearest to."""
    told = f"{run.label} belongs to no row of {table.id}"
    own = plain(run.method)
    candidates = [row for row in table.rows if row.run and row.run.match["method"] == run.method]
    if not candidates:
        return f"{told}: none is of {own}"
    candidates = [row for row in candidates if row.data == run.data]
    if not candidates:
        return f"{told}: none is of {own} on {plain(run.data)}"
    reasons = [
        (wrong, row.method)
        for row in candidates
        if row.run and (wrong := differences(row.run, run, source, named))
    ]
    wrong, method = min(reasons, key=lambda reason: len(reason[0]))
    return f"{told}; nearest is {method}, but {', '.join(wrong)}"


def _ours(run: Finished, column: Column, row: Row, source: Published) -> Ours:
    """Return a run's figure for a cell, or why there is none."""
    of = row.of or column.of
    over = source.categories(row.data, of) or tuple(run.expected)
    there = [name for name in over if name in run.categories]
    value, count = run.mean(column.figure, over)
    if of is None and not set(run.categories) <= set(over):
        return Ours(None, "other\ncategories", False)
    if not there:
        return Ours(None, "failed" if set(over) & set(run.failed) else "not run", False)
    if value is None and count:
        return Ours(None, f"{count} of {len(over)}\ncategories", False)
    if value is None:
        return Ours(None, UNDEFINED, False)
    told = ",\n".join(tag.short for tag in run.tags)
    return Ours(value, told, all(tag.comparable for tag in run.tags))


def _are_draws(runs: Sequence[Finished]) -> bool:
    """Say whether runs of one row are draws to be averaged: several that differ by seeds alone."""
    seeds = {run.seeds for run in runs}
    return len(runs) > 1 and len(seeds) == len(runs) and len({r.settings for r in runs}) == 1


def _mean_of(draws: Sequence[Ours]) -> Ours:
    """Return the mean of a figure over draws, none of which may lack it."""
    values = [one.value for one in draws if one.value is not None]
    if len(values) < len(draws):
        return Ours(None, f"{len(values)} of {len(draws)}\ndraws", False)
    told = ",\n".join(dict.fromkeys(one.told for one in draws if one.told))
    return Ours(fmean(values), told, all(one.comparable for one in draws), stdev(values))


def _difference(ours: Ours, cell: Cell | None) -> float | None:
    if cell is None or ours.value is None or not ours.comparable:
        return None
    return ours.value - cell.value


def _published_line(table: Table, row: Row, name: str, marks: dict[str, int]) -> Line:
    """Return a row as published; its doubts get marks, explained below the table."""
    cells = []
    for cell in row.cells:
        if cell is None:
            cells.append(UNDEFINED)
            continue
        text = f"{100 * cell.value:.{table.digits}f}{_mark(cell.doubt, marks)}"
        if cell.spread is not None:
            text += f"\n±{100 * cell.spread:.{table.digits}f}"
        cells.append(text)
    kind = "published" if row.run is not None else "reference"
    return Line((name + _mark(row.doubt, marks), kind, *cells), "published", first=True)


def _mark(doubt: str | None, marks: dict[str, int]) -> str:
    return "" if doubt is None else f" [{marks.setdefault(doubt, len(marks) + 1)}]"


def _our_lines(table: Table, row: Row, found: Sequence[Ours], mark: str) -> list[Line]:
    digits = max(table.digits, 1)
    own, away = [], []
    for ours, cell in zip(found, row.cells, strict=True):
        if ours.value is None:
            own.append(ours.told)
        else:
            value = f"{100 * ours.value:.{digits}f}"
            spread = "" if ours.spread is None else f"±{100 * ours.spread:.{digits}f}"
            own.append("\n".join(filter(None, [value, spread, ours.told])))
        difference = _difference(ours, cell)
        away.append(UNDEFINED if difference is None else f"{100 * difference:+.{digits}f}")
    return [
        Line(("", mark, *own), "ours"),
        Line(("", "difference", *away), "difference"),
    ]


def _records(
    table: Table, row: Row, found: Sequence[Ours] | None, runs: Sequence[Finished]
) -> list[list[object]]:
    """Return a row's cells for programs: of one run, of the mean of several, or of none."""
    named = (", ".join(run.label for run in runs), ", ".join({run.weights: 0 for run in runs}))
    tags = {tag.long: 0 for run in runs for tag in run.tags}
    rows: list[list[object]] = []
    for at, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        ours = None if found is None else found[at]
        if cell is None and ours is None:
            continue
        if ours is not None:
            told = "" if ours.value is not None else ours.told.replace("\n", " ")
            note = "; ".join(filter(None, [told, *tags]))
        else:
            note = "reference only" if row.run is None else "not run"
        doubts = [table.doubt, row.doubt, None if cell is None else cell.doubt]
        rows.append(
            [
                *(table.id, row.method, row.data, row.of or column.of or "all", column.figure),
                *((None, None) if cell is None else (cell.value, cell.spread)),
                *((None, None) if ours is None else (ours.value, ours.spread)),
                None if ours is None else _difference(ours, cell),
                *(named if runs else (None, None)),
                note,
                "; ".join(filter(None, doubts)),
                f"{table.source}, {table.where}",
            ]
        )
    return rows


def _said(table: Table) -> list[Note]:
    """Return what must be known before a published table is read."""
    said = [Note(f"{table.source}, {table.where}"), Note(f"Protocol: {table.protocol}")]
    return said if table.doubt is None else [*said, Note(f"In doubt: {table.doubt}")]


# -- words -----------------------------------------------------------------------------------------


def _letters(runs: Sequence[Finished]) -> dict[str, Finished]:
    """Return the runs by short names: A to Z, then numbers."""
    names = [*ascii_uppercase, *(str(n) for n in range(len(ascii_uppercase) + 1, len(runs) + 1))]
    return dict(zip(names, runs, strict=False))


def _marked(letters: Mapping[str, Finished], letter: str) -> str:
    """Return what a run is called above its column, one of several, with its labels."""
    if len(letters) == 1:
        return ""
    tags = [tag.short for tag in letters[letter].tags]
    return "\n".join([letter, *tags])


def _warnings(letters: Mapping[str, Finished]) -> list[Note]:
    """Return what must be said of runs, each once."""
    owners: dict[str, list[str]] = {}
    for letter, run in letters.items():
        for tag in run.tags:
            owners.setdefault(tag.long, []).append(letter)
    if len(letters) == 1:
        return [Note(text, loud=True) for text in owners]
    return [Note(f"{', '.join(names)}: {text}", loud=True) for text, names in owners.items()]


def _legend(letters: Mapping[str, Finished]) -> list[Note]:
    if len(letters) == 1:
        return [Note(run.description) for run in letters.values()]
    return [Note(f"{letter}: {run.description}") for letter, run in letters.items()]


def _heading(figure: str, more: str = "") -> str:
    name = HEADINGS.get(figure, figure)
    return f"{name}\n{more}" if more else name


def _of(column: Column) -> str:
    return column.of or ""


def _in_order(names: set[str]) -> list[str]:
    known = [name for name in (*FIGURES, *CLASS_FIGURES) if name in names]
    return [*known, *sorted(names - set(known))]
