"""The option ``--ckpt_path``: a file or a run's folder, and whether a fit can resume from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Trainer

from anomaly_clip.commands.last_step import LAST
from anomaly_clip.errors import UserError
from anomaly_clip.methods.evaluated import reached_limit
from anomaly_clip.progress import say
from anomaly_clip.records import LoaderNeeds

__all__ = ["check_resumable", "checkpoint_file", "completed"]

SHOWN = 5  # checkpoints of a folder in a message


def checkpoint_file(value: str) -> str:
    """Return the checkpoint that a value of ``--ckpt_path`` refers to.

    The folder of a run stands for its ``last.ckpt``, or for its only checkpoint. Other values are
    returned unchanged.

    Raises:
        UserError: If a folder has no checkpoint, or several without a ``last.ckpt``.
    """
    folder = Path(value).expanduser()
    if not folder.is_dir():
        return value
    for place in (folder / "checkpoints", folder):
        files = sorted(place.glob("*.ckpt"))
        if place / LAST in files:
            return str(place / LAST)
        if len(files) == 1:
            return str(files[0])
        if files:
            raise _choose_one(value, folder, files, "has several checkpoints")
    # Such as the folder of each, which has a run per category.
    deeper = sorted(folder.glob("*/*.ckpt")) + sorted(folder.glob("*/checkpoints/*.ckpt"))
    if deeper:
        raise _choose_one(value, folder, deeper, "is not the folder of a single fit")
    content = sorted(path.name for path in folder.iterdir())
    listed = f"has {', '.join(content[:SHOWN])}" if content else "is empty"
    raise UserError(
        f"--ckpt_path {value}: the folder has no checkpoint (it {listed}): give the folder of a "
        f"fit, or a .ckpt file"
    )


def _choose_one(value: str, folder: Path, files: list[Path], problem: str) -> UserError:
    names = [str(file.relative_to(folder)) for file in files]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return UserError(
        f"--ckpt_path {value}: the folder {problem}: name one of {', '.join(names[:SHOWN])}{more}"
    )


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
        UserError: If the method is fitted in a single pass.
    """
    if needs.single_pass:
        raise UserError(
            f"--ckpt_path {path}: {method} is fitted in a single pass, which cannot be resumed: "
            f"leave --ckpt_path out to fit anew, or give it to test or predict"
        )
    limit = reached_limit(checkpoint, trainer)
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
            newer = [field for field in fields(option) if field.name not in saved]
            defaults = {f.name: f.default for f in newer if f.default is not MISSING}
            for field in newer:
                if field.default_factory is not MISSING:
                    defaults[field.name] = field.default_factory()
            return {**saved, **defaults}
    return saved
