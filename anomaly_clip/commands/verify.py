"""``anomaly_clip report RUN --verify``: repeat runs from their folders and compare every metric.

A run is repeated as its folder was made: the test alone for a zero-shot method or for a checkpoint
from elsewhere, fit and test if the folder has both, ``each`` if the folder has one model per
category. Everything is written to a temporary folder. The configuration in a run's folder names
classes and is therefore code: classes outside this package are refused unless the user names them.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml

from anomaly_clip.commands.batch import DryRunCLI, run_verb
from anomaly_clip.commands.each import run_each
from anomaly_clip.commands.experiment import arrange, known_options
from anomaly_clip.commands.foreign_code import concealed_classes, foreign_classes
from anomaly_clip.commands.interruption import advise
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.commands.option_parser import dump_yaml
from anomaly_clip.commands.yaml_names import read_any_name
from anomaly_clip.errors import UserError, check_at_least, reason, user_errors
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import say
from anomaly_clip.recording.calibration_files import earlier_version, is_version_of
from anomaly_clip.reporting.comparison import ComparisonTable
from anomaly_clip.reporting.verification import Repetition, verification_report
from anomaly_clip.results.finished_run import FinishedRun, printable
from anomaly_clip.results.run_files import mapping
from anomaly_clip.results.run_reader import read_run

__all__ = ["TOLERANCE", "verify_runs"]

TOLERANCE = 1e-9
"""Largest difference of a metric, as a fraction, that counts as equal."""
AUXILIARY_ROOT = "data.auxiliary.root"


class Plan(NamedTuple):
    """Verbs and configurations that repeat a run.

    Args:
        run: The run.
        configs: Configuration by verb, in the order of execution.
        checkpoint: Name of the checkpoint of the fit that is tested; None if nothing is fitted.
        several: Whether the run needs several processes.
    """

    run: FinishedRun
    configs: Mapping[str, dict[str, Any]]
    checkpoint: str | None
    several: bool = False


def verify_runs(
    runs: Sequence[FinishedRun],
    roots: Mapping[str, str],
    allowed: Sequence[str] = (),
    tolerance: float | None = None,
) -> tuple[ComparisonTable, int]:
    """Repeat runs, and compare their metrics with the recorded ones.

    Args:
        runs: The runs. All are checked before the first is repeated.
        roots: Folders of data that has moved, by option: ``data.root``, ``data.auxiliary.root``.
        allowed: Classes outside this package that the configurations may name.
        tolerance: Largest difference that counts as equal; default: 1e-9.

    Returns:
        A table of the differences; exit code 0 if all metrics are equal, else 1.

    Raises:
        UserError: If a run cannot be repeated.
    """
    bound = TOLERANCE if tolerance is None else tolerance
    with user_errors():
        check_at_least("report --tolerance", bound, 0)
    quieten()
    read_any_name()
    planned = [_plan(run, roots, allowed) for run in runs]
    _check_roots(planned, roots)
    plans = [_checked(plan) for plan in planned]
    repetitions = []
    for plan in plans:
        say(f"repeating {plan.run.label}: {', then '.join(plan.configs)}")
        with _temporary_folder() as folder, advise(lambda: "run the same command again"):
            repetitions.append(Repetition(plan.run, _repeat(plan, folder)))
        _check_weights(plan.run, repetitions[-1].again.record)
    comparison, differs = verification_report(repetitions, bound)
    return comparison, int(differs)


# -- before anything is run ------------------------------------------------------------------------


def _plan(run: FinishedRun, roots: Mapping[str, str], allowed: Sequence[str]) -> Plan:
    """Return how to repeat a run.

    Raises:
        UserError: If files are missing, or a configuration names classes of other packages.
    """
    folder, recorded = run.folder, run.record.get("checkpoint")
    verbs = ["each"] if (folder / "config-each.yaml").is_file() else ["test"]
    checkpoint, name = None, None
    if verbs == ["test"] and isinstance(recorded, str):
        file = _checkpoint(run, Path(recorded).expanduser())
        in_folder = folder / "checkpoints" / file.name
        if (
            (folder / "config-fit.yaml").is_file()
            and in_folder.is_file()
            and in_folder.samefile(file)
        ):
            verbs, name = ["fit", "test"], file.name
        else:
            checkpoint = file
    configs = {verb: _config(run, verb, roots, allowed) for verb in verbs}
    if "fit" in configs and configs["fit"].get("ckpt_path"):
        raise _refusal(
            run,
            f"its fit was resumed from {configs['fit']['ckpt_path']}, so the folder does not have "
            f"the configuration of a whole fit: test its checkpoint with --ckpt_path instead",
        )
    if verbs == ["test"]:
        configs["test"]["ckpt_path"] = None if checkpoint is None else str(checkpoint)
    return Plan(run, configs, name)


def _config(
    run: FinishedRun, verb: str, roots: Mapping[str, str], allowed: Sequence[str]
) -> dict[str, Any]:
    """Return the saved configuration of a verb, changed so that nothing outside is written."""
    file = run.folder / f"config-{verb}.yaml"
    try:
        config = jsonargparse.get_loader("yaml")(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refusal(run, f"{file.name} is missing: test again to get a folder with it") from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise _refusal(run, f"{file.name} cannot be read ({reason(error)})") from None
    if not isinstance(config, dict) or not all(mapping(config.get(k)) for k in ("model", "data")):
        raise _refusal(
            run, f"{file.name} has no model or no data, as for a run from Python: repeat it there"
        )
    trainer = dict(mapping(config.get("trainer")))
    if trainer.get("logger"):
        trainer["logger"] = None  # nothing is sent to a service again
    trainer["default_root_dir"] = None
    output = {**mapping(config.get("output")), "maps": False, "raw_maps": False, "page": False}
    config |= {"trainer": trainer, "output": output}
    _check_classes(run, file.name, config, allowed)
    _set_roots(run, config["data"], roots)
    return config


def _check_classes(run: FinishedRun, name: str, config: Any, allowed: Sequence[str]) -> None:
    """Check, without an import, that a configuration names only classes that are trusted.

    Raises:
        UserError: If it names others, or has texts or files that a parser may read as classes.
    """
    try:
        foreign, concealed = foreign_classes(config, allowed), concealed_classes(config)
    except (ValueError, RecursionError):
        raise _refusal(run, f"{name} refers to itself: restore the file as it was saved") from None
    if concealed:
        raise _refusal(
            run,
            f"{printable(concealed[0])} of {name} is a text or a file that may name classes, whose "
            f"code would be run: if you trust it, put its content in place of it",
        )
    if foreign:
        options = " ".join(f"--allow {printable(name)}" for name in foreign)
        raise _refusal(
            run,
            f"{name} names classes outside this package, whose code would be run: if you "
            f"trust them, add {options}",
        )


def _check_roots(plans: Sequence[Plan], roots: Mapping[str, str]) -> None:
    """Check that each folder of moved data is used by a run.

    Raises:
        UserError: If one is not.
    """
    used = set()
    for plan in plans:
        for config in plan.configs.values():
            options = mapping(config["data"].get("init_args"))
            auxiliary = mapping(mapping(options.get("auxiliary")).get("init_args"))
            used |= {"data.root"} if "root" in options else set()
            used |= {AUXILIARY_ROOT} if "root" in auxiliary else set()
    for option, folder in roots.items():
        if option not in used:
            kind = "auxiliary data" if option == AUXILIARY_ROOT else "data"
            raise UserError(
                f"report --{option} {printable(folder)}: no run reads {kind} from a folder: leave "
                f"it out"
            )


def _set_roots(run: FinishedRun, data: dict[str, Any], roots: Mapping[str, str]) -> None:
    """Put the current folders into the options of a data set.

    Raises:
        UserError: If a folder is missing.
    """
    options = data.setdefault("init_args", {})
    auxiliary = options.get("auxiliary") if isinstance(options, dict) else None
    parts = {"data.root": options}
    if isinstance(auxiliary, dict):
        parts[AUXILIARY_ROOT] = auxiliary.setdefault("init_args", {})
    for option, part in parts.items():
        if not isinstance(part, dict):
            raise _refusal(run, f"its configuration has no options at {option.rpartition('.')[0]}")
        if option in roots and "root" in part:
            part["root"] = roots[option]
        root = part.get("root")
        path = Path(root).expanduser() if isinstance(root, str) else None
        if path is not None and not path.exists() and not re.search(r"[*?\[]", str(path)):
            raise _refusal(
                run,
                f"{option} {printable(root)}: there is no such folder (as seen from {Path.cwd()}): "
                f"name the place of the data with --{option} FOLDER",
            )


def _checkpoint(run: FinishedRun, recorded: Path) -> Path:
    """Return the checkpoint that a run has tested.

    Raises:
        UserError: If it is missing, or another file than then.
    """
    in_folder = run.folder / "checkpoints" / recorded.name
    files = [path for path in (recorded, in_folder) if path.is_file()]
    then = mapping(run.record.get("environment")).get("checkpoint_sha256")
    if then is not None:
        unchanged = [file for file in files if is_version_of(file, then)]
    elif recorded.is_file() or recorded.parts[-3:] == in_folder.absolute().parts[-3:]:
        unchanged = files  # of version 0.1.0; the folder may have been moved, but not renamed
    else:
        unchanged = []
    if unchanged:
        return unchanged[0 if then is None else -1]  # the folder's, if it is known to be the same
    if recorded.is_file() or (files and recorded.absolute() == in_folder.absolute()):
        raise _refusal(
            run,
            f"its checkpoint {printable(recorded)} has changed since (other SHA-256): test it "
            f"again, or put the former file back",
        )
    other = f", and {in_folder.name} in its folder is not known to be the same" if files else ""
    raise _refusal(
        run,
        f"its checkpoint {printable(recorded)} is not there (as seen from {Path.cwd()}){other}: "
        f"put it back, or start the command from the folder of the run's command",
    )


def _checked(plan: Plan) -> Plan:
    """Build a run without running it, and check the hash of its weights.

    Raises:
        UserError: If the run cannot be built, or its weights have another hash than then.
    """
    verb = next(iter(plan.configs))
    with _temporary_folder() as folder, _explained(plan.run, folder):
        words = _words("fit" if verb == "each" else verb, plan.configs[verb], folder)
        with user_errors(known_options):
            built = DryRunCLI(args=arrange(words))
            several = built.trainer.world_size > 1
            _ = built.datamodule.categories
        if isinstance(built.model, AnomalyMethod):  # others know their weights after loading
            _check_weights(plan.run, {"weights": built.model.weights})
        built.writer.abandon()
    return plan._replace(several=several)


def _check_weights(run: FinishedRun, again: Mapping[str, Any]) -> None:
    """Check that the weights are those of the run.

    Raises:
        UserError: If their hash, or that of trained layers from a file, differs.
    """
    pairs = {"weights": ("weights",), "trained layers": ("protocol", "borrowed")}
    for name, path in pairs.items():
        then, now = (_sha256(record, path) for record in (run.record, again))
        if then is not None and now is not None and then != now:
            raise _refusal(
                run,
                f"the {name} have SHA-256 {now[:8]} now and had {printable(then[:8])} then: put "
                f"those of the run back",
            )


def _sha256(record: Mapping[str, Any], path: Sequence[str]) -> str | None:
    entry: Any = record
    for key in (*path, "sha256"):
        entry = mapping(entry).get(key)
    return entry if isinstance(entry, str) else None


# -- running ---------------------------------------------------------------------------------------


def _repeat(plan: Plan, folder: Path) -> FinishedRun:
    """Repeat a run in a folder and return its result.

    Raises:
        UserError: If a command fails.
    """
    with _explained(plan.run, folder):
        for verb, config in plan.configs.items():
            words = _words(verb, config, folder)
            then = mapping(plan.run.record.get("environment")).get("checkpoint_sha256")
            if verb == "test" and config.get("ckpt_path") and then is not None:
                tested = earlier_version(Path(config["ckpt_path"]), then, folder)
                words += ["--ckpt_path", str(tested)]
            if verb == "test" and plan.checkpoint is not None:
                fitted = folder / "run" / "checkpoints" / plan.checkpoint
                if not fitted.is_file():
                    raise _refusal(
                        plan.run,
                        f"its fit, when repeated, wrote no {printable(plan.checkpoint)}: test the "
                        f"checkpoint of the run with --ckpt_path instead",
                    )
                words += ["--ckpt_path", str(fitted)]
            if verb == "each":
                with contextlib.redirect_stdout(io.StringIO()):
                    run_each(words)
            else:
                run_verb(words, plan.several)
        return read_run(folder / "run")


def _words(verb: str, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a configuration and return the arguments of the verb that uses it."""
    file = folder / f"config-{verb}.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    return [verb, "--config", str(file), "--output.folder", str(folder / "run")]


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="anomaly_clip-verify-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _explained(run: FinishedRun, folder: Path) -> Iterator[None]:
    """Name the run, in place of the temporary folder, in messages about its repetition."""
    start = f"{run.label} cannot be repeated"
    try:
        yield
    except UserError as error:
        message = str(error).replace(f"{folder / 'run'}", run.label)
        message = message.replace(str(folder), run.label)
        if message.startswith(start):
            raise UserError(message) from None
        raise UserError(f"{start}: {message}") from None


def _refusal(run: FinishedRun, why: str) -> UserError:
    return UserError(f"{run.label} cannot be repeated: {why}")
