"""``anomaly_clip each``: fit and test one model per category, then merge their metrics.

Categories run one after the other, each in its own subfolder of the run; of several processes that
torchrun or srun has started, process r of R takes the categories r, r + R, r + 2R, ... A category
that fails does not stop the others. An interrupted run can be resumed. Zero-shot methods are only
tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from anomaly_clip.commands.batch import (
    DryRunCLI,
    check_directory,
    check_new_folder,
    first_difference,
    pop_flag,
    pop_resume,
    run_in_turn,
    run_verb,
    working_in,
)
from anomaly_clip.commands.continued_fit import fit_in
from anomaly_clip.commands.each_processes import (
    Plan,
    announced,
    announcement,
    only_run,
    process_file,
    wait_for_others,
)
from anomaly_clip.commands.experiment import arrange, known_options
from anomaly_clip.commands.heartbeat import Heartbeat, Pulse, State
from anomaly_clip.commands.interruption import advise
from anomaly_clip.commands.last_step import LAST, last_checkpoint
from anomaly_clip.commands.launch import Launch, as_single_process, launch_of
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.errors import UserError, user_errors
from anomaly_clip.files import atomic_path, printable, readable, safe_name, write_json
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.progress import say, show_table
from anomaly_clip.recording.wandb_log import wandb_group
from anomaly_clip.reporting.decision_tables import decision_tables
from anomaly_clip.reporting.metrics_table import build_table
from anomaly_clip.reporting.page import PAGE, write_page
from anomaly_clip.results.metrics_file import merge_decisions, merge_metrics, write_metrics
from anomaly_clip.results.warnings import (
    rounds_remark,
    selection_warning,
    transductive_remark,
    unreadable_warnings,
    weights_remark,
)

__all__ = ["run_each"]

CONFIG, RECORD = "config-each.yaml", "each.json"
"""The configuration of all fits, and the working directory in which the run was started."""
FITTED, TESTED = ".fitted", ".tested"
"""Empty files that mark a category's fit and its test as finished."""
FAILED = 1


def run_each(words: Sequence[str]) -> int:
    """Fit and test category by category.

    Returns:
        0, or 1 if a category failed or some images could not be read. Without defective images in a
        user's folder, categories are fitted, but not tested.

    Raises:
        UserError: If the run cannot be started.
    """
    launch = launch_of(os.environ)
    if launch is None:
        return _begin(words, None)
    if launch.rank > 0 and "--dry-run" in words:
        return 0  # process 0 prints the commands
    with as_single_process(launch):
        return _begin(words, launch) if launch.rank == 0 else _take_part(words, launch)


def _begin(words: Sequence[str], launch: Launch | None) -> int:
    """Run as the first process, or the only one."""
    quieten()
    with contextlib.ExitStack() as stack:
        announce = stack.enter_context(announcement(words, launch))
        words, resumed = pop_resume(words, CONFIG)
        words, lists_only = pop_flag(words, "--dry-run")
        folder = None
        if resumed is not None:
            folder = stack.enter_context(working_in(_directory(resumed), resumed))
            words = _words_of(folder, words)
        return _list_fits(words) if lists_only else _run(words, folder, launch, announce)


def _take_part(words: Sequence[str], launch: Launch) -> int:
    """Run as another process than the first, which prepares the run and joins the results."""
    quieten()
    plan = announced(words, launch)
    if plan is None:
        return 0  # the first process reports its mistake
    is_elsewhere = Path(plan.directory) != Path.cwd()
    folder = Path(plan.directory, plan.folder) if is_elsewhere else Path(plan.folder)
    with working_in(plan.directory, folder), Heartbeat(process_file(folder, launch.rank)) as file:
        failed: dict[str, str] = {}
        try:
            failed = _run_share(folder, plan, launch)
        finally:
            file.end(failed=json.dumps(failed))
        if Pulse(process_file(folder, 0)).look() in (State.GONE, State.ABSENT):
            say(
                f"process 0 of {launch.size} has ended and joins no results: continue with "
                f"{_resume_command(folder)}",
                style="bold red",
            )
            return FAILED
    # Not the exit code of a failed category, at which torchrun would end the others.
    return 0


