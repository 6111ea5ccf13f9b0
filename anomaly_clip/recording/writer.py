"""What a run leaves behind: its configuration, figures, scores and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor

from anomaly_clip.data.dataset import AnomalyData, Sample
from anomaly_clip.drawing.confusion import write_confusion
from anomaly_clip.files import atomic_path, write_csv, write_json
from anomaly_clip.methods.base import AnomalyMethod, Exporter
from anomaly_clip.methods.linear_probe import LinearProbe
from anomaly_clip.metrics.evaluator import Results
from anomaly_clip.progress import say, track
from anomaly_clip.recording.gallery import MAP_SIDE, draw_gallery
from anomaly_clip.recording.map_images import draw_map_images
from anomaly_clip.recording.validation_images import ValidationImages
from anomaly_clip.recording.wandb_log import log_config, log_image, log_run
from anomaly_clip.records import Batch, Scores
from anomaly_clip.report.metrics_table import build_table, metrics_rows
from anomaly_clip.report.page import PAGE, write_page
from anomaly_clip.results.folder import (
    CURVES_FILE,
    GALLERY,
    METRICS_FILE,
    PREDICT_FILE,
    create_run_folder,
    versions,
)
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, image_names, merge_ranges
from anomaly_clip.results.selection import select_images
from anomaly_clip.results.warnings import (
    RANDOM_WARNING,
    rounds_remark,
    selection_warning,
    weights_remark,
)

__all__ = ["Measured", "RunWriter"]

Measured: TypeAlias = AnomalyMethod | LinearProbe
"""Whose test ends in figures."""


class RunWriter(Callback):
    """Make the run's folder and fill it; a run that fails before any result leaves none behind.

    The first process makes the folder and tells the others.

    Args:
        root: Where runs are kept.
        name: The run's name; default: that of the first configuration file.
        folder: The run's folder, made or gone on with; default: a new one below root and name.
        maps: Whether to draw image, heat map and mask of every image; default: predict only.
            A test draws what was compared, predict in the image's own size.
        raw_maps: Whether to keep every map as it is, float16, as a .npy file.
        page: Whether to write report.html, with pictures of a few telling images.
        stages: Whether pictures also show the maps of a method's intermediate steps, if it has any.
        validation_pictures: How many images of a validation during fit are drawn each time.
    """

    def __init__(
        self,
        root: str = "runs",
        name: str | None = None,
        folder: str | None = None,
        maps: bool | None = None,
        raw_maps: bool = False,
        page: bool = True,
        stages: bool = False,
        validation_pictures: int = 6,
    ) -> None:
        self.root = Path(root).expanduser()
        self.name = name
        self.maps = maps
        self.raw_maps = raw_maps
        self.page = page
        self.stages = stages
        self._watched = ValidationImages(validation_pictures)
        self.config = ""
        """The complete configuration as YAML; the command line fills it in."""
        self.sources = "from Python"
        """Where the configuration comes from, for the start line."""
        self.resumed = False
        """Whether a fit goes on from a checkpoint; the command line fills it in."""
        self.seed: int | None = None
        self.asked_folder = None if folder is None else Path(folder).expanduser()
        self._folder: Path | None = None
        self._was_there = False
        self._rows: Rows = {}
        self._kept: MapStore | None = None
        self._unseen: list[int] = []

    @property
    def folder(self) -> Path:
        """The run's folder, made when the first process first asks for it."""
        if self._folder is None:
            # The other processes are told in setup; before that they write nothing.
            first = getattr(rank_zero_only, "rank", 0) == 0
            if self.asked_folder is not None:
                self._was_there = self.asked_folder.exists()
                self.asked_folder.mkdir(parents=True, exist_ok=True)
                self._folder = self.asked_folder
            else:
                self._folder = (
                    create_run_folder(self.root, self.name or "run") if first else self.root
                )
        return self._folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the folder, save the configuration, say what begins."""
        stage = TrainerFn(stage).value
        self._folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if stage == "fit" and isinstance(pl_module, Exporter) and not self.resumed:
            exported = self.folder / pl_module.export_name
            if exported.exists():
                raise ValueError(
                    f"{exported} exists: give another --output.folder, or go on with --ckpt_path"
                )
        self._refuse_other_results(stage)
        self._rows, self._unseen = {}, []
        all_sizes = self.raw_maps or self._draws(stage)
        self._kept = MapStore(self._scratch, self.stages, None if all_sizes else MAP_SIDE)
        if not trainer.is_global_zero:
            return
        with atomic_path(self.folder / f"config-{stage}.yaml") as temporary:
            temporary.write_text(self.config, encoding="utf-8")
        log_config(trainer.loggers, self.config, self.folder)
        say(self._start_line(pl_module, trainer, stage))
        if _is_random(pl_module):
            say(RANDOM_WARNING, style="bold red")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the trained weights, if others can use them."""
        trained = trainer.fit_loop.total_batch_idx >= 0  # limits may have left no batch
        if trainer.is_global_zero and trained and isinstance(pl_module, Exporter):
            say(f"weights: {pl_module.export(self.folder)}")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a few images of a validation during fit."""
        if not _is_watched(trainer) or not isinstance(pl_module, AnomalyMethod):
            return
        scores: Scores = outputs  # type: ignore[assignment]
        self._watched.add(scores, batch, len(pl_module.evaluator.categories))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them, so that one can watch the method learn."""
        if _is_watched(trainer):
            file = self.folder / "validation" / f"step-{trainer.global_step:06d}.png"
            self._watched.draw(file, _warning(pl_module))
            log_image(trainer.loggers, "validation", file)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep scores and maps; of several passes, of the first."""
        if dataloader_idx == 0:
            self._keep(trainer, pl_module, outputs, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep scores and maps."""
        self._keep(trainer, pl_module, outputs, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write figures, scores and pictures; print the table."""
        if isinstance(pl_module, LinearProbe) and pl_module.results is not None:
            self._end_classification(trainer, pl_module, pl_module.results)
        if not isinstance(pl_module, AnomalyMethod) or pl_module.results is None:
            return
        images = pl_module.evaluator.images
        assert images is not None
        final = dict(zip(images.index.tolist(), images.score.tolist(), strict=True))
        for index, row in self._rows.items():
            row["image_score"] = final[index]
        rows, ranges, unseen = self._merge(trainer)
        if trainer.is_global_zero:  # before the pictures, which take longest and can be interrupted
            self._remove_stale()
            self._write_detection(trainer, pl_module, pl_module.results, rows, unseen)
            self._write_scores(pl_module, rows)
            write_json(self.folder / CURVES_FILE, pl_module.evaluator.curves)
        self._write_maps(trainer, pl_module, rows, ranges)
        if trainer.is_global_zero:
            say(f"results: {self.folder}")
            self._write_page(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write scores and pictures."""
        if not isinstance(pl_module, Measured):
            return
        rows, ranges, _ = self._merge(trainer)
        if trainer.is_global_zero:
            self._remove_stale()
            self._write_scores(pl_module, rows)
            listed = len(self._samples(trainer))
            protocol = {"split": "predict", "complete": len(rows) == listed, "listed": listed}
            write_json(self.folder / PREDICT_FILE, {"run": self._run(trainer, pl_module, protocol)})
        if isinstance(pl_module, AnomalyMethod):
            self._write_maps(trainer, pl_module, rows, ranges)
        else:
            self._clear(trainer)
        if trainer.is_global_zero:
            say(f"{len(rows)} images scored: {self.folder}")
            if isinstance(pl_module, AnomalyMethod):
                self._write_page(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove what was kept for later, and the folder if no result is in it."""
        if trainer.is_global_zero:
            self.abandon()

    @property
    def num_scored(self) -> int:
        """How many images this process has scored."""
        return len(self._rows)

    def abandon(self) -> None:
        """Remove what was kept for later, and a folder that this run made but put no result in."""
        if self._folder is None:
            return
        MapStore(self._scratch).clear()
        results = {p.name for p in self.folder.iterdir()} - {"logs"}
        if not self._was_there and all(name.startswith("config-") for name in results):
            shutil.rmtree(self.folder, ignore_errors=True)
            self._folder = None

    def _refuse_other_results(self, stage: str) -> None:
        """Check that a folder that was asked for has no results of another kind.

        Raises:
            ValueError: If a predict would write among those of a test, or a test among a predict's.
        """
        of_test, of_predict = self.folder / METRICS_FILE, self.folder / PREDICT_FILE
        for other, file, kind in (("predict", of_test, "test"), ("test", of_predict, "predict")):
            if stage == other and file.is_file():
                raise ValueError(
                    f"{self.folder} has the results of a {kind}: give {stage} another "
                    f"--output.folder"
                )

    def _remove_stale(self) -> None:
        """Remove what shows an earlier run's results, which are about to be replaced."""
        for name in (PAGE, CURVES_FILE):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / GALLERY, ignore_errors=True)

    @property
    def _scratch(self) -> Path:
        return self.folder / ".scratch"

    def _draws(self, stage: str) -> bool:
        """Say whether all images are drawn: of predict, unless they are not wanted."""
        return self.maps is not False if stage == "predict" else bool(self.maps)

    def _keep(self, trainer: Trainer, method: LightningModule, outputs: Any, batch: Batch) -> None:
        if isinstance(method, LinearProbe):
            described = method.rows(outputs, batch)
            self._rows.update(zip(batch["index"].tolist(), described, strict=True))
        if not isinstance(method, AnomalyMethod):
            return
        labelled = _data(trainer).has_labels
        scores: Scores = outputs
        image_scores = scores["image_score"].float().tolist()
        parts = scores["score_parts"].float().tolist() if "score_parts" in scores else None
        indices = batch["index"].tolist()
        for i, index in enumerate(indices):
            named = zip(method.score_part_names, parts[i], strict=True) if parts else ()
            self._rows[index] = {
                "path": batch["path"][i],
                "category": batch["category"][i],
                "label": int(batch["label"][i]) if labelled else None,
                "image_score": image_scores[i],
                **dict(named),
            }
            if "mask" in batch and bool(batch["label"][i]) and not bool(batch["mask"][i].any()):
                self._unseen.append(index)
        assert self._kept is not None
        if self.page or self._kept.longest is None:
            self._kept.keep(scores, indices, batch["category"])

    def _merge(self, trainer: Trainer) -> tuple[Rows, Ranges, int]:
        """Return what all processes kept, the images in the order of the listing.

        The last is the number of anomalous images without an anomalous pixel.
        """
        own = self._scratch / f"rank-{trainer.global_rank}.json"
        assert self._kept is not None
        write_json(own, {"rows": self._rows, "ranges": self._kept.ranges, "unseen": self._unseen})
        trainer.strategy.barrier("scores are written")
        rows: Rows = {}
        ranges: list[Ranges] = []
        unseen: set[int] = set()
        for rank in range(trainer.world_size):
            part = json.loads((self._scratch / f"rank-{rank}.json").read_text(encoding="utf-8"))
            rows.update({int(index): row for index, row in part["rows"].items()})
            unseen.update(part["unseen"])
            ranges.append(part["ranges"])
        return dict(sorted(rows.items())), merge_ranges(ranges), len(unseen)

    def _write_scores(self, method: Measured, rows: Rows) -> None:
        if isinstance(method, AnomalyMethod) and method.reference_paths:
            write_json(self.folder / "references.json", method.reference_paths)
        header = [*next(iter(rows.values())), "weights"] if rows else ["path"]
        label = _weights_label(method)
        table = ([*row.values(), label] for row in rows.values())
        write_csv(self.folder / "scores.csv", header, table)

    def _write_maps(
        self, trainer: Trainer, method: AnomalyMethod, rows: Rows, ranges: Ranges
    ) -> None:
        """Draw and keep the maps of this process, on the scales of all; then clear up."""
        kept, data = self._kept, _data(trainer)
        assert kept is not None
        draws = self._draws("predict" if trainer.predicting else "test")
        if draws:
            own_size = trainer.predicting and data.resize.rule == "square"
            folder, own = self.folder / "maps", self._rows
            draw_map_images(folder, data, kept, ranges, own, own_size, _warning(method))
        if self.raw_maps:
            names = image_names(self._samples(trainer))
            for index in track(kept.indices, "writing maps"):
                with atomic_path(self.folder / "raw_maps" / f"{names[index]}.npy") as temporary:
                    np.save(temporary, kept.load(index)["map"].astype(np.float16))
        if self.page and trainer.is_global_zero:
            draw_gallery(self.folder, data, kept, ranges, rows, select_images(rows), draws)
        self._clear(trainer)

    def _clear(self, trainer: Trainer) -> None:
        """Remove what was kept for later, when all processes are done with it."""
        assert self._kept is not None
        trainer.strategy.barrier("pictures are drawn")
        if trainer.is_global_zero:
            self._kept.clear()

    def _write_page(self, trainer: Trainer) -> None:
        page = write_page(self.folder) if self.page else None
        log_run(trainer.loggers, self.folder)
        if page is not None:
            say(f"look at: {page}")

    def _write_detection(
        self, trainer: Trainer, method: AnomalyMethod, results: Results, rows: Rows, unseen: int
    ) -> None:
        settings, borrowed = method.evaluator_settings, method.borrowed
        own = {
            **({} if borrowed is None else {"auxiliary": None}),  # it is not known what from
            "fitted": method.must_be_fitted or borrowed is not None,
            "borrowed": borrowed,
            # Masks that are empty, or that resizing or a crop emptied.
            "anomalous_without_pixels": unseen,
            "pixels": settings.pixels,
            "pro_steps": settings.pro_steps,
            "fpr_limit": settings.fpr_limit,
        }
        if borrowed is not None:
            own["overlap"] = None  # nothing of the data set was learnt from
        steps = settings.pro_steps
        form = "over all thresholds" if steps is None else f"in {steps} steps"
        self._write_figures(trainer, method, results, rows, own, f"; PRO {form}")

    def _end_classification(self, trainer: Trainer, probe: LinearProbe, results: Results) -> None:
        """Write figures, what was said of each image, and the confusion; print the table."""
        rows, _, _ = self._merge(trainer)
        if trainer.is_global_zero:
            how = f"; backbone {'frozen' if probe.frozen else 'trained'}"
            self._remove_stale()
            self._write_scores(probe, rows)
            self._write_figures(trainer, probe, results, rows, {"fitted": True}, how)
            assert probe.confusion is not None
            title = f"LinearProbe on {_data(trainer).dataset_name}, {len(rows)} test images{how}"
            names = probe.target_names
            write_confusion(self.folder, probe.confusion.numpy(), names, title, _warning(probe))
            say(f"results: {self.folder}")
            self._write_page(trainer)
        self._clear(trainer)

    def _write_figures(
        self,
        trainer: Trainer,
        method: Measured,
        results: Results,
        rows: Rows,
        own: Mapping[str, Any],
        how: str,
    ) -> None:
        """Write ``metrics.json`` and ``metrics.csv``; print the table.

        Args:
            trainer: Has the data.
            method: What was tested.
            results: Its figures.
            rows: The images.
            own: What figures of this kind depend on.
            how: What the table's title says of that.
        """
        data = _data(trainer)
        counts = {
            name: (len(labels), sum(labels))
            for name in results["categories"]
            if (labels := [row["label"] for row in rows.values() if row["category"] == name])
        }
        listed = len(data.samples("test"))
        protocol = {
            "split": "test",
            "complete": len(rows) == listed,
            "listed": listed,
            **({} if "overlap" in own else {"overlap": _overlap(method, data)}),
            **own,
            "images": {name: images for name, (images, _) in counts.items()},
            "anomalous": {name: anomalous for name, (_, anomalous) in counts.items()},
        }
        run = self._run(trainer, method, protocol)
        write_json(self.folder / METRICS_FILE, {**results, "run": run})
        label = _weights_label(method)
        table = ([*row, label] for row in metrics_rows(results))
        write_csv(self.folder / "metrics.csv", ["category", *results["mean"], "weights"], table)
        title = f"{type(method).__name__} on {data.dataset_name}, test{how}"
        if len(rows) < listed:
            title += f"\nPARTIAL: {len(rows)} of {listed} images"
        for more in (selection_warning(method.protocol()), rounds_remark(method.protocol())):
            if more is not None:
                title += f"\n{more}"
        Console().print(
            build_table(results, title, counts, _is_random(method), weights_remark(method.weights))
        )

    def _run(
        self, trainer: Trainer, method: Measured, protocol: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what figures or scores come from."""
        return {
            "method": type(method).__name__,
            "weights": method.weights,
            "protocol": {**_data(trainer).protocol(), **method.protocol(), **protocol},
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "seed": self.seed,
            "versions": versions(),
        }

    def _start_line(self, module: LightningModule, trainer: Trainer, stage: str) -> str:
        said = [f"{stage} {type(module).__name__}", self.sources]
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, AnomalyData):
            said.append(f"{data.dataset_name} {data.root}: {data.summary(stage)}")
        if isinstance(module, Measured):
            weights = module.weights
            source = "RANDOM" if weights["random"] else weights["pretrained"]
            said.append(f"{weights['backbone']} weights {source}")
        said.append("no seed" if self.seed is None else f"seed {self.seed}")
        said.append(f"run {self.folder}")
        return " | ".join(said)

    @staticmethod
    def _samples(trainer: Trainer) -> list[Sample]:
        return _data(trainer).samples("test")


def _overlap(method: Measured, data: AnomalyData) -> int | None:
    """Return how many test images are among the training images; None if there are none of them."""
    if not method.can_be_fitted and not data.has_shots:
        return None
    try:
        return len(data.overlap())
    except (OSError, ValueError):  # a checkpoint is tested where the training images are not
        return None


def _data(trainer: Trainer) -> AnomalyData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, AnomalyData)
    return data


def _is_random(module: LightningModule) -> bool:
    return isinstance(module, Measured) and module.weights["random"]


def _is_watched(trainer: Trainer) -> bool:
    """Say whether this process draws pictures of the validation that is running."""
    fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return fitting and trainer.is_global_zero


def _warning(module: LightningModule) -> str | None:
    return RANDOM_WARNING if _is_random(module) else None


def _weights_label(method: Measured) -> str:
    return "random" if method.weights["random"] else method.weights["pretrained"]
