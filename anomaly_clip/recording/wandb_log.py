"""Logging to Weights & Biases (W&B), for runs that use the logger of W&B.

The logger itself logs metrics and losses. These functions add the complete configuration and, at
the end of a test, the metrics of all categories, the curves, the gallery with its masks, and an
artifact with the report page and its source files. All of it is read from the run's folder.
``wandb`` is only imported for a run with that logger.
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
from PIL import Image

from anomaly_clip.metric_values import CURVES, CURVES_FILE
from anomaly_clip.recording.gallery import split_panels
from anomaly_clip.reporting.charts import CHARTS, lowest_curves
from anomaly_clip.reporting.page import PAGE
from anomaly_clip.results.folder import METRICS_FILE, SCORES_FILE
from anomaly_clip.results.run_files import GalleryImage, RunFiles, read_files

__all__ = ["finish_wandb_run", "log_config", "log_image", "log_run", "wandb_group"]

ARTIFACT_FILES = (PAGE, METRICS_FILE, "metrics.csv", SCORES_FILE, CURVES_FILE)
"""Content of the artifact, in addition to the configurations."""
MASK_LABELS = {1: "defect"}
GROUP_VARIABLE = "WANDB_RUN_GROUP"
MASK_THRESHOLD = 128  # lossy compression leaves grey pixels in the masks


@contextmanager
def finish_wandb_run() -> Iterator[None]:
    """Finish a W&B run opened inside the context, and mark it as failed after an error.

    Otherwise the next run of this process would be logged to the same W&B run.
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
def wandb_group(name: str) -> Iterator[None]:
    """Group the W&B runs opened inside the context, unless the user has set another group."""
    users_group = os.environ.get(GROUP_VARIABLE)
    os.environ.setdefault(GROUP_VARIABLE, name)  # subprocesses inherit it
    try:
        yield
    finally:
        if users_group is None:
            del os.environ[GROUP_VARIABLE]


def log_config(loggers: Iterable[Logger], config: str, folder: Path) -> None:
    """Log the complete configuration, flattened, under the names of the command-line options.

    Args:
        loggers: The trainer's loggers; only W&B loggers are used.
        config: The configuration as YAML.
        folder: The run's folder.
    """
    flat = {**dict(_flat(yaml.safe_load(config) or {})), "run_folder": str(folder)}
    for run in _runs(loggers):
        # A sweep has already set some options and locked them.
        logged = run.config
        fresh = {k: v for k, v in flat.items() if k not in logged or logged[k] != v}
        logged.update(fresh, allow_val_change=True)


def log_image(loggers: Iterable[Logger], name: str, file: Path) -> None:
    """Log an image if its file exists.

    Args:
        loggers: The trainer's loggers.
        name: Name of the image in W&B.
        file: File of the image.
    """
    for run in _runs(loggers):
        if file.is_file():
            import wandb

            run.log({name: wandb.Image(str(file))})


def log_run(loggers: Iterable[Logger], folder: Path) -> None:
    """Log the results of a finished test from its folder.

    Args:
        loggers: The trainer's loggers.
        folder: The run's folder.
    """
    for run in _runs(loggers):
        import wandb

        files = read_files(folder)
        media: dict[str, Any] = {f"curves/{key}": plot for key, plot in _curves(files).items()}
        if files.mean is not None:
            rows = [[name, *row.values()] for name, row in files.metrics.items()]
            rows.append(["mean", *files.mean.values()])
            media["figures"] = wandb.Table(columns=["category", *files.mean], data=rows)
        for kind in dict.fromkeys(image.kind for image in files.gallery):
            images_of_kind = [image for image in files.gallery if image.kind == kind]
            media[f"pictures/{kind}"] = [
                panel for image in images_of_kind for panel in _panels(image)
            ]
        run.log(media)
        report = wandb.Artifact(f"report-{run.id}", type="report")
        for file in [
            *(folder / name for name in ARTIFACT_FILES),
            *sorted(folder.glob("config-*.yaml")),
        ]:
            if file.is_file():
                report.add_file(str(file))
        run.log_artifact(report)


def _open_run() -> Any:
    wandb = sys.modules.get("wandb")
    return None if wandb is None else wandb.run


def _runs(loggers: Iterable[Logger]) -> list[Any]:
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def _curves(files: RunFiles) -> dict[str, Any]:
    """Return one plot per kind of curve, like those on the report page."""
    import wandb

    plots = {}
    for key in CURVES:
        curves = lowest_curves(files, key)
        if curves:
            title, x_label, _, _ = CHARTS[key]
            plots[key] = wandb.plot.line_series(
                xs=[curve.x for curve in curves.values()],
                ys=[curve.y for curve in curves.values()],
                keys=list(curves),
                title=title,
                xname=x_label,
            )
    return plots


def _panels(image: GalleryImage) -> list[Any]:
    """Return a gallery image with its mask as an overlay, and its heat map, if it has one."""
    import wandb

    with Image.open(image.file) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    photograph, *rest = split_panels(sheet, image.num_panels)
    rest = rest[image.has_overlay :]  # W&B lays the mask over the photograph itself
    heat, mask = rest[: image.has_heat], rest[image.has_heat :]
    masks = None
    if mask:
        defect = (mask[0][..., 0] >= MASK_THRESHOLD).astype(np.uint8)
        masks = {"defect": {"mask_data": defect, "class_labels": MASK_LABELS}}
    caption = f"{image.name}, score {image.score:.4g}"
    return [
        wandb.Image(photograph, masks=masks, caption=caption),
        *(wandb.Image(panel, caption=f"{caption}, heat map") for panel in heat),
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield options by their command-line names, which omit ``init_args``."""
    for name, value in config.items():
        path = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, path)
        else:
            yield path, value