class _PlanCLI(DryRunCLI):
    """Command line of the fit of all categories, or of the test of a zero-shot method."""

    def _check_method(self, method: EvaluatedModule, verb: str, path: str | None) -> None:
        super()._check_method(method, verb if _is_fitted(method) else "test", path)


class _EachCLI(_PlanCLI):
    run_verb = "each"


class _ShareCLI(_EachCLI):
    """Command line of the first of several processes, each of which has one device."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check that one device is requested, and build the trainer.

        Raises:
            UserError: If several are.
        """
        trainer = self.config[self._verb]["trainer"]
        if trainer["devices"] not in ("auto", 1, "1", -1, "-1", [0]):
            option = f"trainer.devices {trainer['devices']}"
        elif trainer["num_nodes"] != 1:
            option = f"trainer.num_nodes {trainer['num_nodes']}"
        else:
            return super().instantiate_trainer(**kwargs)
        raise UserError(
            f"{option}: torchrun or srun has started the processes of each, and every one runs its "
            f"categories on one device: leave the option out"
        )


def _directory(folder: Path) -> str | None:
    """Return the working directory of a run's start; None for a run of 0.1.0."""
    if not (folder / RECORD).is_file():
        return None
    with user_errors():
        directory: str = json.loads((folder / RECORD).read_text(encoding="utf-8"))["directory"]
    return directory


def _list_fits(words: Sequence[str]) -> int:
    """Print the command of each category's fit."""
    line = arrange(["fit", *words])[1:]
    with tempfile.TemporaryDirectory() as nowhere, user_errors(known_options):
        plan = _PlanCLI(args=["fit", *line, "--output.folder", nowhere])
        verb = "fit" if _is_fitted(plan.model) else "test"
        for category in _categories(plan.model, plan.datamodule):
            chosen = ["--data.categories", json.dumps([category])]
            print(shlex.join(["anomaly_clip", verb, *line, *chosen]))
    return 0


def _run(
    words: Sequence[str],
    resumed: Path | None,
    launch: Launch | None,
    announce: Callable[[Plan], None],
) -> int:
    """Prepare the run, fit and test, and merge the metrics."""
    plan = _prepare(words, resumed, launch)
    folder = Path(plan.folder)

    def advice() -> str:
        missing = [printable(name) for name in plan.categories if not _is_finished(plan, name)]
        unfinished = "" if launch is None else f"unfinished: {', '.join(missing)}; "
        return f"{unfinished}resume with {_resume_command(folder)}"

    with only_run(folder), advise(advice):
        announce(plan)
        failed = _run_share(folder, plan, launch)
        if launch is not None:
            finished = partial(_is_finished, plan)
            failed |= wait_for_others(folder, launch, plan.categories, finished)
            failed = {name: failed[name] for name in plan.categories if name in failed}
    if not plan.is_tested and not failed:
        say(
            f"{plan.root}: no folder is defective, so there is nothing to test on; fitted: {folder}"
        )
        return 0
    code = _merge(folder, plan.categories, failed)
    if failed and launch is not None:
        names = ", ".join(map(printable, failed))
        say(f"missing: {names}; continue with {_resume_command(folder)}", style="bold red")
    return code


def _prepare(words: Sequence[str], resumed: Path | None, launch: Launch | None) -> Plan:
    """Check the command line and create the run's folder, with the configuration of all fits."""
    line = arrange(["fit", *words])[1:]
    with user_errors(known_options):
        plan = (_EachCLI if launch is None else _ShareCLI)(args=["fit", *line])
    method, data, writer = plan.model, plan.datamodule, plan.writer
    try:
        categories = _categories(method, data)
        with user_errors(known_options):
            is_tested = data.is_tested_after_fit
        is_fitted = _is_fitted(method)
        if is_fitted:
            _check_checkpoints(plan)
        elif not is_tested:
            raise UserError(
                f"{data.root}: no folder is defective, so there is nothing to test "
                f"{type(method).__name__} on: use predict"
            )
        if resumed is None and writer.requested_folder is not None:
            _check_folder(writer.requested_folder, writer.config, categories)
    except UserError:
        writer.abandon()
        raise
    folder = writer.folder
    if resumed is None and not (folder / CONFIG).is_file():
        write_json(folder / RECORD, {"directory": str(Path.cwd())})
        with atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(writer.config, encoding="utf-8")
    processes = "" if launch is None else f" | {launch.size} processes of {launch.launcher}"
    name = type(method).__name__
    say(f"each {name} | {len(categories)} categories{processes} | run {folder}")
    several = plan.trainer.world_size > 1
    return Plan(
        str(folder), str(Path.cwd()), categories, several, is_fitted, is_tested, str(data.root)
    )


