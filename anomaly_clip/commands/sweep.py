"""``anomaly_clip sweep``: the runs of a W&B sweep file, on this machine and without an account.

Every run is a ``fit`` in its own folder; one table compares them. A run that fails does not stop
the others. An interrupted sweep can be resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.commands.batch import (
    DryRunCLI,
    check_directory,
    check_new_folder,
    first_difference,
    forbid_distributed_launch,
    pop_resume,
    run_in_turn,
    working_in,
)
from anomaly_clip.commands.configs import config_file
from anomaly_clip.commands.continued_fit import fit_in
from anomaly_clip.commands.experiment import UNREADABLE, arrange, known_options
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.commands.sweep_file import METHODS, Sweep, read_sweep
from anomaly_clip.commands.sweep_record import (
    FAILURE_FILE,
    RESULT_FILE,
    SweepRecord,
    any_unreadable,
    last_logged,
    options_text,
    print_table,
    write_table,
)
from anomaly_clip.commands.working_folder import import_named_classes
from anomaly_clip.errors import UserError, reason, suggest, user_errors
from anomaly_clip.files import atomic_path, write_json
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.metric_values import METRICS
from anomaly_clip.progress import say, track
from anomaly_clip.results.folder import create_run_folder

__all__ = ["run_sweep"]

RECORD_FILE = "sweep.json"
CONFIGS = "configs"
"""Folder with the complete configuration of each run."""
FAILED = 1

Options = dict[str, Any]


class GoalMissing(UserError):
    """A finished fit has not logged the sweep's metric, nor would the remaining runs."""


