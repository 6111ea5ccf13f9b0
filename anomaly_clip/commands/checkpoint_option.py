"""The option ``--ckpt_path``: a file, a folder of a run or ``last``; which fits can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Trainer

from anomaly_clip.commands.last_step import FINITE, LAST
from anomaly_clip.errors import UserError
from anomaly_clip.methods.evaluated import is_exceeded, reached_limit
from anomaly_clip.progress import say
from anomaly_clip.records import LoaderNeeds
from anomaly_clip.results.folder import find_run, run_number

__all__ = [
    "check_resumable",
    "checkpoint_file",
    "completed",
    "config_of_fit",
    "is_last",
    "last_of_runs",
    "missing_checkpoint",
]

EXPORTED = "detector.json"
"""File of the folder of an exported detector."""
SHOWN = 5  # checkpoints of a folder in a message
NEWEST = "last"
"""Value that stands for the newest checkpoint."""
WORDS = ("best", "hpc")
"""Values that Lightning's trainer understands within one process."""


def checkpoint_file(value: str, word: str = "") -> str:
    """Return the checkpoint that a value of ``--ckpt_path`` refers to.

    The folder of a run stands for its ``last.ckpt``, or for its only checkpoint, but not for what
    is kept of a fit that diverged. Other values are returned unchanged.

    Args:
        value: A file or folder.
        word: What the user typed instead, for messages.

    Raises:
        UserError: If a folder has no checkpoint, several without a ``last.ckpt``, or that of a fit
            that diverged; or for a word that only Lightning's trainer understands.
    """
    folder = find_run(Path(value).expanduser())
    if not folder.is_dir():
        if not folder.exists() and (value in WORDS or value.startswith("registry")):
            raise UserError(
                f"--ckpt_path {value}: a new command knows no checkpoint of this name: give a "
                f"file, the folder of a run, or {NEWEST}"
            )
        return value if folder == Path(value).expanduser() else str(folder)
    shown = f"{word} ({value})" if word else value
    for place in (folder / "checkpoints", folder):
        files = _visible(place, "*.ckpt")
        if place / LAST in files:
            return str(place / LAST)
        if any(file.match(FINITE) for file in files):
            raise _choose_one(shown, folder, files, "is that of a fit that diverged")
        if len(files) == 1:
            return str(files[0])
        if files:
            raise _choose_one(shown, folder, files, "has several checkpoints")
    deeper = _deeper(folder)
    if deeper:
        raise _choose_one(shown, folder, deeper, "is not the folder of a single fit")
    if (folder / EXPORTED).is_file():
        raise UserError(
            f"--ckpt_path {shown} is an exported detector, not a run: python "
            f"{folder / 'detector.py'} IMAGE_OR_FOLDER scores images, and anomaly_clip benchmark "
            f"measures it"
        )
    content = sorted(path.name for path in folder.iterdir())
    listed = f"has {', '.join(content[:SHOWN])}" if content else "is empty"
    raise UserError(
        f"--ckpt_path {shown}: the folder has no checkpoint (it {listed}): give the folder of a "
        f"fit, or a .ckpt file"
    )


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Return matching files, sorted, without unfinished ones, whose names begin with a dot."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _deeper(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder with several runs, such as that of each."""
    return _visible(folder, "*/*.ckpt") + _visible(folder, "*/checkpoints/*.ckpt")


def _choose_one(value: str, folder: Path, files: list[Path], problem: str) -> UserError:
    names = [str(file.relative_to(folder)) for file in files]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return UserError(
        f"--ckpt_path {value}: the folder {problem}: name one of {', '.join(names[:SHOWN])}{more}"
    )


def is_last(value: str) -> bool:
    """Return whether a value is the word ``last``, and not a path of this name."""
    return value == NEWEST and not Path(value).exists()