def _run_share(folder: Path, plan: Plan, launch: Launch | None) -> dict[str, str]:
    """Run the categories of this process; return why some failed."""
    names = plan.categories
    jobs = {
        name: partial(
            _run_category,
            *(folder / CONFIG, folder / safe_name(name), name),
            *(plan.several, plan.is_fitted, plan.is_tested),
        )
        for name in (names if launch is None else launch.share(names))
    }
    is_quiet = launch is not None and launch.rank > 0
    with wandb_group(str(folder)):
        return run_in_turn(jobs, _resume_command(folder), among=names, quiet=is_quiet)


def _is_finished(plan: Plan, category: str) -> bool:
    """Return whether a category is fitted and tested."""
    marker = TESTED if plan.is_tested else FITTED
    return (Path(plan.folder) / safe_name(category) / marker).is_file()


def _resume_command(folder: Path) -> str:
    """Return the command that continues a run."""
    return f"anomaly_clip each --resume {shlex.quote(str(folder))}"


def _check_checkpoints(plan: DryRunCLI) -> None:
    """Check that each fit writes ``last.ckpt`` into its own folder, from which it is tested.

    Raises:
        UserError: If it does not.
    """
    file = last_checkpoint(plan.trainer)
    if file is None:
        option = "fast_dev_run" if plan.trainer.fast_dev_run else "enable_checkpointing false"  # type: ignore[attr-defined]
        raise UserError(
            f"each tests the checkpoint of each fit, and trainer.{option} writes none: leave the "
            f"option out"
        )
    if file.parent != plan.writer.folder / "checkpoints":
        raise UserError(
            f"all categories would share the checkpoints in {file.parent}, the dirpath of a "
            f"ModelCheckpoint: leave dirpath out"
        )


def _check_folder(folder: Path, config: str, categories: Sequence[str]) -> None:
    """Check that a chosen folder is free, or has an unfinished run with the same options.

    Raises:
        UserError: If it has other results.
    """
    if not (folder / CONFIG).is_file():
        check_new_folder("each", folder, map(safe_name, categories))
        return
    check_directory(folder, _directory(folder))
    before, now = (
        {key: value for key, value in yaml.safe_load(text).items() if key != "output"}
        for text in ((folder / CONFIG).read_text(encoding="utf-8"), config)
    )
    difference = first_difference(before, now)
    if difference is not None:
        raise UserError(
            f"--output.folder {folder} has another run of each, whose {difference} differs: choose "
            f"another folder, or continue that run with --resume {folder}"
        )
    say(f"{folder} has this run already, which continues")


def _categories(method: object, data: AnomalyData) -> list[str]:
    """Return the categories to run.

    Raises:
        UserError: If the method scores no images, there are no test images, or two categories
            would share a folder.
    """
    if not isinstance(method, EvaluatedModule):
        raise UserError(f"{type(method).__name__} scores no images: use fit")
    with user_errors(known_options):
        splits = data.splits
        categories = data.categories if "test" in splits else []
    if "test" not in splits:
        raise UserError(f"{data.dataset_name} has no test images: use fit")
    names = [safe_name(category).lower() for category in categories]
    shared = [name for name in names if names.count(name) > 1]
    if shared:
        clash = [name for name in categories if safe_name(name).lower() == shared[0]]
        raise UserError(
            f"the categories {' and '.join(clash)} would share the folder {shared[0]}: rename one "
            "of them"
        )
    return categories


