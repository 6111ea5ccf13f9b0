"""``anomaly_clip each``: fit and test one model a category, then one table of all.

Categories run one after the other, each in its own folder of the run. One that fails does not stop
the others; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from anomaly_clip.commands.batch import (
    DryRunCLI,
    forbid_distributed_launch,
    pop_resume,
    run_in_turn,
    run_verb,
)
from anomaly_clip.commands.experiment import arrange, known_options, quieten
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.errors import UserError, user_errors
from anomaly_clip.files import atomic_path, safe_name
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.progress import say
from anomaly_clip.recording.wandb_log import wandb_group
from anomaly_clip.report.metrics_table import build_table
from anomaly_clip.report.page import PAGE, write_page
from anomaly_clip.results.metrics_file import merge_metrics, write_metrics
from anomaly_clip.results.warnings import rounds_remark, selection_warning, weights_remark

__all__ = ["run_each"]

CONFIG = "config-each.yaml"
FITTED, TESTED = ".fitted", ".tested"
"""Files that say that a category's fit, and its test, came to their end."""
FAILED = 1


def run_each(words: Sequence[str]) -> int:
    """Fit and test category by category and return an exit code: 1 if one of them failed.

    Raises:
        UserError: What is wrong before anything is run, and the way out.
    """
    words, resumed = pop_resume(words, CONFIG)
    quieten()
    if {"-h", "--help"} & set(words):
        print(
            "usage: anomaly_clip each --config FILE [options of fit]\n"
            "       anomaly_clip each --resume RUN\n\n"
            "Fit and test one model a category, into RUN/<category>/, then merge their figures.\n"
            "--resume goes on with a run: finished categories are not run again.\n"
            "All options of fit: anomaly_clip fit --help"
        )
        return 0
    if resumed is not None:
        words = _words_of(resumed, words)
    forbid_distributed_launch("each")
    line = arrange(["fit", *words])[1:]
    with user_errors(known_options):
        plan = DryRunCLI(args=["fit", *line])
    method, data, writer = plan.model, plan.datamodule, plan.writer
    try:
        categories = _categories(method, data)
    except UserError:
        writer.abandon()
        raise
    several = plan.trainer.world_size > 1
    folder = writer.folder
    if resumed is None:
        with atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(writer.config, encoding="utf-8")
    say(f"each {type(method).__name__} | {len(categories)} categories | run {folder}")
    del plan, method  # each category builds its own, of the same configuration
    jobs = {
        name: partial(_run_category, folder / CONFIG, folder / safe_name(name), name, several)
        for name in categories
    }
    with wandb_group(str(folder)):
        failed = run_in_turn(jobs, f"anomaly_clip each --resume {shlex.quote(str(folder))}")
    return _merge(folder, categories, failed)


def _categories(method: object, data: AnomalyData) -> list[str]:
    """Return what is taken in turn.

    Raises:
        UserError: If the method scores nothing, or there are no categories with folders apart.
    """
    if not isinstance(method, EvaluatedModule):
        raise UserError(f"{type(method).__name__} scores no images: use fit")
    if "test" not in data.splits:
        raise UserError(f"{data.dataset_name} has no test images: use fit")
    with user_errors(known_options):
        categories = data.categories
    names = [safe_name(category).lower() for category in categories]
    shared = [name for name in names if names.count(name) > 1]
    if shared:
        raise UserError(f"two categories would share the folder {shared[0]}: rename one of them")
    return categories


def _words_of(folder: Path, more: Sequence[str]) -> list[str]:
    """Return the words of a run that is gone on with.

    Raises:
        UserError: If there are others, which its finished categories would not have.
    """
    if more:
        raise UserError(f"--resume goes on with the run as it began: leave out {more[0]}")
    return ["--config", str(folder / CONFIG), "--output.folder", str(folder)]


def _run_category(config: Path, folder: Path, category: str, several: bool) -> None:
    """Fit and test, unless that is done; what was interrupted begins anew."""
    if (folder / TESTED).is_file():
        say("finished before")
        return
    checkpoint = folder / "checkpoints" / "last.ckpt"
    options = ["--config", str(config), "--data.categories", json.dumps([category])]
    options += ["--output.folder", str(folder)]
    if not (folder / FITTED).is_file():  # a checkpoint may be of the middle of a fit
        shutil.rmtree(folder, ignore_errors=True)
        run_verb(["fit", *options], several)
        (folder / FITTED).touch()
    shutil.rmtree(folder / "logs" / "test", ignore_errors=True)  # of an interrupted test
    run_verb(["test", *options, "--ckpt_path", str(checkpoint)], several)
    (folder / TESTED).touch()  # behind the pictures, which come after the figures


def _merge(folder: Path, categories: Sequence[str], failed: dict[str, str]) -> int:
    """Write and print the figures of all categories; return an exit code."""
    parts: dict[str, dict[str, Any]] = {}
    for category in categories:
        file = folder / safe_name(category) / "metrics.json"
        if file.is_file() and category not in failed:
            content = json.loads(file.read_text(encoding="utf-8"))
            if category in content["categories"]:
                parts[category] = content
            else:
                failed[category] = f"{file} is of other categories: delete its folder, and resume"
    if parts:
        _write_merged(folder, parts, failed)
        if (folder / safe_name(next(iter(parts))) / PAGE).is_file():  # pages are wanted
            say(f"look at: {write_page(folder)}")
    for category, why in failed.items():
        say(f"failed: {category}: {why}", style="bold red")
    say(f"results: {folder}" if parts else "no category could be run")
    return FAILED if failed else 0


def _write_merged(
    folder: Path, parts: Mapping[str, dict[str, Any]], failed: Mapping[str, str]
) -> None:
    results, run = merge_metrics(parts, failed)
    write_metrics(folder, results, run)
    protocol = run["protocol"]
    counts = {name: (protocol["images"][name], protocol["anomalous"][name]) for name in parts}
    title = f"{run['method']} on {protocol['data']}, one model a category, test"
    if failed:
        title += f"\nWITHOUT {', '.join(failed)}"
    for more in (selection_warning(protocol), rounds_remark(protocol)):
        if more is not None:
            title += f"\n{more.partition(';')[0]}"  # a spread is of one category
    weights = run["weights"]
    remark = weights_remark(weights)
    Console().print(build_table(results, title, counts, weights["random"], remark))