def last_of_runs(verb: str, root: str, name: str | None, folder: str | None) -> str:
    """Return the checkpoint that ``--ckpt_path last`` stands for, and print it.

    It belongs to the newest run that has one: in ``output.folder`` if that has a checkpoint, else
    the highest number in ``output.root/name``, or the last one written below ``output.root``.

    Args:
        verb: The verb; ``fit`` looks only into ``output.folder``, if that is given.
        root: The option ``output.root``.
        name: Name of the configuration or of the run; None: all names.
        folder: The option ``output.folder``; "null" is None.

    Raises:
        UserError: If there is none, or the newest run has several.
    """
    chosen = None if folder in (None, "null") else Path(str(folder)).expanduser()
    parent = Path(root).expanduser()
    runs: list[Path] = []
    if chosen is not None and (verb == "fit" or _checkpoints(chosen)):
        place, runs = chosen, [chosen]
    elif name is not None:
        place = parent / name
        runs = sorted(
            (p for p in place.glob("*") if run_number(p)), key=lambda p: run_number(p) or 0
        )
    else:
        place = parent
        runs = sorted((p for p in place.glob("*/*") if run_number(p)), key=_written)
    saved = [run for run in runs if _checkpoints(run)]
    if not saved:
        raise UserError(
            f"--ckpt_path {NEWEST}: {place} has no checkpoint of a fit: fit first, or give the "
            f"checkpoint's file"
        )
    file = checkpoint_file(str(saved[-1]), NEWEST)
    newer = runs[runs.index(saved[-1]) + 1 :] if name is not None else []
    unsaved = [run.name for run in newer if (run / "config-fit.yaml").is_file()]
    remark = f" (no checkpoint in {', '.join(unsaved)})" if unsaved else ""
    say(f"--ckpt_path {NEWEST}: {file}{remark}")
    return file


def _checkpoints(run: Path) -> list[Path]:
    return _visible(run, "*.ckpt") + _deeper(run)


def _written(run: Path) -> float:
    """Return the time of a run's newest checkpoint."""
    return max((file.stat().st_mtime for file in _checkpoints(run)), default=0.0)


def check_resumable(
    path: str, checkpoint: Mapping[str, Any], needs: LoaderNeeds, method: str, trainer: Trainer
) -> None:
    """Check that a fit can resume from a checkpoint; say so if it has nothing left to do.

    Args:
        path: The checkpoint's file.
        checkpoint: Its progress.
        needs: Requirements of the method.
        method: Name of the method.
        trainer: Trainer of the fit.

    Raises:
        UserError: If the method is fitted in a single pass, the checkpoint has weights only, or it
            has more epochs than the trainer allows.
    """
    if needs.single_pass:
        raise UserError(
            f"--ckpt_path {path}: {method} is fitted in a single pass, which cannot be resumed: "
            f"leave --ckpt_path out to fit anew, or give it to test or predict"
        )
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"--ckpt_path {path}: it holds weights only, without the progress of a fit, so no fit "
            f"can resume from it: give it to test or predict, or give another checkpoint"
        )
    limit = reached_limit(checkpoint, trainer)
    if limit is not None and is_exceeded(checkpoint, trainer):
        raise UserError(
            f"--ckpt_path {path}: nothing is left to train, as {limit}: raise the limit to train on"
        )
    if limit is not None:
        say(f"{path}: this fit is complete ({limit}), so nothing is trained")


def completed(kind: type, name: str, saved: Any) -> Any:
    """Return a checkpoint's settings, with the defaults of options that are newer than it.

    Args:
        kind: Class of the model.
        name: Name of the argument.
        saved: Its value in the checkpoint; a dictionary if the argument is a dataclass.
    """
    if not isinstance(saved, Mapping):
        return saved
    try:
        hint = get_type_hints(kind.__init__).get(name)  # type: ignore[misc]
    except NameError:  # a model of the user's own, with names for type checkers only
        return saved
    for option in get_args(hint) or (hint,):
        if isinstance(option, type) and is_dataclass(option):
            if not set(saved) <= {field.name for field in fields(option)}:
                continue  # of another kind, as a CLIP model in place of a CNN
            newer = [field for field in fields(option) if field.name not in saved]
            defaults = {f.name: f.default for f in newer if f.default is not MISSING}
            for field in newer:
                if field.default_factory is not MISSING:
                    defaults[field.name] = field.default_factory()
            return {**saved, **defaults}
    return saved


def missing_checkpoint(path: Path) -> UserError:
    """Return the error of a checkpoint that does not exist."""
    return UserError(f"--ckpt_path {path}: there is no such file; give a checkpoint of a fit")


def config_of_fit(checkpoint: Path) -> Path:
    """Return the configuration of the fit that wrote a checkpoint.

    Raises:
        UserError: If there is none, or no checkpoint.
    """
    if not checkpoint.is_file():
        raise missing_checkpoint(checkpoint)
    for folder in list(checkpoint.resolve().parents)[:2]:
        if (folder / "config-fit.yaml").is_file():
            return folder / "config-fit.yaml"
    raise UserError(
        f"--ckpt_path {checkpoint}: neither its folder nor the parent folder contains "
        f"config-fit.yaml: give --config FILE"
    )
