"""Record of a sweep: its runs, their results in the sweep's folder, and the table of all runs.

Runs are compared by the last logged value of the sweep's metric, as in W&B's summary, not by the
best value.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomaly_clip.files import write_csv
from anomaly_clip.progress import show_table
from anomaly_clip.records import DEMO, RANDOM
from anomaly_clip.results.warnings import DEMO_REMARK, RANDOM_WARNING

__all__ = [
    "FAILURE_FILE",
    "RESULT_FILE",
    "SweepRecord",
    "any_unreadable",
    "last_logged",
    "options_text",
    "print_table",
    "write_table",
]

RESULT_FILE, FAILURE_FILE = "result.json", "failed.json"
"""Result files of a finished run and of a failed run."""
RANDOM_MARK = "val/random_weights"
"""Flag logged by a fit with random weights; not a metric."""
TEST_WARNING = (
    "SWEEP METRIC COMPUTED ON THE TEST IMAGES (data.val_split test): the best value is too "
    "optimistic"
)


@dataclass(frozen=True)
class SweepRecord:
    """Content of a sweep's ``sweep.json``.

    Args:
        title: Method and data set.
        directory: Working directory at the start, to which file names are relative.
        metric: Name of the sweep's metric.
        maximize: Whether higher is better.
        several: Whether a run uses several processes.
        runs: Options of each run.
        origins: Weights and validation split of each run.
    """

    title: str
    directory: str
    metric: str
    maximize: bool
    several: bool
    runs: list[dict[str, Any]]
    origins: list[dict[str, str]]

    @property
    def remarks(self) -> list[str]:
        """Warnings to print next to the metrics, with the runs they apply to."""
        runs_by_warning = {
            TEST_WARNING: [origin["validated on"] == "test" for origin in self.origins],
            RANDOM_WARNING: [origin["weights"] == RANDOM for origin in self.origins],
            DEMO_REMARK: [origin["weights"] == DEMO for origin in self.origins],
        }
        remarks = []
        for text, applies in runs_by_warning.items():
            runs = [str(number) for number, is_so in enumerate(applies, start=1) if is_so]
            if runs:
                label = f"{'run' if len(runs) == 1 else 'runs'} {', '.join(runs)}"
                remarks.append(text if all(applies) else f"{label}: {text}")
        return remarks


def last_logged(file: Path, goal: str) -> tuple[dict[str, float], dict[str, int]]:
    """Return the last value of every logged metric, and the epoch and step of the sweep's metric.

    Args:
        file: Log of Lightning's CSV logger.
        goal: Name of the sweep's metric.
    """
    metrics: dict[str, float] = {}
    time_logged: dict[str, int] = {}
    if not file.is_file():
        return metrics, time_logged
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            values = {name: float(value) for name, value in row.items() if value}
            metrics |= values
            if goal in values:
                time_logged = {n: int(values[n]) for n in ("epoch", "step") if n in values}
    return metrics, time_logged


def _read_of_runs(folder: Path, record: SweepRecord, name: str) -> dict[int, dict[str, Any]]:
    """Return the content of the file ``name`` by run number, for runs that have it."""
    files = {number: folder / str(number) / name for number in range(1, len(record.runs) + 1)}
    return {
        number: json.loads(file.read_text(encoding="utf-8"))
        for number, file in files.items()
        if file.is_file()
    }


def any_unreadable(folder: Path, record: SweepRecord) -> bool:
    """Return whether a finished run has left out images that could not be read."""
    results = _read_of_runs(folder, record, RESULT_FILE)
    return any(result.get("unreadable") for result in results.values())


def write_table(folder: Path, record: SweepRecord) -> None:
    """Write ``sweep.csv``, one row per run; unknown values stay empty."""
    results, failures = (_read_of_runs(folder, record, n) for n in (RESULT_FILE, FAILURE_FILE))
    goal = record.metric
    logged = {name for result in results.values() for name in result["figures"]}
    others = sorted(n for n in logged if n.startswith("val/") and n not in (goal, RANDOM_MARK))
    options, origins = list(record.runs[0]), list(record.origins[0])
    header = ["run", "state", *options, *origins, goal, *others, "epoch", "step", "minutes"]
    rows = []
    for number, values in enumerate(record.runs, start=1):
        result, run_folder = results.get(number, {}), folder / str(number)
        state = "finished" if result else "failed" if number in failures else "not run"
        metrics = [result.get("figures", {}).get(name) for name in (goal, *others)]
        effort = [result.get(key) for key in ("epoch", "step", "minutes")]
        origin = record.origins[number - 1]
        row = [*(values[name] for name in options), *(origin[name] for name in origins)]
        existing = run_folder if run_folder.is_dir() else None
        why = failures.get(number, {}).get("why")
        rows.append([number, state, *row, *metrics, *effort, existing, why])
    write_csv(folder / "sweep.csv", [*header, "folder", "why"], rows)


def print_table(folder: Path, record: SweepRecord) -> None:
    """Print the runs, best first, followed by those without a result."""
    results, failures = (_read_of_runs(folder, record, n) for n in (RESULT_FILE, FAILURE_FILE))
    goals = {number: result["figures"][record.metric] for number, result in results.items()}
    sign = -1 if record.maximize else 1
    order = sorted(goals, key=lambda number: sign * goals[number])
    order += [number for number in range(1, len(record.runs) + 1) if number not in goals]
    best = "highest" if record.maximize else "lowest"
    title = [f"{record.title}, the {best} {record.metric} first", *record.remarks]
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in ("run", *record.runs[0], record.metric, "minutes"):
        # The name of an option may only break at its dots.
        table.add_column(heading.replace(".", ".\n"), justify="right", overflow="fold")
    for number in order:
        cells = [str(number), *(_value_text(value) for value in record.runs[number - 1].values())]
        if number in goals:
            cells += [_value_text(goals[number]), f"{results[number]['minutes']:.1f}"]
        else:
            cells += ["failed" if number in failures else "not run", "–"]
        table.add_row(*(Text(cell) for cell in cells))
    console = Console(highlight=False)
    console.print(Text("\n".join(title), style="bold"))
    show_table(table, console)


def _value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def options_text(options: Mapping[str, Any]) -> str:
    """Format options on one line.

    Example:
        >>> from anomaly_clip.commands.sweep_record import options_text
        >>> options_text({"model.lr": 0.0001, "seed": 3})
        'model.lr=0.0001, seed=3'
    """
    return ", ".join(f"{name}={_value_text(value)}" for name, value in options.items())
