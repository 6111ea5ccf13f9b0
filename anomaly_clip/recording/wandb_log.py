"""What a run hands to Weights & Biases, if that is its logger.

Figures and losses come by the logger itself. Beside them: the complete configuration, and at the
end of a test the figures of all categories, the curves, the gallery with its masks, and as an
artifact the page with the files it is made of. All of it is read from the run's folder. ``wandb``
is imported only if it was chosen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.metrics.curves import CURVES, CURVES_FILE
from anomaly_clip.recording.gallery import panels_of
from anomaly_clip.report.page import CHARTS, PAGE, lowest
from anomaly_clip.results.finished_run import METRICS
from anomaly_clip.results.run_files import Listed, RunFiles, read_files

__all__ = ["grouped_tracking", "own_tracking", "track_config", "track_picture", "track_run"]

FILES = (PAGE, METRICS, "metrics.csv", "scores.csv", CURVES_FILE)
"""What the artifact holds, with the configurations."""
MASK = {1: "defect"}
GROUP = "WANDB_RUN_GROUP"
HALF = 128


@contextmanager
def own_tracking() -> Iterator[None]:
    """Let a run of W&B that is opened inside end with it, as a failed one after an error.

    Or what a process runs next would be logged into it.
    """
    before = _open_run()
    code = 1
    try:
        yield
        code = 0
    finally:
        opened = _open_run()
        if opened is not None and opened is not before:
            opened.finish(exit_code=code)


@contextmanager
def grouped_tracking(name: str) -> Iterator[None]:
    """Let runs of W&B that are opened inside belong to one group, unless the user names another."""
    asked = os.environ.get(GROUP)
    os.environ.setdefault(GROUP, name)  # which processes that are started inside inherit
    try:
        yield
    finally:
        if asked is None:
            del os.environ[GROUP]


def track_config(loggers: Iterable[Logger], config: str, folder: Path) -> None:
    """Hand on the complete configuration, flat, under the names of the command line.

    Args:
        loggers: Those of the trainer; only W&B's are looked at.
        config: As YAML.
        folder: The run's.
    """
    flat = {**dict(_flat(yaml.safe_load(config) or {})), "run_folder": str(folder)}
    for run in _runs(loggers):
        # A sweep has set some of them already, and keeps those under lock.
        known = run.config
        fresh = {k: v for k, v in flat.items() if k not in known or known[k] != v}
        known.update(fresh, allow_val_change=True)


def track_picture(loggers: Iterable[Logger], name: str, file: Path) -> None:
    """Hand on a picture, if it was drawn.

    Args:
        loggers: Those of the trainer.
        name: Under which it is shown.
        file: Where it lies.
    """
    for run in _runs(loggers):
        if file.is_file():
            import wandb

            run.log({name: wandb.Image(str(file))})


def track_run(loggers: Iterable[Logger], folder: Path) -> None:
    """Hand on what a finished test left in its folder.

    Args:
        loggers: Those of the trainer.
        folder: The run's.
    """
    for run in _runs(loggers):
        import wandb

        files = read_files(folder)
        shown: dict[str, Any] = {f"curves/{name}": one for name, one in _curves(files).items()}
        if files.mean is not None:
            rows = [[name, *row.values()] for name, row in files.figures.items()]
            rows.append(["mean", *files.mean.values()])
            shown["figures"] = wandb.Table(columns=["category", *files.mean], data=rows)
        for kind in dict.fromkeys(one.kind for one in files.pictures):
            pictures = [one for one in files.pictures if one.kind == kind]
            shown[f"pictures/{kind}"] = [image for one in pictures for image in _images(one)]
        run.log(shown)
        report = wandb.Artifact(f"report-{run.id}", type="report")
        for file in [*(folder / name for name in FILES), *sorted(folder.glob("config-*.yaml"))]:
            if file.is_file():
                report.add_file(str(file))
        run.log_artifact(report)


def _open_run() -> Any:
    wandb = sys.modules.get("wandb")
    return None if wandb is None else wandb.run


def _runs(loggers: Iterable[Logger]) -> list[Any]:
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def _curves(files: RunFiles) -> dict[str, Any]:
    """Return a chart of each kind of curve, as the page has them."""
    import wandb

    charts = {}
    for key in CURVES:
        found = lowest(files, key)
        if found:
            title, x_label, _, _ = CHARTS[key]
            charts[key] = wandb.plot.line_series(
                xs=[curve.x for curve in found.values()],
                ys=[curve.y for curve in found.values()],
                keys=list(found),
                title=title,
                xname=x_label,
            )
    return charts


def _images(one: Listed) -> list[Any]:
    """Return an image of the gallery under its mask, and its heat map."""
    import wandb

    with Image.open(one.file) as sheet:
        image, heat, *mask = panels_of(np.asarray(sheet.convert("RGB")), 3 if one.has_mask else 2)
    masks = {"defect": {"mask_data": _mask(mask[0]), "class_labels": MASK}} if mask else None
    words = f"{one.name}, score {one.score:.4g}"
    return [
        wandb.Image(image, masks=masks, caption=words),
        wandb.Image(heat, caption=f"{words}, heat map"),
    ]


def _mask(panel: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (panel[..., 0] >= HALF).astype(np.uint8)


def _flat(config: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Yield options by their names on the command line; ``init_args`` is not part of these."""
    for name, value in config.items():
        path = before if name == "init_args" else f"{before}.{name}" if before else str(name)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, path)
        else:
            yield path, value