def run_sweep(words: Sequence[str]) -> int:
    """Run the fits of a sweep; return exit code 1 if one failed or could not read some images.

    Raises:
        UserError: If the sweep cannot be started.
    """
    rest, folder = pop_resume(words, RECORD_FILE)
    quieten()
    if folder is None:
        return _start(rest)
    if rest:
        raise UserError(
            f"--resume continues the sweep with its original options: leave out {rest[0]}"
        )
    forbid_distributed_launch("sweep")
    with user_errors():
        record = SweepRecord(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
    with working_in(record.directory, folder) as folder:
        return _run_all(folder, record)


def _start(words: Sequence[str]) -> int:
    """Read a sweep file and run it.

    Raises:
        UserError: If the sweep cannot be started.
    """
    parser = _parser()
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    if not words or words[0].startswith("-"):
        given = words[0] if words else "nothing"
        raise UserError(
            f"sweep: expected a sweep file first, such as configs/sweeps/demo.yaml, got {given}"
        )
    options, more = parser.parse_known_args(words[1:])
    if options.count is not None and options.count < 1:
        raise UserError(f"--count {options.count}: expected 1 or more")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    sweep = read_sweep(Path(config_file(words[0])).expanduser())
    method = options.method or sweep.method
    if method == "bayes":
        raise UserError(
            f"{sweep.file}: method bayes needs W&B's server to choose each run: sample the runs "
            f"here with --method random --count N, or start the sweep with wandb sweep {sweep.file}"
        )
    _refuse_contradictions(sweep, more)
    runs = sweep.runs(method, options.count, options.seed)
    # The configured logger may be W&B's, which would require an account.
    lines = [
        [*sweep.words(options_of_run, more), "--trainer.logger", "null"] for options_of_run in runs
    ]
    for line in lines:
        import_named_classes(["fit", *line])
    if not options.dry_run:
        forbid_distributed_launch("sweep")
    record, configs = _plan(sweep, runs, lines)
    if options.dry_run:
        for line in lines:
            print(shlex.join(["anomaly_clip", "fit", *line]))
        return 0
    with user_errors():
        folder = options.folder and Path(options.folder).expanduser()
        if folder is not None and _has_record(folder, record, configs):
            say(f"{folder} has this run already, which continues")
            return _run_all(folder, record)
        if folder is None:
            root = Path(options.root).expanduser()
            name = options.name or f"sweep_{sweep.file.stem}"
            folder = create_run_folder(root, name, "sweep")
    for number, config in enumerate(configs, start=1):
        _write_text(folder / CONFIGS / f"{number}.yaml", config)
    _write_text(folder / "sweep.yaml", sweep.text)
    write_json(folder / RECORD_FILE, asdict(record))  # last: only complete folders can be resumed
    for key in sweep.ignored:
        say(f"{key} only works with W&B's server: here every run finishes")
    if options.count is not None and len(runs) == sweep.run_cap and options.count > len(runs):
        say(f"run_cap {sweep.run_cap} of {sweep.file} limits --count {options.count}")
    say(f"sweep {record.title} | {method}, {len(runs)} runs | goal {record.metric} | run {folder}")
    for remark in record.remarks:
        say(remark, style="bold red")
    return _run_all(folder, record)


def _has_record(folder: Path, record: SweepRecord, configs: Sequence[str]) -> bool:
    """Return whether a chosen folder has the same sweep; False if it is free.

    Raises:
        UserError: If it has other results.
    """
    if not (folder / RECORD_FILE).is_file():
        check_new_folder("sweep", folder, [*map(str, range(1, len(configs) + 1)), CONFIGS])
        return False
    before = SweepRecord(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
    check_directory(folder, before.directory)
    files = [folder / CONFIGS / f"{number}.yaml" for number in range(1, len(configs) + 1)]
    same = before.runs == record.runs and before.metric == record.metric
    pairs = zip(files, configs, strict=True)
    if not (same and all(_same_config(file, config) for file, config in pairs)):
        raise UserError(
            f"--output.folder {folder} has another sweep: choose another folder, or continue that "
            f"sweep with --resume {folder}"
        )
    return True


def _same_config(file: Path, config: str) -> bool:
    before, now = (yaml.safe_load(text) for text in (file.read_text(encoding="utf-8"), config))
    return first_difference(before, now) is None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anomaly_clip sweep",
        usage="anomaly_clip sweep FILE [--method random] [--count N] [--seed S] [--dry-run] "
        "[options of fit]\n       anomaly_clip sweep --resume RUN",
        description="Run a W&B sweep file on this machine, without an account: a fit for each set "
        "of options, then one table with the best run first (sweep.csv). --resume continues an "
        "interrupted run, inside the fit in progress, and skips the fits that are finished. "
        "Options of fit apply to all runs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--method", choices=METHODS[:2], help="search method; default: that of the file"
    )
    parser.add_argument("--count", type=int, metavar="N", help="maximum number of runs")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of method random; default: 0"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the commands of the fits")
    parser.add_argument(
        "--output.root",
        dest="root",
        default="runs",
        metavar="DIR",
        help="parent of the sweep's folder; default: runs",
    )
    parser.add_argument(
        "--output.folder", dest="folder", metavar="DIR", help="the sweep's folder itself"
    )
    parser.add_argument(
        "--output.name",
        dest="name",
        help="name of the sweep's folder; default: sweep_ and the name of the file",
    )
    return parser


def _refuse_contradictions(sweep: Sweep, more: Sequence[str]) -> None:
    """Check that the user's options of fit do not contradict the sweep.

    Raises:
        UserError: If the sweep sets one of them itself.
    """
    swept = {name.replace(".init_args", "") for name in sweep.parameters}
    for word in more:
        name = word.partition("=")[0]
        if name.removeprefix("--").replace(".init_args", "") in swept:
            raise UserError(
                f"{word}: {sweep.file} sets this option itself: remove it from the command"
            )
        if name.startswith("--trainer.logger"):
            raise UserError(
                f"{word}: a sweep logs into the folder of each run: leave the option out"
            )


