"""``anomaly_clip sweep``: the runs of a W&B sweep file, on this machine and without an account.

Every run is a ``fit``, in a folder of its own; then there is one table. A run's figure is the last
one that its validation logged, as in W&B's summary, not the best of its course. One run that fails
does not stop the others; a sweep that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomaly_clip.commands.batch import (
    Plan,
    refuse_shared_launch,
    run_in_turn,
    run_verb,
    without_resume,
)
from anomaly_clip.commands.experiment import arrange, known_options, quieten
from anomaly_clip.commands.sweep_file import METHODS, Sweep, read_sweep
from anomaly_clip.errors import UserError, nearest, reason, translated
from anomaly_clip.files import atomic_path, write_csv, write_json
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.metrics.evaluator import FIGURES
from anomaly_clip.progress import say, track
from anomaly_clip.records import DEMO, RANDOM
from anomaly_clip.report.metrics_table import DEMO_REMARK, RANDOM_WARNING
from anomaly_clip.results.folder import create_run_folder

__all__ = ["run_sweep"]

RECORD, CONFIGS = "sweep.json", "configs"
"""What is run how, and the complete configuration of each run."""
RESULT, FAILURE = "result.json", "failed.json"
"""What says that a run is finished, or why it has failed."""
FAILED = 1
RANDOM_MARK = "val/random_weights"
"""What a fit logs with random weights: no figure."""
BY_TEST = "GOAL MEASURED ON THE TEST IMAGES (data.val_split test): the best is too good"

Options = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What a sweep runs.

    Args:
        title: What is fitted on what.
        directory: Where it was begun, which names of files in it may start from.
        metric: The name of the goal.
        maximize: Whether more of it is better.
        several: Whether a run takes several processes.
        runs: The options of each run.
        origins: What the figures of each run come from: its weights, and what validates.
    """

    title: str
    directory: str
    metric: str
    maximize: bool
    several: bool
    runs: list[Options]
    origins: list[dict[str, str]]

    @property
    def remarks(self) -> list[str]:
        """What must be said beside the figures, and of which runs."""
        wrong = {
            BY_TEST: [one["validated on"] == "test" for one in self.origins],
            RANDOM_WARNING: [one["weights"] == RANDOM for one in self.origins],
            DEMO_REMARK: [one["weights"] == DEMO for one in self.origins],
        }
        said = []
        for text, which in wrong.items():
            runs = ", ".join(str(number) for number, is_so in enumerate(which, start=1) if is_so)
            if runs:
                said.append(text if all(which) else f"run {runs}: {text}")
        return said


class GoalMissing(UserError):
    """A fit came to its end and has not logged the goal: neither will the others."""


def run_sweep(words: Sequence[str]) -> int:
    """Fit with all options of a sweep and return an exit code: 1 if one of the runs failed.

    Raises:
        UserError: What is wrong before anything is run, and the way out.
    """
    rest, folder = without_resume(words, RECORD)
    quieten()
    if folder is None:
        return _start(rest)
    if rest:
        raise UserError(f"--resume goes on with the sweep as it began: leave out {rest[0]}")
    refuse_shared_launch("sweep")
    with translated():
        record = Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    if Path.cwd() != Path(record.directory):  # where its names of files may lead elsewhere
        raise UserError(f"--resume {folder}: the sweep was begun in {record.directory}: go there")
    return _run_all(folder, record)