def _is_fitted(method: object) -> bool:
    """Return whether a method is fitted: zero-shot methods are not."""
    return not isinstance(method, EvaluatedModule) or method.can_be_fitted


def _words_of(folder: Path, more: Sequence[str]) -> list[str]:
    """Return the arguments of ``fit`` for a resumed run.

    Raises:
        UserError: If further options are given: the finished categories did not use them.
    """
    if more:
        raise UserError(
            f"--resume continues the run with its original options: leave out {more[0]}"
        )
    return ["--config", str(folder / CONFIG), "--output.folder", str(folder)]


def _run_category(
    config: Path, folder: Path, category: str, several: bool, is_fitted: bool, is_tested: bool
) -> None:
    """Fit and test a category unless both are finished; an interrupted fit continues.

    Args:
        config: The configuration of the fit.
        folder: The category's folder.
        category: The category.
        several: Whether the runs need several processes.
        is_fitted: False for a zero-shot method.
        is_tested: False if there is nothing to test on.
    """
    if (folder / TESTED).is_file():
        say("already finished")
        return
    checkpoint = folder / "checkpoints" / LAST
    options = ["--config", str(config), "--data.categories", json.dumps([category])]
    # A checkpoint alone may come from the middle of a fit.
    if is_fitted and not (folder / FITTED).is_file():
        fit_in(folder, options, several, category)
        (folder / FITTED).touch()
    if not is_tested:
        return
    options += ["--output.folder", str(folder)]
    shutil.rmtree(folder / "logs" / "test", ignore_errors=True)  # left by an interrupted test
    fitted = ["--ckpt_path", str(checkpoint)] if is_fitted else []
    run_verb(["test", *options, *fitted], several)
    (folder / TESTED).touch()  # not earlier: a test writes its images after its metrics


def _merge(folder: Path, categories: Sequence[str], failed: dict[str, str]) -> int:
    """Write and print the metrics of all categories; return an exit code."""
    parts: dict[str, dict[str, Any]] = {}
    # Results hold readable names, see write_json.
    failed = {readable(category): why for category, why in failed.items()}
    for category in map(readable, categories):
        file = folder / safe_name(category) / "metrics.json"
        if file.is_file() and category not in failed:
            content = json.loads(file.read_text(encoding="utf-8"))
            if category in content["categories"]:
                parts[category] = content
            else:
                failed[category] = (
                    f"{file} contains {', '.join(content['categories'])} instead of {category}: "
                    f"delete {file.parent}, then resume"
                )
    if parts:
        _write_merged(folder, parts, failed)
        if (folder / safe_name(next(iter(parts))) / PAGE).is_file():  # pages are enabled
            say(f"report: {write_page(folder)}")
    for category, why in failed.items():
        say(f"failed: {printable(category)}: {why}", style="bold red")
    say(f"results: {folder}" if parts else "no category has results")
    unreadable = any(unreadable_warnings(part["run"]["protocol"]) for part in parts.values())
    return FAILED if failed or unreadable else 0


def _write_merged(
    folder: Path, parts: Mapping[str, dict[str, Any]], failed: Mapping[str, str]
) -> None:
    results, run = merge_metrics(parts, failed)
    decisions = merge_decisions(parts)
    write_metrics(folder, results, run, decisions)
    protocol = run["protocol"]
    counts = {name: (protocol["images"][name], protocol["anomalous"][name]) for name in parts}
    how = "one model per category" if protocol["fitted"] else "one run per category"
    title = f"{run['method']} on {protocol['data']}, {how}, test"
    if failed:
        title += f"\nWITHOUT {', '.join(failed)}"
    title += "".join(f"\n{warning}" for warning in unreadable_warnings(protocol))
    remarks = transductive_remark(protocol), selection_warning(protocol), rounds_remark(protocol)
    for more in remarks:
        if more is not None:
            title += f"\n{more.partition(';')[0]}"  # without deviations, which differ by category
    weights = run["weights"]
    remark = weights_remark(weights)
    show_table(build_table(results, title, counts, weights["random"], remark))
    for table in [] if decisions is None else decision_tables(decisions):
        show_table(table)