def _plan(
    sweep: Sweep, runs: Sequence[Options], lines: Sequence[Sequence[str]]
) -> tuple[SweepRecord, list[str]]:
    """Build the first run, parse all runs; return the record and the configuration of each run.

    Raises:
        UserError: If the options of a run are invalid, or no run can log the sweep's metric.
    """
    configs, origins = [], []
    with tempfile.TemporaryDirectory() as nowhere, user_errors(known_options):
        plan = DryRunCLI(args=arrange(["fit", *lines[0], "--output.folder", nowhere]))
        _check_goal(plan, sweep)
        _ = plan.datamodule.fit_samples()  # raises if there are no training images
    for number, line in enumerate(track(lines, "parsing"), start=1):
        try:
            with user_errors(known_options):
                config = plan.parser.parse_args(arrange(["fit", *line]))["fit"]
        except UserError as error:
            raise UserError(f"run {number} ({options_text(runs[number - 1])}): {error}") from None
        files = [str(file) for file in config.get("config") or []]
        # Name of a later run that tests this run's checkpoint.
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
    """Return the weights and the validation split of a run from its complete configuration."""
    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    backbone = model.get("backbone") or {}
    weights = backbone.get("pretrained") or backbone.get("weights")
    return {"weights": str(weights), "validated on": str(data.get("val_split"))}


def _check_goal(plan: DryRunCLI, sweep: Sweep) -> None:
    """Check that ``fit`` will log the sweep's metric, as far as that can be known beforehand.

    Raises:
        ValueError: If it will not.
    """
    kind, _, metric = sweep.metric.partition("/")
    if kind == "val" and not plan.datamodule.validation.exists:
        raise ValueError(
            f"{sweep.file}: metric.name {sweep.metric}: these runs have no validation split: add "
            f"one to the command, such as --data.val_split synthetic"
        )
    if kind == "val" and isinstance(plan.model, AnomalyMethod) and metric not in METRICS:
        logged = [f"val/{name}" for name in METRICS]
        method = type(plan.model).__name__
        raise ValueError(
            f"{sweep.file}: metric.name: {method} logs no {sweep.metric}; "
            f"{suggest(sweep.metric, logged)}"
        )


def _run_all(folder: Path, record: SweepRecord) -> int:
    """Run the unfinished runs, print and write the table, and return an exit code."""
    jobs = {
        f"{number}: {options_text(options)}": partial(_run_one, folder, record, number)
        for number, options in enumerate(record.runs, start=1)
    }
    resume = f"anomaly_clip sweep --resume {shlex.quote(str(folder))}"
    failed = run_in_turn(jobs, resume, GoalMissing)
    write_table(folder, record)
    print_table(folder, record)
    say(f"results: {folder / 'sweep.csv'}")
    return FAILED if failed or any_unreadable(folder, record) else 0


def _run_one(folder: Path, record: SweepRecord, number: int) -> None:
    """Fit one run unless it is finished; an interrupted fit continues.

    Raises:
        GoalMissing: If the sweep's metric was not logged.
        UserError: If the training has diverged.
    """
    run = folder / str(number)
    if (run / RESULT_FILE).is_file():
        say("already finished")
        return
    (run / FAILURE_FILE).unlink(missing_ok=True)
    try:
        result = _fit(folder, run, record, number)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else reason(error)
        write_json(run / FAILURE_FILE, {"why": why})  # remains if a later run is interrupted
        raise
    write_json(run / RESULT_FILE, result)
    write_table(folder, record)


def _fit(folder: Path, run: Path, record: SweepRecord, number: int) -> dict[str, Any]:
    """Fit and return the record of the result.

    Raises:
        GoalMissing: If the sweep's metric was not logged.
        UserError: If the training has diverged.
    """
    config = folder / CONFIGS / f"{number}.yaml"
    started = time.monotonic()
    code = fit_in(run, ["--config", str(config)], record.several)
    minutes = (time.monotonic() - started) / 60
    metrics, time_logged = last_logged(run / "logs" / "fit" / "metrics.csv", record.metric)
    goal = metrics.get(record.metric)
    if goal is None:
        logged = ", ".join(name for name in metrics if name.startswith("val/")) or "no val/ metric"
        raise GoalMissing(
            f"the fit did not log {record.metric} (it logged {logged}): choose another "
            f"metric.name in the sweep file"
        )
    if not math.isfinite(goal):
        raise UserError(
            f"the fit diverged: {record.metric} is {'NaN' if math.isnan(goal) else 'infinite'} at "
            f"the end: fit again with a smaller learning rate"
        )
    say(f"{record.metric} {goal:.6g}")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    unreadable = {"unreadable": True} if code == UNREADABLE else {}
    return {"figures": finite, **time_logged, "minutes": minutes, **unreadable}


def _write_text(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