def _start(words: Sequence[str]) -> int:
    """Read a sweep file and run it.

    Raises:
        UserError: What is wrong before anything is run, and the way out.
    """
    parser = _parser()
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    if not words or words[0].startswith("-"):
        raise UserError("sweep: name the file first, as configs/sweeps/demo.yaml")
    asked, more = parser.parse_known_args(words[1:])
    if asked.count is not None and asked.count < 1:
        raise UserError(f"--count {asked.count}: expected 1 or more")
    if asked.seed < 0:
        raise UserError(f"--seed {asked.seed}: expected 0 or more")
    sweep = read_sweep(Path(words[0]).expanduser())
    method = asked.method or sweep.method
    if method == "bayes":
        raise UserError(
            f"{sweep.file}: method bayes asks W&B's server for each run: draw them here with "
            f"--method random --count N, or start it there with wandb sweep {sweep.file}"
        )
    _refuse_contradictions(sweep, more)
    runs = sweep.runs(method, asked.count, asked.seed)
    # Its logger may be W&B's, which would ask for an account.
    lines = [[*sweep.words(options, more), "--trainer.logger", "null"] for options in runs]
    if not asked.dry_run:
        refuse_shared_launch("sweep")
    record, configs = _plan(sweep, runs, lines)
    if asked.dry_run:
        for line in lines:
            print(shlex.join(["anomaly_clip", "fit", *line]))
        return 0
    with translated():
        root = Path(asked.root).expanduser()
        folder = create_run_folder(root, asked.name or f"sweep_{sweep.file.stem}")
    for number, config in enumerate(configs, start=1):
        _write_text(folder / CONFIGS / f"{number}.yaml", config)
    _write_text(folder / "sweep.yaml", sweep.text)
    write_json(folder / RECORD, asdict(record))  # last: without it nothing is gone on with
    for key in sweep.ignored:
        say(f"{key} is looked at by W&B alone: every run comes to its end")
    if asked.count is not None and len(runs) == sweep.run_cap and asked.count > len(runs):
        say(f"run_cap {sweep.run_cap} of {sweep.file} bounds --count {asked.count}")
    say(f"sweep {record.title} | {method}, {len(runs)} runs | goal {record.metric} | run {folder}")
    for remark in record.remarks:
        say(remark, style="bold red")
    return _run_all(folder, record)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anomaly_clip sweep",
        usage="anomaly_clip sweep FILE [--method random] [--count N] [--seed S] [--dry-run] "
        "[options of fit]\n       anomaly_clip sweep --resume RUN",
        description="Run a W&B sweep file here, without an account: a fit for each set of options, "
        "then one table, the best first (sweep.csv). --resume goes on with a sweep: finished runs "
        "are not run again. Options of fit hold for all runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--method", choices=METHODS[:2], help="default: that of the file")
    parser.add_argument("--count", type=int, metavar="N", help="how many runs at most")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws those of random")
    parser.add_argument("--dry-run", action="store_true", help="list the commands of the runs")
    parser.add_argument(
        "--output.root", dest="root", default="runs", metavar="DIR", help="default: runs"
    )
    parser.add_argument(
        "--output.name", dest="name", help="default: sweep_ and the name of the file"
    )
    return parser


def _refuse_contradictions(sweep: Sweep, more: Sequence[str]) -> None:
    """Check the user's own options of fit.

    Raises:
        UserError: If the sweep sets them.
    """
    swept = {name.replace(".init_args", "") for name in sweep.parameters}
    for word in more:
        name = word.partition("=")[0]
        if name.removeprefix("--").replace(".init_args", "") in swept:
            raise UserError(f"{name}: {sweep.file} sweeps it: leave it out")
        if name == "--output.folder":
            raise UserError(f"{name}: a sweep gives each run its folder: give --output.root")
        if name.startswith("--trainer.logger"):
            raise UserError(f"{name}: a sweep logs into the folder of each run: leave it out")


