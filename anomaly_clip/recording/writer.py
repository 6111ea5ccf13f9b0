"""Callback that writes a run's folder: configuration, metrics, scores and images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.drawing.confusion import write_confusion
from anomaly_clip.drawing.tsne import tsne, write_embeddings
from anomaly_clip.files import atomic_path, write_csv, write_json
from anomaly_clip.methods.evaluated import EvaluatedModule, Exporter, FeatureSource, data_module
from anomaly_clip.metric_values import CURVES_FILE, Results
from anomaly_clip.progress import number_of, say, show_table
from anomaly_clip.recording.decision_record import no_decisions
from anomaly_clip.recording.gallery import MAP_SIDE, draw_gallery
from anomaly_clip.recording.image_records import ImageRecords, with_kinds
from anomaly_clip.recording.metrics_record import image_counts, protocol_of_test, table_title
from anomaly_clip.recording.run_conditions import environment, start_line
from anomaly_clip.recording.run_decisions import RunDecisions
from anomaly_clip.recording.run_images import write_map_files
from anomaly_clip.recording.unreadable_images import UnreadableImages
from anomaly_clip.recording.validation_images import ValidationImages
from anomaly_clip.recording.wandb_log import log_config, log_image, log_run
from anomaly_clip.records import Batch, Scores
from anomaly_clip.reporting.decision_tables import decision_tables
from anomaly_clip.reporting.metrics_table import build_table
from anomaly_clip.reporting.page import PAGE, write_page
from anomaly_clip.results.folder import (
    DRIFT_FILE,
    GALLERY,
    METRICS_FILE,
    PREDICT_FILE,
    SCORES_FILE,
    SCRATCH,
    create_run_folder,
)
from anomaly_clip.results.map_store import MapStore, Ranges, Rows
from anomaly_clip.results.metrics_file import run_record, weights_label, write_metrics
from anomaly_clip.results.selection import select_images
from anomaly_clip.results.warnings import RANDOM_WARNING, weights_remark

__all__ = ["RunWriter"]


class RunWriter(Callback):
    """Create and fill the run's folder; a run that fails before it has results leaves no folder.

    The first process creates the folder and broadcasts its path to the others.

    Args:
        root: Parent folder of all runs.
        name: Name of the run; default: the name of the first configuration file, or the class of
            the method.
        folder: Folder of the run, new or existing; default: a new folder in root/name. From Python,
            each fit, test and predict of the trainer has a new one.
        maps: Whether to draw image, heat map and mask of every image; default: predict only.
            A test draws them at the evaluated size, predict at the original size of the image (up
            to 25 million pixels).
        raw_maps: Whether to save every anomaly map as a float16 .npy file.
        page: Whether to write report.html, with a gallery of the most informative images.
        stages: Whether drawings include the maps of a method's intermediate steps, if any.
        validation_pictures: Number of images drawn after each validation during fit.
        checkpoint_every_n_steps: Steps of a fit between two saves of ``last.ckpt``, counted as
            ``trainer.max_steps`` counts them; default: save after each epoch or validation.
        fdr: With a calibration: largest expected share of normal images among those that test or
            predict call anomalous (false discovery rate, by Benjamini-Hochberg); default: each
            image is decided upon alone, by calibration.alpha.
        masks: Whether test and predict write a mask of each image, with the pixels above the
            calibrated map threshold.
        fail_on: anomalous: predict ends with exit code 3 if an image is anomalous.
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
        checkpoint_every_n_steps: int | None = None,
        fdr: float | None = None,
        masks: bool = False,
        fail_on: Literal["anomalous"] | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.name = name
        self.maps = maps
        self.raw_maps = raw_maps
        self.page = page
        self.stages = stages
        self._validation_images = ValidationImages(validation_pictures)
        self.checkpoint_every_n_steps = checkpoint_every_n_steps
        self.fail_on = fail_on
        self.decisions = RunDecisions(fdr, masks, fail_on)
        """Decisions of a test or of predict."""
        self.config = ""
        """Complete configuration as YAML; set by the command line."""
        self.verb: str | None = None
        """Verb in the name of the folder; set by the command line, else the trainer's stage."""
        self.sources = "from Python"
        """Source of the configuration, for the start line."""
        self.resumed = False
        """True if a fit continues from a checkpoint; set by the command line."""
        self.seed: int | None = None
        self.calibration = CalibrationSettings()
        """Options of decisions; set by the command line."""
        self.requested_folder = None if folder is None else Path(folder).expanduser()
        self._folder: Path | None = None
        self._stage: str | None = None
        self._class_name = "run"
        self._existed = False
        self._records: ImageRecords | None = None
        self.unreadable = UnreadableImages()
        """Images that the run could not read, known to the first process at the end."""

    @property
    def folder(self) -> Path:
        """Folder of the run, created on first access by the first process."""
        if self._folder is None:
            # The other processes get the path in setup, and write nothing before.
            first = getattr(rank_zero_only, "rank", 0) == 0
            if self.requested_folder is not None:
                self._existed = self.requested_folder.exists()
                if first:  # or it would find that of another process
                    self.requested_folder.mkdir(parents=True, exist_ok=True)
                self._folder = self.requested_folder
            else:
                name, verb = self.name or self._class_name, self.verb or "run"
                self._folder = create_run_folder(self.root, name, verb) if first else self.root
        return self._folder

    @property
    def num_scored(self) -> int:
        """Number of images that were scored; before the end, by this process."""
        return 0 if self._records is None else self._records.num_scored

    @property
    def num_anomalous(self) -> int:
        """Number of images that were called anomalous, in the end; 0 without a calibration."""
        return self.decisions.num_anomalous

    # -- hooks -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Broadcast the folder, save the configuration and print the start line."""
        stage = TrainerFn(stage).value
        self._begin(stage, pl_module)
        self._folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if stage == "fit" and isinstance(pl_module, Exporter) and not self.resumed:
            exported = self.folder / pl_module.export_name
            if exported.exists():
                raise ValueError(
                    f"{exported} exists: give another --output.folder, or resume its fit "
                    f"with --ckpt_path"
                )
        self._refuse_other_results(stage)
        if self.config and stage in ("test", "predict"):  # before anything is written
            self._find_calibration(trainer, pl_module)
        all_sizes = self.raw_maps or self.decisions.masks or self._draws(stage)
        self._records = ImageRecords(
            self._scratch, self.stages, None if all_sizes else MAP_SIDE, self.page or all_sizes
        )
        if not trainer.is_global_zero:
            return
        config = self.folder / f"config-{stage}.yaml"
        config.unlink(missing_ok=True)
        if self.config:  # empty from Python
            with atomic_path(config) as temporary:
                temporary.write_text(self.config, encoding="utf-8")
        log_config(trainer.loggers, self.config, self.folder)
        say(start_line(pl_module, stage, self.sources, self.seed, self.folder))
        if _is_random(pl_module):
            say(RANDOM_WARNING, style="bold red")
        self.decisions.announce(stage)

    def _begin(self, stage: str, module: LightningModule) -> None:
        """Name the folder; from Python, each call of the trainer has a folder of its own."""
        if self._stage is not None and self.requested_folder is None and not self.config:
            self._folder = self.verb = None
            self.unreadable = UnreadableImages()
        self._stage = stage
        self.verb = self.verb or stage
        self._class_name = type(module).__name__

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the trained weights, if they can be exported, and a t-SNE of the features."""
        trained = trainer.fit_loop.total_batch_idx >= 0  # False if limits left no batch
        if trained and not self.config:  # the command line has a callback for it
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
        data = data_module(pl_module)
        if trainer.is_global_zero and data is not None:
            self.unreadable.take_fit(data)
        if not trainer.is_global_zero or not trained:
            return
        if isinstance(pl_module, Exporter):
            say(f"weights: {pl_module.export(self.folder)}")
        features = pl_module.training_features() if isinstance(pl_module, FeatureSource) else None
        if features is not None:
            write_embeddings(self.folder, [tsne("training features", *features)])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a few images of the validation during fit."""
        if not _is_watched(trainer) or not isinstance(pl_module, EvaluatedModule):
            return
        if pl_module.is_detector:
            scores: Scores = outputs  # type: ignore[assignment]
            self._validation_images.add(scores, batch, len(_data(trainer).validation_categories()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the kept validation images, to follow the progress of the fit."""
        if _is_watched(trainer):
            file = self.folder / "validation" / f"step-{trainer.global_step:06d}.png"
            self._validation_images.draw(file, _warning(pl_module))
            log_image(trainer.loggers, "validation", file)
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.is_global_zero:
            self.unreadable.images = _data(trainer).unreadable.of_fit()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the calibration in a checkpoint that ``setup`` could not know."""
        if not self.config:  # from Python
            self._find_calibration(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the calibration in a checkpoint that ``setup`` could not know."""
        if not self.config:
            self._find_calibration(trainer, pl_module)

    def _find_calibration(self, trainer: Trainer, module: LightningModule) -> None:
        self.decisions.find(trainer, module, self.calibration, self.folder)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the calibration applies to the scores."""
        self.decisions.check(trainer, pl_module)
        self.records.with_highest = self.decisions.made is not None

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the calibration applies to the scores."""
        self.decisions.check(trainer, pl_module)
        self.records.with_highest = self.decisions.made is not None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store scores and maps; with several test dataloaders, only those of the first."""
        if dataloader_idx == 0 and isinstance(pl_module, EvaluatedModule):
            self.records.keep(pl_module, outputs, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store scores and maps."""
        if isinstance(pl_module, EvaluatedModule):
            self.records.keep(pl_module, outputs, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write metrics, scores and images, and print the table."""
        if not isinstance(pl_module, EvaluatedModule) or pl_module.results is None:
            return
        self.records.replace_scores(pl_module.final_scores())
        rows, ranges, without_pixels = self.records.gather(trainer)
        ranges = self.decisions.decide(rows, ranges, replaces_score=False)
        if trainer.is_global_zero:  # before the images, which take longest and may be interrupted
            self._remove_stale()
            self.unreadable.take_test(_data(trainer), pl_module)
            self._write_metrics(trainer, pl_module, pl_module.results, rows, without_pixels)
            self._write_scores(pl_module, with_kinds(rows, _data(trainer).samples("test")))
            pl_module.write_extras(self.folder)
            self._draw_confusion(trainer, pl_module, len(rows))
        self._write_maps(trainer, pl_module, rows, ranges)
        if trainer.is_global_zero:
            say(f"results: {self.folder}")
            self._write_page(trainer)
            self.unreadable.close(len(rows), len(_data(trainer).listing.listed("test")))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write scores and images."""
        if not isinstance(pl_module, EvaluatedModule):
            return
        rows, ranges, _ = self.records.gather(trainer)
        listed = len(_data(trainer).samples("test"))
        self.unreadable.take_predict(_data(trainer), pl_module, self.records.unreadable)
        if self.unreadable.images and not rows:
            trainer.strategy.barrier("records are read")
            raise self.unreadable.none_readable()
        ranges = self.decisions.decide(rows, ranges, replaces_score=True)
        if trainer.is_global_zero:
            self._remove_stale()
            self._write_scores(pl_module, rows)
            protocol = {"split": "predict", "complete": len(rows) == listed, "listed": listed}
            protocol |= self.unreadable.counts()
            record = {"run": self._run(trainer, pl_module, protocol)}
            section = self.decisions.record(self.folder, rows, self.records.highest)
            record |= {} if section is None else {"decisions": section}
            write_json(self.folder / PREDICT_FILE, record)
        self._write_maps(trainer, pl_module, rows, ranges)
        if trainer.is_global_zero:
            say(f"results of {number_of(len(rows), 'image')}: {self.folder}")
            if pl_module.is_detector:
                if section is None:
                    say(no_decisions(trainer.ckpt_path, pl_module))
                self._write_page(trainer)
            self.unreadable.close(len(rows), listed)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the scratch folder, and the run's folder if it has no results."""
        if trainer.is_global_zero:
            self.abandon()

    def abandon(self) -> None:
        """Remove the scratch folder, and the run's folder if it is new and has no results."""
        if self._folder is None:
            return
        MapStore(self._scratch).clear()
        results = {p.name for p in self.folder.iterdir()} - {"logs"}
        if not any(self.folder.glob("checkpoints/*")):  # the first save has failed
            results.discard("checkpoints")
        if not self._existed and all(name.startswith("config-") for name in results):
            shutil.rmtree(self.folder, ignore_errors=True)
            self._folder = None

    # -- files -----------------------------------------------------------------------------------

    @property
    def records(self) -> ImageRecords:
        """Records of the images in this run."""
        assert self._records is not None
        return self._records

    def _refuse_other_results(self, stage: str) -> None:
        """Check that test and predict do not write into the same folder.

        Raises:
            ValueError: If predict would write to the folder of a test, or the other way round.
        """
        test_file, predict_file = self.folder / METRICS_FILE, self.folder / PREDICT_FILE
        for other, file, kind in (
            ("predict", test_file, "test"),
            ("test", predict_file, "predict"),
        ):
            if stage == other and file.is_file():
                raise ValueError(
                    f"{self.folder} has the results of {kind}: give {stage} another --output.folder"
                )

    def _remove_stale(self) -> None:
        """Remove page, curves, drift and gallery of earlier results."""
        for name in (PAGE, CURVES_FILE, DRIFT_FILE):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / GALLERY, ignore_errors=True)

    @property
    def _scratch(self) -> Path:
        return self.folder / SCRATCH

    def _draws(self, stage: str) -> bool:
        """Return whether a stage draws all images; by default, only predict does."""
        return self.maps is not False if stage == "predict" else bool(self.maps)

    def _write_metrics(
        self,
        trainer: Trainer,
        method: EvaluatedModule,
        results: Results,
        rows: Rows,
        without_pixels: int,
    ) -> None:
        """Write ``metrics.json`` and ``metrics.csv``, and print the tables."""
        data = _data(trainer)
        counts = image_counts(rows, results["categories"])
        unread = self.unreadable.counts()
        protocol = protocol_of_test(method, data, counts, len(rows), without_pixels, unread)
        samples = data.samples("test")
        kinds = {index: samples[index].defect or "defect" for index in rows}
        section = self.decisions.record(self.folder, rows, self.records.highest, kinds)
        write_metrics(self.folder, results, self._run(trainer, method, protocol), section)
        title = table_title(method, data, protocol, len(rows))
        remark = weights_remark(method.weights)
        show_table(build_table(results, title, counts, _is_random(method), remark))
        for table in [] if section is None else decision_tables(section):
            show_table(table)

    def _run(
        self, trainer: Trainer, method: EvaluatedModule, protocol: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the origin of metrics or scores."""
        return run_record(
            type(method).__name__,
            method.weights,
            {**_data(trainer).protocol(), **method.recorded_protocol(), **protocol},
            str(trainer.ckpt_path) if trainer.ckpt_path else None,
            self.seed,
            environment(trainer),
        )

    def _write_scores(self, method: EvaluatedModule, rows: Rows) -> None:
        if method.reference_paths:
            write_json(self.folder / "references.json", method.reference_paths)
        header, table = self.unreadable.table(rows, weights_label(method.weights))
        write_csv(self.folder / SCORES_FILE, header, table)

    def _draw_confusion(self, trainer: Trainer, method: EvaluatedModule, num_images: int) -> None:
        confusion = method.confusion
        if confusion is None:
            return
        name, note = type(method).__name__, method.evaluation_note
        title = f"{name} on {_data(trainer).dataset_name}, {num_images} test images{note}"
        write_confusion(
            self.folder, confusion.counts.numpy(), confusion.names, title, _warning(method)
        )

    def _write_maps(
        self, trainer: Trainer, method: EvaluatedModule, rows: Rows, ranges: Ranges
    ) -> None:
        """Draw and save this process's maps on scales common to all processes, then clean up."""
        if method.is_detector:
            records, data = self.records, _data(trainer)
            draws = self._draws("predict" if trainer.predicting else "test")
            lost = write_map_files(
                self.folder,
                data,
                records.maps,
                ranges,
                rows,
                own_size=trainer.predicting and data.resize.rule == "square",
                draws=draws,
                masks=self.decisions.masks,
                raw_maps=self.raw_maps,
                thresholds=self.decisions.map_thresholds,
                warning=_warning(method),
            )
            if self.page and trainer.is_global_zero:
                marked = self.decisions.marked(rows, records.highest)
                limits, contours = self.decisions.thresholds, self.decisions.map_thresholds
                chosen = select_images(rows, limits, marked, trainer.predicting)
                lost += draw_gallery(
                    self.folder, data, records.maps, ranges, rows, chosen, draws, contours
                )
            self.unreadable.lose(lost)
        self.records.clear(trainer)

    def _write_page(self, trainer: Trainer) -> None:
        page = write_page(self.folder) if self.page else None
        log_run(trainer.loggers, self.folder)
        if page is not None:
            say(f"report: {page}")


def _data(trainer: Trainer) -> AnomalyData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, AnomalyData)
    return data


def _is_random(module: LightningModule) -> bool:
    return isinstance(module, EvaluatedModule) and module.weights["random"]


def _is_watched(trainer: Trainer) -> bool:
    """Return whether this process draws images of the current validation."""
    fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return fitting and trainer.is_global_zero


def _warning(module: LightningModule) -> str | None:
    return RANDOM_WARNING if _is_random(module) else None
