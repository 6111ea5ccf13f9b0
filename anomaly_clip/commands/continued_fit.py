"""Fits in folders that may hold an interrupted one, which is then continued from its checkpoint."""

from __future__ import annotations

import csv
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anomaly_clip.commands.batch import DryRunCLI, run_verb
from anomaly_clip.commands.experiment import known_options
from anomaly_clip.commands.finite_tensors import not_finite
from anomaly_clip.commands.last_step import FINITE, LAST
from anomaly_clip.errors import UserError, reason, user_errors
from anomaly_clip.files import write_csv
from anomaly_clip.progress import say

__all__ = ["fit_in"]


def fit_in(folder: Path, options: Sequence[str], several: bool, category: str | None = None) -> int:
    """Fit into a folder, and continue an interrupted fit that it holds.

    A method fitted in a single pass starts again, as does a fit whose checkpoint is damaged or of
    another fit; everything else in the folder is then removed.

    Args:
        folder: Folder of the fit.
        options: Options of ``fit``, without the folder.
        several: Whether the fit needs several processes.
        category: Category of the fit, if it is a single one.

    Returns:
        0, or 1 if some images could not be read.
    """
    words = ["fit", *options, "--output.folder", str(folder)]
    checkpoint = _last_checkpoint(folder)
    step = None if checkpoint is None else _step_to_continue(words, checkpoint, category)
    if step is None:
        _clear(folder)
        return run_verb(words, several)
    say(f"continuing at step {step}")
    _put_log_aside(folder / "logs")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        code = run_verb([*words, "--ckpt_path", str(checkpoint)], several)
    _join_logs(folder / "logs")
    return code


def _last_checkpoint(folder: Path) -> Path | None:
    """Return ``last.ckpt`` of a folder, or its latest checkpoint; None without one."""
    files = [
        file
        for file in folder.glob("checkpoints/*.ckpt")
        if not file.name.startswith(".") and not file.match(FINITE)  # unfinished, or diverged
    ]
    last = [file for file in files if file.name == LAST]
    return max(last or files, key=lambda file: file.stat().st_mtime, default=None)


def _step_to_continue(words: Sequence[str], checkpoint: Path, category: str | None) -> int | None:
    """Return the step at which a fit continues; None, and say why, if it starts anew."""
    with user_errors(known_options):
        plan = DryRunCLI(args=list(words))
    if plan.needs.single_pass:
        say(f"{type(plan.model).__name__} is fitted in a single pass, which starts again")
        return None
    try:
        plan.compare_with(checkpoint)
        content = _content(checkpoint)
        _check_state(plan, content, category)
        return int(content["global_step"])
    except Exception as error:  # files and their content can be wrong in many ways
        why = str(error) if isinstance(error, UserError) else reason(error)
        say(f"{checkpoint} cannot be continued, so the fit starts anew: {why}")
        return None


def _content(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Raises:
        ValueError: If it is damaged, or has no progress of a fit.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:  # torch's older format, which has no checksums
        damaged = None
    if damaged is not None:
        raise ValueError(f"the file is damaged (at {damaged})")
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    missing = [key for key in ("loops", "optimizer_states", "global_step") if key not in content]
    if missing:
        raise ValueError(f"it holds no progress of a fit ({', '.join(missing)} missing)")
    return content


def _check_state(plan: DryRunCLI, content: dict[str, Any], category: str | None) -> None:
    """Check that the state in a checkpoint is finite and fits the method of a plan.

    Raises:
        ValueError: If it does not.
    """
    fitted = content.get("fitted_category")
    if None not in (fitted, category) and fitted != category:
        raise ValueError(f"it was fitted on {fitted}")
    wrong = not_finite(content["state_dict"])
    if wrong:
        raise ValueError(f"its {wrong[0]} is NaN or infinite")
    plan.model.on_load_checkpoint(content)
    state = plan.model.state_dict()
    for name, value in content["state_dict"].items():
        # Some methods allocate tensors when they know the data.
        if name in state and state[name].numel() and state[name].shape != value.shape:
            raise ValueError(f"its {name} is {tuple(value.shape)}, not {tuple(state[name].shape)}")


def _clear(folder: Path) -> None:
    """Remove a folder's content, except for the finite states of fits that diverged."""
    kept = [file for file in folder.glob(f"checkpoints/{FINITE}") if file.is_file()]
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
        return
    say(f"kept from a fit that diverged: {', '.join(map(str, kept))}")
    for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()]:
        if path.is_dir() and path.name != "checkpoints":
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path not in kept:
            path.unlink()


def _put_log_aside(logs: Path) -> None:
    """Rename the log of an interrupted fit, which a new one would replace."""
    if (logs / "fit").is_dir():
        number = 1 + sum(1 for _ in logs.glob("fit-*"))
        (logs / "fit").rename(logs / f"fit-{number}")


def _join_logs(logs: Path) -> None:
    """Join the logs of all parts of a fit; of steps taken twice, the later ones are kept."""
    parts = sorted(logs.glob("fit-*"), key=lambda part: int(part.name.rpartition("-")[2]))
    rows: list[dict[str, str]] = []
    for part in [*parts, logs / "fit"]:
        later = _rows(part / "metrics.csv")
        if later:
            first = min(int(row["step"]) for row in later)
            rows = [row for row in rows if int(row["step"]) < first] + later
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows:
        table = [[row.get(name, "") for name in names] for row in rows]
        (logs / "fit").mkdir(exist_ok=True)
        write_csv(logs / "fit" / "metrics.csv", names, table)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))