def _plan(
    sweep: Sweep, runs: Sequence[Options], lines: Sequence[Sequence[str]]
) -> tuple[Record, list[str]]:
    """Build what the first run needs, and parse all; return the configuration of each, too.

    Raises:
        UserError: If one is not accepted, or none can log the goal.
    """
    configs, origins = [], []
    with tempfile.TemporaryDirectory() as nowhere, translated(known_options):
        plan = Plan(args=arrange(["fit", *lines[0], "--output.folder", nowhere]))
        _check_goal(plan, sweep)
        _ = plan.datamodule.fit_samples()  # are there any?
    for number, line in enumerate(track(lines, "parsing"), start=1):
        try:
            with translated(known_options):
                config = plan.parser.parse_args(arrange(["fit", *line]))["fit"]
        except UserError as error:
            raise UserError(f"run {number} ({_told(runs[number - 1])}): {error}") from None
        files = [str(file) for file in config.get("config") or []]
        # What a test of the run's checkpoint is called.
        config["output"]["name"] = Path(files[0]).stem if files else sweep.file.stem
        configs.append(plan._parser("fit").dump(config, skip_none=False))
        origins.append(_origin(config.as_dict()))
    record = Record(
        title=f"{type(plan.model).__name__} on {plan.datamodule.dataset_name}",
        directory=str(Path.cwd()),
        metric=sweep.metric,
        maximize=sweep.maximize,
        several=plan.trainer.world_size > 1,
        runs=list(runs),
        origins=origins,
    )
    return record, configs


