"""Tables of runs, for the command ``report`` and for ``anomaly_clip.report`` in Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomaly_clip.errors import UserError, suggest
from anomaly_clip.files import ESCAPING, atomic_path, write_csv
from anomaly_clip.reporting.comparison import ComparisonTable, compare_runs
from anomaly_clip.reporting.protocol import protocol_report
from anomaly_clip.reporting.published import PublishedTable, PublishedTables
from anomaly_clip.reporting.published_comparison import compare_with_published
from anomaly_clip.reporting.published_reader import load_published
from anomaly_clip.reporting.table import ReportTable
from anomaly_clip.results.run_reader import find_runs

__all__ = [
    "FORMATS",
    "Report",
    "check_files",
    "find_table",
    "report",
    "weights_by_file",
    "write_files",
]

FORMATS = ("csv", "markdown", "html")
"""Formats of the files that a table is saved in."""
SUFFIXES = {".csv": "csv", ".md": "markdown", ".markdown": "markdown", ".html": "html"}
"""Format of a file, by its suffix."""

StrPath = str | os.PathLike[str]


class Report:
    """A table of runs, as :func:`report` returns it.

    ``print(report)`` prints the table of the command line; a notebook shows it as HTML.

    Args:
        comparison: The table, readable and as rows.
    """

    def __init__(self, comparison: ComparisonTable) -> None:
        self._comparison = comparison

    @property
    def table(self) -> ReportTable:
        """The readable table."""
        return self._comparison.table

    @property
    def columns(self) -> list[str]:
        """Names of the values in each of `rows`."""
        return list(self._comparison.data.header)

    @property
    def rows(self) -> list[dict[str, object]]:
        """One dictionary per category and run, with metrics as fractions in ``[0, 1]``.

        A metric that is undefined is None. ``pandas.DataFrame(report.rows)`` turns the rows into a
        data frame.
        """
        return [dict(zip(self.columns, row, strict=True)) for row in self._comparison.data.rows]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._comparison.data.rows)

    def __str__(self) -> str:
        """Return the table as text."""
        return self.table.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return self.table.fragment()

    def save(self, file: StrPath) -> Path:
        """Write the table as CSV, Markdown or HTML, by the suffix of the file; return its path.

        Raises:
            ValueError: If the suffix is none of .csv, .md, .markdown and .html, or the file cannot
                be written.
        """
        path = Path(os.fsdecode(file)).expanduser()
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"{path}: expected a name that ends with {', '.join(SUFFIXES)}, which selects the "
                f"format"
            )
        _in_python({kind: path}, self._comparison)
        return path


def report(
    *runs: StrPath | Sequence[StrPath],
    table: str | None = None,
    protocol: bool = False,
    weights: Mapping[str, StrPath] | None = None,
    csv: StrPath | None = None,
    markdown: StrPath | None = None,
    html: StrPath | None = None,
) -> Report:
    """Return the metrics of runs side by side, or next to a published table.

    The same tables as those of the command ``anomaly_clip report``.

    Args:
        runs: Folders of runs of test, each or compare, or lists of them.
        table: Name of a published table, such as ``clip_ad``: the runs are shown next to it, with
            the differences.
        protocol: Whether to return the protocol of the runs in place of their metrics: data,
            weights, resolution, seeds, metrics and software, as a paper must state them.
        weights: Files of weights by kind, such as ``{"tab": "tab.safetensors"}``, for files
            without a record of their origin; only with a published table.
        csv: File to write all metrics to, as fractions; default: none.
        markdown: File to write the table to, as Markdown; default: none.
        html: File to write the table to, as a web page; default: none.

    Raises:
        ValueError: If a folder is not that of a finished run, the table does not exist, or a file
            cannot be written; in one sentence, with the way out.

    Example:
        >>> import anomaly_clip
        >>> anomaly_clip.report(table="padim").rows[0]["method"]  # doctest: +SKIP
        'PaDiM'
    """
    files = {
        name: None if file is None else Path(os.fsdecode(file)).expanduser()
        for name, file in zip(FORMATS, (csv, markdown, html), strict=True)
    }
    try:
        check_files(files, "{}=")
        comparison = _build(_flat(runs), table, protocol, weights or {})
    except UserError as error:
        raise ValueError(_in_words_of_python(error)) from error.__cause__
    _in_python(files, comparison)
    return Report(comparison)


def _flat(runs: Sequence[StrPath | Sequence[StrPath]]) -> list[StrPath]:
    return [
        folder
        for entry in runs
        for folder in ([entry] if isinstance(entry, str | os.PathLike) else entry)
    ]


def _build(
    folders: Sequence[StrPath], table: str | None, protocol: bool, weights: Mapping[str, StrPath]
) -> ComparisonTable:
    if table is not None and protocol:
        raise UserError("report: protocol shows no published table: leave out table")
    if weights and table is None:
        raise UserError("report: weights are only needed with a published table: name it as table")
    if table is None and not folders:
        raise UserError("report: give folders of runs, or the name of a published table")
    paths = [Path(os.fsdecode(folder)) for folder in folders]
    if table is None:
        runs = find_runs(paths)
        return protocol_report(runs) if protocol else compare_runs(runs)
    source = load_published()
    chosen = find_table(table, source)
    words = [f"{kind}={os.fsdecode(file)}" for kind, file in weights.items()]
    return compare_with_published(chosen, find_runs(paths), source, weights_by_file(words, source))


def _in_python(files: Mapping[str, Path | None], comparison: ComparisonTable) -> None:
    """Write files.

    Raises:
        ValueError: If a file cannot be written.
    """
    try:
        check_files(files, "{}=")
        write_files(comparison, files, "{}=")
    except UserError as error:
        raise ValueError(_in_words_of_python(error)) from error.__cause__


def _in_words_of_python(error: UserError) -> str:
    return str(error).replace("--table ", "table=").replace("--weights ", "weights=")


# -- shared with the command -----------------------------------------------------------------------


def find_table(name: str, source: PublishedTables) -> PublishedTable:
    """Return a published table.

    Raises:
        UserError: If there is no table of that name.
    """
    if name not in source.tables:
        hint = suggest(name, source.tables) or f"there are {', '.join(source.tables)}"
        raise UserError(f"--table {name}: no such table; {hint}")
    return source.tables[name]


def weights_by_file(words: Sequence[str], source: PublishedTables) -> dict[Path, str]:
    """Return the kind of each weights file that ``KIND=FILE`` names.

    Raises:
        UserError: If a word has another form, or names an unknown kind.
    """
    kinds = {row.run.weights for t in source.tables.values() for row in t.rows if row.run}
    kind_by_file = {}
    for word in words:
        kind, _, file = word.partition("=")
        if kind not in kinds or not file:
            valid = ", ".join(sorted(kinds))
            raise UserError(f"--weights {word}: expected KIND=FILE, with KIND one of {valid}")
        kind_by_file[Path(file).expanduser().resolve()] = kind
    return kind_by_file


def check_files(files: Mapping[str, Path | None], form: str = "--{} ") -> None:
    """Check that no file to write is a folder.

    Args:
        files: File by format; None: none.
        form: How the user names an option.

    Raises:
        UserError: If a file is a folder.
    """
    for name, file in files.items():
        if file is not None and file.is_dir():
            raise UserError(f"{form.format(name)}{file} is a folder: name a file in it")


def write_files(
    comparison: ComparisonTable, files: Mapping[str, Path | None], form: str = "--{} "
) -> list[Path]:
    """Write a table into files, and return their paths.

    Args:
        comparison: The table.
        files: File by format, of `FORMATS`; None: none.
        form: How the user names an option.

    Raises:
        UserError: If a file cannot be written.
    """
    pages = {"markdown": comparison.table.markdown, "html": comparison.table.html}
    written = []
    for name, file in files.items():
        if file is None:
            continue
        try:
            if name == "csv":
                write_csv(file, comparison.data.header, comparison.data.rows)
            else:
                with atomic_path(file) as temporary:
                    temporary.write_text(pages[name](), encoding="utf-8", errors=ESCAPING)
        except OSError as error:
            raise UserError(
                f"{form.format(name)}{file}: cannot be written ({error.strerror})"
            ) from None
        written.append(file)
    return written
