"""``anomaly_clip sweep``: the runs of a W&B sweep file, on this machine and without an account.

Every run is a ``fit``, in a folder of its own; then there is one table. One run that fails does
not stop the others; a sweep that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from anomaly_clip.commands.batch import (
    DryRunCLI,
    forbid_distributed_launch,
    pop_resume,
    run_in_turn,
    run_verb,
)
from anomaly_clip.commands.configs import config_file
from anomaly_clip.commands.experiment import arrange, known_options, quieten
from anomaly_clip.commands.sweep_file import METHODS, Sweep, read_sweep
from anomaly_clip.commands.sweep_record import (
    FAILURE_FILE,
    RESULT_FILE,
    SweepRecord,
    last_logged,
    options_text,
    print_table,
    write_table,
)
from anomaly_clip.errors import UserError, reason, suggest, user_errors
from anomaly_clip.files import atomic_path, write_json
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.metrics.evaluator import FIGURES
from anomaly_clip.progress import say, track
from anomaly_clip.results.folder import create_run_folder

__all__ = ["run_sweep"]

RECORD_FILE = "sweep.json"
CONFIGS = "configs"
"""Folder with the complete configuration of each run."""
FAILED = 1

Options = dict[str, Any]


class GoalMissing(UserError):
    """A fit came to its end and has not logged the goal: neither will the others."""


def run_sweep(words: Sequence[str]) -> int:
    """Fit with all options of a sweep and return an exit code: 1 if one of the runs failed.

    Raises:
        UserError: What is wrong before anything is run, and the way out.
    """
    rest, folder = pop_resume(words, RECORD_FILE)
    quieten()
    if folder is None:
        return _start(rest)
    if rest:
        raise UserError(f"--resume goes on with the sweep as it began: leave out {rest[0]}")
    forbid_distributed_launch("sweep")
    with user_errors():
        record = SweepRecord(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
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
    options, more = parser.parse_known_args(words[1:])
    if options.count is not None and options.count < 1:
        raise UserError(f"--count {options.count}: expected 1 or more")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    sweep = read_sweep(Path(config_file(words[0])).expanduser())
    method = options.method or sweep.method
    if method == "bayes":
        raise UserError(
            f"{sweep.file}: method bayes asks W&B's server for each run: draw them here with "
            f"--method random --count N, or start it there with wandb sweep {sweep.file}"
        )
    _refuse_contradictions(sweep, more)
    runs = sweep.runs(method, options.count, options.seed)
    # Its logger may be W&B's, which would ask for an account.
    lines = [[*sweep.words(of_run, more), "--trainer.logger", "null"] for of_run in runs]
    if not options.dry_run:
        forbid_distributed_launch("sweep")
    record, configs = _plan(sweep, runs, lines)
    if options.dry_run:
        for line in lines:
            print(shlex.join(["anomaly_clip", "fit", *line]))
        return 0
    with user_errors():
        root = Path(options.root).expanduser()
        folder = create_run_folder(root, options.name or f"sweep_{sweep.file.stem}")
    for number, config in enumerate(configs, start=1):
        _write_text(folder / CONFIGS / f"{number}.yaml", config)
    _write_text(folder / "sweep.yaml", sweep.text)
    write_json(folder / RECORD_FILE, asdict(record))  # last: without it nothing is gone on with
    for key in sweep.ignored:
        say(f"{key} is looked at by W&B alone: every run comes to its end")
    if options.count is not None and len(runs) == sweep.run_cap and options.count > len(runs):
        say(f"run_cap {sweep.run_cap} of {sweep.file} bounds --count {options.count}")
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
) -> tuple[SweepRecord, list[str]]:
    """Build the first run, and parse all; return the record and the configuration of each.

    Raises:
        UserError: If one is not accepted, or none can log the goal.
    """
    configs, origins = [], []
    with tempfile.TemporaryDirectory() as nowhere, user_errors(known_options):
        plan = DryRunCLI(args=arrange(["fit", *lines[0], "--output.folder", nowhere]))
        _check_goal(plan, sweep)
        _ = plan.datamodule.fit_samples()  # are there any?
    for number, line in enumerate(track(lines, "parsing"), start=1):
        try:
            with user_errors(known_options):
                config = plan.parser.parse_args(arrange(["fit", *line]))["fit"]
        except UserError as error:
            raise UserError(f"run {number} ({options_text(runs[number - 1])}): {error}") from None
        files = [str(file) for file in config.get("config") or []]
        # Name of the runs that test this run's checkpoint.
        config["output"]["name"] = Path(files[0]).stem if files else sweep.file.stem
        configs.append(plan._parser("fit").dump(config, skip_none=False))
        origins.append(_origin(config.as_dict()))
    record = SweepRecord(
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
    """Return the weights and the validation of a run, by its complete configuration."""
    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    backbone = model.get("backbone") or {}
    weights = backbone.get("pretrained") or backbone.get("weights")
    return {"weights": str(weights), "validated on": str(data.get("val_split"))}


def _check_goal(plan: DryRunCLI, sweep: Sweep) -> None:
    """Check that ``fit`` logs the goal, as far as that is known before.

    Raises:
        ValueError: If it does not.
    """
    kind, _, metric = sweep.metric.partition("/")
    if kind == "val" and not plan.datamodule.validation.exists:
        raise ValueError(
            f"{sweep.file}: metric.name {sweep.metric}: these runs have no validation: say what "
            f"validates, as --data.val_split synthetic in the command"
        )
    if kind == "val" and isinstance(plan.model, AnomalyMethod) and metric not in FIGURES:
        logged = [f"val/{name}" for name in FIGURES]
        method = type(plan.model).__name__
        raise ValueError(
            f"{sweep.file}: metric.name: {method} logs no {sweep.metric}; "
            f"{suggest(sweep.metric, logged)}"
        )


def _run_all(folder: Path, record: SweepRecord) -> int:
    """Run what is not finished; print and write the table; return an exit code."""
    jobs = {
        f"{number}: {options_text(options)}": partial(_run_one, folder, record, number)
        for number, options in enumerate(record.runs, start=1)
    }
    resume = f"anomaly_clip sweep --resume {shlex.quote(str(folder))}"
    failed = run_in_turn(jobs, resume, GoalMissing)
    write_table(folder, record)
    print_table(folder, record)
    say(f"results: {folder / 'sweep.csv'}")
    return FAILED if failed else 0


def _run_one(folder: Path, record: SweepRecord, number: int) -> None:
    """Fit, unless that is done; what was interrupted begins anew.

    Raises:
        GoalMissing: If the goal was not logged.
        UserError: If the training has diverged.
    """
    run = folder / str(number)
    if (run / RESULT_FILE).is_file():
        say("finished before")
        return
    shutil.rmtree(run, ignore_errors=True)
    try:
        result = _fit(folder, run, record, number)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else reason(error)
        write_json(run / FAILURE_FILE, {"why": why})  # kept if what follows is interrupted
        raise
    write_json(run / RESULT_FILE, result)
    write_table(folder, record)


def _fit(folder: Path, run: Path, record: SweepRecord, number: int) -> dict[str, Any]:
    """Fit and return the record of the result.

    Raises:
        GoalMissing: If the goal was not logged.
        UserError: If the training has diverged.
    """
    config = folder / CONFIGS / f"{number}.yaml"
    began = time.monotonic()
    run_verb(["fit", "--config", str(config), "--output.folder", str(run)], record.several)
    minutes = (time.monotonic() - began) / 60
    metrics, time_logged = last_logged(run / "logs" / "fit" / "metrics.csv", record.metric)
    goal = metrics.get(record.metric)
    if goal is None:
        logged = ", ".join(name for name in metrics if name.startswith("val/")) or "no val/ figure"
        raise GoalMissing(f"the fit logged no {record.metric}, but {logged}: choose another goal")
    if not math.isfinite(goal):
        raise UserError(f"{record.metric} is {goal} at the end: the training has diverged")
    say(f"{record.metric} {goal:.6g}")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return {"figures": finite, **time_logged, "minutes": minutes}


def _write_text(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