def _origin(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the figures of a run come from, by its complete configuration."""
    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    backbone = model.get("backbone") or {}
    weights = backbone.get("pretrained") or backbone.get("weights")
    return {"weights": str(weights), "validated on": str(data.get("val_split"))}


def _check_goal(plan: Plan, sweep: Sweep) -> None:
    """Check that ``fit`` logs the goal, as far as that is known before.

    Raises:
        ValueError: If it does not.
    """
    kind, _, figure = sweep.metric.partition("/")
    if kind == "val" and plan.datamodule.val_split == "none":
        raise ValueError(
            f"{sweep.file}: metric.name {sweep.metric}: these runs have no validation: say what "
            f"validates, as --data.val_split synthetic in the command"
        )
    if kind == "val" and isinstance(plan.model, AnomalyMethod) and figure not in FIGURES:
        known = [f"val/{name}" for name in FIGURES]
        method = type(plan.model).__name__
        raise ValueError(
            f"{sweep.file}: metric.name: {method} logs no {sweep.metric}; "
            f"{nearest(sweep.metric, known)}"
        )


def _run_all(folder: Path, record: Record) -> int:
    """Run what is not finished; print and write the table; return an exit code."""
    jobs = {
        f"{number}: {_told(options)}": partial(_run_one, folder, record, number)
        for number, options in enumerate(record.runs, start=1)
    }
    resume = f"anomaly_clip sweep --resume {shlex.quote(str(folder))}"
    failed = run_in_turn(jobs, resume, GoalMissing)
    _write_table(folder, record)
    _print_table(folder, record)
    say(f"results: {folder / 'sweep.csv'}")
    return FAILED if failed else 0


def _run_one(folder: Path, record: Record, number: int) -> None:
    """Fit, unless that is done; what was interrupted begins anew.

    Raises:
        GoalMissing: If the goal was not logged.
        UserError: If the training has diverged.
    """
    own = folder / str(number)
    if (own / RESULT).is_file():
        say("finished before")
        return
    shutil.rmtree(own, ignore_errors=True)
    try:
        result = _fitted(folder, own, record, number)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else reason(error)
        write_json(own / FAILURE, {"why": why})  # kept if what follows is interrupted
        raise
    write_json(own / RESULT, result)
    _write_table(folder, record)


def _fitted(folder: Path, own: Path, record: Record, number: int) -> dict[str, Any]:
    """Fit and return what is kept of it.

    Raises:
        GoalMissing: If the goal was not logged.
        UserError: If the training has diverged.
    """
    config = folder / CONFIGS / f"{number}.yaml"
    began = time.monotonic()
    run_verb(["fit", "--config", str(config), "--output.folder", str(own)], record.several)
    minutes = (time.monotonic() - began) / 60
    figures, when = _last_logged(own / "logs" / "fit" / "metrics.csv", record.metric)
    goal = figures.get(record.metric)
    if goal is None:
        logged = ", ".join(name for name in figures if name.startswith("val/")) or "no val/ figure"
        raise GoalMissing(f"the fit logged no {record.metric}, but {logged}: choose another goal")
    if not math.isfinite(goal):
        raise UserError(f"{record.metric} is {goal} at the end: the training has diverged")
    say(f"{record.metric} {goal:.6g}")
    return {"figures": _known(figures), **when, "minutes": minutes}


def _last_logged(file: Path, goal: str) -> tuple[dict[str, float], dict[str, int]]:
    """Return the last value of all that a fit logged, and epoch and step of the goal's."""
    figures: dict[str, float] = {}
    when: dict[str, int] = {}
    if not file.is_file():
        return figures, when
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            found = {name: float(value) for name, value in row.items() if value}
            figures |= found
            if goal in found:
                when = {name: int(found[name]) for name in ("epoch", "step") if name in found}
    return figures, when


def _known(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that are numbers."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _left(folder: Path, record: Record, name: str) -> dict[int, dict[str, Any]]:
    """Return what the runs left under a name, by their numbers."""
    files = {number: folder / str(number) / name for number in range(1, len(record.runs) + 1)}
    return {
        number: json.loads(file.read_text(encoding="utf-8"))
        for number, file in files.items()
        if file.is_file()
    }


def _write_table(folder: Path, record: Record) -> None:
    """Write ``sweep.csv``, one row a run; what is not known stays empty."""
    results, failed = (_left(folder, record, name) for name in (RESULT, FAILURE))
    goal = record.metric
    logged = {name for one in results.values() for name in one["figures"]}
    others = sorted(n for n in logged if n.startswith("val/") and n not in (goal, RANDOM_MARK))
    options, origins = list(record.runs[0]), list(record.origins[0])
    header = ["run", "state", *options, *origins, goal, *others, "epoch", "step", "minutes"]
    rows = []
    for number, values in enumerate(record.runs, start=1):
        one, own_folder = results.get(number, {}), folder / str(number)
        state = "finished" if one else "failed" if number in failed else "not run"
        figures = [one.get("figures", {}).get(name) for name in (goal, *others)]
        own = [one.get(key) for key in ("epoch", "step", "minutes")]
        origin = record.origins[number - 1]
        row = [*(values[name] for name in options), *(origin[name] for name in origins)]
        there = own_folder if own_folder.is_dir() else None
        why = failed.get(number, {}).get("why")
        rows.append([number, state, *row, *figures, *own, there, why])
    write_csv(folder / "sweep.csv", [*header, "folder", "why"], rows)


def _print_table(folder: Path, record: Record) -> None:
    """Print the runs, the best first and behind them those without a result."""
    results = _left(folder, record, RESULT)
    failed = _left(folder, record, FAILURE)
    goals = {number: one["figures"][record.metric] for number, one in results.items()}
    sign = -1 if record.maximize else 1
    order = sorted(goals, key=lambda number: sign * goals[number])
    order += [number for number in range(1, len(record.runs) + 1) if number not in goals]
    best = "highest" if record.maximize else "lowest"
    title = [f"{record.title}, the {best} {record.metric} first", *record.remarks]
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in ("run", *record.runs[0], record.metric, "minutes"):
        # An option's name is broken at its dots, not anywhere.
        table.add_column(heading.replace(".", ".\n"), justify="right", overflow="fold")
    for number in order:
        cells = [str(number), *(_cell(value) for value in record.runs[number - 1].values())]
        if number in goals:
            cells += [_cell(goals[number]), f"{results[number]['minutes']:.1f}"]
        else:
            cells += ["failed" if number in failed else "not run", "–"]
        table.add_row(*(Text(cell) for cell in cells))
    console = Console()
    if not console.is_terminal:  # a file's lines are as long as they must be
        console.width = max(console.width, console.measure(table).maximum)
    console.print(Text("\n".join(title), style="bold"))
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _told(options: Options) -> str:
    """Return options as they are said to people."""
    return ", ".join(f"{name}={_cell(value)}" for name, value in options.items())


def _write_text(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
